"""Under bfloat16 autocast norms, statistics, cosines and logits are those of float32, and nothing else is widened."""

import copy

import pytest
import torch
from torch import nn

from pipelines.bcos import BcosBatchNorm, BcosConv2d, BcosLinear, Holdable, add_inverse, bcosify, dynamic_weights
from pipelines.models import build

HALF = torch.bfloat16


def autocast():
    return torch.autocast("cpu", dtype=HALF)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_scale_of_a_half_precision_input_is_that_of_the_same_values_in_single(groups):
    torch.manual_seed(0)
    layer, x = BcosConv2d(4, 8, 3, padding=1, groups=groups), torch.randn(2, 4, 9, 9).to(HALF)
    half = copy.deepcopy(layer).to(HALF)
    linear = nn.functional.conv2d(x, half.weight, padding=1, groups=groups).float()
    norm = layer._patch_norm(x.float(), (1, 1))
    expected = (linear * linear.abs() / norm.repeat_interleave(8 // groups, 1)).to(HALF)
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
    monkeypatch.setattr(Holdable, "hold", lambda self, factor: seen.append(factor.dtype) or hold(self, factor))
    with autocast():
        dynamic_weights(model, add_inverse(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1]))
    assert seen
    assert set(seen) == {torch.float32}


def test_training_and_explaining_under_autocast_are_near_single_precision():
    torch.manual_seed(0)
    model, images, targets = bcosify(build("resnet8")).train(), add_inverse(torch.rand(8, 3, 32, 32)), torch.arange(8)

    def gradients():
        logits, weights = dynamic_weights(model, images, targets, create_graph=True)
        (logits.float().square().mean() + (weights.float() * images).sum((1, 2, 3)).square().mean()).backward()
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        return found

    single = gradients()
    with autocast():
        half = gradients()
    assert torch.nn.functional.cosine_similarity(single, half, dim=0) > 0.95


def test_a_linear_layer_keeps_the_type_of_its_input():
    layer = BcosLinear(8, 4).to(HALF)
    assert layer(torch.randn(2, 8).to(HALF)).dtype == HALF


def test_the_logit_bias_costs_an_autocast_network_no_digits():
    torch.manual_seed(0)
    model, images = bcosify(build("resnet8"), logit_bias=0.0).eval(), add_inverse(torch.rand(2, 3, 32, 32))
    with autocast():
        unbiased = model(images)
        model.logit_bias = -6.9
        biased = model(images)
    assert biased.dtype == torch.float32
    torch.testing.assert_close(biased + 6.9, unbiased, rtol=0, atol=1e-6)
