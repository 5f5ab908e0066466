"""Stage `classify`: a classifier of the data of `guide`, the backbone with a new head, not guided yet, in `models/classify`."""

from functools import partial
from pathlib import Path

from pipelines.data.shards.manifest import read_manifest
from pipelines.methods import build_classifier, check_guidable, classifier_spec
from pipelines.params import keyed
from pipelines.workflow.running import Task, model_for_all, shards_of, stage, train_stage
from stages.guide import check_boxes


def main() -> None:
    """Trains the classifier."""
    with stage() as whole:
        params, backbone = whole.for_guide(), Path("models/backbone").absolute()
        manifest = read_manifest(shards_of(params.dataset))
        spec = classifier_spec(backbone, manifest.classes, manifest.task, params.data.image_size)
        build = partial(build_classifier, spec, model_for_all(params, backbone), params.seed)
        check_boxes(shards_of(params.dataset))  # what `guide` needs: now, not after this training
        with keyed("guide.guided", params.guide.guided):
            check_guidable(build().module, spec, params.guide.guided)
        train_stage(Task(params, "classify", params.guide.classify, build, spec, upstream=(backbone,)))


if __name__ == "__main__":
    main()
