"""Weights files: safetensors, or torch files read without unpickling; checked key by key before they are used."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from urllib.parse import urlparse

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipelines.models.errors import WeightsError
from pipelines.storage.errors import one_line
from pipelines.storage.files import file_digest
from pipelines.storage.paths import users_path

StateDict = dict[str, Tensor]


def read_state_dict(source: str, sha256: str | None = None) -> StateDict:
    """The tensors of a local file or URL, by parameter name.

    Wrappers (`state_dict`, `model`) and the `module.` prefix of DataParallel are taken off.

    Raises:
        WeightsError: no such file, another sha256, neither safetensors nor a plain torch file of tensors (code is never run).
    """
    path = _local(source, sha256)
    if sha256 is not None and (actual := file_digest(path)) != sha256:
        raise WeightsError(f"weights {source}: sha256 is {actual}, {sha256} was expected")
    try:
        content = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError:
        raise WeightsError(f"weights {source}: refused, it holds more than tensors (unpickling would run code)") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise WeightsError(f"weights {source}: not a readable weights file ({one_line(error)})") from None
    return _tensors(content, source)


def load_strictly(model: nn.Module, state: StateDict, source: str) -> None:
    """Loads `state` into `model`.

    Raises:
        WeightsError: one line that names the missing, unexpected and misshaped keys, of each kind the first few.
    """
    own = model.state_dict()
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    misshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    problems = {
        "missing": sorted(own.keys() - state.keys() - optional),
        "unexpected": sorted(state.keys() - own.keys()),
        "misshaped": sorted(misshaped),
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {_few(keys)}" for kind, keys in problems.items() if keys)
        raise WeightsError(f"weights {source} do not fit {type(model).__name__}: {told}")
    model.load_state_dict(state, strict=False)


def _few(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _local(source: str, sha256: str | None) -> Path:
    """The file itself, or its copy in torch's hub cache."""
    if urlparse(source).scheme not in ("http", "https"):
        path = Path(users_path(source))
        if not path.is_file():
            raise WeightsError(f"weights {source}: no such file (none, a tag of the library, a file or a URL is wanted)")
        return path
    name = hashlib.sha256(source.encode()).hexdigest()[:16] + "-" + Path(urlparse(source).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise WeightsError(f"weights {source}: download failed ({error})") from None
    return path


def _tensors(content: object, source: str) -> StateDict:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"weights {source}: not a dict of tensors by parameter name")
    return {key.removeprefix("module."): value for key, value in content.items()}
