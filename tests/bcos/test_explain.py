"""Factors are held, not detached: W(x) is exact, and losses on W(x) and on logits have full gradients."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.step import keep_small_features
from pipelines.bcos import (
    BcosConv2d,
    add_inverse,
    bcosify,
    contribution_map,
    dynamic_weights,
    explanation_mode,
    rgba,
)
from pipelines.models import build

DOUBLE = torch.float64


def small_network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.BatchNorm2d(5),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    return bcosify(network).double()


def images(count=4, size=7):
    torch.manual_seed(1)
    return add_inverse(torch.rand(count, 3, size, size, dtype=DOUBLE))


class TwoLayers(nn.Module):
    """Two B-cos layers with B = 2 on images of one pixel, whose W(x) is a short formula (`explicit`)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = BcosConv2d(6, 4, 1), BcosConv2d(4, 3, 1)

    def forward(self, images):
        return self.second(self.first(images)).flatten(1)


def explicit(first, second, x, target):
    """Logits and W(x) of `TwoLayers` by the formula W = diag(s2)[t] V2 diag(s1) V1, s the scales."""

    def scales(weight, x):
        linear = x @ weight.T
        return linear.abs() / (x.square().sum(1, keepdim=True) + 1e-6).sqrt()

    s1 = scales(first, x)
    hidden = s1 * (x @ first.T)
    s2 = scales(second, hidden)
    logits = s2 * (hidden @ second.T)
    rows = torch.arange(len(x))
    return logits, (s2[rows, target, None] * second[target] * s1) @ first


def test_gradients_of_losses_on_weights_and_logits_equal_those_of_the_explicit_formula():
    model = TwoLayers().double()
    x, target = torch.rand(5, 6, 1, 1, dtype=DOUBLE), torch.tensor([0, 1, 2, 1, 0])
    first, second = (
        layer.weight.detach().flatten(1).requires_grad_() for layer in (model.first, model.second)
    )
    expected_logits, expected_weights = explicit(first, second, x.flatten(1), target)
    logits, weights = dynamic_weights(model, x, target, create_graph=True)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(weights.flatten(1), expected_weights)

    direction = torch.randn(5, 6, dtype=DOUBLE)
    for ours, theirs in (
        ((weights.flatten(1) * direction).sum(), (expected_weights * direction).sum()),
        (logits.square().sum(), expected_logits.square().sum()),
        (
            weights.square().sum() + logits.exp().sum(),
            expected_weights.square().sum() + expected_logits.exp().sum(),
        ),
    ):
        got = torch.autograd.grad(ours, (model.first.weight, model.second.weight), retain_graph=True)
        want = torch.autograd.grad(theirs, (first, second), retain_graph=True)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.flatten(1), other)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_of_a_loss_on_the_weights_matches_finite_differences(training):
    model, x, target = small_network().train(training), images(), torch.tensor([0, 1, 2, 0])
    parameters = dict(model.named_parameters())

    def loss(weight):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.nn.utils.stateless._reparametrize_module(model, {"body.3.weight": weight, **buffers}):
            logits, weights = dynamic_weights(model, x, target, create_graph=True)
            return (
                (weights * weights.detach().sign()).sum() * 0.1
                + logits.square().sum()
                + weights.square().sum()
            )

    weight = parameters["body.3.weight"].detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weight), weight)
    step = 1e-5
    for index in [(0, 0, 0, 0), (1, 2, 1, 1), (4, 3, 2, 0)]:
        moved = torch.zeros_like(weight)
        moved[index] = step
        difference = (loss(weight + moved) - loss(weight - moved)).item() / (2 * step)
        assert gradient[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("training", [False, True])
def test_weights_with_and_without_a_graph_are_the_same(training):
    model, x, target = small_network().train(training), images(), torch.tensor([0, 1, 2, 0])
    logits, weights = dynamic_weights(model, x, target)
    with_graph = dynamic_weights(model, x, target, create_graph=True)
    assert not weights.requires_grad
    assert not logits.requires_grad
    torch.testing.assert_close(with_graph[0], logits)
    torch.testing.assert_close(with_graph[1], weights)


@pytest.mark.parametrize("b", [2.0, 1.5])
def test_all_ways_to_the_weights_round_alike(b):
    torch.manual_seed(0)
    network = keep_small_features(bcosify(build("resnet8", num_classes=5), b=b)).eval()
    x, targets = images(6, size=16).float(), torch.arange(6) % 5
    plain = dynamic_weights(network, x, targets)
    with_graph = dynamic_weights(network, x, targets, create_graph=True)
    point = x.clone().requires_grad_()
    with explanation_mode(network):
        logits = network(point)
        (weights,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), point)
    for found in (with_graph, (logits, weights)):
        assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


