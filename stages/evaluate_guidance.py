"""Stage `evaluate_guidance`: evaluates the classifier before and after guidance.

Figures and pictures are in `reports/evaluate_guidance`.
"""

from dataclasses import asdict

from pipelines.attribution import Attribution
from pipelines.evaluation import figures
from pipelines.evaluation.gallery import draw_gallery
from pipelines.storage.files import write_json
from pipelines.workflow.evaluating import CODE, evaluate_models, save_records
from pipelines.workflow.identity import of_data
from pipelines.workflow.places import REPORTS, model_folder
from pipelines.workflow.reports import flat
from pipelines.workflow.running import stage
from pipelines.workflow.sharing import shards_for_all
from pipelines.workflow.training import tracked

OUT = REPORTS / "evaluate_guidance"


def main() -> None:
    """Evaluates both classifiers on each split of `guide.splits`, also with the guided attribution.

    Pictures show the last split.
    """
    with stage() as whole:
        params, models = (
            whole.for_guide(),
            {"unguided": model_folder("classify"), "guided": model_folder("guide")},
        )
        guided = Attribution(params.guide.guided.attribution, params.guide.guided.layer)
        settings = (of_data(params.data), params.evaluate, params.guide.splits, asdict(guided))
        upstream = tuple(models.values())
        with tracked(
            params, "evaluate_guidance", *settings, upstream=upstream, code=CODE, context="evaluation"
        ) as (run, _):
            splits = params.guide.splits
            found = evaluate_models(params, models, ("val", *splits), None, guided)
            save_records(OUT / "records", found)
            metrics = {split: figures(found[split]) for split in splits}
            write_json(OUT / "metrics.json", metrics)
            run.metrics(flat({split: of_split["models"] for split, of_split in metrics.items()}))
            last = splits[-1]
            view = (shards_for_all(params), params.data, params.evaluate, last, guided)
            run.pictures(draw_gallery(OUT / "pictures", models, found[last].right("guided"), *view))


if __name__ == "__main__":
    main()
