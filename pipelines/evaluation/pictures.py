"""Pictures for reviewers: images, colour explanations, heat maps. N images, T texts, H x W pixels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

INCHES = 1.6  # side of a panel, inches


def choose(correct: Tensor, count: int, seed: int) -> Tensor:
    """Draws indices of `count` images, half right and half wrong if there are enough; ascending, int64.

    Args:
        correct: (N,) of bool.
        count: number of images; all images are taken if there are fewer.
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    right, wrong = (torch.nonzero(which)[:, 0] for which in (correct, ~correct))
    right, wrong = (each[torch.randperm(len(each), generator=generator)] for each in (right, wrong))
    wrong_count = min(len(wrong), max(count // 2, count - len(right)))
    return torch.cat([right[: count - wrong_count], wrong[:wrong_count]]).sort().values


@dataclass(frozen=True)
class Column:
    """Explanations of N images by one method, for `save_panels`.

    Attributes:
        maps: (N, H, W, 4) in [0, 1], shown as colours on white, or (N, H, W), shown as heat maps: red for and
            blue against the class, white at 0, limits symmetric about 0.
        titles: N titles, one above each panel.
        contributions: the maps (N, H, W) sum to logits. Such maps of one image share their limits in all
            columns, and their titles name them. Other maps have no common unit and limits of their own.
    """

    maps: Tensor
    titles: Sequence[str]
    contributions: bool = False


def save_panels(
    path: str | Path,
    images: Tensor,
    columns: Sequence[Column],
    titles: Sequence[str],
    boxes: Sequence[Tensor] | None = None,
) -> None:
    """Writes a PNG with a row per image: the image and its explanations. Equal input gives equal bytes.

    Args:
        path: path of the PNG; its folder is created.
        images: (N, 3 or more, H, W) in [0, 1]; the first three channels are shown.
        columns: the explanations, from left to right.
        titles: N titles, written above the images.
        boxes: N tensors (n_i, 4) of xmin, ymin, xmax, ymax in pixels, half-open, drawn on the images.

    Raises:
        ValueError: the numbers of images, maps and titles differ, or an explanation has another shape.
    """
    numbers = {"titles": len(titles)}
    for place, column in enumerate(columns):
        numbers |= {f"column {place}: maps": len(column.maps), f"column {place}: titles": len(column.titles)}
    for name, number in numbers.items():
        if number != len(images):
            raise ValueError(f"{name}: {number} for {len(images)} images")
    shared = [limits(column.maps) for column in columns if column.contributions]
    limit = torch.stack(shared).amax(0) if shared else None
    shown = [(images[:, :3].permute(0, 2, 3, 1).clamp(0, 1), titles)]
    for column in columns:
        if column.contributions and limit is not None:
            scales = [f"{title}\n±{scale:.1e}" for title, scale in zip(column.titles, limit, strict=True)]
            shown.append((heat_map(column.maps, limit=limit), scales))
        else:
            shown.append((_panels(column.maps), column.titles))
    with matplotlib.rc_context({"font.size": 6}):
        lines = max(title.count("\n") + 1 for _, named in shown for title in named) if len(images) else 1
        size = (INCHES * len(shown), (INCHES + 0.12 * lines + 0.15) * len(images))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(images), len(shown), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for row in range(len(images)):
            for place, (panels, named) in enumerate(shown):
                axes[row, place].imshow(_pixels(panels[row]), interpolation="nearest")
                axes[row, place].set_title(named[row], parse_math=False)  # names may contain a $
            for xmin, ymin, xmax, ymax in boxes[row].tolist() if boxes is not None else ():
                corner = (xmin - 0.5, ymin - 0.5)  # pixel i is drawn from i - 0.5 to i + 0.5
                axes[row, 0].add_patch(
                    Rectangle(corner, xmax - xmin, ymax - ymin, fill=False, edgecolor="lime", linewidth=0.8)
                )
        _save(figure, path)


def save_texts(
    path: str | Path, image: Tensor, texts: Sequence[str], colours: Tensor, contributions: Tensor
) -> None:
    """Writes a PNG with an image and a column per text: colour explanation above heat map.

    All heat maps have one scale, which is drawn below the image. Equal input gives equal bytes.

    Args:
        path: path of the PNG; its folder is created.
        image: (3 or more, H, W) in [0, 1]; the first three channels are shown.
        texts: T titles of the columns; long ones are wrapped.
        colours: (T, H, W, 4) in [0, 1], shown on white.
        contributions: (T, H, W), shown by `heat_map` with the largest of their `limits`.

    Raises:
        ValueError: the numbers of texts and explanations differ.
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
    """Writes a PNG of the first metric over each other metric, with the Pareto front joined and numbered.

    Args:
        path: path of the PNG; its folder is created.
        points: number of a trial -> its metrics. A metric that was not measured is `None`, and plots of this
            metric leave the trial out.
        front: numbers of the trials on the front.
        names: names of the metrics; a single metric is plotted over the numbers.
        note: text below the plots.
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
    """Writes the figure as a PNG atomically and creates its folder."""
    with staged(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": None})


def heat_map(attributions: Tensor, percentile: float = 99.5, limit: float | Tensor | None = None) -> Tensor:
    """Colours signed maps (N, H, W) blue (negative), white (0) and red (positive): (N, H, W, 3) in [0, 1].

    The colours of a map end at plus and minus `limit`, of one or each map (N,), by default at the percentile
    of its absolute values, see `limits`.
    """
    maps = attributions.detach().float().cpu()
    most = limits(maps, percentile) if limit is None else torch.as_tensor(limit).expand(len(maps))
    scaled = (maps / most[:, None, None]).clamp(-1, 1)
    colours = matplotlib.colormaps["bwr"](((scaled + 1) / 2).numpy())
    return torch.from_numpy(np.asarray(colours[..., :3])).float()


def limits(attributions: Tensor, percentile: float = 99.5) -> Tensor:
    """Percentile of each map's absolute values, or their maximum if it is 0: (N, H, W) -> (N,), positive."""
    magnitude = attributions.detach().float().cpu().flatten(1).abs()
    limit = torch.quantile(magnitude, percentile / 100, dim=1)
    return torch.where(limit > 0, limit, magnitude.amax(1)).clamp_min(torch.finfo(torch.float32).tiny)


def on_white(rgba: Tensor) -> Tensor:
    """Lays RGBA (N, H, W, 4) in [0, 1] on white: (N, H, W, 3)."""
    colours, alpha = rgba[..., :3], rgba[..., 3:]
    return colours * alpha + (1 - alpha)


def _panels(values: Tensor) -> Tensor:
    """Colours one explanation of all images: maps or RGBA -> (N, H, W, 3)."""
    if values.ndim == 3:
        return heat_map(values)
    if values.ndim == 4 and values.shape[-1] == 4:
        return on_white(values)
    raise ValueError(f"maps: (N, H, W) or (N, H, W, 4) can be shown, not {tuple(values.shape)}")


def _pixels(colours: Tensor) -> np.ndarray:
    """Converts (H, W, 3) in [0, 1] to uint8."""
    return (colours.detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
