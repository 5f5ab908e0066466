"""Deletion and insertion on a model whose important pixels are known."""

import pytest
import torch
from torch import nn

from pipelines.metrics import deletion, insertion, removal_curve


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
