"""Pictures for the person who decides: the image, its explanation in colour, contribution heat maps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from pipelines.storage.files import staged

INCHES = 1.6  # side of a panel


def choose(correct: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` images, half of them right and half wrong as far as there are, drawn by `seed`; rising, int64.

    Args:
        correct: (N,) of bool.
        count: images wanted; all, where there are fewer.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    right, wrong = (torch.nonzero(which)[:, 0] for which in (correct, ~correct))
    right, wrong = (each[torch.randperm(len(each), generator=generator)] for each in (right, wrong))
    wrong_count = min(len(wrong), max(count // 2, count - len(right)))
    return torch.cat([right[: count - wrong_count], wrong[:wrong_count]]).sort().values


def save_panels(
    path: str | Path,
    images: Tensor,
    explanations: Mapping[str, Tensor],
    titles: Sequence[str],
    boxes: Sequence[Tensor] | None = None,
) -> None:
    """Writes a PNG: for each image a row of the image itself and its explanations. The same input gives the same bytes.

    Args:
        path: of the PNG; its folder is made.
        images: (N, 3 or more, H, W) in [0, 1], of which the first three channels are shown.
        explanations: by column title: (N, H, W, 4) in [0, 1] is shown as colours on white, (N, H, W) as a heat map, red for
            and blue against the class, white at 0, with limits symmetric about it.
        titles: N, written above the images.
        boxes: N tensors (n_i, 4) of xmin, ymin, xmax, ymax in pixels, half-open, drawn on the images.

    Raises:
        ValueError: numbers of images, maps and titles differ, or an explanation has another shape.
    """
    for name, number in {
        "titles": len(titles),
        **{name: len(maps) for name, maps in explanations.items()},
    }.items():
        if number != len(images):
            raise ValueError(f"{name}: {number} for {len(images)} images")
    columns = {
        "input": images[:, :3].permute(0, 2, 3, 1).clamp(0, 1),
        **{k: _panels(k, v) for k, v in explanations.items()},
    }
    with matplotlib.rc_context({"font.size": 6}):
        figure = Figure(figsize=(INCHES * len(columns), (INCHES + 0.3) * len(images)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(images), len(columns), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for row, title in enumerate(titles):
            for column, (name, panels) in enumerate(columns.items()):
                axes[row, column].imshow(_pixels(panels[row]), interpolation="nearest")
                axes[row, column].set_title(
                    title if column == 0 else name, parse_math=False
                )  # names may have a $
            for xmin, ymin, xmax, ymax in boxes[row].tolist() if boxes is not None else ():
                corner = (xmin - 0.5, ymin - 0.5)  # pixel i is drawn from i - 0.5 to i + 0.5
                axes[row, 0].add_patch(
                    Rectangle(corner, xmax - xmin, ymax - ymin, fill=False, edgecolor="lime", linewidth=0.8)
                )
        _save(figure, path)


def save_texts(
    path: str | Path, image: Tensor, texts: Sequence[str], colours: Tensor, contributions: Tensor
) -> None:
    """Writes a PNG: an image, and for each text a column of its colour explanation over its heat map, these on one scale.

    The scale stands below the image. The same input gives the same bytes.

    Args:
        path: of the PNG; its folder is made.
        image: (3 or more, H, W) in [0, 1], of which the first three channels are shown.
        texts: T titles of the columns; long ones are wrapped.
        colours: (T, H, W, 4) in [0, 1], shown on white.
        contributions: (T, H, W), shown as `heat_map` shows them, with the largest of the limits that it would choose for each.

    Raises:
        ValueError: numbers of texts and explanations differ.
    """
    if not len(texts) == len(colours) == len(contributions):
        raise ValueError(
            f"texts: {len(texts)} for {len(colours)} colour explanations and {len(contributions)} maps"
        )
    limit = float(limits(contributions).max())
    panels = [on_white(colours), heat_map(contributions, limit=limit)]
    titles = [
        "\n".join(wrapped for line in text.split("\n") for wrapped in textwrap.wrap(line, 26) or [""])
        for text in texts
    ]
    with matplotlib.rc_context({"font.size": 6}):
        lines = max(title.count("\n") + 1 for title in titles)
        size = (INCHES * (len(texts) + 1), 2 * INCHES + 0.12 * lines + 0.1)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(texts) + 1, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        axes[0, 0].imshow(_pixels(image[:3].permute(1, 2, 0)), interpolation="nearest")
        axes[0, 0].set_title("input")
        for row, of_texts in enumerate(panels):
            for column, panel in enumerate(of_texts, start=1):
                axes[row, column].imshow(_pixels(panel), interpolation="nearest")
        for column, title in enumerate(titles, start=1):
            axes[0, column].set_title(title, parse_math=False)
        scale = ScalarMappable(Normalize(-limit, limit), "bwr")
        bar = figure.colorbar(scale, ax=axes[1, 0], location="top", fraction=0.1, ticks=[-limit, 0, limit])
        bar.set_ticklabels([f"{-limit:.1e}", "0", f"{limit:.1e}"])
        bar.set_label("contribution of a pixel to the cosine")
        _save(figure, path)


def draw_front(
    path: str | Path,
    points: Mapping[int, Sequence[float | None]],
    front: Sequence[int],
    names: Sequence[str],
    note: str = "",
) -> None:
    """Writes a PNG of the first figure over each other one: all points, those of the Pareto front joined and numbered.

    Args:
        path: of the PNG; its folder is made.
        points: number -> its figures, None for one that was not measured: the point is in no plot of this figure.
        front: the numbers on the front.
        names: of the figures; a single one is shown over the numbers.
        note: written below the plots.
    """
    others = range(1, len(names)) or (None,)
    figure = Figure(figsize=(4 * len(others), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for other, axes in zip(others, np.atleast_1d(figure.subplots(1, len(others))), strict=True):
        where = {
            n: (float(n) if other is None else values[other], values[0])
            for n, values in points.items()
            if values
        }
        known = {n: (x, y) for n, (x, y) in where.items() if x is not None and y is not None}
        joined = sorted(known[number] for number in front if number in known)
        axes.plot([x for x, _ in known.values()], [y for _, y in known.values()], "o", color="0.7")
        axes.plot([x for x, _ in joined], [y for _, y in joined], "o-", color="C3")
        for number in front:
            if number in known:
                axes.annotate(str(number), known[number], textcoords="offset points", xytext=(4, 4))
        axes.set(xlabel="trial" if other is None else names[other], ylabel=names[0] if names else "")
    figure.supxlabel("\n".join(textwrap.wrap(note, 66 * len(others))), fontsize=6, x=0.02, ha="left")
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    """Writes the figure as a PNG, whole or not at all; makes its folder."""
    with staged(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": None})


def heat_map(attributions: Tensor, percentile: float = 99.5, limit: float | None = None) -> Tensor:
    """Signed maps (N, H, W) as colours (N, H, W, 3) in [0, 1]: blue, white at 0, red.

    The limits of a map are symmetric: plus and minus `limit`, by default the given percentile of its absolute values.
    """
    maps = attributions.detach().float().cpu()
    most = limits(maps, percentile) if limit is None else torch.full((len(maps),), limit)
    scaled = (maps / most[:, None, None]).clamp(-1, 1)
    colours = matplotlib.colormaps["bwr"](((scaled + 1) / 2).numpy())
    return torch.from_numpy(np.asarray(colours[..., :3])).float()


def limits(attributions: Tensor, percentile: float = 99.5) -> Tensor:
    """The percentile of the absolute values of each map (N, H, W), their maximum where that is 0: (N,), positive."""
    magnitude = attributions.detach().float().cpu().flatten(1).abs()
    limit = torch.quantile(magnitude, percentile / 100, dim=1)
    return torch.where(limit > 0, limit, magnitude.amax(1)).clamp_min(torch.finfo(torch.float32).tiny)


def on_white(rgba: Tensor) -> Tensor:
    """Colours with opacity (N, H, W, 4) in [0, 1] laid on white: (N, H, W, 3)."""
    colours, alpha = rgba[..., :3], rgba[..., 3:]
    return colours * alpha + (1 - alpha)


def _panels(name: str, values: Tensor) -> Tensor:
    """One explanation of all images as colours (N, H, W, 3)."""
    if values.ndim == 3:
        return heat_map(values)
    if values.ndim == 4 and values.shape[-1] == 4:
        return on_white(values)
    raise ValueError(f"{name}: (N, H, W) or (N, H, W, 4) can be shown, not {tuple(values.shape)}")


def _pixels(colours: Tensor) -> np.ndarray:
    """(H, W, 3) in [0, 1] as bytes."""
    return (colours.detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
