"""Stored explanations: a teacher's logits and maps for each sample, in shards like those of the data.

    <root>/train-000000.tar             `<key>.logits.npy` (K,) and `<key>.map.npy` (C, h, w) of each sample
    <root>/train-000000.index.jsonl.gz  their places in the tar, see `index`; written after the tar
    <root>/explanations.json            the index, written last: an `Origin` and the list of shards

If `<root>` is a URL, `explanations.json` names it, and a copy of this file suffices to find the shards.

K classes, C channels, h x w pixels of a map. Maps are stored divided by their largest absolute value, so that
they fit half precision. This loses nothing, because the losses use only the direction of a map.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.index import index_name, index_part, part_entries, part_shard
from pipelines.data.shards.manifest import Shard, ShardError
from pipelines.data.shards.reader import OpenShards
from pipelines.data.shards.tar import Entry, write_tar
from pipelines.storage import files
from pipelines.storage.publish import File
from pipelines.storage.retry import is_remote

INDEX = "explanations.json"
LOGITS, MAP = "logits.npy", "map.npy"  # suffixes


@dataclass(frozen=True)
class Origin:
    """Everything that determines the values of stored explanations."""

    teacher: str  # digest of the teacher
    images: str  # digest of the manifest of the data
    maps: str  # `dynamic_weights` or `gradcam`
    image_size: int  # side of the explained view, pixels
    eval_resize: int | None  # see `DataParams`
    resolution: int  # side of the stored maps, pixels
    precision: str


def write_shard(root: str, name: str, samples: Iterable[tuple[str, Tensor, Tensor]]) -> Shard:
    """Writes one shard of (key, logits (K,), map (C, h, w)) atomically, then its samples' places."""
    shard, entries = write_tar(
        root, name, ((key, {LOGITS: _npy(logits), MAP: _npy(stored)}) for key, logits, stored in samples)
    )
    files.write(f"{root}/{_places(name)}", index_part(shard, entries, {}))
    return shard


def finished_shards(root: str, names: Iterable[str]) -> dict[str, Shard]:
    """Name -> shard for those of `names` at `root` that `write_shard` has finished."""
    there = set(files.names_in(root))
    parts = (files.read(f"{root}/{_places(name)}") for name in names if {name, _places(name)} <= there)
    return {shard.name: shard for shard in map(part_shard, parts) if shard is not None}


def shard_files(index: dict[str, Any]) -> list[str]:
    """Names of all files of the stored explanations with this index; the index itself is last."""
    names = [entry["name"] for entry in index["shards"]]
    return [*names, *map(_places, names), INDEX]


def _places(name: str) -> str:
    """Name of the file with the places of the samples in the shard `name`."""
    return index_name(name.removesuffix(".tar"))


