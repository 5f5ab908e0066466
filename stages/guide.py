"""Stage `guide`: the classifier trained on, with its explanations guided onto the objects by boxes, in `models/guide`."""

from functools import partial
from pathlib import Path

from pipelines.data.loading.subsets import annotated_images
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.methods import build_guidance
from pipelines.models import read_spec
from pipelines.params import Params
from pipelines.workflow.running import Task, model_for_all, shards_for_all, shards_of, stage, train_stage


def task(whole: Params) -> Task:
    """The guided classifier."""
    params, classifier = whole.for_guide(), Path("models/classify").absolute()
    optim, keys = params.guide.guided, None
    check_boxes(shards_of(params.dataset))
    if optim.annotated < 1:
        keys = annotated_images(shards_for_all(params), "train", optim.annotated, optim.annotated_seed)
    return Task(
        params,
        "guide",
        optim,
        build=partial(build_guidance, model_for_all(params, classifier), optim, keys),
        spec=read_spec(classifier),
        upstream=(classifier,),
        notes={} if keys is None else {"annotated.json": {"count": len(keys), "keys": keys}},
    )


def main() -> None:
    """Guides the classifier."""
    with stage() as params:
        train_stage(task(params))


def check_boxes(shards: str) -> None:
    """Raises `DataError` unless there are boxes to train and to validate with."""
    fields = read_manifest(shards).fields
    for split in ("train", "val"):
        if "boxes" not in fields.get(split, ()):
            raise DataError(f"guide.dataset: no image of {split} in {shards} has a box: guidance needs some")


if __name__ == "__main__":
    main()
