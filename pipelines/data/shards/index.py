"""The index of a split: the labels of each sample and its place in the shards, in one file beside them.

Subsets are drawn from the index alone, so that no shard is read for them. It is JSON lines in gzip (`zcat` shows it): for each
shard a line of its own, `{"shard": {"name", "bytes", "sha256", "count"}}`, and then a line per sample in the shard's order:

    key          of the sample
    label        int, or `labels`: list of int
    box_classes  classes of its boxes, ascending, each once; only if it has boxes
    group        int; only if it has one
    caption      str, or `captions`: list of str; only if it has one, or several
    files        suffix -> [offset, bytes] of its files in the tar

Each shard's lines are a gzip member of their own; the manifest says how many bytes each member (`part`) has. Hence writers make
parts side by side, and one shard's lines are one small range of the file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.data.shards.manifest import Index, Manifest, Shard, ShardError, read_manifest
from pipelines.data.shards.tar import Entry
from pipelines.storage import files

AGAIN = "run the stage `shard` again"


def index_name(split: str) -> str:
    """Name of the index of `split`."""
    return f"{split}.index.jsonl.gz"


def index_part(shard: Shard, entries: Iterable[Entry], known: Mapping[str, Mapping[str, Any]]) -> bytes:
    """One shard's part of an index, the same bytes each time.

    Args:
        shard: the shard.
        entries: where its samples lie.
        known: key -> what else the sample's line says.
    """
    lines: list[dict[str, Any]] = [{"shard": asdict(shard)}]
    for entry in entries:
        places = {suffix: [offset, size] for suffix, offset, size in entry.files}
        lines.append({"key": entry.key, **known.get(entry.key, {}), "files": places})
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    return gzip.compress(text.encode(), mtime=0)


def known_of(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """What the index says of a sample with this json."""
    known = {
        name: annotation[name]
        for name in ("label", "labels", "group", "caption", "captions")
        if name in annotation
    }
    classes = sorted({int(box[0]) for box in annotation.get("boxes", ())})
    return known | ({"box_classes": classes} if classes else {})


def write_index(root: str, split: str, parts: Sequence[bytes]) -> Index:
    """Writes the index of `split` at `root`, whole or not at all; returns its record for the manifest."""
    content, name = b"".join(parts), index_name(split)
    files.write(f"{root}/{name}", content)
    return Index(name, len(content), hashlib.sha256(content).hexdigest(), tuple(len(part) for part in parts))


def read_index(root: str, manifest: Manifest, split: str) -> Iterator[dict[str, Any]]:
    """The line of each sample of `split`, in the order of its shards; reads the index, no shard.

    Raises:
        ShardError: there is no index, or it is damaged, or not that of these shards.
    """
    shards, index = manifest.shards(split), _index(root, manifest, split)
    content = _read(root, index.name)
    if hashlib.sha256(content).hexdigest() != index.sha256:
        raise ShardError(
            f"{root}/{index.name}: {len(content)} bytes that are not those that the manifest names; {AGAIN}"
        )
    start = 0
    for shard, size in zip(shards, index.parts, strict=True):
        yield from _lines(content[start : start + size], shard, f"{root}/{index.name}")
        start += size


def read_entries(root: str, shard: Shard, split: str | None = None) -> tuple[Entry, ...]:
    """Where the samples of a shard lie, read from its part of the index at `root` alone; errors are those of `read_index`.

    A tar that is read in place may have samples of several splits: then `split` must be given.
    """
    manifest = read_manifest(root)
    named = [split] if split is not None else manifest.splits
    split = next((name for name in named if shard in manifest.splits.get(name, ())), None)
    if split is None:
        raise ShardError(f"{shard.name}: it is not in the manifest at {root}")
    index, place = _index(root, manifest, split), manifest.shards(split).index(shard)
    start = sum(index.parts[:place])
    part = _read(root, index.name, start, start + index.parts[place])
    return part_entries(part, shard, f"{root}/{index.name}")


def part_entries(part: bytes, shard: Shard, name: str) -> tuple[Entry, ...]:
    """Where the samples of `shard` lie, by its part of the index called `name`; raises `ShardError` if it is another part."""
    lines = _lines(part, shard, name)
    return tuple(
        Entry(line["key"], tuple((suffix, *place) for suffix, place in line["files"].items()))
        for line in lines
    )


def part_shard(part: bytes) -> Shard | None:
    """The shard of a part; None if the part is damaged."""
    try:
        return Shard(**json.loads(gzip.decompress(part).partition(b"\n")[0])["shard"])
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError):
        return None


def _read(root: str, name: str, start: int | None = None, end: int | None = None) -> bytes:
    """An index's bytes in [start, end), or all of it."""
    try:
        return files.read(f"{root}/{name}", start, end)
    except FileNotFoundError:
        raise ShardError(f"{name}: missing; it is in the manifest but not in {root}") from None
    except OSError as error:
        raise ShardError(f"{name}: not read from {root}: {error}") from None


def _index(root: str, manifest: Manifest, split: str) -> Index:
    """The record of the index of `split`."""
    index, shards = manifest.indexes.get(split), manifest.splits.get(split, ())
    if index is None or len(index.parts) != len(shards):
        raise ShardError(
            f"{root}: no index of {split}: an earlier version of this project wrote these shards; {AGAIN}"
        )
    return index


def _lines(part: bytes, shard: Shard, name: str) -> list[dict[str, Any]]:
    """The lines of the samples in one part."""
    if part_shard(part) != shard:
        raise ShardError(f"{name}: damaged, or not the index of {shard.name} as the manifest has it; {AGAIN}")
    return [json.loads(line) for line in gzip.decompress(part).splitlines()[1:]]
