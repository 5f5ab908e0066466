"""torchvision's families, shrunk: `convert` preserves the function, W(x) is right, no layer is missed."""

from functools import partial

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import convnext, efficientnet, maxvit, mobilenetv3, regnet, resnet, swin_transformer
from torchvision.ops import SqueezeExcitation

from pipelines.bcos import (
    BcosConv2d,
    BcosLinear,
    Holdable,
    LocationsToBatch,
    add_inverse,
    audit,
    bcosify,
    convert,
    dynamic_weights,
)
from pipelines.bcos.activations import GatedReLU6, GatedTanh
from tests.support.families import check_conversion, check_frozen_jacobian, pictures, relative, settle, shake

K = 5


def vgg():
    with torch.device("meta"):  # the original's classifier alone has 10⁸ weights
        model = models.VGG(models.vgg.make_layers([8], False), num_classes=K, init_weights=False)
    model.features = models.vgg.make_layers([8, "M", 16, "M"], True)
    model.classifier = nn.Sequential(nn.Linear(16 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, K))
    return model


def googlenet(aux_logits=False, **options):
    return models.GoogLeNet(num_classes=K, init_weights=False, aux_logits=aux_logits, **options)


def mobilenet_v3():
    block = partial(mobilenetv3.InvertedResidualConfig, width_mult=0.5)
    blocks = [
        block(16, 3, 16, 16, True, "RE", 2, 1),
        block(16, 3, 72, 24, False, "HS", 2, 1),
        block(24, 5, 96, 24, True, "HS", 1, 1),
    ]
    return models.MobileNetV3(blocks, 32, num_classes=K)


def efficientnet_of(*blocks):
    return models.EfficientNet(blocks, dropout=0.1, num_classes=K, last_channel=32)


def regnet_with(se_ratio):
    parameters = regnet.BlockParams.from_init_params(4, 8, 8, 2.0, 8, se_ratio=se_ratio)
    return models.RegNet(parameters, num_classes=K)


def convnext_small():
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 2)]
    return models.ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=K)


def vit(**options):
    return models.VisionTransformer(
        32, 8, 2, 2, 16, 32, dropout=0.1, attention_dropout=0.1, num_classes=K, **options
    )


def swin(**options):
    return models.SwinTransformer(
        [2, 2], 8, [2, 2], [2, 2], [4, 4], dropout=0.1, attention_dropout=0.1, num_classes=K, **options
    )


SWIN_V2 = {
    "block": swin_transformer.SwinTransformerBlockV2,
    "downsample_layer": swin_transformer.PatchMergingV2,
}
STEM = models.vision_transformer.ConvStemConfig

# how to build it, and the side of an image
FAMILIES = {
    "resnet": (lambda: models.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=K), 32),
    "resnext": (
        lambda: models.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=K, groups=4, width_per_group=4),
        32,
    ),
    "wide_resnet": (
        lambda: models.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=K, width_per_group=96),
        32,
    ),
    "densenet": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=K), 32),
    "vgg": (vgg, 32),
    "mobilenet_v2": (lambda: models.MobileNetV2(K, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2]]), 32),
    "mobilenet_v3": (mobilenet_v3, 32),
    "efficientnet": (
        lambda: efficientnet_of(
            efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1),
            efficientnet.MBConvConfig(4, 5, 2, 8, 16, 2),
        ),
        32,
    ),
    "efficientnet_v2": (
        lambda: efficientnet_of(
            efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
            efficientnet.FusedMBConvConfig(4, 3, 2, 8, 16, 1),
            efficientnet.MBConvConfig(4, 3, 2, 16, 24, 2),
        ),
        32,
    ),
    "regnet_x": (lambda: regnet_with(None), 32),
    "regnet_y": (lambda: regnet_with(0.25), 32),
    "convnext": (convnext_small, 32),
    "vit": (vit, 32),
    "vit, conv stem, pre-logits": (
        lambda: vit(representation_size=12, conv_stem_configs=[STEM(8, 8, 8)]),
        32,
    ),
    "swin": (swin, 30),  # 15 patches a side: windows of 4 need padding
    "swin_v2": (lambda: swin(**SWIN_V2), 30),
    "maxvit": (lambda: models.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.1, num_classes=K), 32),
    "googlenet": (googlenet, 64),
    "shufflenet": (lambda: models.ShuffleNetV2([1, 2, 1], [8, 16, 16, 16, 32], K), 32),
    "squeezenet": (lambda: models.SqueezeNet("1_1", K), 64),
    "mnasnet": (lambda: models.MNASNet(0.25, K), 32),
}
BIAS_FREE_CNNS = [name for name in FAMILIES if not name.startswith(("convnext", "vit", "swin", "maxvit"))]


def build(name):
    torch.manual_seed(0)
    make, side = FAMILIES[name]
    return make(), pictures(4, side)