def test_images_that_want_a_gradient_of_a_loss_on_the_weights_get_it():
    network = small_network()

    def loss(x):
        logits, weights = dynamic_weights(network, x, torch.arange(4) % 3, create_graph=True)
        return logits.square().sum() + weights.square().sum()

    asking, step = images().requires_grad_(), torch.randn_like(images())
    slope = torch.autograd.grad(loss(asking), asking)[0].mul(step).sum()
    measured = (loss(images() + 1e-6 * step) - loss(images() - 1e-6 * step)) / 2e-6
    assert slope.item() == pytest.approx(measured.item(), rel=1e-4)
    silent = images()
    loss(silent).backward()
    assert silent.grad is None


def test_mean_referenced_contributions_sum_to_the_logit():
    model, x, target = small_network().train(), images(), torch.tensor([0, 1, 2, 0])
    for _ in range(50):
        model(x)
    model.eval()
    logits, weights = dynamic_weights(model, x, target)
    total = (weights * (x - model.mean[:, None, None])).sum((1, 2, 3))
    torch.testing.assert_close(total, logits[range(4), target] - model.logit_bias)


def test_a_batch_is_explained_as_its_images_alone():
    model, x, target = small_network().eval(), images(), torch.tensor([0, 1, 2, 0])
    alone = torch.cat([dynamic_weights(model, x[i : i + 1], target[i : i + 1])[1] for i in range(4)])
    torch.testing.assert_close(dynamic_weights(model, x, target)[1], alone)


def test_explanation_mode_gives_the_weights_inside_and_ordinary_gradients_after():
    model, x, target = small_network().eval(), images(), torch.tensor([0, 1, 2, 0])
    _, weights = dynamic_weights(model, x, target)
    x.requires_grad_()

    def gradient():
        return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0]

    plain = gradient()
    with explanation_mode(model), explanation_mode(model):
        torch.testing.assert_close(gradient(), weights)
    with pytest.raises(RuntimeError, match="inside"), explanation_mode(model):
        raise RuntimeError("inside")
    torch.testing.assert_close(gradient(), plain)
    assert not torch.allclose(plain, weights)


def test_explanation_mode_nests_without_ending_the_outer_block():
    model, x, target = small_network().eval(), images(), torch.tensor([0, 1, 2, 0])
    _, weights = dynamic_weights(model, x, target)
    x.requires_grad_()
    with explanation_mode(model):
        with explanation_mode(model):
            model(x)
        dynamic_weights(model, x.detach(), target)
        (after,) = torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)
    torch.testing.assert_close(after, weights)


def test_backward_after_the_block_of_a_forward_pass_inside_it_is_held_too():
    model, x, target = small_network().eval(), images().requires_grad_(), torch.tensor([0, 1, 2, 0])
    with explanation_mode(model):
        chosen = model(x).gather(1, target[:, None]).sum()
    (late,) = torch.autograd.grad(chosen, x)
    torch.testing.assert_close(late, dynamic_weights(model, x.detach(), target)[1])


def test_a_loss_on_weights_taken_in_the_block_has_its_full_gradient():
    model, x, target = small_network().eval(), images(), torch.tensor([0, 1, 2, 0])
    logits, weights = dynamic_weights(model, x, target, create_graph=True)
    parameter = next(model.parameters())
    (expected,) = torch.autograd.grad(weights.square().sum() + logits.square().sum(), parameter)
    x.requires_grad_()
    with explanation_mode(model):
        logits = model(x)
        (weights,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), x, create_graph=True)
    (gradient,) = torch.autograd.grad(weights.square().sum() + logits.square().sum(), parameter)
    torch.testing.assert_close(gradient, expected)


def test_one_model_in_explanation_mode_leaves_another_alone():
    one, other, x = small_network().eval(), small_network().eval(), images().requires_grad_()
    (plain,) = torch.autograd.grad(other(x)[:, 0].sum(), x)
    with explanation_mode(one):
        (beside,) = torch.autograd.grad(other(x)[:, 0].sum(), x)
    torch.testing.assert_close(beside, plain)


