"""Random broken inputs, and the outcome of reading them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

from pipelines.errors import UserError

OK = "ok"
NASTY = (
    *(None, True, 0, -1, 1e308, float("nan"), float("inf"), 2**70),
    *("", "x", "\ud800", "a\nb", "../../x", [], [[]], {}, {"x": 1}),
)


def outcome(call: Callable[[], Any], lines: int | None = 1) -> str:
    """Returns `OK`, or the message of the `UserError` that `call` raises. Any other error fails the test.

    The message must have `lines` lines, any number if `None`.
    """
    try:
        call()
    except UserError as error:
        said = str(error)
    else:
        return OK
    assert said.strip()
    assert lines in (None, len(said.splitlines())), said
    return said


def broken(content: bytes, draw: random.Random) -> bytes:
    """Returns `content` after one random fault: cut off, or a part overwritten, removed or repeated."""
    if not content:
        return b"\0"
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.choice([1, 4, 64, 1024]))
    match draw.randrange(6):
        case 0:
            return content[:start]
        case 1:
            return content[:start] + draw.choice([b"\0", b"\xff", b"9"]) * (end - start) + content[end:]
        case 2:
            return content[:start] + content[end:]
        case 3:
            return content[:end] + content[start:end] + content[end:]
        case 4:
            return content[:start] + draw.randbytes(end - start) + content[end:]
    changed = bytearray(content)
    for _ in range(draw.choice([1, 3, 10])):
        changed[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(changed)


def altered(content: Any, draw: random.Random) -> Any:
    """Returns a copy of nested dicts and lists with one value or key replaced, removed or moved."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []

    def walk(group: Any) -> None:
        for key in list(group) if isinstance(group, dict) else range(len(group)):
            places.append((group, key))
            if isinstance(group[key], dict | list):
                walk(group[key])

    walk(content)
    group, key = draw.choice(places)
    match draw.randrange(4):
        case 0:
            del group[key]
        case 1 if isinstance(group, dict):
            group[draw.choice(["x", "", "id"])] = group.pop(key)
        case 2:
            other, place = draw.choice(places)
            group[key] = (
                copy.deepcopy(other[place])
                if place in other or (isinstance(other, list) and place < len(other))
                else None
            )
        case _:
            group[key] = draw.choice(NASTY)
    return content
