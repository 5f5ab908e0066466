"""timm's module types that compute no factor themselves.

They are linear or piecewise linear (max pools, PReLU) by themselves or in the outputs of their children. They
stay as they are, and their children are converted.
"""

from __future__ import annotations

import dataclasses

import timm.layers
import timm.models
from timm.layers.activations import PReLU
from torch import Tensor, nn

from pipelines.bcos import Conversion, register_conversion
from pipelines.bcos.convert import convert_children, keep, recast_to

layers, models = timm.layers, timm.models


register_conversion(
    layers.DropPath, layers.DropBlock2d, layers.PatchDropout, layers.PatchDropoutWithIndices,
    layers.LayerScale, layers.LayerScale2d, layers.BlurPool2d, layers.AvgPool2dSame,
    layers.pool2d_same.MaxPool2dSame, layers.SpaceToDepth, layers.DepthToSpace, layers.AdaptiveAvgMaxPool2d,
    layers.adaptive_avgmax_pool.AdaptiveCatAvgMaxPool2d, layers.adaptive_avgmax_pool.FastAdaptiveMaxPool,
    layers.adaptive_avgmax_pool.FastAdaptiveAvgMaxPool, layers.adaptive_avgmax_pool.FastAdaptiveCatAvgMaxPool,
    PReLU, models.mlp_mixer.Affine, models.metaformer.Scale, models.fastvit.LayerScale2d,
    models.swiftformer.LayerScale2d, models.efficientformer.Flat, models.levit.Downsample,
)(keep)  # fmt: skip
# Positions do not depend on the image, so layers that compute their embeddings or biases stay ordinary.
register_conversion(
    layers.RelPosBias, layers.RelPosMlp, layers.RelPosBiasTf, layers.RotaryEmbedding,
    layers.RotaryEmbeddingCat, layers.RotaryEmbeddingMixed, layers.RotaryEmbeddingDinoV3, layers.FourierEmbed,
    models.beit.RelativePositionBias, models.xcit.PositionalEncodingFourier,
    models.edgenext.PositionalEncodingFourier,
)(keep)  # fmt: skip
# The own parameters of these types are tokens, positions, masks and layer scales: none of them is a factor.
register_conversion(
    models.vision_transformer.VisionTransformer, models.deit.VisionTransformerDistilled, models.beit.Beit,
    models.beit.Block, models.eva.Eva, models.eva.EvaBlock, models.eva.EvaBlockPostNorm, models.cait.Cait,
    models.cait.LayerScaleBlock, models.cait.LayerScaleBlockClassAttn, models.xcit.Xcit, models.xcit.XCABlock,
    models.xcit.ClassAttentionBlock, models.convnext.ConvNeXtBlock, models.inception_next.MetaNeXtBlock,
    models.edgenext.ConvBlock, models.edgenext.SplitTransposeBlock, models.rdnet.DenseBlock,
    models.swin_transformer.SwinTransformerBlock, models.swin_transformer_v2.SwinTransformerV2Block,
    models.swin_transformer_v2_cr.SwinTransformerV2CrBlock, models.mlp_mixer.ResBlock,
    models.pit.PoolingVisionTransformer, models.visformer.Visformer, models.nest.NestLevel,
    models.nfnet.NormFreeBlock, models.volo.VOLO, models.vision_transformer_relpos.VisionTransformerRelPos,
    models.convit.ConVit, models.tnt.TNT, models.vision_transformer_sam.VisionTransformerSAM,
)(convert_children)  # fmt: skip


@register_conversion(
    models.byobnet.RepVggBlock, models.byobnet.MobileOneBlock, models.fastvit.MobileOneBlock,
    models.crossvit.CrossVit,
)  # fmt: skip
def _branches(module: nn.Module, conversion: Conversion) -> nn.Module:
    # several parallel layers take the image, not just the first; the weight W of each becomes [W, -W]/2
    layers_of_image = [
        layer for layer in module.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3
    ]
    if any(layer is conversion.image_layer for layer in layers_of_image):
        for layer in layers_of_image:
            dataclasses.replace(conversion, image_layer=layer).child(layer, "branch")
    return conversion.children(module)


class LearnableAffine(models.hgnet.LearnableAffineBlock):
    """s·x + b; `bcosify` may have removed the bias b."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x if self.bias is None else self.scale * x + self.bias


register_conversion(models.hgnet.LearnableAffineBlock)(recast_to(LearnableAffine))
