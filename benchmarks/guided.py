"""What guidance does to where a classifier looks: losses, attributions, depths, few and coarse boxes, shift; over seeds.

    dvc repro backbone shard                                                       # the backbone, and the data of `guide`
    python -m benchmarks.guided --choose --runs energy:0.01 energy:0.1       # on the validation split, seed 0
    python -m benchmarks.guided --seeds 0 1 2 --runs none energy:0.1 l1:0.01
    python -m benchmarks.guided --seeds 0 1 2 --runs energy:0.1 --annotated 0.01 0.1 1 --dilation 0 0.25

A run is `none` (as many more epochs of classification, the best by F1) or `loss:λ[:attribution[:layer]]` (the knee of the Pareto
front). What else is trained how, `guide` of the params says. A seed draws the classifier's head, the order of the images, and
which of them have boxes; each seed's classifier is trained once. `--backbone FOLDER` starts from another model. One line of JSON
each goes to `reports/guided.jsonl`; what is there already is not run again. `--table` prints means and standard deviations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pipelines  # noqa: F401  (first: it says how threads wait)
from pipelines import models
from pipelines.attribution import Attribution
from pipelines.data.loading.subsets import annotated_images
from pipelines.data.shards.manifest import read_manifest
from pipelines.evaluation import evaluate
from pipelines.methods import build_classifier, build_guidance, classifier_spec
from pipelines.params import GuidanceParams, OptimiserParams, Params, load
from pipelines.storage.paths import run_directory
from pipelines.training import Context, Job, Result, train
from pipelines.workflow.running import shards_of

RESULTS = Path("reports/guided.jsonl")
FIGURES = (
    *("f1", "accuracy", "worst_group_accuracy", "mean_group_accuracy"),
    *("epg", "on_object_epg", "size_corrected_epg", "iou", "epg_small", "epg_medium", "epg_large", "gridpg"),
)
KEYS = ("data", "split", "backbone", "run", "annotated", "dilation")


def classifier(params: Params, backbone: Path, seed: int) -> Path:
    """The folder of the classifier of this seed, which is trained where there is none."""
    manifest = read_manifest(shards_of(params.dataset))
    inputs = (models.digest(backbone), manifest.digest, params.data, params.guide.classify, seed)
    folder = Path(run_directory("models", "guided", *inputs))
    if not folder.is_dir():
        spec = classifier_spec(backbone, manifest.classes, manifest.task, params.data.image_size)
        build = partial(build_classifier, spec, backbone, seed)
        _, module = trained(params, build, params.guide.classify, seed, models.digest(backbone))
        models.save(folder, module, spec)
    return folder


def guidance_params(params: Params, run: str, annotated: float, dilation: float, seed: int) -> GuidanceParams:
    """The params of `run`."""
    loss, weight, attribution, layer = (*run.split(":"), *[""] * 4)[:4]
    changes: dict[str, Any] = {"annotated": annotated, "annotated_seed": seed, "dilation": dilation}
    if loss == "none":
        changes |= {"localisation_weight": 0.0, "select": "f1"}
    else:
        changes |= {"loss": loss, "localisation_weight": float(weight)}
    changes |= {"attribution": attribution} if attribution else {}
    changes |= {"layer": layer} if layer else {}
    return GuidanceParams(**{**params.guide.guided.model_dump(), **changes})


def trained(params: Params, build: Any, optim: OptimiserParams, seed: int, *inputs: Any) -> tuple[Result, Any]:
    """The result of a training run in this process, and the module of its best epoch."""
    shards = shards_of(params.dataset)
    job = Job(
        build=build,
        shards=shards,
        data=params.data,
        optim=optim,
        training=params.training.model_copy(update={"workers": 0}),
        seed=seed,
        directory=run_directory(params.storage.root, "guided", read_manifest(shards).digest, params.data, optim, seed, *inputs),
    )
    result, module = train(job), build().module
    result.load_best(module)
    return result, module.eval()


def measure(params: Params, backbone: Path, run: str, annotated: float, dilation: float, seed: int, split: str) -> dict[str, Any]:
    """Guides one classifier, and evaluates it on `split` with the attribution that guided it."""
    start = classifier(params, backbone, seed)
    optim = guidance_params(params, run, annotated, dilation, seed)
    shards = shards_of(params.dataset)
    keys = annotated_images(shards, "train", annotated, seed) if annotated < 1 else None
    result, module = trained(params, partial(build_guidance, start, optim, keys), optim, seed, models.digest(start))
    folder = Path(run_directory("models", "guided", models.digest(start), optim))
    models.save(folder, module, models.read_spec(start))
    judge = params.evaluate.model_copy(update={"posthoc": ("input_x_gradient", "gradcam")})
    guided = Attribution(optim.attribution, optim.layer)
    found = evaluate(Context(), {"model": str(folder)}, shards, params.data, judge, split, guided=guided)[0]
    of_model = found["models"]["model"]
    explanations = of_model.pop("explanations")
    seen_by = "guided" if "guided" in explanations else optim.attribution
    figures = {key: value for key, value in (of_model | explanations[seen_by]).items() if key in FIGURES}
    return {"epoch": result.best["epoch"], "front": [row["epoch"] for row in result.kept], "folder": str(folder), **figures}


def rows() -> list[dict[str, Any]]:
    """What has been measured."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def table(found: Iterable[dict[str, Any]]) -> str:
    """Means ± standard deviations over seeds, as markdown."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    figures = [name for name in FIGURES if any(name in row for group in groups.values() for row in group)]
    lines = ["| " + " | ".join([*KEYS, "seeds", *figures]) + " |", "| --- " * (len(KEYS) + 1 + len(figures)) + "|"]
    for key, group in groups.items():
        cells = []
        for name in figures:
            values = [row[name] for row in group if name in row]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append("| " + " | ".join(map(str, [*key, len(group), *cells])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures the runs asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="on the validation split")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", default=[], help="none, or loss:λ[:attribution[:layer]]")
    parser.add_argument("--annotated", type=float, nargs="+", default=[1.0], help="shares of the images whose boxes are used")
    parser.add_argument("--dilation", type=float, nargs="+", default=[0.0], help="of boxes")
    parser.add_argument("--backbone", type=Path, default=Path("models/backbone"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    params, split = load().for_guide(), "val" if options.choose else "test"
    RESULTS.parent.mkdir(exist_ok=True)
    asked = itertools.product(options.seeds, options.runs, options.annotated, options.dilation)
    for seed, run, annotated, dilation in () if options.table else asked:
        data = f"{params.dataset} {params.datasets[params.dataset].model_dump().get('correlation', {}).get('train', 0):g}"
        known = dict(zip(KEYS, (data, split, str(options.backbone), run, annotated, dilation), strict=True), seed=seed)
        if any(known.items() <= row.items() for row in rows()):
            continue
        line = json.dumps(known | measure(params, options.backbone.absolute(), run, annotated, dilation, seed, split))
        with RESULTS.open("a") as file:
            print(line, file=file)
        print(line, flush=True)
    print(table(rows()))


if __name__ == "__main__":
    main()
