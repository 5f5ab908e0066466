"""Keys: the names of samples in shards."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping

from pipelines.data.shards.sample import LONGEST_KEY

_HASH = 16  # hexadecimal digits
_LIKE_HASHED = re.compile(rf".*-[0-9a-f]{{{_HASH}}}")


def keys_of(names: Mapping[str, str]) -> dict[str, str]:
    """The key of each sample of a split: its name with unsafe characters replaced.

    If that is too long or not unique, the key ends in a hash of the sample's path. Keys that differ only in
    case count as equal, because they would be the same file if shards are unpacked on macOS or Windows.

    Args:
        names: path of each sample in its data set (unique) -> a name that people recognise.

    Returns:
        Path -> key. The keys are valid (`shards.sample.KEY`) and unique.
    """
    safe = {path: re.sub(r"[^A-Za-z0-9_-]", "_", name) for path, name in names.items()}
    taken = Counter(key.lower() for key in safe.values())
    return {path: key if _is_free(key, taken) else _hashed(key, path) for path, key in safe.items()}


def in_part(number: int, key: str) -> str:
    """The key, in a mixture, of the sample `key` of data set number `number`; unique in the mixture."""
    longer = f"{number}_{key}"
    return longer if len(longer) <= LONGEST_KEY else _hashed(longer, longer)


def _is_free(key: str, taken: Counter[str]) -> bool:
    """True if a safe name can be a key unchanged. One that looks like a hashed key could collide with one."""
    return 0 < len(key) <= LONGEST_KEY and taken[key.lower()] == 1 and not _LIKE_HASHED.fullmatch(key.lower())


def _hashed(key: str, path: str) -> str:
    """`key`, shortened, with a hash of the sample's unique path."""
    return f"{key[: LONGEST_KEY - _HASH - 1]}-{hashlib.sha256(path.encode()).hexdigest()[:_HASH]}"
