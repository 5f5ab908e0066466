"""SimpleViT and ViT-C: their function on any grid, and their conversion."""

import math

import pytest
import torch

from pipelines.bcos import BcosLinear, add_inverse, bcosify, convert
from pipelines.models import build
from pipelines.models.vit import Patches, SineCosinePositions
from tests.support.families import check_conversion, check_frozen_jacobian, normalised, pictures

SMALL = {"dim": 24, "depth": 2, "heads": 3}
NETWORKS = {
    "simple_vit_ti": {**SMALL, "patch_size": 8},
    "vitc_ti": {**SMALL, "conv_stem": [8, 8, 12, 16]},  # strides 2, 1, 2, 2
}


def small(name, classes=5):
    torch.manual_seed(0)
    return build(name, num_classes=classes, options=NETWORKS[name])


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # of the published ordinary networks
        ("simple_vit_ti", 5.67),
        ("simple_vit_s", 21.96),
        ("simple_vit_b", 86.38),
        ("simple_vit_l", 178.10),
        ("vitc_ti", 5.33),
        ("vitc_s", 20.91),
        ("vitc_b", 81.39),
        ("vitc_l", 167.54),
    ],
)
def test_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"):
        network = build(name)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.01
    )
    assert network(torch.rand(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_patches_are_pixels_in_rows_with_their_channels_last():
    images = torch.rand(2, 3, 8, 12)
    patches = Patches(4)(images)
    assert patches.shape == (2, 2, 3, 48)
    assert torch.equal(patches[1, 1, 2], images[1, :, 4:8, 8:12].permute(1, 2, 0).flatten())
    with pytest.raises(ValueError, match="multiples of the patch, 4: not 8 × 10"):
        Patches(4)(torch.rand(1, 3, 8, 10))


def test_positions_are_sines_and_cosines_of_both_coordinates():
    positions = SineCosinePositions()(torch.zeros(1, 3, 4, 16))[0]
    frequency = 10_000 ** (-2 / 3)  # the third of four
    found = positions[1, 3, [2, 6, 10, 14]].tolist()
    expected = [math.sin(3 * frequency), math.cos(3 * frequency), math.sin(frequency), math.cos(frequency)]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_conversion_preserves_the_function(name):
    check_conversion(small(name), pictures(2, 32))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("gap_reorder", [True, False])
def test_dynamic_weights_are_the_jacobian_with_the_factors_frozen(name, gap_reorder):
    check_frozen_jacobian(small(name), pictures(2, 32), gap_reorder=gap_reorder)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_grid_of_patches(name):
    network = small(name).eval()
    images = torch.rand(2, 3, 40, 24)
    before, after = network(normalised(images)), convert(network)(add_inverse(images))
    assert before.shape == (2, 5)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_what_of_the_network_is_bcos():
    network = bcosify(small("simple_vit_ti"))
    layers = {name for name, module in network.named_modules() if isinstance(module, BcosLinear)}
    blocks = [f"body.transformer.encoder_{index}" for index in range(2)]
    inner = {
        f"{block}.{layer}"
        for block in blocks
        for layer in ("attn.to_out", "ff.net.linear1", "ff.net.linear2")
    }
    assert layers == {"body.to_patch_embedding.linear", "body.linear_head.linear", *inner}
    assert not [name for name, _ in network.named_parameters() if name.endswith("bias")]
    assert network.body.to_patch_embedding.linear.weight.shape == (24, 8 * 8 * 6)


def test_gap_reorder_classifies_every_token():
    network, reordered = (
        bcosify(small("simple_vit_ti"), gap_reorder=on, logit_bias=0.0).eval() for on in (False, True)
    )
    tokens = []
    for each in (network, reordered):
        each.body.transformer.register_forward_hook(lambda *arguments: tokens.append(arguments[-1]))
    images = add_inverse(torch.rand(2, 3, 16, 24))
    head = network.body.linear_head
    torch.testing.assert_close(network(images), head(tokens[0].mean(1)))
    torch.testing.assert_close(reordered(images), head(tokens[1]).mean(1))
