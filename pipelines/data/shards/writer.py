"""Writes a source as WebDataset tars with indexes and a manifest, deterministic to the byte.

A sample is `<key>.jpg|png|webp` (the source's bytes, never re-encoded), `<key>.json`, and `<key>.mask.png` if
it has a mask. Each file is written atomically.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.data.shards.check import check_sample
from pipelines.data.shards.in_place import InPlace, write_in_place
from pipelines.data.shards.index import index_name, index_part, known_of, write_index
from pipelines.data.shards.manifest import MANIFEST, Index, Manifest, Shard
from pipelines.data.shards.sample import DataError, Description, Sample, caption_entry
from pipelines.data.shards.tar import write_tar
from pipelines.process import mapped
from pipelines.progress import bar
from pipelines.storage import files

if TYPE_CHECKING:
    from pipelines.data.sources import Source

# Field of a manifest -> attribute of a `Sample`.
FIELDS = {"boxes": "boxes", "mask": "mask", "group": "group", "caption": "captions"}
WORTH_A_PROCESS = 5000  # samples that take longer to write than an interpreter takes to start


@dataclass(frozen=True)
class _Written:
    """A written shard, the keys and fields of its samples, and its part of the index."""

    shard: Shard
    keys: tuple[str, ...]
    fields: frozenset[str]
    part: bytes


@dataclass(frozen=True)
class _ShardPlan:
    """One shard to write."""

    split: str
    name: str
    references: tuple[Any, ...]


def write_shards(
    source: Source, raw: Path, out: str | Path, *, shard_size: int, workers: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Writes all splits of `source` to `out`; returns the content of `out/manifest.json`.

    An old manifest is deleted first and the new one is written last, so that an interrupted call leaves
    shards without a manifest. The same source gives the same bytes for any number of processes. A source that
    already is tars (`InPlace`) gets a manifest and indexes alone, see `write_in_place`.

    Args:
        source: the source that fetched `raw`. With `workers` > 0, it and its references are pickled.
        raw: the folder that `source.fetch` filled.
        out: a folder or any fsspec URL.
        shard_size: samples per shard; the last shard of a split may have fewer.
        workers: maximum number of processes; each writes one shard at a time. With 0 or 1, or few samples
            (`WORTH_A_PROCESS`), this process writes.
        progress: show a progress bar.

    Raises:
        DataError: a sample fails `check_sample`, or a key comes twice in a split. The error names the key.
        StorageError: no space left, or `out` cannot be written to. No partial shard is left.
    """
    if isinstance(source, InPlace):
        return write_in_place(source, raw, str(out), progress=progress)
    description = source.describe(raw)
    splits = [split for split, count in description.counts.items() if count > 0]
    plans = [plan for split in splits for plan in _plan(split, source.index(raw, split), shard_size)]
    root = str(out)
    for name in (MANIFEST, *map(wids_index, splits), *map(index_name, splits)):
        files.remove(f"{root}/{name}")
    write = partial(_write_shard, source, Path(raw), root, description)
    total = sum(len(plan.references) for plan in plans)
    written: list[_Written] = []
    with bar(f"shards of {description.source}", total, show=progress) as shown:
        for result in mapped(write, plans, min(workers, total // WORTH_A_PROCESS)):
            written.append(result)
            shown.update(result.shard.count)
    of_split = {
        split: [w for p, w in zip(plans, written, strict=True) if p.split == split] for split in splits
    }
    for split, results in of_split.items():
        _check_keys(split, results)
    indexes = {
        split: write_index(root, split, [result.part for result in results])
        for split, results in of_split.items()
    }
    manifest = _manifest(description, of_split, indexes)
    for split, shards in manifest.splits.items():
        listed = [{"url": shard.name, "nsamples": shard.count, "filesize": shard.bytes} for shard in shards]
        files.write_json(
            f"{root}/{wids_index(split)}", {"wids_version": 1, "name": split, "shardlist": listed}
        )
    files.write_json(f"{root}/{MANIFEST}", manifest.to_json())
    return manifest.to_json()


def wids_index(split: str) -> str:
    """Name of the file by which `wids.ShardListDataset` finds the shards of `split`."""
    return f"{split}.wids.json"


def _plan(split: str, references: Sequence[Any], shard_size: int) -> Iterator[_ShardPlan]:
    """Cuts the references of one split into shards of `shard_size`, in order."""
    for number, start in enumerate(range(0, len(references), shard_size)):
        yield _ShardPlan(split, f"{split}-{number:06d}.tar", tuple(references[start : start + shard_size]))


def _write_shard(
    source: Source, raw: Path, root: str, description: Description, plan: _ShardPlan
) -> _Written:
    fields: set[str] = set()
    known: dict[str, dict[str, Any]] = {}

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for reference in plan.references:
            sample = source.load(raw, reference)
            check_sample(sample, description)
            if sample.key in known:
                raise _comes_twice(plan.split, sample.key, plan.name, plan.name)
            fields.update(
                name for name, attribute in FIELDS.items() if getattr(sample, attribute) not in (None, ())
            )
            annotation = annotation_of(sample)
            known[sample.key] = known_of(annotation)
            yield sample.key, contents(sample, annotation)

    shard, entries = write_tar(root, plan.name, samples())
    return _Written(shard, tuple(known), frozenset(fields), index_part(shard, entries, known))


def annotation_of(sample: Sample) -> dict[str, Any]:
    """Content of a sample's json."""
    optional = {name: getattr(sample, name) for name in ("label", "labels", "group")}
    known = {name: value for name, value in optional.items() if value is not None}
    return {"boxes": sample.boxes, **known, **caption_entry(sample.captions)}


def contents(sample: Sample, annotation: dict[str, Any]) -> dict[str, bytes]:
    """Suffix -> content of a sample's files, in the order of the tar."""
    described = json.dumps(annotation, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    mask = {} if sample.mask is None else {"mask.png": sample.mask}
    return {sample.extension: sample.image, "json": described, **mask}


def _check_keys(split: str, written: Iterable[_Written]) -> None:
    """Raises `DataError` if a key comes twice in `split`."""
    shard_of: dict[str, str] = {}
    for result in written:
        for key in result.keys:
            if key in shard_of:
                raise _comes_twice(split, key, shard_of[key], result.shard.name)
            shard_of[key] = result.shard.name


def _comes_twice(split: str, key: str, first: str, second: str) -> DataError:
    return DataError(
        f"{split}: key {key!r} comes twice, in {first} and {second}; keys are unique in their split"
    )


def _manifest(
    description: Description, written: Mapping[str, Sequence[_Written]], indexes: dict[str, Index]
) -> Manifest:
    return Manifest(
        classes=description.classes,
        task=description.task,
        source=description.source,
        checksum=description.checksum,
        splits={split: tuple(result.shard for result in results) for split, results in written.items()},
        fields={
            split: tuple(field for field in FIELDS if any(field in result.fields for result in results))
            for split, results in written.items()
        },
        indexes=indexes,
    )
