"""The files that `fetch` writes beside the data.

`<split>.index.jsonl` has one reference per line, as a JSON list. `manifest.json` is written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.data.formats.archive import Ref
from pipelines.data.formats.left_out import LeftOut
from pipelines.data.raw.holdout import shuffled
from pipelines.data.shards.sample import DataError, Description
from pipelines.errors import redacted
from pipelines.params import DatasetParams
from pipelines.storage import files
from pipelines.storage.errors import one_line

_MANIFEST = "manifest.json"
_DESCRIPTION = TypeAdapter(Description)


class ListedImages:
    """Base of sources: reads the index and the manifest. Subclasses add `fetch` and `load`."""

    params: DatasetParams

    def describe(self, raw: Path) -> Description:
        return read_description(raw)

    def index(self, raw: Path, split: str) -> list[Any]:
        """References in the order of `fetch`; for `train` shuffled, so that every shard has all classes."""
        refs = self.references(raw, split)
        return shuffled(refs, self.params.split_seed) if split == "train" else refs

    def references(self, raw: Path, split: str) -> list[Any]:
        """References in the order of `fetch`; raises `DataError` if the split or the manifest is missing."""
        return [Ref(*line) for line in read_lines(raw, split)]


def write_references(raw: Path, split: str, refs: Iterable[tuple[Any, ...]]) -> None:
    """Writes the references of one split to `raw`, in the given order."""
    lines = "".join(json.dumps(ref, ensure_ascii=False) + "\n" for ref in refs)
    # File names may have surrogates (undecodable bytes), which UTF-8 cannot encode.
    files.write(raw / f"{split}.index.jsonl", lines.encode(errors="backslashreplace"))


def read_lines(raw: Path, split: str) -> list[list[Any]]:
    """The lines that `write_references` wrote; raises `DataError` if the split or the manifest is missing."""
    read_raw_manifest(raw)
    path = raw / f"{split}.index.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no such split; splits are train, val and test")
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); run fetch again") from None


def write_raw_manifest(
    raw: Path, description: Description, left_out: LeftOut | None = None, **details: Any
) -> None:
    """Writes `manifest.json`, and logs the items left out.

    The manifest has the description, the counts of items left out, bytes and sha256 of each file in `raw`,
    and `details`.
    """
    left_out = left_out or LeftOut()
    left_out.log(description.source)
    details["left_out"] = dict(sorted(left_out.counts.items()))
    written = [
        path
        for path in sorted(raw.iterdir())
        if path.is_file() and path.name[0] != "." and path.name != _MANIFEST
    ]
    listed = {
        path.name: {"bytes": path.stat().st_size, "sha256": files.file_digest(path)} for path in written
    }
    source = redacted(description.source)
    files.write_json(raw / _MANIFEST, {**asdict(description), "source": source, **details, "files": listed})


def read_description(raw: Path) -> Description:
    """The description in the manifest of `raw`; raises `DataError` if it is missing or damaged."""
    try:
        return _DESCRIPTION.validate_python(read_raw_manifest(raw))
    except ValidationError as error:
        raise DataError(f"{raw / _MANIFEST}: damaged ({one_line(error)}); run fetch again") from None


def read_raw_manifest(raw: Path) -> dict[str, Any]:
    """The manifest of `raw`; raises `DataError` if it is missing or damaged."""
    path = raw / _MANIFEST
    try:
        content: dict[str, Any] | None = files.read_json(path)
    except ValueError as error:
        raise DataError(f"{path}: not a manifest ({error}); run fetch again") from None
    if content is None:
        raise DataError(f"{path}: missing: nothing was fetched here, or not to the end; run fetch")
    return content
