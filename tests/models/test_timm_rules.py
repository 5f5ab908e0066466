"""timm's families, shrunk: `convert` keeps the function; W(x) is the Jacobian with factors frozen."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import GatedMlp, GroupNormAct, StdConv2dSame
from timm.models import efficientnet, metaformer, mlp_mixer, mobilenetv3, resnetv2, vgg
from torch import nn

import pipelines.models  # noqa: F401  (registers the rules)
from pipelines.bcos import (
    BcosLinear,
    ConversionError,
    add_inverse,
    bcosify,
    convert,
    dynamic_weights,
    explanation_mode,
)
from pipelines.bcos.audit import audit
from pipelines.bcos.network import LocationsToBatch
from tests.support.families import (
    check_conversion,
    check_frozen_jacobian,
    normalised,
    pictures,
    relative,
    settle,
    shake,
)

RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_width": 16}
VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
PYRAMID = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "depths": (2, 2),
    "embed_dim": 12,
    "num_heads": (1, 2),
}
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
    "vit_tiny_patch16_224 qk norm": {
        **VIT,
        "qk_norm": True,
        "scale_attn_norm": True,
        "dynamic_img_size": True,
    },
    "deit3_small_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "maxvit_pico_rw_256": MAXVIT,
    "coatnet_pico_rw_224": {**MAXVIT, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)},
    "efficientformerv2_s0": {
        "img_size": 64,
        "depths": (1, 1, 1, 2),
        "embed_dims": (8, 12, 16, 24),
        "num_vit": 1,
    },
    "levit_128s": {"img_size": 64, "embed_dim": (16, 24, 32), "num_heads": (1, 2, 2), "depth": (1, 1, 1)},
}


BIT = {"stem_type": "same", "conv_layer": StdConv2dSame, "norm_layer": GroupNormAct}
CAFORMER = {
    "token_mixers": [metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention],
    "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    "head_dim": 8,
}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24, "num_classes": 10}

BUILT = {  # networks whose factories fix sizes that are too large for a test
    "efficientnet": lambda: efficientnet._gen_efficientnet("efficientnet_b0", 0.25, 0.1, num_classes=10),
    "tf_efficientnet": lambda: efficientnet._gen_efficientnet(
        "efficientnet_b0", 0.25, 0.1, num_classes=10, pad_type="same"
    ),
    "mobilenetv2": lambda: efficientnet._gen_mobilenet_v2("mobilenetv2_100", 0.25, 0.1, num_classes=10),
    "mobilenetv3": lambda: mobilenetv3._gen_mobilenet_v3("mobilenetv3_large_100", 0.25, 0.1, num_classes=10),
    "vgg": lambda: vgg.VGG(
        [8, "M", 8, "M", 16, "M"], mlp_ratio=0.01, norm_layer=nn.BatchNorm2d, num_classes=10
    ),
    "resnetv2": lambda: resnetv2.ResNetV2(
        (1, 1, 1, 1), (128, 128, 128, 128), stem_chs=32, num_classes=10, **BIT
    ),
    "caformer": lambda: metaformer.MetaFormer(num_classes=10, **CAFORMER, **PYRAMID),
    "poolformer": lambda: metaformer.MetaFormer(
        num_classes=10, mlp_act=nn.GELU, use_mlp_head=False, **PYRAMID
    ),
    "mixer": lambda: mlp_mixer.MlpMixer(**MIXER),
    "resmlp": lambda: mlp_mixer.MlpMixer(
        block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, mlp_ratio=4, **MIXER
    ),
    "gmlp": lambda: mlp_mixer.MlpMixer(
        block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=4, **MIXER
    ),
}
EVERY = [*FAMILIES, *BUILT]


def network(name):
    torch.manual_seed(0)
    return (
        BUILT[name]()
        if name in BUILT
        else timm.create_model(name.partition(" ")[0], num_classes=10, **FAMILIES[name])
    )


def images_for(name):
    if name in ("mixer", "resmlp", "gmlp"):
        return pictures(2, 32)
    return pictures(2, FAMILIES.get(name, {}).get("img_size", 64))


@pytest.mark.parametrize("name", EVERY)
def test_conversion_preserves_the_function(name):
    check_conversion(network(name), images_for(name))


@pytest.mark.parametrize("name", EVERY)
def test_dynamic_weights_are_the_jacobian_with_frozen_factors(name):
    explained = check_frozen_jacobian(network(name), images_for(name))
    assert audit(explained, add_inverse(images_for(name).double())) == []


COMPLETE = [
    "resnet50d",
    "seresnet18",
    "densenet121",
    "vgg",
    "regnety_002",
    "efficientnet",
    "convnextv2_atto",
    "resnetv2",
]


@pytest.mark.parametrize("name", [*COMPLETE, "swin_tiny_patch4_window7_224"])
def test_without_biases_and_positions_pixels_carry_the_whole_logit(name):
    model = bcosify(shake(network(name)), logit_bias=0.0).double()
    images, targets = add_inverse(images_for(name).double()), torch.arange(2)
    settle(model, images)
    logits, weights = dynamic_weights(model, images, targets)
    explained = (weights * (images - model.mean[:, None, None])).sum((1, 2, 3))
    assert relative(explained, logits[range(2), targets]) <= 1e-6


ATTENTION = [
    "vit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
    "swinv2_tiny_window8_256",
    "maxvit_pico_rw_256",
    "caformer",
]


@pytest.mark.parametrize(
    "name", [*ATTENTION, "vit_tiny_patch16_224 attention pool", "levit_128s", "convnextv2_atto", "gmlp"]
)
def test_explanation_mode_leaves_the_logits_as_they_are(name):
    model, images = bcosify(shake(network(name))).double().eval(), add_inverse(images_for(name).double())
    with torch.no_grad():
        plain = model(images)
        with explanation_mode(model):
            torch.testing.assert_close(model(images), plain)


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "regnety_002", "efficientnet", "vgg", "swin_tiny_patch4_window7_224"]
)
def test_classifying_every_location_first_changes_nothing_where_the_classifier_is_linear(name):
    source, images = settle(shake(network(name)), normalised(images_for(name))), add_inverse(images_for(name))
    choices = {"b": 1.0, "bias": "keep", "stem_pool": "keep"}
    reordered, original = (bcosify(source, gap_reorder=reorder, **choices) for reorder in (True, False))
    assert sum(isinstance(module, LocationsToBatch) for module in reordered.modules()) == 1
    assert not any(isinstance(module, LocationsToBatch) for module in original.modules())
    with torch.no_grad():
        torch.testing.assert_close(reordered(images), original(images), rtol=1e-3, atol=1e-4)


def test_what_computes_a_gate_stays_ordinary():
    model = convert(network("seresnet18"))
    gates = [module for name, module in model.named_modules() if name.endswith(".se")]
    assert len(gates) == 4
    assert not any(isinstance(module, nn.AdaptiveAvgPool2d) for gate in gates for module in gate.modules())
    assert all(type(gate.fc1) is nn.Conv2d and type(gate.fc2) is nn.Conv2d for gate in gates)


def test_queries_keys_and_values_stay_linear_and_the_output_projection_does_not():
    model = convert(network("vit_tiny_patch16_224"))
    assert all(type(block.attn.qkv) is nn.Linear for block in model.body.blocks)
    assert all(isinstance(block.attn.proj, BcosLinear) for block in model.body.blocks)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_converted_attention_can_be_copied_and_pickled(copied):
    model, images = convert(network("vit_tiny_patch16_224").eval()), add_inverse(pictures(1, 32))
    torch.testing.assert_close(copied(model)(images), model(images))


ACTIVATIONS = [
    "swish",
    "hard_swish",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "mish",
    "hard_mish",
    "tanh",
    "prelu",
    "relu",
]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_its_gate_times_its_input(name):
    activation = timm.layers.create_act_layer(name)
    layer = convert(nn.Sequential(nn.Conv2d(3, 4, 1), activation)).body[1]
    x = torch.cat([torch.linspace(-4, 4, 17), torch.tensor([0.0, 1e-6])]).requires_grad_()
    with explanation_mode(layer):
        y = layer(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, activation(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope * x, y)


NORMS = ["layernorm2d", "rmsnorm2d", "groupnorm", "groupnorm1", "batchnorm2d"]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("make", [timm.layers.create_norm_layer, timm.layers.create_norm_act_layer])
def test_a_norm_with_its_factor_held_is_linear_but_for_its_bias(name, make):
    groups = {"num_groups": 2} if name == "groupnorm" else {}
    norm = shake(make(name, 6, **groups)).eval()
    layer = convert(nn.Sequential(nn.Conv2d(3, 6, 1), copy.deepcopy(norm))).eval().body[1]
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    with explanation_mode(layer):
        torch.testing.assert_close(layer(x), norm(x))
    for key, parameter in layer.named_parameters():
        if key.endswith("bias"):
            nn.init.zeros_(parameter)
    with explanation_mode(layer):
        y = layer(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close((slope * x).sum(), y.sum(), rtol=1e-4, atol=1e-4)


def test_same_padding_follows_the_size_of_the_input():
    layer = timm.layers.create_conv2d(3, 4, 3, stride=2, padding="same", bias=True)
    model = convert(nn.Sequential(layer))
    for side in (7, 8, 9):
        images = torch.rand(1, 3, side, side + 1)
        torch.testing.assert_close(model(add_inverse(images)), layer(normalised(images)))


def test_every_branch_of_a_stem_takes_the_image():
    block = timm.models.byobnet.RepVggBlock(3, 4, 3, stride=2)
    images = torch.rand(2, 3, 16, 16)
    settle(shake(block), normalised(images))
    with torch.no_grad():
        torch.testing.assert_close(
            convert(block)(add_inverse(images)), block(normalised(images)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "module",
    [
        timm.models.focalnet.FocalModulation(8, focal_window=3, focal_level=1),
        timm.layers.CondConv2d(8, 8),
        timm.layers.Sigmoid(),
    ],
)
def test_a_type_that_no_rule_reaches_is_refused_by_name(module):
    with pytest.raises(ConversionError, match=rf"{type(module).__name__} at '1'.*register_conversion"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 1), module))
