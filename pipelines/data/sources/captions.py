"""`captions`: images with captions in a CSV or TSV, or in the layout of Flickr8k.

The data set is a folder or archive, local or at any fsspec URL.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Contents
from pipelines.data.formats.caption_tables import (
    FLICKR8K_LISTS,
    FLICKR8K_TOKENS,
    Columns,
    Row,
    read_names,
    read_rows,
)
from pipelines.data.formats.roots import open_root
from pipelines.data.raw.captioned import SPLITS, CaptionedImages, CaptionedRef, write_captioned
from pipelines.data.raw.images import is_image
from pipelines.data.raw.keys import keys_of
from pipelines.data.shards.sample import DataError
from pipelines.params import CaptionsParams

IMAGE_FOLDERS = ("", "Images/", "images/", "Flicker8k_Dataset/", "Flickr8k_Dataset/")
SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "test": "test",
}


@dataclass(frozen=True)
class Captions(CaptionedImages):
    """Any data set of images with one or several captions each.

    Each row of a table has one caption of an image. Without `table` and `tables`, these files are looked for,
    in this order: Flickr8k's lists; `train.csv`, `val.csv` and `test.csv`; the only table; `captions.csv`. A
    table may also be a TSV.
    """

    params: CaptionsParams

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Reads the tables, and checks that each row has a caption and an existing image.

        Raises:
            DataError: a table, a column or a split is missing, an image is in two splits, or a row lacks its
                image or caption and `on_bad_row` is `raise`.
        """
        params = self.params
        contents, checksum = open_root(params.root, params.sha256, raw, cache, progress)
        _Reader(raw, contents, checksum, params).write()


SOURCE = Captions


