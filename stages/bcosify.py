"""Stage `bcosify START`: the B-cos network made from the pretrained model, or from scratch, in `models/bcosify/START`."""

import sys
from functools import partial
from pathlib import Path

import torch

from pipelines import models
from pipelines.data.manifest import read_manifest
from pipelines.methods import Bcosification
from pipelines.models import ModelSpec, assemble
from stages.common import shards_of, spec_of, stage, train_stage

CHOICES = ("b", "bias", "norm", "stem_pool", "gap_reorder", "activation", "logit_bias", "temperature", "normalize_weight")


def method(spec: ModelSpec, pretrained: Path | None, seed: int) -> Bcosification:
    """The B-cos network that `spec` describes, from the conventional model in the folder `pretrained`, or random."""
    torch.manual_seed(seed)
    network = None if pretrained is None else models.load(pretrained)[0].get_submodule("network")
    return Bcosification(assemble(spec, network), spec.task, len(spec.classes))


def main(start: str) -> None:
    """Trains the B-cos network whose weights start as `start` says: `pretrained` or `scratch`."""
    with stage() as params:
        optim = getattr(params.bcosify, start)
        manifest = read_manifest(shards_of(params.dataset))
        spec = spec_of(params, manifest, kind="bcos", design=optim.model_dump(include=set(CHOICES)))
        source = Path("models/pretrain").absolute() if start == "pretrained" else None
        make = partial(method, spec, source, params.seed)
        upstream = () if source is None else (source,)
        train_stage(params, f"bcosify/{start}", optim=optim, build=make, spec=spec, manifest=manifest, upstream=upstream)


if __name__ == "__main__":
    main(sys.argv[1])
