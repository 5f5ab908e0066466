"""Where shards, models, explanations and reports are on this machine. It imports no PyTorch."""

from __future__ import annotations

from pathlib import Path

from pipelines import tracking
from pipelines.params import Params
from pipelines.storage.model_folder import copy_model
from pipelines.storage.paths import users_path

REPORTS = Path("reports")
STORED_EXPLANATIONS = Path("data/explanations")
# Start of a B-cos network (`bcosify.starts`) -> its name in reports.
BCOS_NAMES = {"pretrained": "bcosified", "scratch": "bcos_from_scratch"}


def shards_of(dataset: str) -> str:
    """Returns the absolute folder of a data set's shards."""
    return str(Path("data/shards", dataset).absolute())


def model_folder(name: str) -> Path:
    """Returns the absolute folder of a stage's model, e.g. `bcosify/pretrained`."""
    return Path("models", name).absolute()


def is_shared(params: Params) -> bool:
    """Returns True if the storage is at a URL, from which workers on other machines read."""
    return "://" in params.storage.root


def take_model(source: str, out: Path) -> None:
    """Copies the model at `source`, and its text tower if it has one, to the folder `out`.

    `source` is a folder, a file in one, or `models:/name@alias` of the registry.

    Raises:
        FileNotFoundError: there is no model in the folder.
        TrackingError: the registry does not answer or has no such version.
    """
    if not source.startswith("models:/"):
        source = users_path(source)
        source = str(Path(source).parent) if Path(source).is_file() else source
    with tracking.model_folder(source) as folder:
        copy_model(folder, out)
