"""Stage `evaluate_clip`: evaluates original and B-cosified image towers; see `reports/evaluate_clip`."""

from pipelines.storage.files import write_json
from pipelines.workflow.places import REPORTS
from pipelines.workflow.running import stage

OUT = REPORTS / "evaluate_clip"


def main() -> None:
    """Evaluates the towers of `clip.towers`, and draws explanations of texts in images of `clip.located`."""
    with stage() as whole:
        if not whole.clip.towers:
            write_json(OUT / "metrics.json", {})
            (OUT / "pictures").mkdir(parents=True, exist_ok=True)
            return
        # Imported here, because a stage that is left out need not wait seconds for PyTorch
        from pipelines.evaluation.text_gallery import draw_text_gallery
        from pipelines.workflow.evaluating_towers import CODE, evaluate_towers, towers
        from pipelines.workflow.identity import of_data
        from pipelines.workflow.reports import flat
        from pipelines.workflow.sharing import shards_for_all
        from pipelines.workflow.training import tracked

        params, folders = whole.for_clip(whole.clip.located), towers(whole)
        clip, upstream = params.clip, tuple(folders.values())
        settings = (of_data(params.data), clip.evaluate, clip.pairs, clip.labelled)
        with tracked(
            params, "evaluate_clip", *settings, upstream=upstream, code=CODE, context="evaluation"
        ) as (run, _):
            metrics = evaluate_towers(params, folders)
            write_json(OUT / "metrics.json", metrics)
            run.metrics(flat({name: found["models"] for name, found in metrics.items()}))
            explained = {name: folder for name, folder in folders.items() if name.endswith("_bcos")}
            run.pictures(
                draw_text_gallery(
                    OUT / "pictures", explained, shards_for_all(params), params.data, clip.evaluate
                )
            )


if __name__ == "__main__":
    main()
