"""Stored explanations: a teacher's logits and maps, in shards that lie beside the data's, sample by sample.

    <root>/train-000000.tar   of each sample `<key>.logits.npy` (K,) and `<key>.map.npy` (C, h, w)
    <root>/explanations.json  written last: whose explanations they are, and of which images

A map is stored divided by its largest absolute value, so that half precision holds it: what counts is its direction.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.cache import bring
from pipelines.data.shards.manifest import Shard, ShardError
from pipelines.data.shards.writer import entry, staged
from pipelines.storage.retry import is_remote, with_patience

INDEX = "explanations.json"


@dataclass(frozen=True)
class Origin:
    """What stored explanations depend on."""

    teacher: str  # digest of the model
    images: str  # digest of the data's manifest
    maps: str  # `dynamic_weights` or `gradcam`
    image_size: int  # of the view that is explained
    eval_resize: int | None
    resolution: int  # side of the stored maps
    precision: str


def write_shard(root: str, name: str, samples: Iterable[tuple[str, Tensor, Tensor]]) -> Shard:
    """Writes one shard of (key, logits (K,), map (C, h, w)), whole or not at all."""
    count = 0
    with staged(root, name) as path:
        with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, logits, stored in samples:
                for suffix, values in (("logits.npy", logits), ("map.npy", stored)):
                    buffer = io.BytesIO()
                    np.save(buffer, values.numpy(), allow_pickle=False)
                    tar.addfile(entry(f"{key}.{suffix}", buffer.tell()), io.BytesIO(buffer.getvalue()))
                count += 1
        with path.open("rb") as whole:
            sha256 = hashlib.file_digest(whole, "sha256").hexdigest()
        return Shard(name, path.stat().st_size, sha256, count)


def write_index(root: str, origin: Origin, shards: Iterable[Shard]) -> None:
    """Writes what makes the shards in `root` a whole."""
    of_name = {shard.name: asdict(shard) for shard in sorted(shards, key=lambda shard: shard.name)}
    with staged(root, INDEX) as path:
        path.write_text(json.dumps({**asdict(origin), "shards": list(of_name.values())}, indent=1) + "\n")


def check_origin(root: str, wanted: Origin) -> None:
    """Raises `ShardError`, one line, unless the explanations at `root` are of this origin."""
    found = read_index(root)
    for name, value in asdict(wanted).items():
        if found.get(name) != value:
            raise ShardError(f"{root}: its explanations are of another {name} ({found.get(name)}, not {value}): store them again")


def read_index(root: str) -> dict[str, Any]:
    """What `write_index` wrote; raises `ShardError` where it did not."""
    filesystem, folder = fsspec.url_to_fs(root)
    try:
        return json.loads(with_patience(partial(filesystem.cat_file, f"{folder}/{INDEX}"), root))
    except FileNotFoundError:
        raise ShardError(f"{root}: no {INDEX}; explanations were not stored there, or not to the end") from None
    except (OSError, ValueError) as error:
        raise ShardError(f"{root}/{INDEX}: not read: {error}") from None


class StoredExplanations:
    """Reads explanations by shard and key; picklable.

    Args:
        root: a folder or any fsspec URL.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._shards: dict[str, Shard] | None = None
        self._members: dict[str, dict[str, tuple[int, int]]] = {}  # of each shard: first byte and the one after the last

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
        for suffix in ("logits.npy", "map.npy"):
            if f"{key}.{suffix}" not in self._members[shard]:
                raise ShardError(f"{self.root}/{shard}: no {suffix} of {key}: store the explanations of all images again")
            start, end = self._members[shard][f"{key}.{suffix}"]
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(end - start)
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
        return bring(self.root, self._shards[shard])

    def _scan(self, path: Path, shard: str) -> dict[str, tuple[int, int]]:
        """Where the members of a shard lie in it."""
        try:
            with tarfile.open(path, "r:") as tar:
                return {member.name: (member.offset_data, member.offset_data + member.size) for member in tar}
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ShardError(f"{self.root}/{shard}: not read: {error}") from None
