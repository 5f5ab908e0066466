"""Stores the teacher's explanations of the training images, from which students learn."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from pipelines.data.loading.subsets import few_shot
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.stored_explanations import INDEX, are_complete, read_index, shard_files
from pipelines.methods import check_pair
from pipelines.methods.stored_explanations import store_explanations
from pipelines.models import read_spec
from pipelines.params import Params, keyed
from pipelines.storage import files
from pipelines.storage.paths import run_directory
from pipelines.training import launch
from pipelines.workflow import identity
from pipelines.workflow.places import is_shared, model_folder, shards_of
from pipelines.workflow.sharing import model_for_all, shards_for_all
from pipelines.workflow.tasks import explanations_origin, student_spec

CODE = ("pipelines.methods.stored_explanations",)  # the module that computes the maps


def store(params: Params, out: Path) -> None:
    """Computes the explanations of the teacher in `models/teacher` on workers, and stores them.

    Workers write to a folder of the storage whose name is a hash of everything that the explanations depend
    on. A stage that was killed continues there. If the storage is at a URL, the explanations stay there and
    only their index is copied to the folder `out`. Otherwise they move to `out`.
    """
    teacher, shots = model_folder("teacher"), params.distill.shots
    spec = read_spec(teacher)
    shards = shards_for_all(params)
    with keyed("distill", params.distill):
        check_pair(student_spec(params, read_manifest(shards_of(params.dataset)), spec), spec, explained=True)
        subset = (
            None if shots is None else few_shot(shards, "train", shots, params.distill.shots_seed).numbers
        )
    origin = explanations_origin(params)
    shared = is_shared(params)
    place = run_directory(
        params.storage.root, "explanations", asdict(origin), subset, identity.code_digest(*CODE)
    )
    if shared:
        place = f"{params.storage.root.rstrip('/')}/explanations/{PurePosixPath(place).name}"
    if not are_complete(place):
        arguments = (model_for_all(params, teacher), shards, params.data, origin, place, subset)
        training = params.training.with_loader(params.data.loader_workers)
        with keyed("training", training):
            launch(store_explanations, *arguments, training=training, storage=params.storage.root)
    index = read_index(place)
    if shared:
        files.write(out / INDEX, files.read(f"{place}/{INDEX}"))
    else:
        move(Path(place), out, shard_files(index))
    count, size = (sum(shard[name] for shard in index["shards"]) for name in ("count", "bytes"))
    print(f"{count} explanations stored, {size / 2**20:.1f} MiB in all")


def move(folder: Path, out: Path, names: Sequence[str]) -> None:
    """Moves the files `names`, the last of them the index, from `folder` to `out`. A kill loses none."""
    *_, index = names
    for name in names:
        (out / name).unlink(missing_ok=True)
        try:
            os.link(folder / name, out / name)
        except OSError:  # another file system
            shutil.copyfile(folder / name, out / name)
    (folder / index).unlink()  # first, because without an index the other files do not count as complete
    files.remove(folder)
