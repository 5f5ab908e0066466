"""Single-removal scores of explanations on drawn scenes, with 95 % intervals.

    python -m benchmarks.removal models/classify models/guide [--dataset scenes] [--split test] [--images 200]

Draws a seeded sample of the split again without some of the objects (`evaluation.removal`), and prints two
markdown tables. The first has, per model and explanation, each score's mean over the images, its bootstrap
interval over these images, and in brackets their number. The second has the differences from the first row,
paired by image. `uniform` is the map that is 1 everywhere. Importance thresholds are those with the best
completeness on as many validation images. It needs no shards: the scenes come from the params.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas

from benchmarks.markdown import table
from pipelines.distributed import Context
from pipelines.evaluation import load_explained_model
from pipelines.evaluation.removal import evaluate_removal, sample_keys
from pipelines.evaluation.rows import Row, image_means
from pipelines.evidence.intervals import Interval, difference, interval
from pipelines.params import ScenesParams, load

POSTHOC = ("gradcam", "input_x_gradient")  # explanations of conventional networks
SCORES = (
    "single_deletion",
    "single_deletion_with_clutter",
    "most_important_object",
    "completeness",
    "data_check",
    "preservation",
    "deletion_check",
    "distractibility",
    "target_sensitivity",
)


def of_images(rows: Sequence[Row], score: str) -> pandas.DataFrame:
    """A score per image, as `evaluation.intervals` takes it."""
    return pandas.DataFrame({"top": image_means(rows, score), "bottom": 1.0})


def shown(found: Interval | None, images: int) -> str:
    """Mean, interval and number of images; empty if there are fewer than two."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] ({images})" if found else ""


def measured(rows: Sequence[Row], score: str) -> str:
    """The cell of a score in the first table."""
    values = of_images(rows, score)
    return shown(interval(values), len(values))


def compared(rows: Sequence[Row], first: Sequence[Row], score: str) -> str:
    """The cell of a score in the second table: its difference from the first row's."""
    one, other = of_images(rows, score), of_images(first, score)
    return shown(difference(one, other), len(one.index.intersection(other.index)))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--params", default="params.yaml", help="params of the run that made the models")
    parser.add_argument("--dataset", default="scenes", help="key in `datasets` of drawn images")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample of images")
    options = parser.parse_args()

    params = load(options.params)
    drawn = params.datasets[options.dataset]
    if not isinstance(drawn, ScenesParams):
        parser.error(
            f"--dataset {options.dataset}: its images are not drawn, so nothing can be removed from them"
        )
    data = params.guide.data if options.dataset == params.guide.dataset else params.data
    context = Context()
    models = {str(folder): load_explained_model(folder, POSTHOC, context.device) for folder in options.models}
    validation = sample_keys(drawn, "val", options.images, options.seed)
    thresholds = evaluate_removal(context, models, drawn, validation, data).thresholds
    keys = sample_keys(drawn, options.split, options.images, options.seed)
    scores = evaluate_removal(context, models, drawn, keys, data, thresholds)

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in scores.rows:
        groups.setdefault((row["model"], row["explanation"]), []).append(row)
    print(f"{len(keys)} images of {options.dataset}/{options.split}, seed {options.seed}\n")
    heads = ["model", "explanation", *(score.replace("_", " ") for score in SCORES)]
    lines = (
        [
            *name,
            *(measured(rows, score) for score in SCORES),
            f"{thresholds[name[0]][name[1]]:.3f}",
        ]
        for name, rows in groups.items()
    )
    print(table([*heads, "threshold"], lines))
    print("\nDifferences from the first row\n")
    first, *others = groups.items()
    differences = ([*name, *(compared(rows, first[1], score) for score in SCORES)] for name, rows in others)
    print(table(heads, differences))


if __name__ == "__main__":
    main()
