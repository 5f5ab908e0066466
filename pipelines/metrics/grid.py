"""The grid pointing game: the share of a class's map in that cell of a grid which shows the class.

A grid has n x n cells with images of distinct classes, so chance is 1/n². G grids, N images, K classes, T
targets, C channels, H x W pixels of an image or grid, h x w pixels of a cell.

Source: Böhle et al., B-cos Networks, CVPR 2022, section 4.
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
    """n² images of n² distinct classes, in the order of the cells row by row."""

    images: tuple[int, ...]  # indices into the images that the grids were drawn from
    classes: tuple[int, ...]


def eligible(labels: Tensor, *logits: Tensor) -> Tensor:
    """Images for grids: labels (N,), logits (N, K) per model -> (N,) of bool.

    True if every model classifies the image correctly with sigmoid(logit) > 0.5.
    """
    chosen = torch.ones_like(labels, dtype=torch.bool)
    for logits_NK in logits:
        best = logits_NK.max(1)
        chosen &= (best.indices == labels) & (best.values > 0)
    return chosen


def confidence(labels: Tensor, *logits: Tensor) -> Tensor:
    """Mean over models of sigmoid(logit) of the label: labels (N,), logits (N, K) -> float64 (N,)."""
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
    """Draws up to `count` grids of n × n images; no image is in two grids.

    The allowed images of each class are sorted by falling confidence, then by key, so that the result does
    not depend on the order of the images. For each grid, n² distinct classes are drawn uniformly from those
    with images left, and each class gives its next image. Drawing ends early when fewer than n² classes have
    images left. Callers report the number of grids.

    Args:
        confidences, labels: (N,) of all images.
        keys: N unique names.
        allowed: (N,) of bool, from `eligible`.
        n: cells per side of a grid.
        count: largest number of grids.
        seed: seed for the draw of the classes.
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
    """Tiles the cells' images, row by row, at full size: (..., n², C, h, w) -> (..., C, n·h, n·w)."""
    n = _side(images.shape[-4])
    *_, channels, height, width = images.shape
    rows = images.unflatten(-4, (n, n)).movedim(-3, -5)  # (..., C, n, n, h, w)
    return rows.transpose(-3, -2).reshape(*images.shape[:-4], channels, n * height, n * width)


def grid_batches(
    grids: Sequence[Grid], images_of: Callable[[Sequence[int]], Tensor], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields grids (G, C, n·h, n·w) and their classes (G, n²), G <= `batch_size`.

    `images_of` returns the images (M, C, h, w) of M indices. It is called once per batch.
    """
    for start in range(0, len(grids), batch_size):
        batch = grids[start : start + batch_size]
        images = images_of([index for grid in batch for index in grid.images])
        classes = torch.tensor([grid.classes for grid in batch], device=images.device)
        yield tile(images.unflatten(0, (len(batch), -1))), classes


def grid_pointing_game(explain: Explain, grids: Tensor, classes: Tensor, smooth: int = 15) -> Tensor:
    """Scores of a batch of grids for all of their classes.

    Args:
        explain: (grids (G, C, H, W), classes (G, n²)) -> signed maps (G, n², H, W). An example is
            `partial(attribute, model, method="bcos")`, which takes one forward pass for all classes of a
            grid.
        grids: (G, C, n·h, n·w).
        classes: (G, n²), classes of the cells row by row.
        smooth: side of the mean filter in pixels, odd: 15 at 224 px, 3 at 32 px.

    Returns:
        (G, n²) in [0, 1], the share of each class's map that lies in its own cell, see `grid_scores`.
    """
    # channels_last is the faster layout.
    return grid_scores(explain(grids.contiguous(memory_format=torch.channels_last), classes), smooth)


def in_windows(explain: Explain, size: int) -> Explain:
    """Extends `explain` from images of `size` × `size` pixels to larger ones by sliding windows.

    Windows of `size` × `size` pixels slide over the zero-padded image with a stride of `size`/2, so that each
    pixel is in four windows, and their maps are added up. An n × n grid has (2n + 1)² windows. Each call of
    `explain` gets as many windows as have together the pixels of the images.

    Args:
        explain: (windows (M, C, size, size), classes (M, T)) -> signed maps (M, T, size, size).
        size: even.

    Returns:
        A function (images (N, C, H, W), classes (N, T)) -> maps (N, T, H, W), H and W multiples of size/2.

    Source: Arya et al., B-cosification, NeurIPS 2024, appendix.
    """
    if size % 2:
        raise ValueError(f"windows overlap by half their size, which must be even: not {size}")
    stride = padding = size // 2

    def explain_in_windows(images: Tensor, classes: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % stride or width % stride:
            raise ValueError(
                f"sides of images must be multiples of {stride}, half the window: not {height} × {width}"
            )
        # (N, C, rows, columns, size, size)
        tiles = F.pad(images, (padding,) * 4).unfold(2, size, stride).unfold(3, size, stride)
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
    """Share of each map's positive part in its class's cell: maps (G, n², H, W) -> (G, n²) in [0, 1].

    The signed maps are smoothed (mean of `smooth` × `smooth` pixels, zeros outside counted) and then clamped
    at 0. A map without a positive value scores 0.
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
