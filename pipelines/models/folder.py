"""The files of a model's folder: image tower or classifier, and the text tower beside it where there is one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from pipelines.storage.publish import exists, pull
from pipelines.storage.retry import is_remote

WEIGHTS, CONFIG = "model.safetensors", "model.json"
TEXT_WEIGHTS, TEXT_CONFIG = "text.safetensors", "text.json"


def has_text_tower(directory: str | Path) -> bool:
    """Whether a text tower lies beside the model in a folder or at a URL."""
    return exists(f"{directory}/{TEXT_CONFIG}")


def model_file_names(directory: str | Path) -> tuple[str, ...]:
    """Names of the files that make up the model in a folder or at a URL; the weights of the model are the last."""
    return (*((TEXT_CONFIG, TEXT_WEIGHTS) if has_text_tower(directory) else ()), CONFIG, WEIGHTS)


@contextmanager
def local_folder(directory: str | Path, names: Iterable[str] = (CONFIG, WEIGHTS)) -> Iterator[Path]:
    """A local folder with the files `names`: `directory` itself, or for a URL a temporary folder with copies of them."""
    if not is_remote(directory):
        yield Path(fsspec.core.strip_protocol(directory) if "://" in str(directory) else directory)
        return
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        pull(str(directory), Path(folder), names)
        yield Path(folder)
