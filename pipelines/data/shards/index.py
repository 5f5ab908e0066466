"""The index of a split: labels and place of each sample in the shards, in one file beside them.

Subsets are drawn from the index alone, without reading a shard. The file is gzipped JSON lines (see `zcat`).
Each shard has one line `{"shard": {"name", "bytes", "sha256", "count"}}`, followed by one line per sample
in the order of the shard:

    key          key of the sample
    label        int; or `labels`, a list of int
    box_classes  classes of the boxes, ascending, each once; absent without boxes
    group        int; absent without a group
    caption      str; or `captions`, a list of str; absent without captions
    files        suffix -> [offset, bytes] of the sample's files in the tar

The lines of one shard form one gzip member, called a part. The manifest lists the size of each part.
Processes can therefore write parts in parallel, and one range request reads the lines of one shard.
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
    """File name of the index of `split`."""
    return f"{split}.index.jsonl.gz"


def index_part(shard: Shard, entries: Iterable[Entry], known: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Part of an index for one shard. Equal arguments give equal bytes.

    Args:
        shard: the shard.
        entries: the places of its samples.
        known: key -> the other fields of the sample's line, see `known_of`.
    """
    lines: list[dict[str, Any]] = [{"shard": asdict(shard)}]
    for entry in entries:
        places = {suffix: [offset, size] for suffix, offset, size in entry.files}
        lines.append({"key": entry.key, **known.get(entry.key, {}), "files": places})
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    return gzip.compress(text.encode(), mtime=0)


def known_of(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """Index fields that follow from a sample's json: labels, group, captions, classes of boxes."""
    known = {
        name: annotation[name]
        for name in ("label", "labels", "group", "caption", "captions")
        if name in annotation
    }
    classes = sorted({int(box[0]) for box in annotation.get("boxes", ())})
    return known | ({"box_classes": classes} if classes else {})


def write_index(root: str, split: str, parts: Sequence[bytes]) -> Index:
    """Writes the index of `split` to `root` atomically; returns its entry for the manifest."""
    content, name = b"".join(parts), index_name(split)
    files.write(f"{root}/{name}", content)
    return Index(name, len(content), hashlib.sha256(content).hexdigest(), tuple(len(part) for part in parts))


def read_index(root: str, manifest: Manifest, split: str) -> Iterator[dict[str, Any]]:
    """Yields the index line of each sample of `split`, in the order of the shards. Reads no shard.

    Raises:
        ShardError: the index is missing, damaged, or belongs to other shards.
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
    """Places of a shard's samples. Reads the shard's part of the index at `root` alone.

    `split` is required for tars that are read in place, because one tar may hold samples of several splits.

    Raises:
        ShardError: as `read_index`, or the shard is not in the manifest.
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
    """Places of the samples in `part` of the index `name`; `ShardError` unless `part` belongs to `shard`."""
    lines = _lines(part, shard, name)
    return tuple(
        Entry(line["key"], tuple((suffix, *place) for suffix, place in line["files"].items()))
        for line in lines
    )


def part_shard(part: bytes) -> Shard | None:
    """Shard that a part belongs to; `None` if the part is damaged."""
    try:
        return Shard(**json.loads(gzip.decompress(part).partition(b"\n")[0])["shard"])
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError):
        return None


def _read(root: str, name: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes [start, end) of an index, by default all bytes."""
    try:
        return files.read(f"{root}/{name}", start, end)
    except FileNotFoundError:
        raise ShardError(f"{name}: missing; it is in the manifest but not in {root}") from None
    except OSError as error:
        raise ShardError(f"{name}: not read from {root}: {error}") from None


def _index(root: str, manifest: Manifest, split: str) -> Index:
    index, shards = manifest.indexes.get(split), manifest.splits.get(split, ())
    if index is None or len(index.parts) != len(shards):
        raise ShardError(
            f"{root}: no index of {split}: an earlier version of this project wrote these shards; {AGAIN}"
        )
    return index


def _lines(part: bytes, shard: Shard, name: str) -> list[dict[str, Any]]:
    """Sample lines of one part, without its shard line."""
    if part_shard(part) != shard:
        raise ShardError(f"{name}: damaged, or not the index of {shard.name} as the manifest has it; {AGAIN}")
    return [json.loads(line) for line in gzip.decompress(part).splitlines()[1:]]
