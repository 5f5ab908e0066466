"""Tables of captions: CSV and TSV with a header, and Flickr8k's own lists (Hodosh et al. 2013)."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator
from typing import NamedTuple

from pipelines.data.formats.archive import as_text, in_archive
from pipelines.data.shards.sample import DataError

FLICKR8K_LISTS = {
    split: f"Flickr_8k.{name}Images.txt"
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test"))
}
FLICKR8K_TOKENS = "Flickr8k.token.txt"


class Row(NamedTuple):
    """One caption. `where` names its file and line; a field that the line lacks is empty."""

    where: str
    image: str
    text: str
    split: str


class Columns(NamedTuple):
    """Names of a table's columns. The column `split` is optional."""

    image: str
    caption: str
    split: str


def read_rows(content: bytes, path: str, columns: Columns, source: str) -> Iterator[Row]:
    """Yields the rows of the table `path`: a CSV or TSV with a header, or `Flickr8k.token.txt`.

    The separator is a tab if the file is a `.tsv` or its header has a tab, and a comma otherwise. Texts may
    be quoted, as `csv` and pandas write them. White space in a caption becomes single blanks.

    Raises:
        DataError: a column is missing, a quoted text has no end, or a row has more cells than the header. The
            error names the line.
    """
    text = content.decode("utf-8-sig", errors="replace")
    where = f"{source}: {path}"
    if posixpath.basename(path) == FLICKR8K_TOKENS:
        yield from _tokens(text, where)
        return
    delimiter = "\t" if path.endswith(".tsv") or "\t" in text.partition("\n")[0] else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    done = 0  # lines read
    try:
        names = reader.fieldnames or ()
        missing = [column for column in (columns.image, columns.caption) if column not in names]
        if missing:
            raise DataError(
                f"{where}: has no column {', '.join(missing)} "
                f"(it has {', '.join(map(as_text, names)) or 'none'})"
            )
        for cells in reader:
            done = reader.line_num
            line = f"{where}: line {done}"
            if None in cells:
                raise DataError(
                    f"{line}: has more cells than the header: put texts that contain the separator in quotes"
                )
            image, caption, split = (cells.get(column) or "" for column in columns)
            yield Row(line, as_text(in_archive(image.strip())), " ".join(caption.split()), split.strip())
    except csv.Error as error:
        raise DataError(
            f"{where}: line {max(done, 1) + 1}: not a row ({error}): quotes in a quoted text are doubled"
        ) from None


def _tokens(text: str, where: str) -> Iterator[Row]:
    """Yields the rows of Flickr8k's own list, whose lines are `NAME.jpg#NUMBER`, a tab, the caption."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            name, _, caption = line.partition("\t")
            yield Row(
                f"{where}: line {number}",
                as_text(name.rpartition("#")[0].strip()),
                " ".join(caption.split()),
                "",
            )


def read_names(content: bytes) -> list[str]:
    """The image names in a list with one name per line."""
    return [
        as_text(line.strip())
        for line in content.decode("utf-8-sig", errors="replace").splitlines()
        if line.strip()
    ]