def _npy(values: Tensor) -> bytes:
    """Encodes a tensor as a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, values.numpy(), allow_pickle=False)
    return buffer.getvalue()


def write_index(root: str, origin: Origin, shards: Iterable[Shard]) -> None:
    """Writes the index of the shards at `root`, which marks them as complete; names `root` if it is a URL."""
    of_name = {shard.name: asdict(shard) for shard in sorted(shards, key=lambda shard: shard.name)}
    place = {"root": root} if "://" in root else {}
    files.write_json(f"{root}/{INDEX}", {**asdict(origin), **place, "shards": list(of_name.values())})


def check_origin(root: str, wanted: Origin) -> None:
    """Raises `ShardError` unless the stored explanations at `root` have the origin `wanted`."""
    found = read_index(root)
    for name, value in asdict(wanted).items():
        if found.get(name) != value:
            raise ShardError(
                f"{root}: its explanations are of another {name} ({found.get(name)}, not {value}): "
                "store them again"
            )


def read_index(root: str) -> dict[str, Any]:
    """Reads the index that `write_index` wrote; raises `ShardError` if it is missing or damaged."""
    try:
        content = files.read_json(f"{root}/{INDEX}")
        for entry in () if content is None else content["shards"]:
            # Local copies are written under these names, so `File` raises if one is unsafe.
            File(entry["name"], entry["bytes"], entry["sha256"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ShardError(f"{root}/{INDEX}: not read: {error}") from None
    if content is None:
        raise ShardError(f"{root}: no {INDEX}; explanations were not stored there, or not to the end")
    return content


def are_complete(root: str) -> bool:
    """Returns True if `root` has an index with shards, which marks its explanations as complete."""
    try:
        return bool(read_index(root)["shards"])
    except (ShardError, LookupError, TypeError):
        return False


class StoredExplanations:
    """Reads stored explanations by shard and key. Picklable.

    Args:
        root: a folder or any fsspec URL.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._shards: dict[str, Shard] = {}
        self._entries: dict[str, dict[str, Entry]] = {}  # shard name -> key -> entry
        self._open = OpenShards(root, (LOGITS, MAP), self._indexed, patient=False)

    def __reduce__(self) -> tuple[type[StoredExplanations], tuple[str]]:
        return StoredExplanations, (self.root,)

    def read(self, shard: str, key: str) -> tuple[Tensor, Tensor]:
        """Reads logits (K,) and map (C, h, w) of a sample, both float32.

        Raises:
            ShardError: the shard or the key is missing, a file is damaged, or a value is not finite.
        """
        described = self._shard(shard)
        if shard not in self._entries:
            self._entries[shard] = {entry.key: entry for entry in self._open.entries(described)}
        entry = self._entries[shard].get(key, Entry(key, ()))
        for suffix in (LOGITS, MAP):
            if suffix not in (known for known, _, _ in entry.files):
                raise ShardError(
                    f"{self.root}/{shard}: no {suffix} of {key}: store the explanations of all images again"
                )
        found = self._open.read(described, entry)
        return self._values(shard, key, LOGITS, found), self._values(shard, key, MAP, found)

    def close(self, shard: str | None = None) -> None:
        """Closes a shard, by default all shards. The cache may then delete their copies."""
        self._open.close(shard)
        self._entries = {
            name: entries for name, entries in self._entries.items() if shard not in (name, None)
        }

    def _values(self, shard: str, key: str, suffix: str, found: dict[str, bytes]) -> Tensor:
        """Decodes one file, float32; raises `ShardError` if it is damaged or not finite."""
        try:
            values = torch.from_numpy(np.load(io.BytesIO(found[suffix]), allow_pickle=False)).float()
        except (ValueError, EOFError) as error:
            raise ShardError(f"{self.root}/{shard}: {suffix} of {key} is damaged: {error}") from None
        if not torch.isfinite(values).all():
            raise ShardError(f"{self.root}/{shard}: {suffix} of {key} has values that are not finite")
        return values

    def _shard(self, name: str) -> Shard:
        """Shard `name`, from the index if it is remote, else from its file (without sha256 and count)."""
        if name not in self._shards and is_remote(self.root):
            self._shards = {entry["name"]: Shard(**entry) for entry in read_index(self.root)["shards"]}
            if name not in self._shards:
                raise ShardError(f"{self.root}/{name}: not read: it is not in {INDEX}")
        elif name not in self._shards:
            try:
                size = Path(fsspec.core.strip_protocol(self.root), name).stat().st_size
            except OSError as error:
                raise ShardError(f"{self.root}/{name}: not read: {error}") from None
            self._shards[name] = Shard(name, size, "", 0)
        return self._shards[name]

    def _indexed(self, shard: Shard) -> tuple[Entry, ...]:
        """Places of a shard's samples, from the file that `write_shard` wrote beside it."""
        place = f"{self.root}/{_places(shard.name)}"
        try:
            return part_entries(files.read(place), shard, place)
        except FileNotFoundError:
            raise ShardError(f"{place}: missing: store the explanations again") from None
