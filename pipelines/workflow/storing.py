"""The teacher's explanations of the training images, stored for students."""

from __future__ import annotations

import uuid
from pathlib import Path

from pipelines.data.loading.subsets import few_shot
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.stored_explanations import INDEX, read_index
from pipelines.methods import check_pair
from pipelines.methods.stored_explanations import store_explanations
from pipelines.models import read_spec
from pipelines.params import Params, keyed
from pipelines.storage import files
from pipelines.storage.publish import pull
from pipelines.training import launch
from pipelines.workflow.places import is_shared, model_folder, model_for_all, shards_for_all, shards_of
from pipelines.workflow.tasks import explanations_origin, student_spec


def store(params: Params, out: Path) -> None:
    """Stores the explanations of the teacher in `models/teacher` in the folder `out`, computed on the workers of the params."""
    teacher, shots = model_folder("teacher"), params.distill.shots
    spec = read_spec(teacher)
    shards, shared = shards_for_all(params), is_shared(params)
    with keyed("distill", params.distill):
        check_pair(student_spec(params, read_manifest(shards_of(params.dataset)), spec), spec, explained=True)
        subset = None if shots is None else few_shot(shards, "train", shots, params.distill.shots_seed).numbers
    place = f"{params.storage.root.rstrip('/')}/stored/{uuid.uuid4().hex}" if shared else str(out.absolute())
    arguments = (model_for_all(params, teacher), shards, params.data, explanations_origin(params), place, subset)
    training = params.training.with_loader(params.data.loader_workers)
    with keyed("training", training):
        count = launch(store_explanations, *arguments, training=training, storage=params.storage.root)
    if shared:
        pull(place, out, (*(shard["name"] for shard in read_index(place)["shards"]), INDEX))
        files.remove(place)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{count} explanations stored, {size / 2**20:.1f} MiB in all")
