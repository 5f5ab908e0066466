"""The audit finds functions in a forward pass that are not held, and nothing in sound networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipelines.bcos import ConversionError, Holdable, add_inverse, audit, bcosify, check_held


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


def without_grad(x):
    with torch.no_grad():
        gate = torch.sigmoid(x)
    return x * gate


def written_to(x, write):
    x = x.clone()
    write(x[:, :2], x[:, 2:4])
    return x


# name -> function of features (N, 4, H, W), operations that the audit must name
PLANTED = {
    "silu": (F.silu, ["silu"]),
    "gelu": (F.gelu, ["gelu"]),
    "hardswish": (F.hardswish, ["hardswish"]),
    "gate by hand": (lambda x: torch.sigmoid(x) * x, ["sigmoid", "mul"]),
    "relu6": (F.relu6, ["hardtanh"]),
    "softmax": (lambda x: F.softmax(x, 1), ["softmax"]),
    "square": (lambda x: x * x, ["mul"]),
    "power": (lambda x: x**3, ["pow"]),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[1:]), ["native_layer_norm"]),
    "variance": (lambda x: x / torch.var_mean(x, 1, keepdim=True)[0], ["var_mean", "div"]),
    "cosine": (lambda x: F.normalize(x, dim=1), ["linalg_vector_norm", "div"]),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), None),
    "quotient": (lambda x: 1 / x, None),
    "attention pool": (
        lambda x: x.flatten(2) @ x.flatten(2).mT @ x.flatten(2).softmax(1),
        ["bmm", "softmax"],
    ),
    "autograd function": (Swish.apply, ["swish"]),
    "weights from the image": (
        lambda x: F.conv2d(x, x[:1].expand(4, -1, -1, -1), padding=3),
        ["convolution"],
    ),
    "in place": (lambda x: x.clone().sigmoid_(), ["sigmoid"]),
    "in place, on a view": (lambda x: written_to(x, lambda a, b: a.sigmoid_()), ["sigmoid"]),
    "product in place, on a view": (lambda x: written_to(x, lambda a, b: a.mul_(b)), ["mul"]),
}

LINEAR = {
    "gate made without gradients": without_grad,
    "gate of a detached copy": lambda x: x * torch.sigmoid(x.detach()),
    "comparison": lambda x: x * (x > 0) + torch.where(x > x.mean(), x, -x) * torch.sign(x),
    "constants": lambda x: (x * 2 - 1) / 3 @ torch.ones(x.shape[-1], 2) + torch.arange(2).float().softmax(0),
    "centring": lambda x: x - torch.var_mean(x, 1, keepdim=True)[1],
    "views and pads": lambda x: F.pad(
        torch.cat([x.flip(1).roll(1, 2), x[:, ::2]], 1).transpose(1, 2), (1, 1)
    )[..., 1:].abs(),
    "pools and sizes": lambda x: (
        F.interpolate(F.max_pool2d(x, 2), scale_factor=2, mode="bilinear") + F.avg_pool2d(x, 3, 1, 1)
    ),
    "dropout in place, on a view": lambda x: F.dropout(x.flatten(1), 0.5, inplace=True).sum(1, keepdim=True),
    "copy to a view": lambda x: written_to(x, lambda a, b: a.copy_(b)),
    "constant factor in place, on a view": lambda x: written_to(x, lambda a, b: a.mul_(torch.rand(2, 1, 1))),
    "sum in place, on a view": lambda x: written_to(x, lambda a, b: a.add_(b)),
}


class Functional(nn.Module):
    """A container whose forward pass ends in a function."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 1), function

    def forward(self, x):
        return self.function(self.conv(x))


class Ending(nn.Module):
    """Two logits from features of any channel count."""

    def forward(self, x):
        return x.flatten(1).sum(1, keepdim=True).expand(-1, 2)


def network_with(function):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), Functional(function))
    network = bcosify(model, gap_reorder=False, logit_bias=0.0)
    network.body.append(Ending())
    return network


def images():
    torch.manual_seed(0)
    return add_inverse(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PLANTED)
def test_a_functional_form_is_found_where_it_is(name, training):
    function, operations = PLANTED[name]
    (finding,) = audit(network_with(function).train(training), images())
    assert (finding.path, finding.type) == ("body.3", "Functional")
    assert operations is None or set(operations) <= set(finding.operations)
    assert operations is None or finding.operations[0] == operations[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_or_held_is_no_finding(name, training):
    assert audit(network_with(LINEAR[name]).train(training), images()) == []


def test_findings_come_one_a_module_in_order_and_check_held_says_them_in_one_line():
    network = network_with(lambda x: torch.tanh(x).exp())
    network.body.insert(3, Functional(F.silu))
    assert [(finding.path, finding.operations) for finding in audit(network, images())] == [
        ("body.3", ("silu",)),
        ("body.4", ("tanh", "exp")),
    ]
    with pytest.raises(
        ConversionError, match=r"silu .*'body\.3'; tanh, exp .* Functional at 'body\.4'.*register_conversion"
    ) as error:
        check_held(network, images())
    assert "\n" not in str(error.value)


def test_a_held_factor_is_no_finding_and_the_one_beside_it_that_is_forgotten_is():
    class Gate(Holdable):
        forgets = False

        def forward(self, x):
            gate = torch.sigmoid(x)
            return x * (gate if self.forgets else self.hold(gate))

    network = network_with(nn.Identity())
    network.body.insert(3, Gate())
    assert audit(network, images()) == []
    check_held(network, images())
    network.body[3].forgets = True
    assert [(finding.path, finding.type) for finding in audit(network, images())] == [("body.3", "Gate")]


def test_the_network_is_left_as_it_was():
    network = network_with(lambda x: F.dropout(x)).train()
    network.body[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    required = [parameter.requires_grad for parameter in network.parameters()]
    x, state = images(), torch.get_rng_state()
    audit(network, x)
    assert torch.equal(state, torch.get_rng_state())
    assert required == [parameter.requires_grad for parameter in network.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
