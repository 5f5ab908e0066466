"""The names that samples have in shards."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping

from pipelines.data.shards.sample import LONGEST_KEY

_HASH = 16  # hexadecimal digits
_LIKE_HASHED = re.compile(rf".*-[0-9a-f]{{{_HASH}}}")


def keys_of(names: Mapping[str, str]) -> dict[str, str]:
    """The key of each sample of a split: its name, made safe in file names, if that is short enough and no other has it.

    Otherwise the key ends in a hash of the sample's path. Keys that differ in upper and lower case alone count as equal, because
    they would be one file where shards are unpacked on macOS or Windows.

    Args:
        names: path of each sample in its data set, which no other sample has -> a name that people recognise.

    Returns:
        Path -> key. Keys are valid (`shards.sample.KEY`) and differ.
    """
    safe = {path: re.sub(r"[^A-Za-z0-9_-]", "_", name) for path, name in names.items()}
    taken = Counter(key.lower() for key in safe.values())
    return {path: key if _is_free(key, taken) else _hashed(key, path) for path, key in safe.items()}


def in_part(number: int, key: str) -> str:
    """A key for the sample `key` of data set `number` of several: keys of different data sets, or of one, differ."""
    longer = f"{number}_{key}"
    return longer if len(longer) <= LONGEST_KEY else _hashed(longer, longer)


def _is_free(key: str, taken: Counter[str]) -> bool:
    """Whether a safe name can be a key as it is; one that looks like a hashed key could meet one."""
    return 0 < len(key) <= LONGEST_KEY and taken[key.lower()] == 1 and not _LIKE_HASHED.fullmatch(key.lower())


def _hashed(key: str, path: str) -> str:
    """A key that is this sample's alone."""
    return f"{key[: LONGEST_KEY - _HASH - 1]}-{hashlib.sha256(path.encode()).hexdigest()[:_HASH]}"
