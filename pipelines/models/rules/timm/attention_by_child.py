"""timm's attention modules whose attention matrix passes through a child, which is made to hold it.

The modules keep timm's `forward`. The projections to q, k and v stay linear, and the output projection
becomes a B-cos layer.
"""

from __future__ import annotations

import timm.layers
import timm.models
from torch import Tensor, nn

from pipelines.bcos import Conversion, Holdable, register_conversion
from pipelines.models.rules.timm.gates import Factor

layers, models = timm.layers, timm.models


class HeldDropout(Holdable, nn.Dropout):
    """Dropout of an attention matrix; its output can be held."""

    def forward(self, x: Tensor) -> Tensor:
        return self.hold(super().forward(x))


def _attention(original: type[nn.Module], *converted: str, through: str = "attn_drop") -> None:
    """Registers the rule of an attention module whose matrix passes through its child `through`.

    The output projection `proj` and the children `converted` (dotted: descendants) are on the linear path.
    """
    # fused attention has no matrix to hold, so it is off in explanation mode
    fused_unless_explained = property(lambda layer: getattr(layer, through).explanation is None)
    name = f"Held_{original.__module__.rpartition('.')[2]}_{original.__name__}"
    held = type(
        name,
        (original,),
        {"fused_attn": fused_unless_explained, "__module__": __name__, "__doc__": original.__doc__},
    )
    globals()[name] = held  # pickle looks classes up in their module

    @register_conversion(original)
    def rule(module: nn.Module, conversion: Conversion) -> nn.Module:
        matrix = getattr(module, through)
        setattr(
            module,
            through,
            conversion.recast(matrix, HeldDropout) if isinstance(matrix, nn.Dropout) else Factor(matrix),
        )
        gate = getattr(module, "gate", None)
        if gate is not None:
            module.gate = Factor(gate)
        conversion.children(module, ("proj", "proj_drop", *converted))
        return conversion.recast(module, held) if getattr(module, "fused_attn", False) else module


_attention(layers.Attention, "norm")
_attention(layers.AttentionRope, "norm")
_attention(layers.MultiQueryAttention2d, "value.norm", "output")
_attention(models.davit.WindowAttention, through="softmax")
_attention(models.eva.EvaAttention, "norm")
_attention(models.nextvit.EfficientAttention, "sr", "norm")
_attention(models.pvt_v2.Attention, "pool", "sr", "norm", "act")
_attention(models.twins.GlobalSubSampleAttn, "sr", "norm")
_type: type[nn.Module]
for _type in (
    layers.attention2d.Attention2d, models.beit.Attention, models.cait.ClassAttn, models.cait.TalkingHeadAttn,
    models.convit.GPSA, models.convit.MHSA, models.crossvit.CrossAttention,
    models.edgenext.CrossCovarianceAttn, models.fastvit.Attention, models.gcvit.WindowAttentionGlobal,
    models.maxxvit.Attention2d, models.maxxvit.AttentionCl, models.metaformer.Attention,
    models.nest.Attention, models.swin_transformer.WindowAttention,
    models.swin_transformer_v2.WindowAttention, models.swin_transformer_v2_cr.WindowMultiHeadAttention,
    models.tnt.Attention, models.twins.LocallyGroupedAttn, models.vision_transformer_relpos.RelPosAttention,
    models.vision_transformer_sam.Attention, models.visformer.Attention, models.volo.Attention,
    models.volo.ClassAttention, models.volo.OutlookAttention, models.xcit.XCA,
):  # fmt: skip
    _attention(_type)
