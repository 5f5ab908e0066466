"""Stored explanations: a teacher's logits and maps, sample by sample, in shards like the data's.

    <root>/train-000000.tar   `<key>.logits.npy` (K,) and `<key>.map.npy` (C, h, w) of each sample
    <root>/explanations.json  written last: the teacher, the images, and how the maps were made

A map is stored divided by its largest absolute value, so that it fits half precision: losses use its direction alone.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.cache import local_copy
from pipelines.data.shards.manifest import Shard, ShardError
from pipelines.data.shards.tar import scan, write_tar
from pipelines.storage.files import read_json, write_json
from pipelines.storage.publish import File
from pipelines.storage.retry import is_remote

INDEX = "explanations.json"
LOGITS, MAP = "logits.npy", "map.npy"  # suffixes


@dataclass(frozen=True)
class Origin:
    """Everything that stored explanations depend on."""

    teacher: str  # digest of the model
    images: str  # digest of the data's manifest
    maps: str  # `dynamic_weights` or `gradcam`
    image_size: int  # of the view that is explained
    eval_resize: int | None
    resolution: int  # side of the stored maps
    precision: str


def write_shard(root: str, name: str, samples: Iterable[tuple[str, Tensor, Tensor]]) -> Shard:
    """Writes one shard of (key, logits (K,), map (C, h, w)), whole or not at all."""
    return write_tar(root, name, ((key, {LOGITS: _npy(logits), MAP: _npy(stored)}) for key, logits, stored in samples))


def _npy(values: Tensor) -> bytes:
    """A tensor as the content of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, values.numpy(), allow_pickle=False)
    return buffer.getvalue()


def write_index(root: str, origin: Origin, shards: Iterable[Shard]) -> None:
    """Writes the index of the shards in `root`, which marks them as complete."""
    of_name = {shard.name: asdict(shard) for shard in sorted(shards, key=lambda shard: shard.name)}
    write_json(f"{root}/{INDEX}", {**asdict(origin), "shards": list(of_name.values())})


def check_origin(root: str, wanted: Origin) -> None:
    """Raises `ShardError` unless the stored explanations at `root` are of this origin."""
    found = read_index(root)
    for name, value in asdict(wanted).items():
        if found.get(name) != value:
            raise ShardError(f"{root}: its explanations are of another {name} ({found.get(name)}, not {value}): store them again")


def read_index(root: str) -> dict[str, Any]:
    """The index that `write_index` wrote; raises `ShardError` if there is none."""
    try:
        content = read_json(f"{root}/{INDEX}")
        for entry in () if content is None else content["shards"]:
            File(entry["name"], entry["bytes"], entry["sha256"])  # which raises: copies are written under these names
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ShardError(f"{root}/{INDEX}: not read: {error}") from None
    if content is None:
        raise ShardError(f"{root}: no {INDEX}; explanations were not stored there, or not to the end")
    return content


class StoredExplanations:
    """Reads stored explanations by shard and key; picklable.

    Args:
        root: a folder or any fsspec URL.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._shards: dict[str, Shard] | None = None
        self._members: dict[str, dict[tuple[str, str], tuple[int, int]]] = {}  # of each shard: (key, suffix) -> (offset, bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_shards": None, "_members": {}}

    def read(self, shard: str, key: str) -> tuple[Tensor, Tensor]:
        """Logits (K,) and map (C, h, w) of a sample, both float32.

        Raises:
            ShardError: the shard or the key is missing, or a value is not finite.
        """
        path = self._path(shard)
        if shard not in self._members:
            self._members[shard] = self._scan(path, shard)
        values = []
        for suffix in (LOGITS, MAP):
            if (key, suffix) not in self._members[shard]:
                raise ShardError(f"{self.root}/{shard}: no {suffix} of {key}: store the explanations of all images again")
            offset, size = self._members[shard][key, suffix]
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
            try:
                values.append(torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False)).float())
            except (ValueError, EOFError) as error:
                raise ShardError(f"{self.root}/{shard}: {suffix} of {key} is damaged: {error}") from None
            if not torch.isfinite(values[-1]).all():
                raise ShardError(f"{self.root}/{shard}: {suffix} of {key} has values that are not finite")
        return values[0], values[1]

    def _path(self, shard: str) -> Path:
        """A file on this machine with the shard's content."""
        if not is_remote(self.root):
            return Path(fsspec.core.strip_protocol(self.root), shard)
        if self._shards is None:
            self._shards = {entry["name"]: Shard(**entry) for entry in read_index(self.root)["shards"]}
        if shard not in self._shards:
            raise ShardError(f"{self.root}/{shard}: not read: it is not in {INDEX}")
        return local_copy(self.root, self._shards[shard])

    def _scan(self, path: Path, shard: str) -> dict[tuple[str, str], tuple[int, int]]:
        """Where the files of a shard lie in it: (offset, bytes) by key and suffix."""
        try:
            status = path.stat()
            entries = scan(path, status.st_size, status.st_mtime_ns, (LOGITS, MAP))
            return {(entry.key, suffix): (offset, size) for entry in entries for suffix, offset, size in entry.files}
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ShardError(f"{self.root}/{shard}: not read: {error}") from None
