"""The boxes of CUB-200-2011 (Wah et al. 2011), by image name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Contents
from pipelines.data.formats.boxes import Corners
from pipelines.data.formats.roots import Official, download_archives, open_root
from pipelines.data.shards.sample import DataError

ARCHIVES = {
    "cub": Official(
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        "md5:97eceeb196236b17998738112f37df78",
    )
}


def read_boxes(root: str | None, cache: Path, progress: bool) -> tuple[dict[str, Corners], str]:
    """Corners of the boxes by image name (`species/file.jpg`), and one checksum of the data set's files.

    CUB documents its boxes only as x, y, width and height in pixels. Boxes with x = 0 exist, and none of the
    5,794 boxes of the test split has x + width beyond the image's last pixel. So this function reads boxes as
    counted from 0 and half-open, [x, x + width), like the code published with Waterbirds-100. It does not
    check them against their images.

    Args:
        root: a folder or archive, local or at any fsspec URL, with `images.txt` and `bounding_boxes.txt`. If
            `None`, the official archive is downloaded to `cache`.
        cache: folder where archives are kept and unpacked. Nothing is written elsewhere, as only the boxes
            are used.
        progress: if True, shows progress bars.

    Raises:
        DataError: a file is missing, or a line is malformed.
    """
    source = f"CUB-200-2011: {root or ARCHIVES['cub'].url}"
    if root is None:
        contents, checksum = download_archives(ARCHIVES, cache, cache, progress)
    else:
        contents, checksum = open_root(root, None, cache, cache, progress)
    top = archive.folder_with(contents, "bounding_boxes.txt", source)
    names = dict(_cells(contents, f"{top}images.txt", 2, cache, source))
    boxes = {}
    for key, *numbers in _cells(contents, f"{top}bounding_boxes.txt", 5, cache, source):
        try:
            x, y, width, height = map(float, numbers)
            boxes[names[key]] = (x, y, x + width, y + height)
        except (KeyError, ValueError):
            raise DataError(
                f"{source}: {top}bounding_boxes.txt: {' '.join((key, *numbers))!r} "
                "is not an id of images.txt and four numbers"
            ) from None
    return boxes, checksum


def _cells(contents: Contents, path: str, count: int, folder: Path, source: str) -> Iterator[list[str]]:
    """Yields the cells of each line of a text file; raises `DataError` if a line has not `count` cells."""
    for line in archive.read_file(folder, contents, path, source).decode(errors="replace").splitlines():
        cells = line.split()
        if len(cells) != count:
            raise DataError(f"{source}: {path}: {line!r} has not {count} columns")
        yield cells
