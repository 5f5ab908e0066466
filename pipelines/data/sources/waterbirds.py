"""`waterbirds`: birds of CUB-200-2011 on land or water (Sagawa et al. 2020), with CUB's boxes."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelines.data.formats import archive, cub
from pipelines.data.formats.archive import Contents, Ref, as_text
from pipelines.data.formats.boxes import Annotation, BoxCheck, Corners
from pipelines.data.formats.encoded_image import DecodeError, image_size
from pipelines.data.formats.left_out import LeftOut
from pipelines.data.formats.roots import Official, download_archives, open_root
from pipelines.data.raw import annotated, images
from pipelines.data.raw.annotated import AnnotatedImages
from pipelines.data.raw.keys import keys_of
from pipelines.data.shards.sample import DataError, Description
from pipelines.params import WaterbirdsParams
from pipelines.progress import bar
from pipelines.storage.files import combined_sha256

CLASSES = ("landbird", "waterbird")
_RANGES = {"y": 2, "split": 3, "place": 2}  # column of metadata.csv -> number of its values (0, 1, ...)
URL = "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz"


class Row(NamedTuple):
    """A line of `metadata.csv`: `y` is the class, `place` is 0 for land and 1 for water."""

    name: str
    y: int
    split: str
    place: int

    @property
    def is_unusual(self) -> bool:
        """True for a training image of a bird on the background of the other class."""
        return self.split == "train" and self.y != self.place


@dataclass(frozen=True)
class Waterbirds(AnnotatedImages):
    """Landbirds and waterbirds. The group of an image is 2·y + place.

    Groups 0 to 3 are landbirds on land, landbirds on water, waterbirds on land, and waterbirds on water.

    Variant 95 is the official data set, where 95 % of the training birds are on their usual background.
    Variant 100 leaves out the other training images; val and test, where places are drawn evenly, are
    unchanged. The results of model guidance were published on the Waterbirds-100 of Petryk et al. (2022),
    `waterbird_1.0_forest2water2`. That data set was composed anew, with other places and splits, and cannot
    be downloaded by a program: give its folder as `root`.

    No digest of the official archive is published. Its length and gzip's CRC are checked, and `sha256` if it
    is given.
    """

    params: WaterbirdsParams

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Lists the images at `root` or in the official archive, each with its bird's box from CUB-200-2011.

        Raises:
            DataError: a file, a column or an image is missing, an image has no box, or its box is invalid.
        """
        params = self.params
        if params.root is None:
            official = Official(URL, params.sha256 and f"sha256:{params.sha256}")
            contents, checksum = download_archives({"images": official}, raw, cache, progress)
        else:
            contents, checksum = open_root(params.root, params.sha256, raw, cache, progress)
        source = f"waterbirds {params.variant}: {params.root or URL}"
        boxes, boxes_checksum = cub.read_boxes(params.cub_root, cache, progress)
        top = archive.folder_with(contents, "metadata.csv", source)
        rows = _read_rows(
            archive.read_file(raw, contents, f"{top}metadata.csv", source), f"{source}: {top}metadata.csv"
        )
        left_out = contents.left_out()
        _count_unlisted(contents, top, rows, boxes, left_out)
        if params.variant == 100:
            for row in rows:
                if row.is_unusual:
                    left_out.add("training images of the smaller groups", row.name)
            rows = [row for row in rows if not row.is_unusual]
        reader = _Reader(raw, contents, top, source, boxes, BoxCheck(params.on_bad_box, left_out))
        sizes = {}
        for split in annotated.SPLITS:
            chosen = [row for row in rows if row.split == split]
            sizes[split] = annotated.write_split(raw, split, reader.read(chosen, split, progress))
        total = combined_sha256({"images": checksum, "boxes": boxes_checksum})
        annotated.write_description(
            raw, Description(CLASSES, "multiclass", source, total, sizes), reader.check
        )


SOURCE = Waterbirds


@dataclass(frozen=True)
class _Reader:
    """Pairs the images below the folder `top` of `contents` with the boxes of the same names."""

    raw: Path
    contents: Contents
    top: str
    source: str
    boxes: Mapping[str, Corners]
    check: BoxCheck

    def read(self, rows: list[Row], split: str, progress: bool) -> Iterator[tuple[Ref, Annotation]]:
        """Yields the images of `rows`, which all belong to `split`, with their annotations."""
        keys = keys_of({row.name: row.name.rpartition("/")[2].rpartition(".")[0] for row in rows})
        with bar(f"boxes of {split}", len(rows), show=progress) as shown:
            for row in rows:
                image = archive.reference_to(self.contents, self.top + row.name, keys[row.name], self.source)
                yield image, self._annotation(image, row)
                shown.update(1)

    def _annotation(self, image: Ref, row: Row) -> Annotation:
        """The annotation of one image, with the size from the image's header.

        An image that does not decode gets no box; training raises an error or skips it (`data.on_error`).
        """
        if row.name not in self.boxes:
            raise DataError(f"{self.source}: {row.name} has no box in CUB-200-2011")
        try:
            height, width = image_size(archive.read(self.raw, image))
            corners = self.check(self.boxes[row.name], width, height, image.path)
        except DecodeError:
            self.check.left_out.add("boxes of images that do not decode", image.path)
            height, width, corners = 0, 0, None
        boxes = () if corners is None else ((row.y, *corners),)
        return Annotation(width, height, boxes, label=row.y, group=2 * row.y + row.place)


def _count_unlisted(
    contents: Contents, top: str, rows: Sequence[Row], boxes: Mapping[str, Corners], left_out: LeftOut
) -> None:
    """Counts the images and boxes that no line of `metadata.csv` (`rows`) names."""
    names = {row.name for row in rows}
    for path in sorted(contents.files):
        if path.startswith(top) and images.is_image(path) and path.removeprefix(top) not in names:
            left_out.add("images that metadata.csv does not name", path)
    for name in sorted(boxes.keys() - names):
        left_out.add("boxes of images that metadata.csv does not name", name)


def _read_rows(content: bytes, where: str) -> list[Row]:
    """Parses `metadata.csv`; raises `DataError` for missing columns, invalid values and repeated names."""
    reader = csv.DictReader(content.decode(errors="replace").splitlines())
    missing = [column for column in ("img_filename", *_RANGES) if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(
            f"{where}: has no column {', '.join(missing)} "
            f"(it has {', '.join(reader.fieldnames or ()) or 'none'})"
        )
    rows = []
    for line in reader:
        place_of = f"{where}: line {reader.line_num}"
        y, split, place = (
            _number(line[column], column, choices, place_of) for column, choices in _RANGES.items()
        )
        rows.append(Row(as_text(line["img_filename"] or ""), y, annotated.SPLITS[split], place))
    names = Counter(row.name for row in rows)
    if len(names) < len(rows):
        raise DataError(f"{where}: names {names.most_common(1)[0][0]} more than once: an image has one line")
    return rows


def _number(text: str, column: str, choices: int, where: str) -> int:
    """The number in a cell; raises `DataError` unless it is in [0, choices)."""
    if text not in map(str, range(choices)):
        raise DataError(f"{where}: {column} is {text!r}, where 0 to {choices - 1} are allowed")
    return int(text)
