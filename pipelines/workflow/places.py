"""Where the things of a stage lie: on this machine, and where every worker sees them."""

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
    """The absolute root of a data set's shards."""
    return str(Path("data/shards", dataset).absolute())


def model_folder(name: str) -> Path:
    """The absolute folder of the model that a stage leaves, such as `bcosify/pretrained`."""
    return Path("models", name).absolute()


def is_shared(params: Params) -> bool:
    """Whether the storage is at a URL: workers may be on other machines, and read there."""
    return "://" in params.storage.root


def shards_for_all(params: Params) -> str:
    """The root of the run's shards that every worker sees."""
    shards = shards_of(params.dataset)
    return publish_shards(shards, params.storage.root) if is_shared(params) else shards


def model_for_all(params: Params, folder: Path) -> str:
    """The place that every worker sees of the model in a folder here."""
    if not is_shared(params):
        return str(folder)
    url = f"{params.storage.root.rstrip('/')}/models/{models.digest(folder)[:16]}"
    return publish(folder, url, models.model_file_names(folder))


def models_for_all(params: Params, folders: Mapping[str, Path]) -> dict[str, str]:
    """`model_for_all` of each folder, by the same names."""
    return {name: model_for_all(params, folder) for name, folder in folders.items()}


def explanations_for_all(params: Params, root: str | None) -> str | None:
    """The root that every worker sees of the stored explanations whose index is in a folder here."""
    if root is None or not (is_shared(params) or "root" in read_index(root)):
        return root
    return publish_explanations(root, params.storage.root)


def absolute_weights(model: NetworkT) -> NetworkT:
    """`model` with the absolute path and sha256 of a local weights file, because workers may run in another folder."""
    path = users_path(model.weights)
    if not Path(path).is_file():
        return model
    return model.model_copy(update={"weights": path, "sha256": model.sha256 or file_digest(path)})


def save_model_from(source: str, out: Path) -> None:
    """Saves the model at `source`, a folder, a file in one or `models:/name@alias` of the registry, in the folder `out`.

    A text tower that lies beside it goes along.
    """
    if not source.startswith("models:/"):
        source = users_path(source)
        source = str(Path(source).parent) if Path(source).is_file() else source
    with tracking.model_folder(source) as folder:
        models.save(out, *models.load(folder))
        if models.has_text_tower(folder):
            models.save_text_tower(out, models.load_text_tower(folder))
