"""Hooks, parametrizations and forwards of instances survive the conversion, or are refused by name."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from pipelines.bcos import ConversionError, add_inverse, bcosify, convert
from pipelines.models import ModelSpec, load, save
from tests.support.families import normalised, pictures

warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)


def network(change=lambda layer: layer, index=2):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    nn.init.normal_(model[3].running_mean, 0, 0.3)
    model[index] = change(model[index])
    return model.eval()


@torch.no_grad()
def same(model, converted, dtype=torch.float32, tolerance=1e-5):
    images = pictures(3, 12).to(dtype)
    before, after = model(normalised(images)), converted(add_inverse(images))
    return bool((before - after).abs().max() <= tolerance * before.abs().max())


def trained(change):
    """Applies `change` and a forward pass in training mode, after which computed weights have a graph."""

    def changed(layer):
        layer = change(layer).train()
        layer(torch.rand(2, layer.in_channels, 8, 8))
        return layer.eval()

    return changed


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def pruned_twice(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.3)
    return prune.ln_structured(layer, "weight", 0.25, n=2, dim=0)


def doubled(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


REPARAMETRISED = {
    "spectral norm": nn.utils.spectral_norm,
    "spectral norm, trained": trained(nn.utils.spectral_norm),
    "weight norm": nn.utils.weight_norm,
    "weight norm, trained": trained(nn.utils.weight_norm),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned again": pruned_twice,
    "parametrised weight norm": parametrizations.weight_norm,
    "parametrised spectral norm": parametrizations.spectral_norm,
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "a parametrisation of one's own": doubled,
}


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_weights_that_are_computed_are_converted_as_they_are_computed(name, index):
    model = network(REPARAMETRISED[name], index)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    converted = convert(model)
    assert same(model, converted)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(type(parameter) is nn.Parameter and parameter.is_leaf for parameter in converted.parameters())
    assert not any(module._forward_pre_hooks for module in converted.modules())


def test_a_spectral_norm_in_training_mode_is_left_as_it_is():
    model = network(parametrizations.spectral_norm).train()
    state = copy.deepcopy(model.state_dict())
    converted = convert(model).eval()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert same(model.eval(), converted)


def test_what_becomes_permanent_is_said(caplog):
    with caplog.at_level("INFO"):
        convert(network(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)))
    assert caplog.messages == ["pruning at '2' becomes permanent: it does not go on during training"]


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def looked_at(layer):
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return layer


def guided(layer):
    layer.register_full_backward_hook(lambda module, before, after: before)
    return layer


def replaced(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def masked(layer):
    layer.weight.register_hook(lambda gradient: 0 * gradient)
    return layer


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (hooked, r"forward hook \(hooked.*\) at '2'"),
        (looked_at, r"forward pre-hook .* at '2'"),
        (guided, r"backward hook .* at '2'"),
        (replaced, r"Conv2d at '2' has a forward of its own \(replaced"),
        (masked, r"'2.weight' has a gradient hook"),
        (lambda layer: nn.LazyConv2d(8, 3), r"'2.weight' has no values yet"),
        (lambda layer: layer.to(torch.complex64), r"'2.weight' is complex"),
    ],
)
def test_what_would_be_lost_is_refused_in_one_line(change, told):
    with pytest.raises(ConversionError, match=told) as error:
        bcosify(network(change))
    assert "\n" not in str(error.value)


def test_a_hook_around_layers_is_refused_too():
    model = network()
    model.register_forward_hook(lambda module, inputs, output: output.flip(1))
    with pytest.raises(ConversionError, match=r"forward hook .* at 'the top'"):
        convert(model)


def test_an_image_layer_of_groups_is_refused():
    with pytest.raises(ConversionError, match="'0' takes the image in 3 groups"):
        convert(network(lambda layer: nn.Conv2d(3, 6, 3, groups=3), 0))


def test_programs_of_torchscript_are_refused():
    with pytest.raises(ConversionError, match="TorchScript"):
        convert(torch.jit.trace(network(), torch.rand(1, 3, 12, 12)))


class Tied(nn.Module):
    def __init__(self, one="b", other="c"):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Conv2d(3, 3, 3, padding=1),
        )
        self.norms = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
        self.fc = nn.Linear(3, 5)
        self.get_submodule(other).weight = self.get_submodule(one).weight

    def forward(self, x):
        return self.fc(self.norms(self.c(self.b(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("choices", [{}, {"max_out": 2}, {"bias": "keep", "norm": "centered"}])
def test_tied_weights_stay_tied(choices):
    network = bcosify(Tied(), **choices)
    assert network.body.b.weight is network.body.c.weight
    assert network.body.a.weight is not network.body.b.weight
    assert len(list(network.parameters())) == len({id(parameter) for parameter in network.parameters()})


def test_tied_weights_are_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.models.store.build", lambda *_, **__: Tied())
    model, spec = bcosify(Tied()), ModelSpec("tied", tuple("abcde"), 12, "bcos")
    save(tmp_path, model, spec)
    loaded, _ = load(tmp_path)
    assert loaded.body.b.weight is loaded.body.c.weight
    images = add_inverse(pictures(2, 12))
    torch.testing.assert_close(loaded(images), model.eval()(images))


def test_ties_that_a_conversion_would_cut_are_refused():
    with pytest.raises(ConversionError, match=r"'a' and 'b.weight' share a parameter"):
        convert(Tied("a", "b"))
    model = Tied()
    model.norms[1].bias = model.norms[0].bias
    norms = convert(model).body.norms
    assert norms[0].bias is norms[1].bias  # equal running means give equal derived biases
    model.norms[1].running_mean += 1
    with pytest.raises(ConversionError, match=r"'norms.0' and 'norms.1' share"):
        convert(model)
    centered = convert(model, norm="centered").body.norms
    assert centered[0].bias is centered[1].bias


def test_frozen_parameters_stay_frozen_and_others_are_trained():
    model = network(nn.utils.weight_norm)
    model.requires_grad_(False)
    model[7].requires_grad_(True)
    for converted in (convert(model), bcosify(model, bias="keep")):
        trained = {name for name, parameter in converted.named_parameters() if parameter.requires_grad}
        assert trained == {"body.7.weight", "body.7.bias"}
    assert all(parameter.requires_grad for parameter in convert(network()).parameters())


def test_each_module_keeps_its_training_mode():
    model = network().train()
    model[3].eval()  # a frozen norm
    converted = convert(model)
    assert {name: module.training for name, module in converted.body.named_modules()} == {
        name: module.training for name, module in model.named_modules()
    }
    assert converted.training
    assert not any(module.training for module in bcosify(network()).modules())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-6)]
)
def test_precision_is_kept(dtype, tolerance):
    model = network().to(dtype)
    converted = convert(model)
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    assert same(model, converted, dtype, tolerance)


@pytest.mark.parametrize("affine", [True, False])
def test_a_network_stays_on_its_device(affine):
    model = network(lambda layer: nn.BatchNorm2d(8, affine=affine), 3).to("meta")
    for converted in (convert(model), bcosify(model, b_mode="scheduled"), bcosify(model, b_mode="learned")):
        assert {value.device.type for value in (*converted.parameters(), *converted.buffers())} == {"meta"}
        assert converted(torch.rand(2, 6, 12, 12, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {}])
@pytest.mark.parametrize("norm", ["uncentered", "centered"])
def test_a_norm_keeps_its_statistics_and_how_many_batches_they_are_of(norm, options):
    def change(layer):
        layer = nn.BatchNorm2d(8, **options)
        for _ in range(3):
            layer(torch.randn(4, 8, 5, 5) + 2)
        return layer

    model = network(change, 3)
    converted = convert(model, norm=norm)
    assert same(model, converted)
    assert converted.body[3].num_batches_tracked == 3


def test_a_norm_without_a_bias_is_converted():
    model = network()
    model[3].bias = None
    nn.init.uniform_(model[3].weight, 0.5, 2)
    assert same(model, convert(model))
    assert same(model, convert(model, norm="centered"))


class Renamed(nn.Conv2d):
    def __init__(self, *arguments):
        super().__init__(*arguments)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 3


def test_a_subclass_has_the_rule_of_its_base_unless_it_changes_what_that_computes():
    model = network(lambda layer: Renamed(8, 8, 3))
    assert same(model, convert(model))
    with pytest.raises(ConversionError, match="Standardised at '2'"):
        convert(network(lambda layer: Standardised(8, 8, 3)))


@pytest.mark.compile
def test_a_compiled_network_is_converted_as_what_it_was_made_of():
    model = network()
    assert same(model, convert(torch.compile(model)))
    model.append(torch.compile(nn.Linear(5, 4)))
    assert same(nn.Sequential(*model[:-1], model[-1]._orig_mod), convert(model))


def test_parameters_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model = bcosify(network(), b_mode="learned", max_out=2)
    model(add_inverse(pictures(2, 12))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
