"""Tars as img2dataset writes them: `<key>.jpg`, `<key>.txt` with the caption, `<key>.json`; beside them `<tar>_stats.json`."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.formats.archive import as_text, in_archive
from pipelines.data.formats.encoded_image import DecodeError, image_size
from pipelines.data.shards.sample import DataError, caption_entry
from pipelines.data.shards.tar import members

CAPTION = "txt"  # suffix

# Why a sample or tar is left out
NO_IMAGE = "samples without an image"
NO_CAPTION = "samples without a caption"
BROKEN = "images that do not decode"
EMPTY = "tars without a sample"
FEWER = "images that are not in their tars although the statistics count them"

IMAGES = {
    "jpg": "jpg",
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
}  # suffix in a tar -> the project's own name of the format


@dataclass(frozen=True, slots=True)
class Pair:
    """An image with its caption, and (offset, bytes) of both files in their tar; `name` is their name without suffix."""

    name: str
    extension: str
    image: tuple[int, int]
    text: tuple[int, int]
    caption: str


def read_pairs(path: Path, name: str) -> tuple[list[Pair], list[tuple[str, str]]]:
    """The image-text pairs of the tar at `path`, called `name`; and (reason, name) of whatever is left out.

    A pair needs an image with a readable header and a caption with words. Images are not decoded.

    Raises:
        DataError: the file is not a whole tar.
    """
    files: dict[str, dict[str, tuple[int, int]]] = {}
    for inside, suffix, place in _files(path, name):
        files.setdefault(inside, {}).setdefault(suffix, place)
    pairs: list[Pair] = []
    left_out: list[tuple[str, str]] = []
    with path.open("rb") as tar:

        def content(place: tuple[int, int]) -> bytes:
            tar.seek(place[0])
            return tar.read(place[1])

        for inside, of_sample in files.items():
            extension = next((suffix for suffix in IMAGES.values() if suffix in of_sample), None)
            caption = caption_of(content(of_sample[CAPTION])) if CAPTION in of_sample else ""
            if extension is None:
                left_out.append((NO_IMAGE, f"{name}: {inside}"))
            elif not caption:
                left_out.append((NO_CAPTION, f"{name}: {inside}"))
            elif not _has_header(content(of_sample[extension])):
                left_out.append((BROKEN, f"{name}: {inside}"))
            else:
                pairs.append(Pair(inside, extension, of_sample[extension], of_sample[CAPTION], caption))
    return pairs, left_out if files else [(EMPTY, name)]


def _files(path: Path, name: str) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Name without suffix, suffix, and place of each file in a tar that belongs to a sample; none of an empty file."""
    if path.stat().st_size == 0:
        return
    try:
        found = members(path)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{name}: not a whole tar ({error}): get it again") from None
    for member, offset, size in found:
        folder, base = posixpath.split(in_archive(member))
        stem, _, suffix = base.partition(".")
        yield (
            as_text(posixpath.join(folder, stem)),
            IMAGES.get(suffix.lower(), suffix.lower()),
            (offset, size),
        )


def _has_header(encoded: bytes) -> bool:
    """Whether a file begins as an image does."""
    try:
        return min(image_size(encoded)) > 0
    except DecodeError:
        return False


def caption_of(content: bytes) -> str:
    """The caption in a `.txt`, its white space made single blanks; empty if it has no words."""
    return " ".join(content.decode("utf-8", errors="replace").split())


def annotation_of(content: bytes) -> bytes:
    """The `.txt` of a sample as the json that the project's own shards have instead."""
    return json.dumps(caption_entry((caption_of(content),)), ensure_ascii=False).encode()


def missing_images(stats: Any, pairs: Sequence[Pair], left_out: Sequence[tuple[str, str]]) -> int:
    """How many more images the content of a stats file counts than its tar has, by what `read_pairs` returned."""
    count = stats.get("successes", 0) if isinstance(stats, dict) else 0
    there = len(pairs) + sum(reason in (NO_CAPTION, BROKEN) for reason, _ in left_out)
    return max(0, count - there) if isinstance(count, int) else 0


def stats_name(tar: str) -> str:
    """Name of the stats file of a tar."""
    return f"{tar.removesuffix('.tar')}_stats.json"
