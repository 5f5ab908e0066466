"""`manifest.json` of a folder of shards: written last by `write_shards`, read first by the loader."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipelines.data.shards.sample import DataError, Task
from pipelines.storage.errors import one_line
from pipelines.storage.files import file_digest, read_json
from pipelines.storage.publish import File

MANIFEST = "manifest.json"


class ShardError(DataError):
    """A shard, index or manifest is missing, corrupt or does not match the manifest. One line names it."""


@dataclass(frozen=True)
class Listed:
    """A file that a manifest lists."""

    name: str
    bytes: int
    sha256: str

    def check(self, path: Path, *, verify: bool = True) -> None:
        """Raises `ShardError` unless the file at `path` has this size and, if `verify`, this sha256."""
        size = path.stat().st_size
        if size != self.bytes:
            fault = "truncated" if size < self.bytes else "too long"
            raise ShardError(f"{self.name}: {fault}: {size} bytes; the manifest says {self.bytes}")
        if verify and (sha256 := file_digest(path)) != self.sha256:
            raise ShardError(f"{self.name}: sha256 is {sha256}; the manifest says {self.sha256}")


@dataclass(frozen=True)
class Shard(Listed):
    """One tar of a split."""

    count: int  # samples


@dataclass(frozen=True)
class Index(Listed):
    """Entry of the index of a split, see `index`."""

    parts: tuple[int, ...]  # size of each shard's part in bytes, in the order of the shards


@dataclass(frozen=True)
class Manifest:
    """A data set in shards.

    Attributes:
        classes: names of the classes, in the order of their labels.
        task: `multiclass`, `multilabel`, `caption` or `unlabelled`.
        source: name or URL of the data set's source.
        checksum: sha256 of the source.
        splits: split -> its shards, in order.
        fields: split -> those of `boxes`, `mask`, `group` and `caption` that at least one of its samples has.
        indexes: split -> its index; empty if an earlier version of this project wrote the shards.
        tars: `None` if the shards are this project's and lie beside the manifest. Otherwise the absolute path
            or URL of a folder of img2dataset tars that are read in place. Their captions lie in `.txt` files,
            and only samples that the index names are read.
    """

    classes: tuple[str, ...]
    task: Task
    source: str
    checksum: str
    splits: dict[str, tuple[Shard, ...]]
    fields: dict[str, tuple[str, ...]]
    indexes: dict[str, Index] = field(default_factory=dict)
    tars: str | None = None

    def count(self, split: str) -> int:
        """Number of samples in `split`; raises `ShardError` if there is no such split."""
        return sum(shard.count for shard in self.shards(split))

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Shards of `split`; raises `ShardError` if there is no such split."""
        if split not in self.splits:
            raise ShardError(
                f"split {split!r} is not in the shards (they have {', '.join(sorted(self.splits))})"
            )
        return self.splits[split]

    @property
    def labelled(self) -> bool:
        """True if the task gives samples classes (multiclass, multilabel)."""
        return self.task in ("multiclass", "multilabel")

    @property
    def digest(self) -> str:
        """sha256 of the manifest, which identifies every byte of every shard."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Content of `manifest.json`."""
        content = asdict(self)
        if self.tars is None:
            del content["tars"]  # absent in earlier versions, whose digests stay valid
        return content


_CONTENT = TypeAdapter(Manifest)


def read_manifest(root: str) -> Manifest:
    """Reads and checks the manifest of the shards at `root`, a folder or any fsspec URL.

    Raises:
        ShardError: there is no manifest, or it is damaged.
    """
    try:
        content = read_json(f"{root}/{MANIFEST}")
        manifest = None if content is None else _CONTENT.validate_python(content)
        for listed in (
            () if manifest is None else (*chain(*manifest.splits.values()), *manifest.indexes.values())
        ):
            # Local copies are written under these names, so `File` raises if one is unsafe.
            File(listed.name, listed.bytes, listed.sha256)
    except OSError as error:
        raise ShardError(f"{root}/{MANIFEST}: {error}") from None
    except ValueError as error:
        raise ShardError(f"{root}/{MANIFEST}: not a manifest of shards ({one_line(error)})") from None
    if manifest is None:
        raise ShardError(f"{root}: no {MANIFEST}; shards are not there, or were not written to the end")
    return manifest
