"""Markdown tables for the pages in docs/."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table with these column heads and rows."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def table_of(lines: Sequence[dict[str, Any]]) -> str:
    """A markdown table with a row per line and a column per key that occurs in any line."""
    heads = list(dict.fromkeys(key for line in lines for key in line))
    return table(heads, ([line.get(head, "") for head in heads] for line in lines))
