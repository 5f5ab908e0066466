import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.bcos import (
    BcosBatchNorm,
    BcosConv2d,
    BcosLinear,
    ConversionError,
    add_inverse,
    bcosify,
    convert,
    dynamic_weights,
    register_conversion,
)
from pipelines.bcos.network import IMAGENET_MEAN, IMAGENET_STD
from pipelines.models import build

SHARED = Path(os.environ.get("BCOS_SHARED", Path(__file__).parents[3] / "shared"))


def normalised(images):
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def with_random_statistics(model):
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *(
            (name, "uncentered")
            for name in ("resnet18", "resnet50", "densenet121", "vgg11_bn", "timm:resnet10t")
        ),
        *(("resnet20", norm) for norm in ("uncentered", "centered")),
    ],
)
def test_conversion_preserves_the_function(name, norm):
    torch.manual_seed(0)
    model = with_random_statistics(build(name, num_classes=10))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before, after = model(normalised(images)), convert(model, norm=norm)(add_inverse(images))
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()


def test_conversion_preserves_the_cifar_network_with_its_real_weights():
    path = SHARED / "weights/cifar10/resnet20-12fca82f.th"
    if not path.is_file():
        pytest.skip("the CIFAR weights are not at hand")
    model, images = build("resnet20", str(path)).eval(), torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        before, after = model(normalised(images)), convert(model)(add_inverse(images))
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()


def test_the_original_is_left_untouched():
    model = build("resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bcosify(model).train()(torch.rand(2, 6, 32, 32)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(isinstance(module, BcosConv2d) for module in model.modules())


def test_design_choices_of_the_paper_are_the_default():
    model = bcosify(build("resnet18"))
    layers = [module for module in model.modules() if isinstance(module, BcosConv2d | BcosLinear)]
    assert {layer.b for layer in layers} == {2.0}
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert not any(isinstance(module, nn.MaxPool2d) for module in model.modules())
    assert model.logit_bias == pytest.approx(-math.log(999))
    assert model(torch.rand(2, 6, 64, 64)).shape == (2, 1000)


def test_choices_can_be_taken_back():
    model = bcosify(
        build("resnet18"),
        b=1.5,
        bias="keep",
        norm="centered",
        stem_pool="keep",
        gap_reorder=False,
        logit_bias=0.5,
    )
    assert any(isinstance(module, nn.MaxPool2d) for module in model.modules())
    assert all(module.centered for module in model.modules() if isinstance(module, BcosBatchNorm))
    assert [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert model.logit_bias == 0.5
    assert not any(isinstance(m, nn.ReLU) for m in bcosify(build("resnet18"), activation="remove").modules())


def test_classifying_every_location_first_is_the_average_of_their_logits():
    torch.manual_seed(0)
    source = with_random_statistics(build("resnet20"))
    model, images = bcosify(source, bias="keep", logit_bias=0.0), add_inverse(torch.rand(3, 3, 32, 32))
    body, z = model.body, (images - model.mean[:, None, None]) / model.std[:, None, None]
    features = body.layer3(body.layer2(body.layer1(body.relu(body.bn1(body.conv1(z))))))
    expected = body.linear(features.permute(0, 2, 3, 1)).mean((1, 2))
    torch.testing.assert_close(model(images), expected)
    assert not torch.allclose(
        expected, bcosify(source, bias="keep", logit_bias=0.0, gap_reorder=False)(images), rtol=1e-3
    )


def test_a_bias_free_network_explains_its_logits_wholly():
    torch.manual_seed(0)
    model = bcosify(build("resnet20")).train()
    with torch.no_grad():
        for _ in range(30):
            model(add_inverse(torch.rand(16, 3, 32, 32)))
    model = model.eval().double()
    images, targets = add_inverse(torch.rand(4, 3, 32, 32, dtype=torch.float64)), torch.arange(4)
    logits, weights = dynamic_weights(model, images, targets)
    explained = (weights * (images - model.mean[:, None, None])).sum((1, 2, 3))
    actual = logits[range(4), targets] - model.logit_bias
    assert (explained - actual).abs().sum() <= 1e-6 * actual.abs().sum()


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def test_a_module_without_a_rule_is_named_with_its_path():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Swish()))
    with pytest.raises(ConversionError, match=r"Swish at '1\.0'.*register_conversion"):
        convert(model)
    with pytest.raises(ConversionError, match="Softmax at '1'"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1)))
    with pytest.raises(ConversionError, match="LSTM at"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LSTM(4, 4)))


def test_a_rule_of_ones_own_makes_it_convertible():
    class Mine(Swish):
        pass

    @register_conversion(Mine)
    def _(module, context):
        return nn.Identity()

    images = torch.rand(1, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Mine())
    torch.testing.assert_close(convert(model)(add_inverse(images)), model[0](normalised(images)))


def test_shared_modules_stay_shared():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared))
    assert model.body[1] is model.body[3]


def test_three_channels_given_to_a_converted_model_are_refused():
    with pytest.raises(ValueError, match="apply add_inverse"):
        convert(build("resnet20"))(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        add_inverse(torch.rand(1, 6, 32, 32))
    with pytest.raises(ConversionError, match="three channels"):
        convert(nn.Sequential(nn.Conv2d(1, 4, 3)))


def test_a_network_without_the_shift_differs_from_the_function_by_the_means_alone():
    source, images = with_random_statistics(build("resnet20")), torch.rand(2, 3, 32, 32)
    without = convert(source, norm="uncentered_unshifted")(add_inverse(images))
    assert not torch.allclose(without, source(normalised(images)), rtol=1e-2)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
    after = convert(source, norm="uncentered_unshifted")(add_inverse(images))
    torch.testing.assert_close(after, source(normalised(images)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", [{"b_mode": "scheduled"}, {"b_mode": "learned"}, {"bias": "decay"}])
def test_choices_of_training_start_as_the_fixed_network(choice):
    source, images = with_random_statistics(build("resnet8")), add_inverse(torch.rand(2, 3, 32, 32))
    fixed = bcosify(source, b=1.5, bias="keep" if "bias" in choice else "remove")
    torch.testing.assert_close(bcosify(source, b=1.5, **choice)(images), fixed(images), rtol=1e-4, atol=1e-5)


def test_max_out_multiplies_the_units_not_the_channels():
    model = bcosify(build("resnet8"), max_out=2, normalize_weight=True)
    assert model.body.conv1.weight.shape == (32, 6, 3, 3)
    assert model(torch.rand(2, 6, 32, 32)).shape == (2, 10)


def test_values_outside_the_unit_interval_are_warned_of_once():
    model, images = convert(build("resnet8")).eval(), add_inverse(torch.rand(2, 3, 32, 32))
    with pytest.warns(UserWarning, match=r"\[0, 1\] and normalises them itself; these lie in \[-"):
        model(4 * images - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(4 * images - 2)
        convert(build("resnet8"))(images)
