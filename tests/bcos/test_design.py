"""Design choices take effect, or else are recorded as off, or refused if the caller asked for them."""

import logging
import math
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from open_clip.modified_resnet import ModifiedResNet
from torch import nn

# imported here, so that the test that removes all rules restores these, too
import pipelines.models.rules.open_clip  # noqa: F401
from pipelines.bcos import BcosConv2d, ConversionError, LocationsToBatch, add_inverse, bcosify, convert
from pipelines.models import ModelSpec, assemble, build, load, published, read_spec, save
from tests.support.families import pictures, relative, settle, shake


class Functional(nn.Module):
    """A network of one convolution whose activation and pool are functions, without biases and norms."""

    def __init__(self, activation=None):
        super().__init__()
        self.conv, self.act, self.fc = (
            nn.Conv2d(3, 8, 3, bias=False),
            activation or nn.Identity(),
            nn.Linear(8, 5, bias=False),
        )

    def forward(self, x):
        return self.fc(F.relu(self.act(self.conv(x))).mean((2, 3)))


IDLE = {
    "bias": "remove",
    "norm": "uncentered",
    "stem_pool": "average",
    "gap_reorder": True,
    "activation": "remove",
}


OTHERS = [("bias", "decay"), ("norm", "centered"), ("position_embedding", "remove"), ("projection", "bcos")]


@pytest.mark.parametrize(("choice", "value"), [*IDLE.items(), *OTHERS])
def test_a_choice_that_was_asked_for_and_finds_nothing_is_an_error(choice, value):
    with pytest.raises(ConversionError, match=rf"nothing in Functional for {choice}={value!r}") as told:
        bcosify(Functional(), **{choice: value})
    assert "\n" not in str(told.value)


def test_defaults_that_find_nothing_are_said_and_the_design_has_what_took_effect(caplog):
    with caplog.at_level(logging.INFO):
        network = bcosify(Functional())
    (message,) = caplog.messages
    assert all(f"{choice}={value!r}" in message for choice, value in IDLE.items() if choice != "activation")
    assert network.design == {
        **{
            "b": 2.0,
            "b_mode": "fixed",
            "bias": "keep",
            "norm": "uncentered",
            "stem_pool": "keep",
            "gap_reorder": False,
        },
        **{"activation": "keep", "position_embedding": "keep", "projection": "linear", "logit_bias": None},
        **{"temperature": 1.0, "normalize_weight": False, "max_out": 1},
    }
    caplog.clear()
    network = bcosify(torchvision.models.resnet18(num_classes=5), activation="remove", bias="decay")
    assert caplog.messages == []
    acted = {"bias": "decay", "stem_pool": "average", "gap_reorder": True, "activation": "remove"}
    assert acted.items() <= network.design.items()


def test_activations_that_are_functions_beside_some_that_are_modules_are_an_error():
    with pytest.raises(
        ConversionError, match=r"cannot take relu away, a function in the forward of Functional at 'inner'"
    ):
        bcosify(Nested(), activation="remove")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Functional(nn.ReLU())

    def forward(self, x):
        return self.inner(x)


def test_a_shared_activation_is_removed_wherever_it_stands():
    act = nn.ReLU()
    layers = [
        nn.Conv2d(3, 4, 3),
        act,
        nn.Conv2d(4, 4, 3),
        act,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ]
    network = bcosify(nn.Sequential(*layers), activation="remove")
    assert not any(isinstance(module, nn.ReLU) for module in network.modules())


def test_what_the_params_leave_at_its_default_is_no_error_and_the_saved_spec_says_what_took_effect(
    tmp_path, caplog
):
    whole = {
        "b": 2.0,
        "bias": "remove",
        "norm": "uncentered",
        "stem_pool": "average",
        "gap_reorder": True,
        "activation": "keep",
    }
    spec = ModelSpec("resnet8", ("a", "b", "c"), 16, "bcos", design=whole)
    model = assemble(spec)
    save(tmp_path, model, spec)
    design = read_spec(tmp_path).design
    assert (design["stem_pool"], design["gap_reorder"], design["bias"]) == ("keep", True, "remove")
    caplog.clear()
    loaded, _ = load(tmp_path)
    images = add_inverse(pictures(2, 16))
    torch.testing.assert_close(loaded(images), model.eval()(images))
    with pytest.raises(ConversionError, match="norm='centered'"):
        assemble(
            ModelSpec(
                "xfixup_resnet18", ("a", "b"), 16, "bcos", design={"norm": "centered"}, options={"width": 4}
            )
        )


def test_a_model_of_an_earlier_version_still_loads(tmp_path):
    spec = ModelSpec("xfixup_resnet18", ("a", "b"), 16, "bcos", options={"width": 4})
    save(tmp_path, assemble(spec), spec)
    path = tmp_path / "model.json"
    # earlier versions recorded the choice of norm even if the network had no norm
    path.write_text(path.read_text().replace('"uncentered"', '"uncentered_unshifted"'))
    assert read_spec(tmp_path).design["norm"] == "uncentered_unshifted"
    load(tmp_path)


# Towers -----------------------------------------------------------------------------------------------------


def without(name, head):
    model = build(name)
    model.set_submodule(head, nn.Identity())
    return model


