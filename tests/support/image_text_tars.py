"""Image-text tars as img2dataset writes them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tests.support.fetching import jpeg


def sample(number: int, **changes: Any) -> dict[str, bytes | None]:
    """Returns the files of one sample by suffix; `None` leaves a file out."""
    content = {"jpg": jpeg(9, 9, number), "txt": f"photo {number}".encode(), "json": b'{"status": "success"}'}
    return {**content, **changes}


def write_tar(path: Path, samples: dict[str, dict[str, bytes | None]]) -> None:
    """Writes a tar, and its statistics beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                if content is not None:
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    counted = {
        "count": len(samples) + 3,
        "successes": sum(files["jpg"] is not None for files in samples.values()),
    }
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(counted))


def numbered(tar: int, count: int, **bad: dict[str, bytes | None]) -> dict[str, dict[str, bytes | None]]:
    """The samples of tar number `tar`, some of them replaced."""
    return {f"{tar:05d}{n:04d}": bad.get(f"n{n}", sample(100 * tar + n)) for n in range(count)}
