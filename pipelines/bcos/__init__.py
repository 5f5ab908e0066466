"""B-cos networks: layers, conversion, explanation mode, dynamic weights. Needs torch and nothing else of this project."""

from pipelines.bcos.activations import GatedGELU, GatedHardswish, GatedSiLU
from pipelines.bcos.attention import attend
from pipelines.bcos.audit import Finding, audit, check_held
from pipelines.bcos.convert import Conversion, ConversionError, bcosify, convert, is_bias, register_conversion
from pipelines.bcos.explain import contribution_map, dynamic_weights, rgba
from pipelines.bcos.explanation import Holdable, explanation_mode
from pipelines.bcos.layers import BcosConv2d, BcosLinear, clamp_b, layer_b, set_b
from pipelines.bcos.network import IMAGENET_MEAN, IMAGENET_STD, BcosNetwork, LocationsToBatch, add_inverse
from pipelines.bcos.norms import BcosBatchNorm, BcosGroupNorm, BcosLayerNorm

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BcosBatchNorm",
    "BcosConv2d",
    "BcosGroupNorm",
    "BcosLayerNorm",
    "BcosLinear",
    "BcosNetwork",
    "Conversion",
    "ConversionError",
    "Finding",
    "GatedGELU",
    "GatedHardswish",
    "GatedSiLU",
    "Holdable",
    "LocationsToBatch",
    "add_inverse",
    "attend",
    "audit",
    "bcosify",
    "check_held",
    "clamp_b",
    "contribution_map",
    "convert",
    "dynamic_weights",
    "explanation_mode",
    "is_bias",
    "layer_b",
    "register_conversion",
    "rgba",
    "set_b",
]