VIT = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_width": 16}
TOWERS = {
    "timm's ViT": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT),
    "timm's ResNet": lambda: timm.create_model("resnet18", num_classes=0, **RESNET),
    "timm's MobileNet v3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
    "a CIFAR ResNet": lambda: without("resnet8", "linear"),
    "DenseNet": lambda: without("densenet121", "classifier"),
    "MobileNet v3": lambda: without("mobilenet_v3_small", "classifier.3"),
    "X-DNN": lambda: without("xfixup_resnet18", "fc"),
    "SimpleViT": lambda: without("simple_vit_ti", "linear_head.linear"),
    "its own": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}


@pytest.mark.parametrize("name", TOWERS)
def test_an_embedding_tower_has_no_logit_bias(name):
    torch.manual_seed(0)
    network = bcosify(TOWERS[name]())
    assert network.logit_bias == 0
    assert not any(isinstance(module, LocationsToBatch) for module in network.modules())
    assert bcosify(TOWERS["its own"](), logit_bias=-3.0).logit_bias == -3.0


class HeadFirst(nn.Module):
    """A network whose classifier is defined before its features."""

    def __init__(self, last=True):
        super().__init__()
        self.fc = nn.Linear(8, 5)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.last = last

    def forward(self, x):
        x = self.features(x).flatten(1)
        return self.fc(x) if self.last else x


def test_a_classifier_is_found_wherever_it_is_defined():
    assert bcosify(HeadFirst()).logit_bias == pytest.approx(-math.log(4))
    assert bcosify(HeadFirst(last=False)).logit_bias == 0
    assert bcosify(build("squeezenet1_1", num_classes=7)).logit_bias == pytest.approx(-math.log(6))


class Excited(nn.Module):
    """A network with a gate that has a global pool, and whose own global pool is a function."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.gate = Gated()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.gate(self.conv(x)).mean((2, 3)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.reduce = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x * self.reduce(self.pool(x))


def test_the_pool_of_a_gate_is_not_taken_for_that_of_the_classifier():
    network = bcosify(Excited())
    assert not network.design["gap_reorder"]
    assert network(add_inverse(pictures(2, 12))).shape == (2, 5)
    with pytest.raises(ConversionError, match="gap_reorder"):
        bcosify(Excited(), gap_reorder=True)


# Position embeddings ----------------------------------------------------------------------------------------

TRANSFORMERS = {
    "timm": (
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT),
        {"pos_embed", "cls_token"},
    ),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=5),
        {"pos_embedding", "class_token"},
    ),
}


@pytest.mark.parametrize("library", TRANSFORMERS)
def test_without_position_embedding_the_order_of_patches_does_not_matter(library):
    torch.manual_seed(0)
    make, names = TRANSFORMERS[library]
    source, images = shake(make()), add_inverse(pictures(2, 32).double())
    moved = images.roll(8, dims=3)  # by the width of one patch
    networks = (
        bcosify(source, position_embedding=choice, logit_bias=0.0).double() for choice in ("keep", "remove")
    )
    kept, removed = (settle(network, images) for network in networks)
    with torch.no_grad():
        assert relative(removed(moved), removed(images)) <= 1e-6
        assert relative(kept(moved), kept(images)) > 1e-3
    parameters = {name.rpartition(".")[2] for name, _ in removed.named_parameters()}
    assert names <= {name.rpartition(".")[2] for name, _ in kept.named_parameters()}
    assert not names & (parameters | {name.rpartition(".")[2] for name in removed.state_dict()})
    assert removed.design["position_embedding"] == "remove"


# Rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["torchvision", "timm", "open_clip"])
def test_rules_of_a_library_are_found_whatever_was_imported(library, monkeypatch):
    converting = sys.modules["pipelines.bcos.convert"]
    own = {
        kind: rule
        for kind, rule in converting._RULES.items()
        if not rule.__module__.startswith("pipelines.models")
    }
    assert torchvision.models.DenseNet not in own
    monkeypatch.setattr(converting, "_RULES", own)
    for name in [name for name in sys.modules if name.startswith("pipelines.models.rules")]:
        monkeypatch.delitem(sys.modules, name)
    models = {
        "open_clip": lambda: ModifiedResNet([1, 1, 1, 1], 6, 2, image_size=32, width=8),
        "torchvision": lambda: torchvision.models.DenseNet(8, (1, 1), 16, num_classes=3),
        "timm": lambda: timm.create_model(
            "densenet121", num_classes=3, growth_rate=8, block_config=(1, 1, 1, 1)
        ),
    }
    network = bcosify(models[library]())
    assert isinstance(
        network.body.conv1 if library == "open_clip" else network.body.features.conv0, BcosConv2d
    )
    assert any(isinstance(module, LocationsToBatch) for module in network.modules()) == (
        library != "open_clip"
    )
    assert all(type(layer) is nn.Linear for name, layer in network.named_modules() if name.endswith("q_proj"))


def test_missing_rules_are_an_error(monkeypatch):
    monkeypatch.setitem(
        sys.modules["pipelines.bcos.convert"].RULES, "torchvision", "pipelines.models.no_rules"
    )
    with pytest.raises(ConversionError, match=r"rules that convert a .* cannot be imported"):
        convert(torchvision.models.DenseNet(8, (1, 1), 16, num_classes=3))


def test_published_designs_are_what_their_networks_have():
    # a ViT has no stem pool to replace
    without_effect = {"b-cos-v2:vitc_ti": {"stem_pool": "keep"}, "b-cosification:resnet18": {}}
    for name, unchosen in without_effect.items():
        spec = published.published_spec(name)
        design = assemble(spec).design
        assert {choice: design[choice] for choice in spec.design} == {**spec.design, **unchosen}
