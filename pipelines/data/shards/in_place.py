"""Manifest and indexes of data sets that already are tars.

They point to these tars, so that no sample is copied. The index of a split names the samples of the split.
Other samples in the same tars are never read.
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
    """A source whose original tars are read directly, without writing shards."""

    def describe(self, raw: Path) -> Description:
        """Describes the data set."""

    def tars(self, raw: Path) -> str:
        """Absolute path or URL of the folder that holds all tars."""

    def parts(
        self, raw: Path, split: str
    ) -> Iterator[tuple[Shard, Sequence[Entry], dict[str, dict[str, Any]]]]:
        """Yields each tar with the places of its samples and their other index fields by key (`known_of`).

        Only samples of `split` are included, and `Shard.count` is their number.
        """


def write_in_place(source: InPlace, raw: Path, root: str, *, progress: bool = True) -> dict[str, Any]:
    """Writes the indexes of `source` and then its manifest to `root`; returns the content of the manifest."""
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
