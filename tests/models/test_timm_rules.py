"""Each of timm's families, shrunk: `convert` preserves the function, and W(x) is the Jacobian with the factors frozen."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import GatedMlp, GroupNormAct, StdConv2dSame
from timm.models import efficientnet, metaformer, mlp_mixer, mobilenetv3, resnetv2, vgg
from torch import nn

import pipelines.models  # noqa: F401  (registers the rules)
from pipelines.bcos import ConversionError, add_inverse, bcosify, convert, dynamic_weights, explanation_mode
from pipelines.bcos.network import LocationsToBatch
from tests.models.families import check_conversion, check_frozen_jacobian, normalised, pictures, relative, settle, shake

RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_width": 16}
VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
PYRAMID = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 2), "embed_dim": 12, "num_heads": (1, 2)}
MAXVIT = {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 32)}

FAMILIES = {
    "resnet18": RESNET,
    "resnet18d": RESNET,
    "resnet50d": RESNET,
    "resnetblur18": RESNET,
    "resnext50_32x4d": {**RESNET, "cardinality": 4},
    "wide_resnet50_2": RESNET,
    "seresnet18": RESNET,
    "ecaresnet50t": RESNET,
    "skresnet18": RESNET,
    "resnest14d": RESNET,
    "densenet121": {"growth_rate": 8, "block_config": (2, 1, 1, 1)},
    "regnety_002": {},
    "convnext_atto": PYRAMID,
    "convnextv2_atto": PYRAMID,
    "vit_tiny_patch16_224": VIT,
    "vit_tiny_patch16_224 average": {**VIT, "class_token": False, "global_pool": "avg"},
    "vit_tiny_patch16_224 attention pool": {**VIT, "class_token": False, "global_pool": "map"},
    "vit_tiny_patch16_224 qk norm": {**VIT, "qk_norm": True, "scale_attn_norm": True, "dynamic_img_size": True},
    "deit3_small_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "maxvit_pico_rw_256": MAXVIT,
    "coatnet_pico_rw_224": {**MAXVIT, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)},
    "efficientformerv2_s0": {"img_size": 64, "depths": (1, 1, 1, 2), "embed_dims": (8, 12, 16, 24), "num_vit": 1},
    "levit_128s": {"img_size": 64, "embed_dim": (16, 24, 32), "num_heads": (1, 2, 2), "depth": (1, 1, 1)},
}


BIT = {"stem_type": "same", "conv_layer": StdConv2dSame, "norm_layer": GroupNormAct}
CAFORMER = {
    "token_mixers": [metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention],
    "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    "head_dim": 8,
}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24, "num_classes": 10}

BUILT = {  # whose factories fix what is too large for a test
    "efficientnet": lambda: efficientnet._gen_efficientnet("efficientnet_b0", 0.25, 0.1, num_classes=10),
    "tf_efficientnet": lambda: efficientnet._gen_efficientnet("efficientnet_b0", 0.25, 0.1, num_classes=10, pad_type="same"),
    "mobilenetv2": lambda: efficientnet._gen_mobilenet_v2("mobilenetv2_100", 0.25, 0.1, num_classes=10),
    "mobilenetv3": lambda: mobilenetv3._gen_mobilenet_v3("mobilenetv3_large_100", 0.25, 0.1, num_classes=10),
    "vgg": lambda: vgg.VGG([8, "M", 8, "M", 16, "M"], mlp_ratio=0.01, norm_layer=nn.BatchNorm2d, num_classes=10),
    "resnetv2": lambda: resnetv2.ResNetV2((1, 1, 1, 1), (128, 128, 128, 128), stem_chs=32, num_classes=10, **BIT),
    "caformer": lambda: metaformer.MetaFormer(num_classes=10, **CAFORMER, **PYRAMID),
    "poolformer": lambda: metaformer.MetaFormer(num_classes=10, mlp_act=nn.GELU, use_mlp_head=False, **PYRAMID),
    "mixer": lambda: mlp_mixer.MlpMixer(**MIXER),
    "resmlp": lambda: mlp_mixer.MlpMixer(block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, mlp_ratio=4, **MIXER),
    "gmlp": lambda: mlp_mixer.MlpMixer(block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=4, **MIXER),
}
EVERY = [*FAMILIES, *BUILT]


def network(name):
    torch.manual_seed(0)
    return BUILT[name]() if name in BUILT else timm.create_model(name.partition(" ")[0], num_classes=10, **FAMILIES[name])


def images_for(name):
    if name in ("mixer", "resmlp", "gmlp"):
        return pictures(2, 32)
    return pictures(2, FAMILIES.get(name, {}).get("img_size", 64))


@pytest.mark.parametrize("name", EVERY)
def test_conversion_preserves_the_function(name):
    check_conversion(network(name), images_for(name))


@pytest.mark.parametrize("name", EVERY)
def test_dynamic_weights_are_the_jacobian_with_frozen_factors(name):
    check_frozen_jacobian(network(name), images_for(name))
