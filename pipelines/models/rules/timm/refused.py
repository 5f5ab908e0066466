"""timm's module types that no rule converts, so that their conversion is an error.

Converting just their children would miss the factors that their `forward` computes.
"""

from __future__ import annotations

import timm.layers
import timm.models
from torch import nn

from pipelines.bcos import Conversion, ConversionError, register_conversion

layers, models = timm.layers, timm.models


@register_conversion(
    layers.attention2d.MultiQueryAttentionV2, layers.attention_pool.AttentionPoolPrr, layers.AttentionPool2d,
    layers.RotAttentionPool2d, layers.bottleneck_attn.BottleneckAttn, layers.coord_attn.CoordAttn,
    layers.coord_attn.EfficientLocalAttn, layers.coord_attn.SimpleCoordAttn, layers.coord_attn.StripAttn,
    layers.diff_attention.DiffAttention, layers.GlobalContext, layers.halo_attn.HaloAttn,
    layers.lambda_layer.LambdaLayer, layers.non_local_attn.BilinearAttnTransform, layers.NonLocalAttn,
    layers.other_pool.SimPool1d, layers.other_pool.SimPool2d, models._efficientnet_blocks.CondConvResidual,
    models.coat.FactorAttnConvRelPosEnc, models.coat.ConvRelPosEnc, models.cpubone.ConvAttention,
    models.davit.ChannelAttentionV2, models.efficientvim.EfficientViMBlock, models.efficientvim.HSMSSD,
    models.efficientvit_mit.LiteMLA, models.efficientvit_msra.CascadedGroupAttention,
    models.focalnet.FocalModulation, models.gemma4_vit.Gemma4Attention, models.gemma4_vit.Gemma4GatedMlp,
    models.ghostnet.GhostModuleV2, models.ghostnet.GhostModuleV3, models.hiera.MaskUnitAttention,
    models.hieradet_sam2.MultiScaleAttention, models.iformer.SHMA, models.lowformer.ConvAttention,
    models.mobilevit.LinearSelfAttention, models.mvitv2.MultiScaleAttention,
    models.mvitv2.MultiScaleAttentionPoolFirst, models.shvit.SHSA,
    models.swiftformer.EfficientAdditiveAttention, models.vision_transformer.ParallelScalingBlock,
    models.vision_transformer.DiffParallelScalingBlock, models.vitamin.GeGluMlp,
)  # fmt: skip
def _refused(module: nn.Module, conversion: Conversion) -> nn.Module:
    name = type(module).__name__
    raise ConversionError(
        f"no conversion rule for {name} at {conversion.path!r} "
        "(its forward multiplies functions of the input, which nothing holds): "
        f"write one with @register_conversion({name})"
    )
