"""Compiled networks compute what eager ones do, in and out of explanation mode.

They compile to one graph per mode, and never recompile.
"""

import copy

import pytest
import torch
from torch import nn

from pipelines.bcos import add_inverse, bcosify, dynamic_weights
from pipelines.models import build

pytestmark = pytest.mark.compile
BACKEND = "aot_eager"  # traces and differentiates as inductor does, without its code generation


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small_network(**choices):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, groups=1),
        nn.GroupNorm(1, 5),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    return bcosify(network, **choices)


def batch(count=4, size=9):
    torch.manual_seed(1)
    return add_inverse(torch.rand(count, 3, size, size)), torch.arange(count) % 3


def loss(model, images, targets):
    logits, weights = dynamic_weights(model, images, targets, create_graph=True)
    return (weights * weights.detach().sign()).sum() * 0.1 + weights.square().sum() + logits.square().sum()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "choices", [{}, {"b_mode": "learned", "b": 1.5}, {"bias": "keep", "norm": "centered"}]
)
def test_a_compiled_loss_on_weights_and_logits_has_the_eager_gradient(choices, training):
    eager = small_network(**choices).train(training)
    compiled = copy.deepcopy(eager)
    images, targets = batch()
    expected = loss(eager, images, targets)
    got = torch.compile(loss, fullgraph=True, backend=BACKEND)(compiled, images, targets)
    torch.testing.assert_close(got, expected)
    ours, theirs = (
        torch.autograd.grad(value, list(m.parameters())) for value, m in ((got, compiled), (expected, eager))
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        compiled.buffers(), eager.buffers(), strict=True
    ):  # one update of running statistics
        torch.testing.assert_close(one, other)


def test_a_compiled_network_toggles_explanation_mode_without_recompiling():
    eager = small_network().eval()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend=BACKEND)
    images, targets = batch()

    def use(model):
        logits = model(images)
        explained = dynamic_weights(model, images, targets)
        with torch.no_grad():
            return logits.detach(), *explained, model(images)

    use(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            for one, other in zip(use(compiled), use(eager), strict=True):
                torch.testing.assert_close(one, other)


def test_a_compiled_network_explains_several_classes_from_one_forward_pass():
    eager = small_network().eval()
    compiled = copy.deepcopy(eager)
    # only inductor frees tensors (donated buffers) that a second backward pass needs
    compiled.compile(fullgraph=True, backend="inductor")
    images, _ = batch()
    targets = torch.tensor([[0, 1, 2]] * len(images))
    for one, other in zip(
        dynamic_weights(compiled, images, targets), dynamic_weights(eager, images, targets), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_schedule_of_b_does_not_recompile():
    from pipelines.bcos import set_b

    model = small_network(b_mode="scheduled", b=1.0).train()
    model.compile(fullgraph=True, backend=BACKEND)
    images, _ = batch()
    before = model(images)
    with torch.compiler.set_stance("fail_on_recompile"):
        set_b(model, 1.5)
        assert not torch.allclose(model(images), before)


@pytest.mark.parametrize("name", ["resnet8", "timm:vit_tiny_patch16_224", "simple_vit_ti"])
def test_whole_networks_are_one_graph(name):
    options = {"img_size": 32, "depth": 2} if name.startswith("timm") else {}
    torch.manual_seed(0)
    eager = bcosify(build(name, num_classes=4, options=options)).eval()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend=BACKEND)
    images, targets = batch(2, 32)
    for one, other in zip(
        dynamic_weights(compiled, images, targets), dynamic_weights(eager, images, targets), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_compiled_loss_has_the_eager_gradient_with_a_layer_at_two_places_and_dropout(drop):
    shared = nn.SiLU()
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), shared, nn.Dropout(drop), nn.Conv2d(4, 4, 3), shared),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )
    torch.manual_seed(2)
    model = bcosify(network).train()

    def gradients(function):
        torch.manual_seed(3)
        return torch.autograd.grad(function(model, *batch()), list(model.parameters()))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(loss), rtol=1e-4, atol=1e-6)


def test_compiled_the_predicted_class_is_explained_by_default():
    model = small_network().eval()
    images, _ = batch()
    logits, wanted = dynamic_weights(model, images)
    found = torch.compile(dynamic_weights, fullgraph=True, backend=BACKEND)(model, images)
    torch.testing.assert_close(found, (logits, wanted))
