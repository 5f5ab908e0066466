"""Stored explanations: a teacher's logits and maps, sample by sample, in shards like the data's.

    <root>/train-000000.tar             `<key>.logits.npy` (K,) and `<key>.map.npy` (C, h, w) of each sample
    <root>/train-000000.index.jsonl.gz  where they lie in the tar, see `index`; written after it
    <root>/explanations.json            written last: the teacher, the images, how the maps were made, and the shards

The index alone can stand elsewhere: it says at which URL the shards are, if they are at one.

A map is stored divided by its largest absolute value, so that it fits half precision: losses use its direction alone.
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
    """Everything that stored explanations depend on."""

    teacher: str  # digest of the model
    images: str  # digest of the data's manifest
    maps: str  # `dynamic_weights` or `gradcam`
    image_size: int  # of the view that is explained
    eval_resize: int | None
    resolution: int  # side of the stored maps
    precision: str


def write_shard(root: str, name: str, samples: Iterable[tuple[str, Tensor, Tensor]]) -> Shard:
    """Writes one shard of (key, logits (K,), map (C, h, w)), whole or not at all, and then where these lie in it."""
    shard, entries = write_tar(
        root, name, ((key, {LOGITS: _npy(logits), MAP: _npy(stored)}) for key, logits, stored in samples)
    )
    files.write(f"{root}/{_places(name)}", index_part(shard, entries, {}))
    return shard


def finished_shards(root: str, names: Iterable[str]) -> dict[str, Shard]:
    """Those of the shards `names` at `root` that `write_shard` has finished, by name."""
    there = set(files.names_in(root))
    parts = (files.read(f"{root}/{_places(name)}") for name in names if {name, _places(name)} <= there)
    return {shard.name: shard for shard in map(part_shard, parts) if shard is not None}


def shard_files(index: dict[str, Any]) -> list[str]:
    """Names of the files that belong to stored explanations with this index, the index last."""
    names = [entry["name"] for entry in index["shards"]]
    return [*names, *map(_places, names), INDEX]


def _places(name: str) -> str:
    """Name of the file that says where the samples lie in the shard `name`."""
    return index_name(name.removesuffix(".tar"))


def _npy(values: Tensor) -> bytes:
    """A tensor as the content of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, values.numpy(), allow_pickle=False)
    return buffer.getvalue()


def write_index(root: str, origin: Origin, shards: Iterable[Shard]) -> None:
    """Writes the index of the shards in `root`, which marks them as complete; it names `root` if that is a URL."""
    of_name = {shard.name: asdict(shard) for shard in sorted(shards, key=lambda shard: shard.name)}
    place = {"root": root} if "://" in root else {}
    files.write_json(f"{root}/{INDEX}", {**asdict(origin), **place, "shards": list(of_name.values())})


def check_origin(root: str, wanted: Origin) -> None:
    """Raises `ShardError` unless the stored explanations at `root` are of this origin."""
    found = read_index(root)
    for name, value in asdict(wanted).items():
        if found.get(name) != value:
            raise ShardError(
                f"{root}: its explanations are of another {name} ({found.get(name)}, not {value}): store them again"
            )


def read_index(root: str) -> dict[str, Any]:
    """The index that `write_index` wrote; raises `ShardError` if there is none."""
    try:
        content = files.read_json(f"{root}/{INDEX}")
        for entry in () if content is None else content["shards"]:
            File(
                entry["name"], entry["bytes"], entry["sha256"]
            )  # which raises: copies are written under these names
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ShardError(f"{root}/{INDEX}: not read: {error}") from None
    if content is None:
        raise ShardError(f"{root}: no {INDEX}; explanations were not stored there, or not to the end")
    return content


def are_complete(root: str) -> bool:
    """Whether `write_index` has marked the explanations at `root` as complete."""
    try:
        return bool(read_index(root)["shards"])
    except (ShardError, LookupError, TypeError):
        return False


class StoredExplanations:
    """Reads stored explanations by shard and key; picklable.

    Args:
        root: a folder or any fsspec URL.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._shards: dict[str, Shard] = {}
        self._entries: dict[str, dict[str, Entry]] = {}  # of each shard that is open, by key
        self._open = OpenShards(root, (LOGITS, MAP), self._indexed, patient=False)

    def __reduce__(self) -> tuple[type[StoredExplanations], tuple[str]]:
        return StoredExplanations, (self.root,)

    def read(self, shard: str, key: str) -> tuple[Tensor, Tensor]:
        """Logits (K,) and map (C, h, w) of a sample, both float32.

        Raises:
            ShardError: the shard or the key is missing, or a value is not finite.
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
        """Ends the reading of a shard, or of all; its copy may be deleted from the cache."""
        self._open.close(shard)
        self._entries = {
            name: entries for name, entries in self._entries.items() if shard not in (name, None)
        }

    def _values(self, shard: str, key: str, suffix: str, found: dict[str, bytes]) -> Tensor:
        """The tensor of one file."""
        try:
            values = torch.from_numpy(np.load(io.BytesIO(found[suffix]), allow_pickle=False)).float()
        except (ValueError, EOFError) as error:
            raise ShardError(f"{self.root}/{shard}: {suffix} of {key} is damaged: {error}") from None
        if not torch.isfinite(values).all():
            raise ShardError(f"{self.root}/{shard}: {suffix} of {key} has values that are not finite")
        return values

    def _shard(self, name: str) -> Shard:
        """The shard of this name, by the index if it is remote."""
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
        """Where the samples of a shard lie."""
        place = f"{self.root}/{_places(shard.name)}"
        try:
            return part_entries(files.read(place), shard, place)
        except FileNotFoundError:
            raise ShardError(f"{place}: missing: store the explanations again") from None
