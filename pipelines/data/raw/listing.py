"""Files that `fetch` writes beside the data: one index per split, and `manifest.json`, written last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.data.formats.archive import Ref
from pipelines.data.shards.sample import DataError, Description
from pipelines.storage import files

_MANIFEST = "manifest.json"


def write_references(raw: Path, split: str, refs: Iterable[tuple[Any, ...]]) -> None:
    """Writes the references of one split to `raw`, in their order."""
    lines = "".join(json.dumps(ref, ensure_ascii=False) + "\n" for ref in refs)
    files.write(raw / f"{split}.index.jsonl", lines.encode())


def read_references(raw: Path, split: str) -> list[Ref]:
    """The references that `write_references` wrote; raises `DataError` if the split or the fetch is missing."""
    return [Ref(*line) for line in read_lines(raw, split)]


def read_lines(raw: Path, split: str) -> list[list[Any]]:
    """The lines that `write_references` wrote; raises `DataError` if the split or the fetch is missing."""
    read_raw_manifest(raw)
    path = raw / f"{split}.index.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no such split; splits are train, val and test")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_raw_manifest(raw: Path, description: Description, **details: Any) -> None:
    """Writes `manifest.json`: the description, the bytes and sha256 of each file in `raw`, and `details`."""
    written = [path for path in sorted(raw.iterdir()) if path.is_file() and path.name[0] != "." and path.name != _MANIFEST]
    listed = {path.name: {"bytes": path.stat().st_size, "sha256": files.file_digest(path)} for path in written}
    files.write_json(raw / _MANIFEST, {**asdict(description), **details, "files": listed})


def read_raw_manifest(raw: Path) -> dict[str, Any]:
    """The manifest in `raw`; raises `DataError` if there is none or it is damaged."""
    path = raw / _MANIFEST
    try:
        content: dict[str, Any] | None = files.read_json(path)
    except ValueError as error:
        raise DataError(f"{path}: not a manifest ({error}); run fetch again") from None
    if content is None:
        raise DataError(f"{path}: missing: nothing was fetched here, or not to the end; run fetch")
    return content


def read_description(raw: Path) -> Description:
    """The data set whose manifest lies in `raw`."""
    manifest = read_raw_manifest(raw)
    return Description(
        classes=tuple(manifest["classes"]),
        task=manifest["task"],
        source=manifest["source"],
        checksum=manifest["checksum"],
        counts=dict(manifest["counts"]),
    )