class _Reader:
    """Reads the tables in `contents` and finds their images."""

    def __init__(self, raw: Path, contents: Contents, checksum: str, params: CaptionsParams) -> None:
        self._raw, self._contents, self._checksum, self._params = raw, contents, checksum, params
        self._source = f"captions: {params.root}"
        self._left_out = contents.left_out()
        self._top = ""  # folder of the tables

    def write(self) -> None:
        """Writes the indexes and the manifest to `raw`."""
        rows = list(self._rows())
        folder = self._image_folder([row for _, row in rows])
        captions = self._captions(rows, folder)
        self._count_unnamed(captions, folder)
        found = {split: self._references(of_split, folder) for split, of_split in captions.items()}
        write_captioned(
            found,
            self._raw,
            self._params,
            source=self._source,
            checksum=self._checksum,
            left_out=self._left_out,
        )

    def _rows(self) -> Iterator[tuple[str, Row]]:
        """Yields (split, row) for each row of the tables."""
        params, files = self._params, self._contents.files
        has_lists = any(posixpath.basename(path) == FLICKR8K_LISTS["train"] for path in files)
        if has_lists and not params.table and not params.tables:
            yield from self._flickr8k()
            return
        for path, split in self._tables().items():
            for row in self._read(path):
                yield split or self._split_of(row), row

    def _flickr8k(self) -> Iterator[tuple[str, Row]]:
        """Yields (split, row) by Flickr8k's lists of splits; captions of images on no list are left out."""
        self._top = archive.folder_with(self._contents, FLICKR8K_LISTS["train"], self._source)
        split_of: dict[str, str] = {}
        for split, name in FLICKR8K_LISTS.items():
            path = self._top + name
            for image in read_names(archive.read_file(self._raw, self._contents, path, self._source)):
                if split_of.setdefault(image, split) != split:
                    raise DataError(
                        f"{self._source}: {image} is in the lists of {split_of[image]} and {split}"
                    )
        tables = [
            self._top + name
            for name in (FLICKR8K_TOKENS, "captions.txt")
            if self._top + name in self._contents.files
        ]
        if not tables:
            raise DataError(
                f"{self._source}: neither {FLICKR8K_TOKENS} nor captions.txt is in {self._top or 'the root'}"
            )
        captioned: set[str] = set()
        for row in self._read(tables[0]):
            if row.image in split_of:
                captioned.add(row.image)
                yield split_of[row.image], row
            elif row.image:
                self._left_out.add(
                    "captions of images that no split lists", row.where.removeprefix(f"{self._source}: ")
                )
            else:
                self._bad(row.where, "names no image", "rows without the name of an image")
        for image in split_of.keys() - captioned:
            self._bad(f"{self._source}: {image}", "has no caption", "images without a caption")

    def _tables(self) -> dict[str, str]:
        """Path of each table -> its split; empty if its rows name their splits themselves."""
        given: dict[str, str] = {path: split for split, path in self._params.tables.items()}
        if self._params.table is not None:
            given = {self._params.table: ""}
        if given:
            tops = {path: archive.folder_with(self._contents, path, self._source) for path in given}
            self._top = min(tops.values(), key=len)
            return {tops[path] + path: split for path, split in given.items()}
        files = self._contents.files
        named = [
            path
            for path in files
            if path.endswith((".csv", ".tsv")) or posixpath.basename(path) == "captions.txt"
        ]
        depth = min((path.count("/") for path in named), default=0)
        tables = {
            path: posixpath.splitext(posixpath.basename(path))[0]
            for path in sorted(named)
            if path.count("/") == depth
        }
        own = {path: SPLIT_NAMES[stem] for path, stem in tables.items() if stem in SPLIT_NAMES}
        if len(own) > len(set(own.values())):
            raise DataError(
                f"{self._source}: two tables of one split ({', '.join(own)}): name them in tables"
            )
        if not own:
            chosen = (
                list(tables)
                if len(tables) == 1
                else [path for path, stem in tables.items() if stem == "captions"]
            )
            if len(chosen) != 1:
                there = ", ".join(tables) or archive.top_names(files)
                raise DataError(f"{self._source}: which file has the captions? Set table; there is: {there}")
            own = {chosen[0]: ""}
        self._top = next(iter(own)).rpartition("/")[0]
        self._top += "/" if self._top else ""
        return own

    def _read(self, path: str) -> Iterator[Row]:
        params = self._params
        columns = Columns(params.image_column, params.caption_column, params.split_column)
        return read_rows(
            archive.read_file(self._raw, self._contents, path, self._source), path, columns, self._source
        )

    def _split_of(self, row: Row) -> str:
        """The split that a row names; `train` if it names none."""
        if row.split and row.split.lower() not in SPLIT_NAMES:
            raise DataError(
                f"{row.where}: {self._params.split_column} is {row.split!r}, "
                f"which is none of {', '.join(SPLIT_NAMES)}"
            )
        return SPLIT_NAMES[row.split.lower()] if row.split else "train"

    def _image_folder(self, rows: Sequence[Row]) -> str:
        """The folder to which the rows' image names are relative: the one with the most of these images."""
        names = {row.image for row in rows}
        candidates = [self._top + folder for folder in IMAGE_FOLDERS]
        if self._params.images is not None:
            given = self._params.images.strip("/") + "/"
            candidates = [self._top + given, given]
        return max(
            candidates, key=lambda folder: sum(folder + name in self._contents.files for name in names)
        )

    def _captions(self, rows: Sequence[tuple[str, Row]], folder: str) -> dict[str, dict[str, list[str]]]:
        """Split -> image -> captions."""
        captions: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
        split_of: dict[str, str] = {}
        for split, row in rows:
            if not row.image:
                self._bad(row.where, "names no image", "rows without the name of an image")
            elif not row.text:
                self._bad(row.where, f"{row.image} has no caption", "rows without a caption")
            elif folder + row.image not in self._contents.files:
                self._bad(row.where, f"there is no image {folder}{row.image}", "rows whose image is missing")
            elif split_of.setdefault(row.image, split) != split:
                raise DataError(
                    f"{row.where}: {row.image} is in {split_of[row.image]} and in {split}: "
                    "an image is in one split"
                )
            else:
                captions[split].setdefault(row.image, []).append(row.text)
        return captions

    def _bad(self, where: str, fault: str, plural: str) -> None:
        """Raises `DataError` for a bad row, or counts it under `plural`, as `on_bad_row` says."""
        if self._params.on_bad_row == "raise":
            raise DataError(f"{where}: {fault}; on_bad_row: skip leaves such rows out")
        self._left_out.add(plural, where.removeprefix(f"{self._source}: "))

    def _references(self, captions: Mapping[str, Sequence[str]], folder: str) -> list[CaptionedRef]:
        """References to the images of one split, with unique keys."""
        keys = keys_of({image: posixpath.splitext(image)[0] for image in captions})
        return [
            CaptionedRef(
                archive.reference_to(self._contents, folder + image, keys[image], self._source), tuple(texts)
            )
            for image, texts in captions.items()
        ]

    def _count_unnamed(self, captions: Mapping[str, Mapping[str, Sequence[str]]], folder: str) -> None:
        """Counts the images without captions."""
        named = {folder + image for of_split in captions.values() for image in of_split}
        for path in sorted(self._contents.files.keys() - named):
            if is_image(path):
                self._left_out.add("images without a caption in a split", path)
