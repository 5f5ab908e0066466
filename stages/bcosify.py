"""Stage `bcosify START`: the B-cos network made from the pretrained model, or from scratch, in `models/bcosify/START`."""

import sys
from functools import partial
from pathlib import Path

from pipelines.data.shards.manifest import read_manifest
from pipelines.methods import build_bcosification
from pipelines.params import Params
from pipelines.workflow.running import Task, model_for_all, shards_of, spec_of, stage, train_stage


def task(params: Params, start: str) -> Task:
    """The B-cos network whose weights start as `start` says: `pretrained` or `scratch`."""
    optim = getattr(params.bcosify, start)
    spec = spec_of(params, read_manifest(shards_of(params.dataset)), kind="bcos", design=optim.design())
    source = Path("models/pretrain").absolute() if start == "pretrained" else None
    start_model = None if source is None else model_for_all(params, source)
    build = partial(build_bcosification, spec, start_model, optim, params.seed)
    return Task(params, f"bcosify/{start}", optim, build, spec, upstream=() if source is None else (source,))


def main(start: str) -> None:
    """Trains it."""
    with stage() as params:
        train_stage(task(params, start))


if __name__ == "__main__":
    main(sys.argv[1])
