"""Puts shards, models and explanations where every worker can read them.

With a local storage that is the folder where they are. With a storage at a URL they are uploaded there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pipelines import models
from pipelines.data.shards.publish import publish_explanations, publish_shards
from pipelines.data.shards.stored_explanations import read_index
from pipelines.params import NetworkParams, Params
from pipelines.storage.files import file_digest
from pipelines.storage.paths import users_path
from pipelines.storage.publish import publish
from pipelines.workflow.places import is_shared, shards_of

NetworkT = TypeVar("NetworkT", bound=NetworkParams)


def shards_for_all(params: Params) -> str:
    """Returns the root of the run's shards that every worker can read."""
    shards = shards_of(params.dataset)
    return publish_shards(shards, params.storage.root) if is_shared(params) else shards


def model_for_all(params: Params, folder: Path) -> str:
    """Returns where every worker can read the model in the local `folder`."""
    if not is_shared(params):
        return str(folder)
    url = f"{params.storage.root.rstrip('/')}/models/{models.digest(folder)[:16]}"
    return publish(folder, url, models.model_file_names(folder))


def models_for_all(params: Params, folders: Mapping[str, Path]) -> dict[str, str]:
    """Returns `model_for_all` of each folder, by the same names."""
    return {name: model_for_all(params, folder) for name, folder in folders.items()}


def explanations_for_all(params: Params, root: str | None) -> str | None:
    """Returns where every worker can read the stored explanations whose index is in the folder `root`."""
    if root is None or not (is_shared(params) or "root" in read_index(root)):
        return root
    return publish_explanations(root, params.storage.root)


def absolute_weights(model: NetworkT) -> NetworkT:
    """Returns `model` with the absolute path and the sha256 of its weights file, if that is a local one.

    The path is absolute because workers may run in another folder.
    """
    path = users_path(model.weights)
    if not Path(path).is_file():
        return model
    return model.model_copy(update={"weights": path, "sha256": model.sha256 or file_digest(path)})


def of_config_file(model: NetworkT, part: str) -> NetworkT:
    """Returns `model`, a tower of open_clip, with the content of its config file instead of the path.

    Workers may not have the file. `part` is `vision_cfg` of an image tower or `text_cfg` of a text tower. A
    model that names no config file is returned unchanged.
    """
    if not model.name.endswith(".json"):
        return model
    name, options = models.resolved_name(model.name, model.options, part)
    return model.model_copy(update={"name": name, "options": options})
