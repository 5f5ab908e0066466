"""Attribution maps: completeness, formulas, independence of the batch, models that are left untouched."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from pipelines.attribution import METHODS, Attribution, attribute, explain, last_features
from pipelines.bcos import add_inverse, bcosify, contribution_map, dynamic_weights
from pipelines.models import ConventionalNetwork, ModelError, build

SIZE, CLASSES = 12, 5


class Body(nn.Module):
    """Two convolutions, a pool and a linear layer, with in-place operations where possible."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.relu1 = nn.ReLU(inplace=True)
        self.stage = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=bias), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(8, CLASSES, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.flatten(self.pool(self.stage(self.relu1(self.conv1(x))))))


def conventional(bias: bool = False) -> ConventionalNetwork:
    torch.manual_seed(0)
    return ConventionalNetwork(Body(bias)).eval()


def bcos() -> nn.Module:
    torch.manual_seed(0)
    return bcosify(Body(True)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return add_inverse(torch.rand(3, 3, SIZE, SIZE))


TARGETS = torch.tensor([0, 4, 2])
MODELS = {"conventional": conventional, "bcos": bcos}


def test_input_x_gradient_sums_to_the_logit_of_a_bias_free_piecewise_linear_network(images):
    model = conventional()
    maps = attribute(model, images, TARGETS, method="input_x_gradient")
    torch.testing.assert_close(maps.sum((1, 2)), model(images).gather(1, TARGETS[:, None])[:, 0])


def test_integrated_gradients_equal_input_x_gradient_in_such_a_network(images):
    model = conventional()
    maps = attribute(model, images, TARGETS, method="integrated_gradients", steps=8)
    torch.testing.assert_close(maps, attribute(model, images, TARGETS, method="input_x_gradient"))


def test_integrated_gradients_are_complete_with_biases(images):
    model = conventional(bias=True)
    maps = attribute(model, images, TARGETS, method="integrated_gradients", steps=512)
    whole = (model(images) - model(model.mean[:, None, None].expand_as(images))).gather(1, TARGETS[:, None])[
        :, 0
    ]
    torch.testing.assert_close(maps.sum((1, 2)), whole, atol=1e-4, rtol=1e-3)


def test_bcos_maps_are_the_contributions_of_the_dynamic_weights(images):
    model = bcos()
    logits, weights = dynamic_weights(model, images, TARGETS)
    torch.testing.assert_close(attribute(model, images, TARGETS), contribution_map(images, weights))
    centered = attribute(model, images, TARGETS, method="bcos_centered")
    torch.testing.assert_close(centered, ((images - model.mean[:, None, None]) * weights).sum(1))
    torch.testing.assert_close(
        centered.sum((1, 2)) + model.logit_bias, logits.gather(1, TARGETS[:, None])[:, 0]
    )


@pytest.mark.parametrize("layer", ["network.stage", None])
def test_gradcam_is_its_formula(images, layer):
    model = conventional(bias=True)
    body = model.network
    features = body.stage(
        body.relu1(body.conv1((images[:, :3] - model.mean[:3, None, None]) / model.std[:3, None, None]))
    )
    # the gradient of the global mean is the same at each location
    weights = body.head.weight[TARGETS] / features[0, 0].numel()
    expected = torch.einsum("nchw,nc->nhw", features, weights).clamp_min(0)
    maps = attribute(model, images, TARGETS, method="gradcam", layer=layer, resize=False)
    torch.testing.assert_close(maps, expected.detach())
    resized = attribute(model, images, TARGETS, method="gradcam", layer=layer)
    assert resized.shape == (3, SIZE, SIZE)
    torch.testing.assert_close(
        resized, nn.functional.interpolate(expected[None], (SIZE, SIZE), mode="bilinear").detach()[0]
    )


def test_the_last_features_are_a_container_before_the_pool():
    assert last_features(conventional(), torch.rand(1, 6, SIZE, SIZE)) == "network.stage"
    # although this network classifies every location
    assert last_features(bcos(), torch.rand(1, 6, SIZE, SIZE)) == "body.stage"


def test_logits_of_a_convolutional_classifier_are_no_features():
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, CLASSES, 1),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    assert last_features(ConventionalNetwork(body), torch.rand(1, 6, SIZE, SIZE)) == "network.1"


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("convnext_tiny", "features"),
        ("densenet121", "features"),
        ("efficientnet_b0", "features"),
        ("vgg11_bn", "features"),
        ("swin_t", "permute"),  # here, tokens become (N, C, H, W)
    ],
)
def test_the_last_features_of_torchvision_networks(name, features):
    with torch.device("meta"):
        body = torchvision.models.get_model(name, num_classes=CLASSES)
        assert last_features(Meta(body), torch.rand(1, 6, 64, 64)) == f"network.{features}"


@pytest.mark.parametrize(
    "name", ["simple_vit_ti", "torchvision:vit_b_16", "vitc_ti", "timm:swin_tiny_patch4_window7_224"]
)
def test_a_network_that_goes_on_with_tokens_has_no_features_for_gradcam(name):
    with torch.device("meta"):
        body = build(name, num_classes=CLASSES)
        with pytest.raises(
            ModelError, match=rf"{type(body).__name__} has no convolutional features [^\n]* GradCAM"
        ):
            last_features(Meta(body), torch.rand(1, 6, 224, 224))


