"""The working directory of a job: this working tree without data, models and files that git ignores."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from infra.project import SubmitError, git

LIMIT = 100 * 2**20  # bytes; Ray's own limit is 500 MiB, and the head keeps all of it in memory
LEFT_OUT = {".dvc", ".git", ".venv", "data", "mlartifacts", "mlruns", "models", "reports", "runs"}


def pack(target: Path) -> int:
    """Copies the code to the new folder `target` and returns its size in bytes.

    Raises:
        SubmitError: the code is too large; the message names the largest folder.
    """
    files = [
        path
        for path in map(Path, git("ls-files", "-z", "-co", "--exclude-standard").split("\0"))
        if wanted(path)
    ]
    sizes: Counter[str] = Counter()
    for path in files:
        sizes[f"{path.parts[0]}/" if len(path.parts) > 1 else path.name] += path.stat().st_size
    if (total := sizes.total()) > LIMIT:
        (largest, size), *_ = sizes.most_common(1)
        raise SubmitError(
            f"the working directory has {total / 2**20:.0f} MiB, {size / 2**20:.0f} of them in {largest}; "
            f"at most {LIMIT / 2**20:.0f} are sent: move it away or name it in .gitignore "
            "(shards and models go through the storage)"
        )
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / path)
    return total


def wanted(path: Path) -> bool:
    """Returns True if a file belongs to the package.

    `.gitignore` files do not, because Ray would leave out the files that they name.
    """
    return path.is_file() and path.name != ".gitignore" and path.parts[0] not in LEFT_OUT
