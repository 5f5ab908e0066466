"""Under bfloat16 autocast, norms, statistics, cosines and logits are float32, and nothing else is."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

from pipelines.bcos import (
    BcosBatchNorm,
    BcosConv2d,
    BcosLinear,
    Holdable,
    add_inverse,
    bcosify,
    dynamic_weights,
)
from pipelines.bcos.precision import exact_float32
from pipelines.models import build

HALF = torch.bfloat16


def test_float32_is_exact_in_the_block_and_as_it_was_after_it():
    assert torch.backends.cudnn.allow_tf32  # torch's default
    with suppress(ZeroDivisionError), exact_float32():
        assert not torch.backends.cudnn.allow_tf32
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32


def autocast():
    return torch.autocast("cpu", dtype=HALF)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_scale_of_a_half_precision_input_is_that_of_the_same_values_in_single(groups, dilation):
    torch.manual_seed(0)
    options = {"padding": dilation, "dilation": dilation, "groups": groups}
    layer, x = BcosConv2d(4, 8, 3, **options), torch.randn(2, 4, 9, 9).to(HALF)
    half = copy.deepcopy(layer).to(HALF)
    linear = nn.functional.conv2d(x, half.weight, **options).float()
    norm = layer._patch_norm(x.float(), (dilation, dilation))
    expected = (linear * linear.abs() / norm.repeat_interleave(8 // groups, 1)).to(HALF)
    with autocast():
        torch.testing.assert_close(layer._patch_norm(x, (dilation, dilation)), norm)
        torch.testing.assert_close(half(x), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_half_precision_features_are_taken_in_single(training):
    torch.manual_seed(0)
    x = (torch.randn(64, 3, 8, 8) + 3).to(HALF)
    half, single = BcosBatchNorm(3, bias=False).train(training), BcosBatchNorm(3, bias=False).train(training)
    ours, theirs = half(x), single(x.float())
    assert ours.dtype == HALF
    torch.testing.assert_close(ours, theirs.to(HALF), rtol=2**-7, atol=0)
    torch.testing.assert_close(half.running_var, single.running_var)


def test_every_held_factor_of_an_autocast_network_is_single_precision(monkeypatch):
    model, seen = bcosify(build("resnet8")).eval(), []
    hold = Holdable.hold
    monkeypatch.setattr(
        Holdable, "hold", lambda self, factor: seen.append(factor.dtype) or hold(self, factor)
    )
    with autocast():
        dynamic_weights(model, add_inverse(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1]))
    assert seen
    assert set(seen) == {torch.float32}


def test_training_and_explaining_under_autocast_are_near_single_precision():
    torch.manual_seed(0)
    model, images, targets = (
        bcosify(build("resnet8")).train(),
        add_inverse(torch.rand(8, 3, 32, 32)),
        torch.arange(8),
    )

    def gradients():
        logits, weights = dynamic_weights(model, images, targets, create_graph=True)
        (
            logits.float().square().mean() + (weights.float() * images).sum((1, 2, 3)).square().mean()
        ).backward()
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        return found

    single = gradients()
    with autocast():
        half = gradients()
    assert torch.nn.functional.cosine_similarity(single, half, dim=0) > 0.95


@pytest.mark.parametrize("bias", [False, True])
def test_layers_keep_the_type_of_what_they_compute(bias):
    layer = BcosLinear(8, 4, bias=bias).to(HALF)
    assert layer(torch.randn(2, 8).to(HALF)).dtype == HALF
    with autocast():
        assert BcosLinear(8, 4, bias=bias)(torch.randn(2, 8)).dtype == HALF
        assert BcosConv2d(3, 4, 3, bias=bias)(torch.randn(2, 3, 8, 8)).dtype == HALF


@pytest.mark.compile
@pytest.mark.parametrize("name", ["resnet8", "timm:vit_tiny_patch16_224"])
def test_compiled_a_loss_under_autocast_has_nearly_the_eager_gradient(name):
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2} if name.startswith("timm") else {}
    model = bcosify(build(name, num_classes=8, options=options)).train()
    images, targets = add_inverse(torch.rand(8, 3, 32, 32)), torch.arange(8)

    def loss(model, images, targets):
        logits, weights = dynamic_weights(model, images, targets, create_graph=True)
        return logits.float().square().mean() + (weights.float() * images).sum((1, 2, 3)).square().mean()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        with autocast():
            value = function(model, images, targets)
        gradients = torch.autograd.grad(value, list(model.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    torch.compiler.reset()
    assert nn.functional.cosine_similarity(*found, dim=0) > 0.95


def test_the_logit_bias_costs_an_autocast_network_no_digits():
    torch.manual_seed(0)
    model, images = bcosify(build("resnet8"), logit_bias=0.0).eval(), add_inverse(torch.rand(2, 3, 32, 32))
    with autocast():
        unbiased = model(images)
        model.logit_bias = -6.9
        biased = model(images)
    assert biased.dtype == torch.float32
    torch.testing.assert_close(biased + 6.9, unbiased, rtol=0, atol=1e-6)
