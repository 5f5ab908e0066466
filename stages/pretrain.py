"""Stage `pretrain`: the conventional model, in `models/pretrain`."""

from functools import partial

from pipelines.data.shards.manifest import read_manifest
from pipelines.methods import build_pretrain
from pipelines.workflow.running import Task, located, shards_of, spec_of, stage, train_stage


def main() -> None:
    """Trains the conventional model of the params."""
    with stage() as params:
        manifest = read_manifest(shards_of(params.dataset))
        spec = spec_of(params, manifest, kind="conventional")
        build = partial(build_pretrain, located(params.model), spec, params.pretrain, params.seed)
        train_stage(Task(params, "pretrain", params.pretrain, build, spec, model=params.model))


if __name__ == "__main__":
    main()
