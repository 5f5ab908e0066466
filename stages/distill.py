"""Stage `distill RUN`: a student of the teacher in `models/teacher`, in `models/distill/RUN`."""

import sys
from functools import partial
from pathlib import Path

from pipelines.data.loading.subsets import few_shot, validation_images
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.stored_explanations import check_origin
from pipelines.methods import build_e2kd, check_pair
from pipelines.models import read_spec
from pipelines.params import Params, ParamsError, keyed
from pipelines.workflow.running import Task, located, model_for_all, shards_for_all, shards_of, stage, student_spec, train_stage
from stages import explain


def task(params: Params, name: str) -> Task:
    """The student whose loss `name` says: `kd` or `e2kd`."""
    optim = getattr(params.distill, name)
    shards, teacher = shards_of(params.dataset), Path("models/teacher").absolute()
    manifest, of_teacher = read_manifest(shards), read_spec(teacher)
    spec = student_spec(params, manifest, of_teacher)
    with keyed("distill", params.distill):
        check_pair(spec, of_teacher, explained=optim.explanation_weight > 0)
    if optim.label_weight > 0 and not manifest.labelled:
        raise ParamsError(f"distill.{name}.label_weight: {params.dataset} has no labels; 0 is wanted, not {optim.label_weight:g}")
    shots, frozen, subset, notes = params.distill.shots, optim.explanations == "frozen", None, {}
    if shots is not None:
        readable = shards_for_all(params)
        subset = few_shot(readable, "train", shots, params.distill.shots_seed)
        notes = {"validation.json": validation_images(readable)}
    if frozen:
        check_origin(str(explain.OUT.absolute()), explain.origin(params, str(teacher)))
    student = located(params.distill.student)
    return Task(
        params,
        f"distill/{name}",
        optim,
        build=partial(build_e2kd, student, spec, model_for_all(params, teacher), optim, params.seed, manifest.labelled),
        spec=spec,
        upstream=(teacher,),
        model=params.distill.student,
        subset=subset,
        explanations=str(explain.OUT.absolute()) if frozen else None,
        notes=notes,
    )


def main(name: str) -> None:
    """Trains it."""
    with stage() as params:
        train_stage(task(params, name))


if __name__ == "__main__":
    main(sys.argv[1])
