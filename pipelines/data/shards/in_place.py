"""Data sets that already lie in tars: a manifest and indexes that point to these very tars. No sample is copied.

The index of a split names the samples that belong to it: other samples of the same tars are never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pipelines.data.shards.index import index_name, index_part, write_index
from pipelines.data.shards.manifest import MANIFEST, Index, Manifest, Shard
from pipelines.data.shards.sample import Description
from pipelines.data.shards.tar import Entry
from pipelines.progress import bar
from pipelines.storage import files


@runtime_checkable
class InPlace(Protocol):
    """A source whose samples are read from the tars in which they lie."""

    def describe(self, raw: Path) -> Description:
        """The data set."""

    def tars(self, raw: Path) -> str:
        """The absolute path or URL of the folder of all tars."""

    def parts(
        self, raw: Path, split: str
    ) -> Iterator[tuple[Shard, Sequence[Entry], dict[str, dict[str, Any]]]]:
        """Each tar of `split`, where the split's samples lie in it, and what else the index says of each by key.

        The tar's count is that of these samples.
        """


def write_in_place(source: InPlace, raw: Path, root: str, *, progress: bool = True) -> dict[str, Any]:
    """Writes the indexes and the manifest of `source` to `root`, the manifest last; returns its content."""
    description = source.describe(raw)
    splits = [split for split, count in description.counts.items() if count > 0]
    for name in (MANIFEST, *map(index_name, splits)):
        files.remove(f"{root}/{name}")
    shards: dict[str, tuple[Shard, ...]] = {}
    indexes: dict[str, Index] = {}
    with bar(f"index of {description.source}", sum(description.counts.values()), show=progress) as shown:
        for split in splits:
            of_split: list[Shard] = []
            parts: list[bytes] = []
            for shard, entries, known in source.parts(raw, split):
                of_split.append(shard)
                parts.append(index_part(shard, entries, known))
                shown.update(shard.count)
            shards[split], indexes[split] = tuple(of_split), write_index(root, split, parts)
    manifest = Manifest(
        classes=description.classes,
        task=description.task,
        source=description.source,
        checksum=description.checksum,
        splits=shards,
        fields=dict.fromkeys(splits, ("caption",)),
        indexes=indexes,
        tars=source.tars(raw),
    )
    files.write_json(f"{root}/{MANIFEST}", manifest.to_json())
    return manifest.to_json()
