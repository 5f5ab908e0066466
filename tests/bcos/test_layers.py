import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipelines.bcos import (
    BcosBatchNorm,
    BcosConv2d,
    BcosGroupNorm,
    BcosLayerNorm,
    BcosLinear,
    explanation_mode,
    layer_b,
    set_b,
)

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (3, 5), "padding": (1, 2)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 3},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "max_out": 2},
    {"kernel_size": 3, "padding": 1, "max_out": 3, "groups": 2},
    {"kernel_size": 3, "padding": 1, "normalize_weight": True},
]


def by_patches(layer, x):
    """The output of the layer by its definition, with an im2col per group."""
    kernel, groups = layer.kernel_size, layer.groups
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0, 0)
    else:
        padding = layer.padding
    patches = F.unfold(x, kernel, layer.dilation, padding, layer.stride).unflatten(1, (groups, -1))  # N G D L
    weight = layer.weight.flatten(1).unflatten(0, (groups, -1))  # G O D
    if layer.normalize_weight:
        weight = weight / weight.norm(dim=2, keepdim=True)
    linear = torch.einsum("god,ngdl->ngol", weight, patches)
    if layer.max_out > 1:
        linear = linear.unflatten(2, (-1, layer.max_out)).amax(3)
    norm = (patches.square().sum(2, keepdim=True) + 1e-6).sqrt()
    cosine = linear.abs() / norm if layer.b == 2 else linear.abs() / norm + 1e-6
    return (linear * cosine ** (layer.b - 1)).flatten(1, 2)


@pytest.mark.parametrize("b", [2.0, 1.5])
@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
def test_convolution_is_its_definition_on_every_patch(arguments, b):
    torch.manual_seed(0)
    layer = BcosConv2d(4, 4, b=b, **arguments).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x).flatten(2), by_patches(layer, x))


@pytest.mark.parametrize("b", [2.0, 1.25])
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_is_its_definition(b, normalize):
    torch.manual_seed(0)
    layer = BcosLinear(5, 3, b=b, max_out=2, normalize_weight=normalize).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    weight = layer.weight / layer.weight.norm(dim=1, keepdim=True) if normalize else layer.weight
    linear = (x @ weight.T).unflatten(-1, (3, 2)).amax(-1)
    cosine = linear.abs() / x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(layer(x), linear * (cosine + (0 if b == 2 else 1e-6)) ** (b - 1))


@pytest.mark.parametrize("arguments", CONVOLUTIONS[:8:3] + CONVOLUTIONS[10:11], ids=str)
def test_first_and_second_derivatives_of_the_convolution(arguments):
    torch.manual_seed(0)
    layer = BcosConv2d(4, 4, **arguments).double()
    x = torch.randn(1, 4, 4, 5, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, layer.weight), fast_mode=True)


def test_derivatives_stay_finite_where_the_input_is_zero():
    for layer, x in (
        (BcosLinear(4, 3), torch.zeros(2, 4)),
        (BcosConv2d(4, 3, 3, padding=1), torch.zeros(2, 4, 5, 5)),
    ):
        x.requires_grad_()
        (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        first.square().sum().backward()
        assert x.grad.isfinite().all()
        assert layer.weight.grad.isfinite().all()


def test_b_equal_one_is_the_ordinary_layer():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    layer = BcosConv2d(4, 5, 3, bias=True, b=1)
    nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias))


@pytest.mark.parametrize("wrong", [{"b": 0.9}, {"max_out": 0}])
def test_impossible_exponent_and_units_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match="B must" if name == "b" else name):
        BcosConv2d(3, 3, 1, **wrong)


@pytest.mark.parametrize("centered", [False, True])
def test_batch_norm_is_its_definition_and_tracks_the_biased_variance(centered):
    torch.manual_seed(0)
    norm = BcosBatchNorm(3, momentum=0.3, centered=centered).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    x = 2 * torch.randn(4, 3, 5, 6, dtype=torch.float64) + 1
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    shape = (1, 3, 1, 1)
    expected = (x - mean * centered) / (var + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(
        shape
    )
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(
        norm.running_var, 0.7 * torch.ones(3, dtype=torch.float64) + 0.3 * var.flatten()
    )
    norm.eval()
    running = norm.running_mean.view(shape) if centered else 0
    expected = (x - running) / (norm.running_var.view(shape) + norm.eps).sqrt() * norm.weight.view(
        shape
    ) + norm.bias.view(shape)
    torch.testing.assert_close(norm(x), expected)


def test_first_and_second_derivatives_of_the_batch_norm():
    torch.manual_seed(0)
    norm = BcosBatchNorm(2, bias=False).double()
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(function, (x, norm.weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, norm.weight), fast_mode=True)


@pytest.mark.parametrize(
    ("ours", "torchs", "shape"),
    [
        (BcosLayerNorm((6,)), nn.LayerNorm((6,)), (2, 5, 6)),
        (BcosGroupNorm(2, 4), nn.GroupNorm(2, 4), (2, 4, 3, 3)),
    ],
)
def test_layer_and_group_norm_are_torchs_in_and_out_of_explanation_mode(ours, torchs, shape):
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x), torchs(x))
    with explanation_mode(ours):
        torch.testing.assert_close(ours(x), torchs(x))


@pytest.mark.parametrize("layer", [BcosConv2d(3, 4, 3), BcosLinear(3, 4)])
def test_a_scheduled_exponent_is_the_fixed_one_of_that_value(layer):
    x = torch.rand(2, 3, 5, 5) if isinstance(layer, BcosConv2d) else torch.rand(2, 3)
    network = nn.Sequential(layer)
    layer._configure(1.0, 1, False, "scheduled")
    for b in (1.0, 1.5, 2.0):
        set_b(network, b)
        assert layer_b(network) == {"0": b}
        scheduled = layer(x)
        fixed = copy.deepcopy(layer)
        fixed._configure(b, 1, False)
        torch.testing.assert_close(scheduled, fixed(x), rtol=1e-4, atol=1e-6)
    assert "0.b_value" in network.state_dict()
    with pytest.raises(ValueError, match=r"at least 1, not 0\.5"):
        set_b(network, 0.5)
    with pytest.raises(ValueError, match="scheduled"):
        set_b(nn.Sequential(BcosLinear(3, 4)), 1.5)


def test_a_learned_exponent_has_a_gradient_and_stays_at_one_or_above():
    layer = BcosConv2d(3, 4, 3)
    layer._configure(1.0, 1, False, "learned")
    x = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, layer.weight), rtol=1e-4, atol=1e-6)
    layer(x).sum().backward()
    assert layer.b_offset.grad != 0
    optimiser = torch.optim.AdamW([layer.b_offset], lr=0.1, weight_decay=0.5)
    layer.b_offset.grad = None
    before = float(layer.b)
    for _ in range(10):
        layer.b_offset.grad = torch.zeros(())
        optimiser.step()
    assert before < float(layer.b) < 2
    with torch.no_grad():
        layer.b_offset.fill_(-3)
    assert layer_b(layer) == {"": 1.0}
