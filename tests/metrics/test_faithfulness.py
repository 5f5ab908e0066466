"""Deletion, insertion and single deletion on models whose important pixels are known."""

import pytest
import torch
from torch import nn

from pipelines.metrics import deletion, insertion, removal_curve, single_deletion


class CountsPixels(nn.Module):
    """The logit of class 0 is the difference of the first two rows from the mean image, in channel 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((6,), 0.25))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        share = (images[:, 0, :2] - 0.25).mean((1, 2)) / 0.75
        return torch.stack([share, 1 - share], dim=1)


@pytest.fixture
def case():
    images = torch.ones(3, 6, 4, 4)
    faithful = torch.zeros(3, 4, 4)
    faithful[:, :2] = 1
    return CountsPixels(), images, faithful, torch.zeros(3, dtype=torch.long)


def identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


def test_the_curve_falls_as_the_important_pixels_go(case):
    model, images, faithful, targets = case
    curve = removal_curve(model, images, faithful, targets, steps=4, probability=identity)
    torch.testing.assert_close(curve, torch.tensor([[1, 0.5, 0, 0, 0]] * 3))
    last = removal_curve(model, images, -faithful, targets, steps=4, probability=identity)
    torch.testing.assert_close(last, torch.tensor([[1, 1, 1, 0.5, 0]] * 3))


def test_a_faithful_map_has_small_deletion_and_large_insertion(case):
    model, images, faithful, targets = case
    options = {"steps": 4, "probability": identity}
    torch.testing.assert_close(deletion(model, images, faithful, targets, **options), torch.full((3,), 0.25))
    torch.testing.assert_close(insertion(model, images, faithful, targets, **options), torch.full((3,), 0.75))


def test_batches_do_not_matter(case):
    model, images, _, targets = case
    images, maps = torch.rand_like(images), torch.randn(3, 4, 4)
    torch.testing.assert_close(
        deletion(model, images, maps, targets, steps=7, batch_size=5),
        deletion(model, images, maps, targets, steps=7),
    )


class Linear(nn.Module):
    """Logits are sums of weights times pixels."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((6,), 0.25))
        self.weights = weights

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,kchw->nk", images, self.weights)


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(0)
    model = Linear(torch.randn(2, 6, 8, 8, generator=generator))
    images, targets = torch.rand(5, 6, 8, 8, generator=generator), torch.tensor([0, 1, 1, 0, 1])
    return model, images, ((images - 0.25) * model.weights[targets]).sum(1), targets


def test_the_terms_of_a_linear_model_have_single_deletion_1(linear):
    model, images, maps, targets = linear
    for grid in (2, 4, 8):
        torch.testing.assert_close(
            single_deletion(model, images, maps, targets, grid=grid), torch.ones(5, dtype=torch.float64)
        )
    torch.testing.assert_close(
        single_deletion(model, images, -maps, targets), -torch.ones(5, dtype=torch.float64)
    )


def test_single_deletion_by_hand():
    weights = torch.zeros(1, 6, 4, 4)
    weights[0, 0, ::2, ::2] = torch.tensor([[4.0, 3.0], [2.0, 1.0]])  # drops of the four patches
    maps = torch.zeros(1, 4, 4)
    maps[0, 1::2, 1::2] = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    found = single_deletion(Linear(weights), torch.ones(1, 6, 4, 4), maps, torch.tensor([0]), grid=2)
    assert found.item() == pytest.approx(1 - 6 * 4 / (4 * 15))  # 1 - 6 Σ d² / (n (n² - 1))


def test_single_deletion_does_not_depend_on_batches_nor_on_scale(linear):
    model, images, _, targets = linear
    maps = torch.randn(5, 8, 8)
    expected = single_deletion(model, images, maps, targets)
    torch.testing.assert_close(single_deletion(model, images, 7 * maps, targets, batch_size=2), expected)


def test_single_deletion_is_undefined_without_an_order(linear):
    model, images, maps, targets = linear
    broken = maps.clone()
    broken[0] = 0
    broken[1, 0, 0] = torch.nan
    images[2] = 0.25  # the mean image: nothing is removed
    found = single_deletion(model, images, broken, targets)
    assert found.isnan().tolist() == [True, True, True, False, False]


def test_patches_must_be_equal(linear):
    model, images, maps, targets = linear
    with pytest.raises(ValueError, match="grid 3 does not divide images of 8 x 8"):
        single_deletion(model, images, maps, targets, grid=3)
