"""Names of the files in a model's folder, and local copies of them.

A folder holds one model (a classifier or an image tower), and may hold a text tower beside it. Each is a
safetensors file with the weights and a JSON file that says how to build the network.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from pipelines.storage.files import staged
from pipelines.storage.publish import exists, pull
from pipelines.storage.retry import is_remote

WEIGHTS, CONFIG = "model.safetensors", "model.json"
TEXT_WEIGHTS, TEXT_CONFIG = "text.safetensors", "text.json"


def has_text_tower(directory: str | Path) -> bool:
    """Returns True if the folder or URL holds a text tower."""
    return exists(f"{directory}/{TEXT_CONFIG}")


def model_file_names(directory: str | Path) -> tuple[str, ...]:
    """Names of the model's files in a folder or at a URL, text tower included; its weights come last."""
    return (*((TEXT_CONFIG, TEXT_WEIGHTS) if has_text_tower(directory) else ()), CONFIG, WEIGHTS)


def copy_model(source: Path, out: Path) -> None:
    """Copies the model in the local folder `source`, with its text tower if any, to the folder `out`.

    Raises:
        FileNotFoundError: `source` has no model.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in model_file_names(source):
        if not (source / name).is_file():
            raise FileNotFoundError(f"no model in {source}: {CONFIG} and {WEIGHTS} are wanted there")
        with staged(out / name) as path:
            shutil.copyfile(source / name, path)


@contextmanager
def local_folder(directory: str | Path, names: Iterable[str] = (CONFIG, WEIGHTS)) -> Iterator[Path]:
    """Yields a local folder with the files `names`.

    It is `directory` itself if that is local. For a URL it is a temporary folder with copies of the files.
    """
    if not is_remote(directory):
        yield Path(fsspec.core.strip_protocol(directory) if "://" in str(directory) else directory)
        return
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        pull(str(directory), Path(folder), names)
        yield Path(folder)
