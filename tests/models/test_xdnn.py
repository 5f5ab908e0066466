"""X-DNN ResNets: input × gradient equals integrated gradients; they train at any depth."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from pipelines.attribution import Attribution, attribute, explain, last_features
from pipelines.bcos import BcosConv2d, BcosLinear, add_inverse, bcosify
from pipelines.losses import energy_loss
from pipelines.models import ModelError, ModelSpec, WeightsError, assemble, build
from pipelines.models.xdnn import DEPTHS, XFIXUPS
from tests.support.families import (
    check_conversion,
    check_frozen_jacobian,
    normalised,
    pictures,
    relative,
    shake,
)

SMALL = {"width": 4, "stem_stride": 1}
NETWORKS = [
    ("xfixup_resnet18", SMALL),
    ("xfixup_resnet50", SMALL),
    ("xfixup_resnet18", {"width": 4}),
    ("xfixup_resnet50", {"width": 4}),
]


@pytest.fixture(autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(name, options=SMALL, *, initial=False):
    """A small network with five classes; unless `initial`, weights that start at 0 are random instead."""
    torch.manual_seed(0)
    network = build(name, num_classes=5, options=options)
    return network if initial else shake(network)


def model_of(name, options):
    return assemble(
        ModelSpec(name, tuple("abcde"), 32, "conventional", options=options), small(name, options)
    ).eval()


# Function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", XFIXUPS)
def test_weights_are_those_of_the_resnet_without_norms_and_biases(name):
    with torch.device("meta"):
        network, resnet = build(name), torchvision.models.get_model(name.removeprefix("xfixup_"))
    matrices = {key: value.shape for key, value in resnet.state_dict().items() if value.ndim > 1}
    expected = {key.replace("downsample.0.", "downsample."): shape for key, shape in matrices.items()}
    assert {key: value.shape for key, value in network.state_dict().items()} == expected
    assert network(torch.rand(1, 3, 224, 224, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_the_network_is_nonnegatively_homogeneous(name, options):
    network, z = small(name, options), normalised(pictures(4, 32))
    with torch.no_grad():
        logits = network(z)
        assert relative(network(0 * z), logits) == 1
        for scale in (1e-3, 0.3, 7, 1e3):
            assert relative(network(scale * z), scale * logits) <= 1e-5
        assert relative(network(-z), -logits) > 0.1


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_input_x_gradient_is_integrated_gradients_and_sums_to_the_logit(name, options):
    model, images, targets = (
        model_of(name, options).double(),
        add_inverse(pictures(4, 64).double()),
        torch.tensor([0, 1, 2, 4]),
    )
    maps = attribute(model, images, targets, method="input_x_gradient")
    # In float32, rounding takes a few ReLUs of deep networks across 0, which changes a map by about 1e-3.
    assert relative(maps, attribute(model, images, targets, method="integrated_gradients", steps=8)) <= 1e-7
    model, images = model.float(), images.float()
    logits = model(images).detach().gather(1, targets[:, None])[:, 0]
    for layer in (
        None,
        *(f"network.{name}" for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4")),
    ):
        maps = attribute(model, images, targets, method="input_x_gradient", layer=layer, resize=False)
        assert relative(maps.sum((1, 2)), logits) <= 1e-5
    assert last_features(model, images) == "network.layer4"


def test_a_network_with_norms_and_biases_has_neither_property():
    model = assemble(ModelSpec("resnet8", tuple("abcde"), 32, "conventional", options={"width": 4})).train()
    images, targets = add_inverse(pictures(4, 32)), torch.tensor([0, 1, 2, 4])
    model(images)  # statistics that are not the initial ones
    maps = attribute(model.eval(), images, targets, method="input_x_gradient")
    assert relative(maps, attribute(model, images, targets, method="integrated_gradients")) > 0.05
    assert relative(maps.sum((1, 2)), model(images).detach().gather(1, targets[:, None])[:, 0]) > 0.05


# Initialisation and training --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xfixup_resnet18", "xfixup_resnet50"])
def test_branches_and_logits_start_at_zero_and_shortcuts_carry_the_features(name):
    network, z = small(name, initial=True), normalised(pictures(2, 32))
    seen = []
    for module in network.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            module.register_forward_hook(
                lambda block, inputs, output: seen.append((block, inputs[0], output))
            )
    assert not network(z).any()
    assert len(seen) == sum(DEPTHS[XFIXUPS[name]][0])
    for block, x, output in seen:
        assert torch.equal(output, (block.downsample or nn.Identity())(x).relu())
        assert output.any()


@pytest.mark.parametrize(
    ("name", "scale"), [("xfixup_resnet18", 8 ** (-1 / 2)), ("xfixup_resnet50", 16 ** (-1 / 4))]
)
def test_the_other_convolutions_of_a_branch_are_scaled_with_the_number_of_branches(name, scale):
    network = small(name, {"width": 32}, initial=True)
    for key, module in network.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        he = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
        starts_at = module.weight.square().mean().sqrt().item() / he
        last = "conv3" if name.endswith("50") else "conv2"
        of_branch = ".conv" in key
        assert starts_at == pytest.approx(
            0 if key.endswith(f".{last}") else scale if of_branch else 1, rel=0.1
        )


def test_activations_stay_bounded_at_any_depth_from_the_first_steps_on():
    def trained(network, steps=4):
        """Second moments of the last features before and after training, and the largest |logit| after it."""
        torch.manual_seed(1)
        images, targets = torch.randn(10, 3, 16, 16), torch.arange(10) % 5
        features = []
        network.layer4.register_forward_hook(
            lambda *arguments: features.append(arguments[-1].detach().square().mean().item())
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(steps):
            logits = network(images)
            optimizer.zero_grad()
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
        return features[0], features[-1], logits.detach().abs().max().item()

    for depth in (18, 50, 152):
        before, after, moved = trained(small(f"xfixup_resnet{depth}", initial=True))
        assert 1e-3 < before < 1
        assert after == pytest.approx(before, rel=0.1)
        assert 1e-3 < moved < 1
    plain = small("xfixup_resnet152", initial=True)
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    assert trained(plain, steps=1)[0] > 1e6


@pytest.mark.parametrize("name", ["xfixup_resnet18", "xfixup_resnet50"])
def test_gradients_reach_every_parameter_within_two_steps(name):
    network, images = small(name, initial=True), normalised(pictures(10, 16))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    reached = []
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(images), torch.arange(10) % 5).backward()
        reached.append({key for key, parameter in network.named_parameters() if parameter.grad.any()})
        optimizer.step()
    everything = {key for key, _ in network.named_parameters()}
    last = ".conv3." if name.endswith("50") else ".conv2."
    assert reached[0] == {"fc.weight"}  # behind weights of 0 nothing has a gradient
    assert reached[1] == {key for key in everything if last in key or ".conv" not in key}
    assert reached[2] == everything


def test_a_loss_on_the_map_reaches_every_parameter():
    model, images = model_of("xfixup_resnet18", SMALL), add_inverse(pictures(4, 32))
    masks = torch.zeros(4, 32, 32)
    masks[:, 8:24, 8:24] = 1
    _, maps = explain(
        model, images, torch.tensor([[0], [1], [2], [4]]), Attribution("input_x_gradient"), create_graph=True
    )
    energy_loss(maps[:, 0], masks).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


# Weights and bad input --------------------------------------------------------------------------------------


def test_a_file_as_the_published_trainer_writes_it_loads(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    network = shake(build("xfixup_resnet50", options={"width": 2}))
    optimizer = torch.optim.SGD([{"params": network.parameters(), "initial_lr": 0.1}], lr=0.1, momentum=0.9)
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    told = {
        "epoch": 100,
        "arch": "xfixup_resnet50",
        "best_acc1": torch.tensor(70.0),
        "optimizer": optimizer.state_dict(),
    }
    torch.save({**told, "state_dict": state}, "xfixup_resnet50_model_best.pth.tar")
    loaded = build("xfixup_resnet50", "xfixup_resnet50_model_best.pth.tar", options={"width": 2})
    assert all(torch.equal(value, state[f"module.{key}"]) for key, value in loaded.state_dict().items())
    other = build(
        "xfixup_resnet50", "./xfixup_resnet50_model_best.pth.tar", num_classes=20, options={"width": 2}
    )
    assert other.fc.weight.shape == (20, 64)
    assert other.fc.bias is None  # a new head keeps the network homogeneous
    assert "1000 classes, replaced by a new one with 20" in caplog.text
    with pytest.raises(
        WeightsError, match=r"misshaped: conv1\.weight \(2, 3, 7, 7\) instead of \(2, 3, 3, 3\)"
    ):
        build(
            "xfixup_resnet50", "./xfixup_resnet50_model_best.pth.tar", options={"width": 2, "stem_stride": 1}
        )


@pytest.mark.parametrize(
    ("name", "arguments", "error", "told"),
    [
        (
            "xfixup_resnet18",
            {"options": {"norm": "batch"}},
            ModelError,
            "xfixup_resnet18 does not take the options .*norm",
        ),
        ("xfixup_resnet18", {"options": {"stem_stride": 3}}, ModelError, "stride 1, 2 or 4, not 3"),
        ("xfixup_resnet18", {"options": {"width": 0}}, ModelError, "width .* 1 or more, not 0"),
        ("xfixup_resnet51", {}, ModelError, "unknown model 'xfixup_resnet51'; near it: xfixup_resnet50"),
        ("xfixup_resnet50", {"weights": "IMAGENET1K_V1"}, WeightsError, "no tagged weights"),
    ],
)
def test_what_does_not_exist_is_said_in_one_line(name, arguments, error, told):
    with pytest.raises(error, match=told) as raised:
        build(name, **arguments)
    assert "\n" not in str(raised.value)


# Conversion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_conversion_preserves_the_function(name, options):
    check_conversion(small(name, options), pictures(2, 32))


@pytest.mark.parametrize("gap_reorder", [True, False])
def test_dynamic_weights_are_the_jacobian_with_the_factors_frozen(gap_reorder):
    check_frozen_jacobian(small("xfixup_resnet18"), pictures(2, 32), gap_reorder=gap_reorder)


def test_every_layer_becomes_bcos_and_the_pool_of_the_stem_an_average():
    network = bcosify(small("xfixup_resnet18", {"width": 4}))
    layers = {name for name, module in network.named_modules() if isinstance(module, BcosConv2d | BcosLinear)}
    assert {f"{name}.weight" for name in layers} == {name for name, _ in network.named_parameters()}
    assert isinstance(network.body.maxpool, nn.AvgPool2d)
