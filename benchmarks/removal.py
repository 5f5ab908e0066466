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

import torch

from benchmarks.markdown import table
from pipelines.distributed import Context
from pipelines.evaluation import load_explained_model
from pipelines.evaluation.removal import evaluate_removal, sample_keys
from pipelines.evaluation.rows import Row, image_means
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


def interval(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values`, by percentiles."""
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = sample[torch.randint(len(sample), (resamples, len(sample)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def shown(values: Sequence[float]) -> str:
    """Mean, interval and number of values; empty without values."""
    if not values:
        return ""
    low, high = interval(values)
    return f"{sum(values) / len(values):.3f} [{low:.3f}, {high:.3f}] ({len(values)})"


def paired(rows: Sequence[Row], first: Sequence[Row], score: str) -> list[float]:
    """Differences of `score` from that of the rows `first`, for the images that both have."""
    ours, theirs = image_means(rows, score), image_means(first, score)
    return [ours[key] - theirs[key] for key in ours if key in theirs]


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
            *(shown(list(image_means(rows, score).values())) for score in SCORES),
            f"{thresholds[name[0]][name[1]]:.3f}",
        ]
        for name, rows in groups.items()
    )
    print(table([*heads, "threshold"], lines))
    print("\nDifferences from the first row\n")
    first, *others = groups.items()
    differences = (
        [*name, *(shown(paired(rows, first[1], score)) for score in SCORES)] for name, rows in others
    )
    print(table(heads, differences))


if __name__ == "__main__":
    main()
