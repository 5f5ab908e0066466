"""B-cos networks: layers, conversion, explanation mode and dynamic weights.

Imports torch, and nothing else of this project but `pipelines.errors`.
"""

from pipelines.bcos.activations import GatedGELU, GatedHardswish, GatedSiLU
from pipelines.bcos.attention import attend
from pipelines.bcos.audit import Finding, audit, check_held
from pipelines.bcos.convert import Conversion, convert, register_conversion
from pipelines.bcos.design import bcosify, fade_biases, is_bias
from pipelines.bcos.errors import ConversionError
from pipelines.bcos.explain import contribution_map, dynamic_weights, rgba
from pipelines.bcos.explanation import Holdable, explanation_mode
from pipelines.bcos.layers import BcosConv2d, BcosLinear, clamp_b, layer_b, set_b
from pipelines.bcos.network import IMAGENET_MEAN, IMAGENET_STD, BcosNetwork, LocationsToBatch, add_inverse
from pipelines.bcos.norms import BcosBatchNorm, BcosGroupNorm, BcosLayerNorm
