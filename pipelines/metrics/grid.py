"""The grid pointing game: does the map of a class fall on the cell of a grid that shows this class?

Source: Böhle et al., B-cos Networks, CVPR 2022, section 4. Chance is 1/n².
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Explain = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """n² images of n² distinct classes, row by row."""

    images: tuple[int, ...]  # indices of the images they were drawn from
    classes: tuple[int, ...]


def eligible(labels: Tensor, *logits: Tensor) -> Tensor:
    """Which images grids may be made of: labels (N,), logits (N, K) of each model that plays -> (N,) of bool.

    Every model classifies the image correctly, with sigmoid(logit) > 0.5.
    """
    chosen = torch.ones_like(labels, dtype=torch.bool)
    for logits_NK in logits:
        best = logits_NK.max(1)
        chosen &= (best.indices == labels) & (best.values > 0)
    return chosen


def confidence(labels: Tensor, *logits: Tensor) -> Tensor:
    """Mean of the models' sigmoid(logit) of the label, in float64: labels (N,), logits (N, K) of each model -> (N,)."""
    return torch.stack([each.gather(1, labels[:, None])[:, 0].double().sigmoid() for each in logits]).mean(0)


def draw_grids(
    confidences: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    allowed: Tensor,
    *,
    n: int,
    count: int,
    seed: int,
) -> list[Grid]:
    """At most `count` grids of n × n images; no image is in two of them.

    The allowed images of a class are sorted by falling confidence, then by key, so that the order they come in is of no
    account. For each grid n² distinct classes are drawn, uniformly from those that have images left, and each gives its next
    one. When fewer than n² classes have images left, the grids made so far are all there are: report their number.

    Args:
        confidences, labels: (N,) of all images.
        keys: N unique names.
        allowed: (N,) of bool, as `eligible` gives it.
        n: side of a grid, cells.
        count: grids wanted.
        seed: draws the classes.
    """
    queues: dict[int, deque[int]] = {}
    order = sorted(
        allowed.nonzero()[:, 0].tolist(), key=lambda index: (-float(confidences[index]), keys[index])
    )
    for index in order:
        queues.setdefault(int(labels[index]), deque()).append(index)
    generator = torch.Generator().manual_seed(seed)
    grids: list[Grid] = []
    while len(grids) < count:
        left = sorted(label for label, queue in queues.items() if queue)
        if len(left) < n * n:
            break
        drawn = [
            left[position] for position in torch.randperm(len(left), generator=generator)[: n * n].tolist()
        ]
        grids.append(Grid(tuple(queues[label].popleft() for label in drawn), tuple(drawn)))
    return grids


def tile(images: Tensor) -> Tensor:
    """Images of the cells, row by row, at full size side by side: (..., n², C, h, w) -> (..., C, n·h, n·w)."""
    n = _side(images.shape[-4])
    *_, channels, height, width = images.shape
    rows = images.unflatten(-4, (n, n)).movedim(-3, -5)  # (..., C, n, n, h, w)
    return rows.transpose(-3, -2).reshape(*images.shape[:-4], channels, n * height, n * width)


def grid_batches(
    grids: Sequence[Grid], images_of: Callable[[Sequence[int]], Tensor], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of grids (G, C, n·h, n·w) with their classes (G, n²), G at most `batch_size`.

    `images_of` gives the images (M, C, h, w) of M indices; it is asked for one batch at a time.
    """
    for start in range(0, len(grids), batch_size):
        batch = grids[start : start + batch_size]
        images = images_of([index for grid in batch for index in grid.images])
        classes = torch.tensor([grid.classes for grid in batch], device=images.device)
        yield tile(images.unflatten(0, (len(batch), -1))), classes


def grid_pointing_game(explain: Explain, grids: Tensor, classes: Tensor, smooth: int = 15) -> Tensor:
    """Scores of a batch of grids for each of their classes.

    Args:
        explain: (grids (G, C, H, W), classes (G, n²)) -> signed maps (G, n², H, W), such as
            `partial(attribute, model, method="bcos")`, which needs one forward pass for all classes of a grid.
        grids: (G, C, n·h, n·w).
        classes: (G, n²), of the cells row by row.
        smooth: side of the mean filter, pixels, odd: 15 at 224 px, 3 at 32 px.

    Returns:
        (G, n²) in [0, 1]: for each cell's class the share of its map that lies in this cell.
    """
    return grid_scores(
        explain(grids.contiguous(memory_format=torch.channels_last), classes), smooth
    )  # the faster layout


def in_windows(explain: Explain, size: int) -> Explain:
    """`explain` for networks made for images of `size` × `size`: windows of that size are explained, and their maps added up.

    The windows lie at a stride of half their size over the image with zeros around it, so that each pixel is in four of them. Of
    an n × n grid there are (2n + 1)². As many are explained at once as have the pixels of the images together.

    Args:
        explain: (windows (M, C, size, size), classes (M, T)) -> signed maps (M, T, size, size).
        size: even.

    Returns:
        (images (N, C, H, W), classes (N, T)) -> maps (N, T, H, W), H and W multiples of size/2.

    Source: Arya et al., B-cosification, NeurIPS 2024, appendix.
    """
    if size % 2:
        raise ValueError(f"windows overlap by half their size, which must be even: not {size}")
    stride = padding = size // 2

    def explain_in_windows(images: Tensor, classes: Tensor) -> Tensor:
        """(N, C, H, W) and (N, T) -> (N, T, H, W)."""
        height, width = images.shape[-2:]
        if height % stride or width % stride:
            raise ValueError(
                f"sides of images must be multiples of {stride}, half the window: not {height} × {width}"
            )
        tiles = (
            F.pad(images, (padding,) * 4).unfold(2, size, stride).unfold(3, size, stride)
        )  # (N, C, rows, columns, size, size)
        windows = tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        per_image = len(windows) // len(images)
        at_once = max(1, len(images) * height * width // size**2)
        parts = zip(
            windows.split(at_once), classes.repeat_interleave(per_image, 0).split(at_once), strict=True
        )
        maps = torch.cat([explain(some, of_them) for some, of_them in parts]).unflatten(0, (-1, per_image))
        columns = maps.permute(0, 2, 3, 4, 1).flatten(1, 3)  # (N, T·size·size, windows)
        return F.fold(columns, (height, width), size, padding=padding, stride=stride)

    return explain_in_windows


def grid_scores(maps: Tensor, smooth: int = 15) -> Tensor:
    """Share of the positive part of each map in the cell of its class: maps (G, n², H, W) -> (G, n²) in [0, 1].

    Maps are smoothed while signed (mean of `smooth` × `smooth` pixels, zeros outside counted), then clamped at 0. A map that is
    nowhere positive scores 0.
    """
    if smooth % 2 == 0:
        raise ValueError(f"smooth must be odd, not {smooth}")
    n = _side(maps.shape[1])
    positive = F.avg_pool2d(maps, smooth, stride=1, padding=smooth // 2).relu()
    cells = positive.unflatten(-1, (n, -1)).sum(-1).unflatten(-2, (n, -1)).sum(-2).flatten(-2)  # (G, n², n²)
    total = cells.sum(-1)
    return torch.where(total > 0, cells.diagonal(dim1=1, dim2=2) / total, torch.zeros_like(total))


def _side(cells: int) -> int:
    n = math.isqrt(cells)
    if n * n != cells:
        raise ValueError(f"a grid has n × n cells, not {cells}")
    return n
