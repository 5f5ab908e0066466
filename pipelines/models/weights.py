"""Reads state dicts from weights files or URLs, fits their keys to a network, and loads them strictly.

Training scripts wrap state dicts in other dicts and put prefixes before their keys. Known wrappers and
prefixes are removed. Then every key and shape must fit the network.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.models.checkpoints import read_content
from pipelines.models.errors import WeightsError
from pipelines.storage.errors import one_line
from pipelines.storage.files import file_digest
from pipelines.storage.paths import users_path

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

SUFFIXES = (
    *("bin", "ckpt", "gz", "h5", "model", "msgpack", "npz", "onnx", "pickle", "pkl"),
    *("pt", "pt2", "pth", "safetensors", "tar", "th", "torchscript", "weights", "zip"),
)
WRAPPERS = (  # keys under which training scripts save a state dict
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
)
# keys under which they save moving averages of the weights
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")  # wrappers put them before all keys
# torch's wrappers put these anywhere in a key
INSIDE = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def names_a_file(weights: str) -> bool:
    """Returns True if `weights` is a file or URL, not a tag: the file exists, or the name looks like one."""
    looks = re.search(rf"[/\\]|\.({'|'.join(SUFFIXES)})$|^\w+://", weights, re.IGNORECASE)
    return looks is not None or Path(users_path(weights)).is_file()


def read_state_dict(source: str, sha256: str | None = None) -> StateDict:
    """Returns the tensors in a local file or at a URL, by parameter name.

    The state dict is the content itself or lies under a key of `WRAPPERS`, else of `AVERAGED` (moving
    averages), else under the only key whose value holds tensors. Prefixes that DataParallel, torch.compile,
    FSDP and activation checkpointing put into keys are removed.

    Args:
        source: path or URL; downloads are kept in torch's hub cache.
        sha256: digest that the file must have.

    Raises:
        WeightsError: the file does not exist, has another sha256, cannot be read without running code, or has
            no state dict.
    """
    path = _local(source, sha256)
    if sha256 is not None and (actual := file_digest(path)) != sha256:
        raise WeightsError(f"weights {source}: sha256 is {actual}, {sha256} was expected")
    content = read_content(path, source)
    state = _state_dict(content, source)
    return {_unwrapped(key): value for key, value in state.items() if key != "n_averaged"}


def fitted(state: StateDict, network: nn.Module, source: str) -> StateDict:
    """Returns `state` without a prefix that keeps its keys from fitting `network`, such as `model.`.

    Keys without that prefix (of losses or metrics) are left out, and the log names them.

    Raises:
        WeightsError: `state` holds several such networks.
    """
    wanted = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    if not wanted or wanted <= state.keys():
        return state
    probe = max(wanted, key=len)
    found = [key[: -len(probe)] for key in state if key.endswith(f".{probe}")]
    whole = [prefix for prefix in found if all(prefix + key in state for key in wanted)]
    usual = [prefix for prefix in whole if re.fullmatch(f"({'|'.join(map(re.escape, PREFIXES))})+", prefix)]
    if len(usual or whole) > 1:
        raise WeightsError(
            f"weights {source}: several networks of this architecture, "
            f"under {', '.join(map(repr, usual or whole))}: save the state_dict of one of them"
        )
    prefix = (usual or whole or [_common(state)])[0]
    others = [key for key in state if not key.startswith(prefix)]
    if others:
        log.info("weights %s: the network is under %r; left out are %s", source, prefix, few(others))
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def paired(state: StateDict, network: nn.Module) -> StateDict | None:
    """Renames the tensors of `state` to the keys of `network` in order; returns `None` if a shape differs.

    `state` may end in up to two more tensors, those of a classifier that `network` does not have.
    """
    own, values = network.state_dict(), list(state.values())
    if not 0 <= len(values) - len(own) <= 2 or any(
        value.shape != wanted.shape for value, wanted in zip(values, own.values(), strict=False)
    ):
        return None
    return dict(zip(own, values, strict=False))


def load_strictly(model: nn.Module, state: StateDict, source: str) -> None:
    """Loads `state` into `model`; all keys but `num_batches_tracked` must be there.

    Raises:
        WeightsError: keys are missing, unexpected or misshaped; the message names the first few of each.
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
        told = "; ".join(f"{kind}: {few(keys)}" for kind, keys in problems.items() if keys)
        raise WeightsError(f"weights {source} do not fit {type(model).__name__}: {told}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"weights {source} do not fit {type(model).__name__}: {one_line(error)}") from None


def few(keys: list[str], most: int = 5) -> str:
    """Text with the first `most` of `keys` and the number of the others."""
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _common(state: StateDict) -> str:
    """Longest sequence of `PREFIXES` before all keys, to be removed from them.

    Then an error about missing and unexpected keys names only the keys that really differ.
    """
    prefix = ""
    while more := next(
        (each for each in PREFIXES if state and all(key.startswith(prefix + each) for key in state)), None
    ):
        prefix += more
    return prefix


def _unwrapped(key: str) -> str:
    key = INSIDE.sub("", key)
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _local(source: str, sha256: str | None) -> Path:
    """The local file, or the copy of the URL in torch's hub cache."""
    if urlparse(source).scheme not in ("http", "https"):
        path = Path(users_path(source))
        if path.is_dir():
            inside = [child.name for child in sorted(path.iterdir()) if names_a_file(child.name)]
            raise WeightsError(
                f"weights {source}: a folder; name a file in it ({few(inside) or 'it has none'})"
            )
        if not path.is_file():
            raise WeightsError(
                f"weights {source}: no such file "
                "(none, a tag of the library, a local file or an http address is wanted)"
            )
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


def _state_dict(content: object, source: str) -> StateDict:
    """The state dict in a checkpoint's content; raises WeightsError with its keys if there is none."""
    inner = content
    while isinstance(inner, Mapping) and (key := _wrapper(inner)) is not None:
        averaged = [name for name in AVERAGED if name != key and isinstance(inner.get(name), Mapping)]
        if key in AVERAGED or averaged:
            log.info(
                "weights %s: taken from %r%s", source, key, f", not from {few(averaged)}" if averaged else ""
            )
        inner = inner[key]
    tensors = _tensors(inner)
    if not tensors:
        raise WeightsError(
            f"weights {source}: no state dict where one is looked for "
            f"(the file itself, or {', '.join(WRAPPERS)} in it). "
            f"It holds {_described(content)}. Save the network's state_dict() alone"
        )
    return tensors


def _wrapper(content: Mapping[object, object]) -> str | None:
    """The key of the state dict in `content`; `None` if `content` is itself a state dict, or has none."""
    usual = next(
        (key for key in (*WRAPPERS, *AVERAGED) if isinstance(content.get(key), Mapping) and content[key]),
        None,
    )
    if usual is not None or _tensors(content):
        return usual
    states = [
        key
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Mapping) and _tensors(value)
    ]
    return states[0] if len(states) == 1 else None


def _tensors(content: object) -> StateDict:
    """The tensors and arrays in a mapping, as tensors by name; all other values are left out."""
    if not isinstance(content, Mapping):
        return {}
    found = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor | np.ndarray)
    }
    try:
        return {key: torch.as_tensor(value) for key, value in found.items()}
    except (TypeError, ValueError):  # arrays of strings or objects
        return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _described(content: object, depth: int = 2) -> str:
    """Describes a checkpoint's content for an error message: its keys, and the shapes of its tensors."""
    if isinstance(content, Tensor | np.ndarray):
        return str(tuple(content.shape))
    if not isinstance(content, Mapping):
        return type(content).__name__
    inside = f"a dict of {len(content)}"
    if depth == 0 or not content:
        return inside
    return f"{inside} ({few([f'{key}: {_described(value, depth - 1)}' for key, value in content.items()])})"
