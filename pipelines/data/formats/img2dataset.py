"""Image-text tars in the format of img2dataset (https://github.com/rom1504/img2dataset).

A sample is `<key>.jpg` (or another image), `<key>.txt` with the caption, and `<key>.json`. Beside `<tar>.tar`
lies `<tar>_stats.json`.
"""

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

# Reasons why a sample or tar is left out
NO_IMAGE = "samples without an image"
NO_CAPTION = "samples without a caption"
BROKEN = "images that do not decode"
EMPTY = "tars without a sample"
FEWER = "images that are not in their tars although the statistics count them"

# Suffix in a tar -> this project's suffix of the format
IMAGES = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True, slots=True)
class Pair:
    """An image-text pair in a tar.

    `name` is the name of both files without suffix, `image` and `text` are (offset, bytes) of the files in
    the tar.
    """

    name: str
    extension: str
    image: tuple[int, int]
    text: tuple[int, int]
    caption: str


def read_pairs(path: Path, name: str) -> tuple[list[Pair], list[tuple[str, str]]]:
    """The image-text pairs of the tar at `path`, and (reason, name) of each sample left out.

    A pair needs an image with a readable header and a caption that is not blank. Images are not decoded.

    Args:
        path: the tar.
        name: the tar's name, for messages and the names of samples left out.

    Raises:
        DataError: the file is not a complete tar.
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
    """Yields (name without suffix, suffix, (offset, bytes)) of each file in a tar, which may be empty."""
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
    """Returns True if the file has an image header with a size."""
    try:
        return min(image_size(encoded)) > 0
    except DecodeError:
        return False


def caption_of(content: bytes) -> str:
    """The caption in a `.txt`, with white space reduced to single blanks; empty if the file is blank."""
    return " ".join(content.decode("utf-8", errors="replace").split())


def annotation_of(content: bytes) -> bytes:
    """Converts the `.txt` of a sample to the `.json` that this project's own shards have instead."""
    return json.dumps(caption_entry((caption_of(content),)), ensure_ascii=False).encode()


def missing_images(stats: Any, pairs: Sequence[Pair], left_out: Sequence[tuple[str, str]]) -> int:
    """Number of images that the stats file counts beyond those in the tar; 0 if it gives no count.

    Args:
        stats: content of the stats file.
        pairs: as `read_pairs` returned.
        left_out: as `read_pairs` returned.
    """
    count = stats.get("successes", 0) if isinstance(stats, dict) else 0
    there = len(pairs) + sum(reason in (NO_CAPTION, BROKEN) for reason, _ in left_out)
    return max(0, count - there) if isinstance(count, int) else 0


def stats_name(tar: str) -> str:
    """Name of the stats file of a tar."""
    return f"{tar.removesuffix('.tar')}_stats.json"