@pytest.mark.parametrize("name", FAMILIES)
def test_conversion_preserves_the_function(name):
    check_conversion(*build(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_the_jacobian_with_the_factors_frozen(name):
    model, images = build(name)
    network = check_frozen_jacobian(model, images)
    layers = [layer for layer in network.modules() if isinstance(layer, BcosConv2d | BcosLinear)]
    assert K in (getattr(layers[-1], "out_features", None), getattr(layers[-1], "out_channels", None)), (
        "the classifier is not last"
    )
    if name not in BIAS_FREE_CNNS:
        return
    x, targets = add_inverse(images.double()), torch.arange(len(images))
    logits, weights = dynamic_weights(network, x, targets)
    explained = (weights * (x - network.mean[:, None, None])).sum((1, 2, 3))
    assert relative(explained, logits.gather(1, targets[:, None])[:, 0]) <= 1e-6


@pytest.mark.parametrize("name", ["efficientnet", "vit", "swin_v2", "maxvit"])
def test_weights_are_that_jacobian_where_biases_and_pools_are_kept(name):
    check_frozen_jacobian(*build(name), bias="keep", gap_reorder=False, b=1.5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_the_audit_finds_nothing(name, training):
    model, images = build(name)
    assert audit(bcosify(model).train(training), add_inverse(images)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classifier_sees_every_location_where_there_is_a_global_pool(name):
    model, images = build(name)
    network = bcosify(model).eval()
    pools = [path for path, module in network.named_modules() if isinstance(module, LocationsToBatch)]
    assert len(pools) == (0 if name.startswith("vit") or name == "vgg" else 1)
    assert network(add_inverse(images)).shape == (4, K)
    assert not any(
        isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
        for module in network.modules()
    )


def test_a_normalisation_of_ones_own_is_kept():
    torch.manual_seed(0)
    check_conversion(googlenet(transform_input=True), pictures(4, 64))


def test_auxiliary_classifiers_are_left_out_and_names_of_weights_stay():
    network = bcosify(googlenet(aux_logits=True), bias="keep").train()
    assert network(add_inverse(pictures(2, 64))).shape == (2, K)
    for name in ("densenet", "mobilenet_v2", "shufflenet", "mnasnet", "swin", "convnext", "vit"):
        model, _ = build(name)
        converted = {key.removeprefix("body.") for key in convert(model, norm="centered").state_dict()}
        assert converted == set(model.state_dict()), name


def test_a_squeeze_excitation_is_its_input_times_a_held_gate():
    torch.manual_seed(0)
    layer = settle(
        shake(convert(nn.Sequential(nn.Conv2d(3, 4, 3), SqueezeExcitation(4, 2)))),
        add_inverse(pictures(4, 8)),
    )
    assert isinstance(layer.body[1], Holdable)
    x = torch.rand(2, 4, 3, 3)
    gate = layer.body[1]._scale(x)
    assert gate.shape == (2, 4, 1, 1)
    torch.testing.assert_close(layer.body[1](x), gate * x)


def test_the_gate_of_tanh_is_smooth_at_zero():
    x = torch.cat([torch.logspace(-12, 1, 40, dtype=torch.float64), torch.zeros(1)])
    x = torch.cat([-x, x]).requires_grad_()
    gate = GatedTanh().gate(x)
    torch.testing.assert_close(x * gate, torch.tanh(x))
    assert gate[-1] == 1
    (slope,) = torch.autograd.grad(gate.sum(), x)
    near = x.detach().abs() < 1e-3
    torch.testing.assert_close(slope[near], -2 * x.detach()[near] / 3, rtol=1e-5, atol=1e-18)
    assert torch.autograd.gradcheck(
        GatedTanh().gate, torch.tensor([-2, -0.0099, 0, 0.0101, 1], dtype=torch.float64).requires_grad_()
    )


def test_what_relu6_cuts_off_is_in_its_gate():
    x = torch.tensor([-3.0, 0, 1, 6, 12])
    assert GatedReLU6().gate(x).tolist() == [0, 0, 1, 1, 0.5]
    torch.testing.assert_close(GatedReLU6()(x), x * GatedReLU6().gate(x))


def test_windows_are_shifted_as_the_original_shifts_them():
    torch.manual_seed(0)
    for height, width, shift in ((7, 9, [2, 2]), (4, 9, [2, 2]), (8, 8, [0, 2]), (8, 12, [1, 3])):
        original = swin_transformer.ShiftedWindowAttention(8, [4, 4], shift, 2).double().eval()
        nn.init.normal_(original.relative_position_bias_table)
        model = nn.Sequential(nn.Conv2d(3, 8, 1), original)
        x = torch.randn(2, height, width, 8, dtype=torch.float64)
        torch.testing.assert_close(convert(model).body[1](x), original(x))


def test_the_bias_of_windows_is_that_of_maxvit():
    torch.manual_seed(0)
    original = maxvit.RelativePositionalMultiHeadAttention(8, 4, 9).eval()
    nn.init.normal_(original.relative_position_bias_table)
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(convert(nn.Sequential(nn.Conv2d(3, 8, 1), original)).body[1](x), original(x))


def test_removed_activations_are_those_on_the_linear_path():
    network = bcosify(models.regnet_y_400mf(), activation="remove")
    left = [name for name, module in network.named_modules() if isinstance(module, nn.ReLU)]
    assert left
    assert all(".se." in name for name in left)
