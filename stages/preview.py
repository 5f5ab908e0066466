"""Stage `preview`: the first pictures, of validation images, in `reports/preview`."""

from pipelines.data.loading.subsets import validation_images
from pipelines.evaluation.gallery import draw_gallery
from pipelines.workflow.evaluating import trained_classifiers
from pipelines.workflow.places import REPORTS, shards_of
from pipelines.workflow.running import stage
from pipelines.workflow.sharing import shards_for_all


def main() -> None:
    """Draws explanations of the conventional and the B-cos networks, long before all models are evaluated."""
    with stage() as params:
        keys = validation_images(shards_of(params.dataset))["keys"]
        draw_gallery(
            REPORTS / "preview",
            trained_classifiers(params),
            dict.fromkeys(keys, True),
            shards_for_all(params),
            params.data,
            params.evaluate,
            "val",
        )


if __name__ == "__main__":
    main()
