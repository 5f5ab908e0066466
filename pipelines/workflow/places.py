"""Where shards, models and explanations are: on this machine, and where every worker can read them.

With a local storage both are the same folder. With a storage at a URL, the functions `..._for_all` upload the
files there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pipelines import models, tracking
from pipelines.data.shards.publish import publish_explanations, publish_shards
from pipelines.data.shards.stored_explanations import read_index
from pipelines.params import NetworkParams, Params
from pipelines.storage.files import file_digest
from pipelines.storage.paths import users_path
from pipelines.storage.publish import publish

NetworkT = TypeVar("NetworkT", bound=NetworkParams)

REPORTS = Path("reports")
STORED_EXPLANATIONS = Path("data/explanations")


def shards_of(dataset: str) -> str:
    """Returns the absolute folder of a data set's shards."""
    return str(Path("data/shards", dataset).absolute())


def model_folder(name: str) -> Path:
    """Returns the absolute folder of a stage's model, e.g. `bcosify/pretrained`."""
    return Path("models", name).absolute()


def is_shared(params: Params) -> bool:
    """Returns True if the storage is at a URL, from which workers on other machines read."""
    return "://" in params.storage.root


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


def save_model_from(source: str, out: Path) -> None:
    """Saves the model at `source`, and its text tower if it has one, to the folder `out`.

    `source` is a folder, a file in one, or `models:/name@alias` of the registry.
    """
    if not source.startswith("models:/"):
        source = users_path(source)
        source = str(Path(source).parent) if Path(source).is_file() else source
    with tracking.model_folder(source) as folder:
        models.save(out, *models.load(folder))
        if models.has_text_tower(folder):
            models.save_text_tower(out, models.load_text_tower(folder))
