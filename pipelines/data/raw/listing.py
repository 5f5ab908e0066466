"""What `fetch` leaves beside the data: one index a split, and `manifest.json`, written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.data.shards.sample import DataError, Description

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


class Ref(NamedTuple):
    """Where one sample lies: bytes `offset` to `offset + size` of the file `name`, or all of it at offset -1.

    `path` is what the sample is called where it comes from, for images that have a name of their own.
    """

    key: str
    name: str
    offset: int
    size: int
    label: int | None = None
    path: str = ""


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: str) -> None:
    """Writes a text file that is either all there or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def write_index(raw: Path, split: str, refs: Iterable[tuple[Any, ...]]) -> None:
    """Leaves the references of one split in `raw`, in their order."""
    lines = "".join(json.dumps(ref, ensure_ascii=False) + "\n" for ref in refs)
    write_atomically(raw / f"{split}.index.jsonl", lines)


def read_index(raw: Path, split: str) -> list[Ref]:
    """The references that `write_index` left; raises `DataError` for a split or a fetch that is not there."""
    return [Ref(*line) for line in read_lines(raw, split)]


def read_lines(raw: Path, split: str) -> list[list[Any]]:
    """What `write_index` left, as lists; raises `DataError` for a split or a fetch that is not there."""
    read_manifest(raw)
    path = raw / f"{split}.index.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no such split; splits are train, val and test")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_manifest(raw: Path, description: Description, **details: Any) -> None:
    """Leaves `manifest.json`: the description, bytes and sha256 of each file in `raw`, and `details`."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(raw.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    content = {**asdict(description), **details, "files": files}
    write_atomically(raw / MANIFEST, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_manifest(raw: Path) -> dict[str, Any]:
    """The manifest in `raw`; raises `DataError` where there is none, or not a whole one."""
    path = raw / MANIFEST
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing: nothing was fetched here, or not to the end; run fetch") from None
    except ValueError as error:
        raise DataError(f"{path}: not a manifest ({error}); run fetch again") from None
    return content


def read_description(raw: Path) -> Description:
    """The data set whose manifest lies in `raw`."""
    manifest = read_manifest(raw)
    return Description(
        classes=tuple(manifest["classes"]),
        task=manifest["task"],
        source=manifest["source"],
        checksum=manifest["checksum"],
        counts=dict(manifest["counts"]),
    )


def combined_sha256(parts: Mapping[str, str]) -> str:
    """One sha256 for named ones, whatever their order."""
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        digest.update(f"{name}\0{value}\n".encode())
    return digest.hexdigest()
