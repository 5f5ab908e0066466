"""The working directory of a job: the code as it is here, without data, models, environments or what git ignores."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from infra.project import SubmitError, git

LIMIT = 100 * 2**20  # bytes; Ray's own is 500 MiB, all of it in the head's memory
LEFT_OUT = {".dvc", ".git", ".venv", "data", "mlartifacts", "mlruns", "models", "reports", "runs"}


def pack(target: Path) -> int:
    """Copies the code to the new folder `target`; returns its bytes.

    Raises:
        SubmitError: it is too large; names the folder that most of it lies in.
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
            f"the working directory has {total / 2**20:.0f} MiB, {size / 2**20:.0f} of them in {largest}; at most "
            f"{LIMIT / 2**20:.0f} are sent: move it away or name it in .gitignore (shards and models go through the storage)"
        )
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / path)
    return total


def wanted(path: Path) -> bool:
    """Whether a file goes along. Ray would leave out what a `.gitignore` names, which is what the job is to find."""
    return path.is_file() and path.name != ".gitignore" and path.parts[0] not in LEFT_OUT
