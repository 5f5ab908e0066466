"""ReLU and average pool in B-cos networks: outputs, gradients and gradients of gradients."""

import pytest
import torch
from torch import nn

from pipelines.bcos import bcosify, dynamic_weights, explanation_mode
from pipelines.bcos.activations import BcosAvgPool2d, BcosReLU

POOLS = (
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "ceil_mode": True, "count_include_pad": False},
    {"kernel_size": 2, "stride": (1, 2), "padding": (0, 1), "divisor_override": 1},
)
LAYERS = [
    (BcosReLU(), nn.ReLU()),
    (
        BcosAvgPool2d((3, 2), ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d((3, 2), ceil_mode=True, count_include_pad=False),
    ),
    (
        BcosAvgPool2d(2, (1, 2), (0, 1), divisor_override=1),
        nn.AvgPool2d(2, (1, 2), (0, 1), divisor_override=1),
    ),
]


@pytest.mark.parametrize(("ours", "torchs"), LAYERS, ids=str)
def test_values_and_derivatives_are_torchs_in_and_out_of_explanation_mode(ours, torchs):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), torchs(x))
    with explanation_mode(ours):
        torch.testing.assert_close(ours(x), torchs(x))
        assert torch.autograd.gradcheck(ours, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(ours, x, fast_mode=True)


def test_conversion_uses_them_and_a_loss_on_their_weights_has_the_same_gradient():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    network, images = bcosify(nn.Sequential(*layers)).double(), torch.rand(2, 6, 8, 8, dtype=torch.float64)
    assert [type(layer) for layer in network.body][1:3] == [BcosReLU, BcosAvgPool2d]
    gradients = []
    for _ in range(2):
        _, weights = dynamic_weights(network, images, torch.tensor([0, 2]), create_graph=True)
        gradients.append(torch.autograd.grad(weights.square().sum(), list(network.parameters())))
        network.body[1], network.body[2] = nn.ReLU(), nn.AvgPool2d(2)
    torch.testing.assert_close(*gradients)
