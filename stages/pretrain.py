"""Stage `pretrain`: the conventional model, in `models/pretrain`."""

from functools import partial

import torch

from pipelines.data.manifest import read_manifest
from pipelines.methods import Pretrain
from pipelines.models import ModelSpec, assemble, build
from pipelines.params import ModelParams
from stages.common import absolute_weights, shards_of, spec_of, stage, train_stage


def method(model: ModelParams, spec: ModelSpec, label_smoothing: float, seed: int) -> Pretrain:
    """The network with its pretrained weights, a new head where the classes are others."""
    torch.manual_seed(seed)
    classes = len(spec.classes)
    network = build(model.name, model.weights, num_classes=classes, sha256=model.sha256, options=model.options)
    return Pretrain(assemble(spec, network), spec.task, classes, label_smoothing)


def main() -> None:
    """Trains the conventional model of the params."""
    with stage() as params:
        manifest = read_manifest(shards_of(params.dataset))
        spec = spec_of(params, manifest, kind="conventional")
        make = partial(method, absolute_weights(params.model), spec, params.pretrain.label_smoothing, params.seed)
        train_stage(params, "pretrain", optim=params.pretrain, build=make, spec=spec, manifest=manifest)


if __name__ == "__main__":
    main()
