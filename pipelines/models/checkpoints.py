"""Reads checkpoint files without running code from them.

The content, not the file name, tells the format: safetensors, or one of the two of `torch.save` (zip and
legacy). A pickle may hold tensors, NumPy arrays and the harmless types listed here. Any other type is
refused, because constructing it could run code.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import datetime
import pathlib
import re
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from pipelines.models.errors import WeightsError
from pipelines.storage.errors import one_line

LONGEST_HEADER = 100_000_000  # bytes; a safetensors file is: header length (8 bytes), header (JSON), data
STARTS = {  # first bytes of a file that is no checkpoint -> what the file is, and what to do
    b"\x1f\x8b": "packed by gzip: unpack it",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zXZ": "packed by xz: unpack it",
    b"\x89HDF": "HDF5 (Keras): only PyTorch's and safetensors files are read",
    b"\x93NUMPY": "a NumPy array: a state dict, an array for each name, is wanted",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    b"<": "HTML or XML: its download gave a page instead of the file",
    b"{": "JSON: name the file of the weights themselves",
}


def read_content(path: Path, source: str) -> Any:
    """Returns the object in the file at `path` (safetensors: a dict of tensors); errors call it `source`.

    Raises:
        WeightsError: the file has another format, is damaged, or holds more than tensors and harmless types.
    """
    start = _start(path, source)
    try:
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER:
            return safetensors.torch.load_file(path)
        if start.startswith(b"PK\x03\x04"):
            _check_archive(path)
        elif told := next((told for begin, told in STARTS.items() if start.lstrip().startswith(begin)), None):
            raise WeightsError(told)
        return _unpickled(path)
    except WeightsError as error:
        raise WeightsError(f"weights {source}: {error}") from None
    except Exception as error:  # safetensors, zipfile and torch.load raise many types on damaged files
        raise WeightsError(f"weights {source}: not a readable weights file ({one_line(error)})") from None


def _start(path: Path, source: str) -> bytes:
    """The first 64 bytes of the file; raises WeightsError if it is empty or cannot be opened."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(f"weights {source}: not a readable weights file ({one_line(error)})") from None
    if not start:
        raise WeightsError(f"weights {source}: not a readable weights file (it is empty)")
    return start


def _check_archive(path: Path) -> None:
    """Raises WeightsError unless `torch.save` wrote the zip archive."""
    names = zipfile.ZipFile(path).namelist()
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last:
        raise WeightsError(
            "a TorchScript program, not a checkpoint: save torch.jit.load(FILE).state_dict() with torch.save"
        )
    if "archive_format" in last:
        raise WeightsError(
            "an exported program, not a checkpoint: save torch.export.load(FILE).state_dict with torch.save"
        )
    if "data.pkl" not in last:
        raise WeightsError(
            f"an archive of {', '.join(names[:5]) or 'nothing'}, not a checkpoint of torch.save: unpack it"
        )


def _unpickled(path: Path) -> Any:
    """The object in a file written by `torch.save`, in the zip or the legacy format."""
    with warnings.catch_warnings(), torch.serialization.safe_globals([*_harmless(), *_stand_ins(path)]):
        warnings.simplefilter("ignore")  # torch.load warns about pickle protocols
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            found = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>", str(error))
            if found is None:
                raise
            raise WeightsError(
                f"refused, it holds more than tensors: to read a {found[1] or found[2]} would run code. "
                "If you trust the file, load it with torch.load(FILE, weights_only=False), "
                "and save its state dict alone"
            ) from None


# Types other than tensors that a checkpoint may hold --------------------------------------------------------

# Constructing one of them has no side effect. No other type is imported or called.


class _Ignored:
    """Stand-in for an object of a training framework, such as its configuration; drops all arguments."""

    def __new__(cls, *_: Any, **__: Any) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _dict(*_: Any) -> dict[Any, Any]:
    return {}


def _list(*_: Any) -> list[Any]:
    return []


FRAMEWORKS = (  # the objects of types whose names start like this become `_Ignored`
    *(
        "lightning.",
        "lightning_fabric.",
        "lightning_utilities.",
        "mmengine.",
        "omegaconf.",
        "pytorch_lightning.",
        "typing.",
    ),
    *("torch.amp.", "torch.cuda.amp.", "torch.nn.modules.loss.", "torch.optim."),
)
DICTS = (  # subclasses of dict; their objects are read as plain dicts
    *(
        "easydict.EasyDict",
        "fvcore.common.config.CfgNode",
        "ml_collections.config_dict.config_dict.ConfigDict",
    ),
    *(
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
    ),
    *(
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "yacs.config.CfgNode",
    ),
)


def _harmless() -> list[Any]:
    """Types, and pairs (type or function, name in the pickle), for `torch.serialization.safe_globals`."""
    plain = [
        argparse.Namespace,
        types.SimpleNamespace,
        np.dtype,
        np.ndarray,
        torch.torch_version.TorchVersion,
    ]
    plain += [datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone]
    plain += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    arrays = {"scalar": multiarray.scalar, "_reconstruct": multiarray._reconstruct}
    named: list[Any] = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in arrays.items()
    ]
    paths = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    named += [
        (pathlib.PurePath, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in paths
    ]
    named += [
        (getattr(builtins, name), f"builtins.{name}") for name in ("bool", "float", "frozenset", "int", "str")
    ]
    named += [(getattr(builtins, name), f"builtins.{name}") for name in ("dict", "list", "tuple", "slice")]
    named += [
        (_dict, "collections.defaultdict"),
        (_list, "collections.deque"),
        *((dict, name) for name in DICTS),
    ]
    return plain + named


def _stand_ins(path: Path) -> list[Any]:
    """Pairs (`_Ignored`, type name) for the training-framework types in a checkpoint; see `_harmless`."""
    with contextlib.suppress(Exception):  # legacy format or damaged file: torch.load reports the error
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known = {name for _, name in filter(lambda each: isinstance(each, tuple), _harmless())}
        return [(_Ignored, name) for name in unknown if name not in known and name.startswith(FRAMEWORKS)]
    return []