class Meta(nn.Module):
    """A conventional network on six-channel images, without normalisation."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images[:, :3])


def test_integrated_gradients_in_training_mode_leave_the_running_statistics_alone(images):
    model = conventional(bias=True).train()
    model.network.stage.append(nn.BatchNorm2d(8))
    kept = copy.deepcopy(model)
    attribute(model, images, TARGETS, method="integrated_gradients")
    with torch.no_grad():
        kept(images)  # `attribute` has one such pass, for the logits
    for one, other in zip(model.buffers(), kept.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert all(module.training for module in model.modules())


def test_without_features_of_several_places_a_layer_is_asked_for(images):
    model = ConventionalNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)))
    with pytest.raises(ValueError, match="name a layer"):
        attribute(model, images, TARGETS, method="gradcam")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_many_targets_are_the_single_ones(images, kind, method):
    model = MODELS[kind]()
    targets = torch.tensor([[0, 1, 2], [4, 0, 4], [2, 3, 1]])
    many = attribute(model, images, targets, method=method)
    single = torch.stack(
        [attribute(model, images, column, method=method) for column in targets.unbind(1)], dim=1
    )
    torch.testing.assert_close(many, single)
    assert many.shape == (3, 3, SIZE, SIZE)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_without_targets_the_predicted_class_is_explained(images, kind, method):
    model = MODELS[kind]()
    logits, maps = explain(model, images, attribution=Attribution(method))
    torch.testing.assert_close(logits, model(images))
    torch.testing.assert_close(maps, attribute(model, images, logits.argmax(1), method=method))
    assert not logits.requires_grad
    assert not maps.requires_grad


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_the_batch(images, kind, method):
    model = MODELS[kind]()
    alone = torch.cat(
        [attribute(model, images[i : i + 1], TARGETS[i : i + 1], method=method) for i in range(3)]
    )
    torch.testing.assert_close(attribute(model, images, TARGETS, method=method), alone)


@pytest.mark.parametrize("method", ["bcos", "input_x_gradient"])
def test_at_the_features_the_map_sums_to_the_logit(images, method):
    model = conventional() if method == "input_x_gradient" else bcos()
    layer = "network.stage" if method == "input_x_gradient" else "body.stage"
    logits, maps = explain(model, images, TARGETS, Attribution(method, layer), resize=False)
    assert maps.shape == (3, SIZE // 2, SIZE // 2)
    torch.testing.assert_close(maps.sum((1, 2)) + model.logit_bias, logits.gather(1, TARGETS[:, None])[:, 0])


def test_a_layer_before_an_in_place_activation_is_explained_by_its_own_output(images):
    model = conventional(bias=True)
    normalised = (images[:, :3] - model.mean[:3, None, None]) / model.std[:3, None, None]
    features = model.network.conv1(normalised).detach().requires_grad_()
    body = model.network
    logits = body.head(body.flatten(body.pool(body.stage(features.relu()))))
    (gradient,) = torch.autograd.grad(logits.gather(1, TARGETS[:, None]).sum(), features)
    maps = attribute(model, images, TARGETS, method="input_x_gradient", layer="network.conv1")
    torch.testing.assert_close(maps, (features * gradient).sum(1).detach())


@pytest.mark.parametrize(
    ("method", "layer"),
    [(m, None) for m in METHODS] + [(m, "body.stage") for m in METHODS if m != "integrated_gradients"],
)
def test_a_loss_on_the_maps_has_its_full_gradient(method, layer):
    """Compares with finite differences of the maps, in float64."""
    model = bcos().double()
    images = add_inverse(
        torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    )
    targets = torch.tensor([1, 3])
    weight = model.body.conv1.weight
    direction = torch.randn_like(weight)

    def loss(graph: bool) -> torch.Tensor:
        maps = attribute(model, images, targets, method=method, layer=layer, create_graph=graph)
        return maps.square().sum()

    (gradient,) = torch.autograd.grad(loss(True), weight)
    step = 1e-6
    with torch.no_grad():
        weight += step * direction
        above = loss(False)
        weight -= 2 * step * direction
        below = loss(False)
    torch.testing.assert_close(
        (gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(images, method):
    model = bcos()
    model.body.conv1.requires_grad_(False)
    model.body.stage.train()
    before = {name: (p.clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    with torch.no_grad():
        attribute(model, images, TARGETS, method=method)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        value, requires_grad, grad = before[name]
        assert torch.equal(parameter, value)
        assert (parameter.requires_grad, parameter.grad) == (requires_grad, grad)
    assert not images.requires_grad


def test_errors_name_what_is_near(images):
    model = conventional()
    with pytest.raises(ValueError, match=r"no layer 'stage'; near it: network\.stage"):
        attribute(model, images, TARGETS, layer="stage", method="gradcam")
    with pytest.raises(ValueError, match=r"'network\.head'.*\(3, 5\)"):
        attribute(model, images, TARGETS, layer="network.head", method="gradcam")
    with pytest.raises(ValueError, match=r"unknown attribution method 'grad_cam'.*gradcam"):
        attribute(model, images, TARGETS, method="grad_cam")
    with pytest.raises(ValueError, match="input alone"):
        attribute(model, images, TARGETS, method="integrated_gradients", layer="network.stage")
    model.unused = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="takes no part"):
        attribute(model, images, TARGETS, layer="unused")


@pytest.mark.parametrize("method", ["bcos", "gradcam", "input_x_gradient", "integrated_gradients"])
def test_maps_are_the_same_where_the_caller_has_turned_gradients_off(images, method):
    model = bcos() if method == "bcos" else conventional()
    layer = "body.stage" if method == "bcos" else None
    expected = attribute(model, images, TARGETS, method=method, layer=layer)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = attribute(model, images.clone(), TARGETS.clone(), method=method, layer=layer)
        torch.testing.assert_close(found, expected)
