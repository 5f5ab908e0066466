"""Tables as the pages in docs/ have them."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def table_of(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown with a column for each key that any of the lines has."""
    heads = list(dict.fromkeys(key for line in lines for key in line))
    return table(heads, ([line.get(head, "") for head in heads] for line in lines))