def test_contribution_map_and_picture():
    model, x, target = small_network().eval(), images(2, 9), torch.tensor([0, 1])
    _, weights = dynamic_weights(model, x, target)
    contributions = contribution_map(x, weights)
    assert contributions.shape == (2, 9, 9)
    torch.testing.assert_close(contributions.sum((1, 2)), (weights * x).sum((1, 2, 3)))
    picture = rgba(x, weights, smooth=3)
    assert picture.shape == (2, 9, 9, 4)
    assert picture.min() >= 0
    assert picture.max() <= 1
    torch.testing.assert_close(rgba(x[1:], weights[1:], smooth=3), picture[1:])
    with pytest.raises(ValueError, match="odd"):
        rgba(x, weights, smooth=4)


def test_opacities_on_one_scale_compare():
    x, weights = torch.rand(1, 6, 8, 8).expand(2, -1, -1, -1), torch.rand(1, 6, 8, 8).repeat(2, 1, 1, 1)
    weights[1] /= 4
    alone, together = (
        rgba(x, weights, smooth=3, percentile=100, one_scale=one_scale) for one_scale in (False, True)
    )
    torch.testing.assert_close(alone[0], alone[1])
    torch.testing.assert_close(together[0], alone[0])
    torch.testing.assert_close(together[1, ..., 3], alone[1, ..., 3] / 4)


def test_rgba_shows_the_colour_that_the_weights_ask_for():
    weights = torch.zeros(1, 6, 5, 5)
    weights[:, 0] = 1.0  # red speaks for the class
    weights[:, 4] = weights[:, 5] = 0.5  # and so does the absence of green and blue
    x = add_inverse(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 5, 5))
    red, green, blue, alpha = rgba(x, weights, smooth=1)[0, 2, 2]
    assert (red, green, blue, alpha) == pytest.approx((1, 0, 0, 1))


def test_many_classes_are_each_explained_as_alone():
    model, x = small_network().eval(), images()
    targets = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]])
    logits, weights = dynamic_weights(model, x, targets)
    assert weights.shape == (4, 2, *x.shape[1:])
    for index in range(2):
        alone_logits, alone = dynamic_weights(model, x, targets[:, index])
        torch.testing.assert_close(weights[:, index], alone)
        torch.testing.assert_close(logits, alone_logits)


def test_parameters_stay_trainable_and_copies_are_outside_explanation_mode():
    model, x, target = small_network().eval(), images(), torch.tensor([0, 1, 2, 0])
    dynamic_weights(model, x, target)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with explanation_mode(model):
        copied = copy.deepcopy(model)
    x.requires_grad_()
    (plain,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    torch.testing.assert_close(torch.autograd.grad(copied(x)[:, 0].sum(), x)[0], plain)


def test_without_targets_the_predicted_class_is_explained():
    model, x = small_network(), images()
    logits, weights = dynamic_weights(model, x)
    same_logits, wanted = dynamic_weights(model, x, logits.argmax(1))
    assert torch.equal(logits, same_logits)
    assert torch.equal(weights, wanted)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_explanations_are_the_same_whatever_gradient_mode_their_caller_is_in(mode, frozen):
    model, target = small_network().eval().requires_grad_(not frozen), torch.tensor([0, 1, 2, 0])
    expected_logits, expected = dynamic_weights(model, images(), target)
    with MODES[mode]():
        x, classes = images(), target.clone()  # inference tensors if the mode is inference mode
        for create_graph in (False, True):
            logits, weights = dynamic_weights(model, x, classes, create_graph=create_graph)
            torch.testing.assert_close(logits, expected_logits)
            torch.testing.assert_close(weights, expected)
        _, several = dynamic_weights(model, x, classes[:, None].expand(4, 2))
        torch.testing.assert_close(several[:, 1], expected)
        with explanation_mode(model):
            point = x.clone().requires_grad_()
            (found,) = torch.autograd.grad(model(point).gather(1, target[:, None]).sum(), point)
        torch.testing.assert_close(found, expected)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    if not frozen:
        weights.square().sum().backward()
        assert all(
            parameter.grad is not None
            for name, parameter in model.named_parameters()
            if name.endswith("weight")
        )


def test_autocast_without_gradients_before_an_explanation_leaves_its_gradients():
    model, target = small_network().float().eval(), torch.tensor([0, 1, 2, 0])
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(x)  # autocast caches half-precision weights, here without a graph
        _, weights = dynamic_weights(model, x, target, create_graph=True)
    weights.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        _, in_inference = dynamic_weights(model, x, target)
    torch.testing.assert_close(in_inference, weights.detach())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_network_made_in_inference_mode_is_explained():
    torch.manual_seed(0)
    with torch.inference_mode():
        model = bcosify(build("resnet8", num_classes=3)).eval()
        _, found = dynamic_weights(model, images().float())
    torch.testing.assert_close(found, dynamic_weights(model, images().float())[1])
