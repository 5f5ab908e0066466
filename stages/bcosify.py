"""Stage `bcosify START`: the B-cos network made from the pretrained model, or from scratch, in `models/bcosify/START`."""

import sys
from functools import partial
from pathlib import Path

from pipelines.data.manifest import read_manifest
from pipelines.methods import build_bcosification
from stages.common import model_for_all, shards_of, spec_of, stage, train_stage


def main(start: str) -> None:
    """Trains the B-cos network whose weights start as `start` says: `pretrained` or `scratch`."""
    with stage() as params:
        optim = getattr(params.bcosify, start)
        manifest = read_manifest(shards_of(params.dataset))
        spec = spec_of(params, manifest, kind="bcos", design=optim.design())
        source = Path("models/pretrain").absolute() if start == "pretrained" else None
        start_model = None if source is None else model_for_all(params, source)
        build = partial(build_bcosification, spec, start_model, optim, params.seed)
        upstream = () if source is None else (source,)
        train_stage(params, f"bcosify/{start}", optim=optim, build=build, spec=spec, upstream=upstream)


if __name__ == "__main__":
    main(sys.argv[1])
