"""Stage `evaluate_guidance`: the classifier before and after guidance; figures and pictures in `reports/evaluate_guidance`."""

from functools import partial
from typing import Any

from pipelines.evaluation import evaluate_and_judge
from pipelines.evaluation.gallery import draw_gallery
from pipelines.storage.files import write_json
from pipelines.training import launch
from pipelines.workflow.running import REPORTS, flat, models_for_all, shards_for_all, stage, stage_run
from stages.evaluate import in_models

OUT = REPORTS / "evaluate_guidance"


def main() -> None:
    """Evaluates both on the splits of the params, also by the attribution that was guided; pictures are of the last split."""
    with stage() as whole:
        params, directories = whole.for_guide(), in_models({"unguided": "classify", "guided": "guide"})
        shards = shards_for_all(params)
        where: dict[str, Any] = {
            "training": params.training.model_copy(update={"workers": params.evaluate.workers}),
            "storage": params.storage.root,
        }
        guided = {"method": params.guide.guided.attribution, "layer": params.guide.guided.layer}
        settings = (params.data, params.evaluate, params.guide.splits, guided)
        both = tuple(directories.values())
        with stage_run(params, "evaluate_guidance", *settings, upstream=both, context="evaluation") as (run, _):
            models = models_for_all(params, directories)
            judge = partial(launch, evaluate_and_judge, models, shards, params.data, params.evaluate, **where)
            found = {split: judge(split, None, guided) for split in params.guide.splits}
            metrics = {split: of_split for split, (of_split, _) in found.items()}
            write_json(OUT / "metrics.json", metrics)
            run.metrics(flat({split: of_split["models"] for split, of_split in metrics.items()}))
            right, last = found[params.guide.splits[-1]][1], params.guide.splits[-1]
            drawn = draw_gallery(OUT / "pictures", directories, right, shards, params.data, params.evaluate, last, guided)
            run.pictures(drawn)


if __name__ == "__main__":
    main()
