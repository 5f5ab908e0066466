"""An environment with only the packages that a list of requirements needs, as links to installed ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def closure(requirements: Iterable[str]) -> set[str]:
    """Returns the names of `requirements` and of all distributions that they need, extras included."""
    found: set[tuple[str, str]] = set()
    left = [Requirement(line) for line in requirements]
    while left:
        wanted = left.pop()
        for extra in ("", *wanted.extras):
            if (wanted.name.lower(), extra) in found:
                continue
            found.add((wanted.name.lower(), extra))
            try:
                needs = map(Requirement, distribution(wanted.name).requires or ())
            except PackageNotFoundError:  # only for another platform
                continue
            left.extend(
                need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})
            )
    return {name for name, _ in found}


def bare_environment(requirements: Iterable[str], folder: Path) -> list[str]:
    """Returns the command of a Python that runs a script from stdin with only these packages.

    It finds these packages, as links in `folder`, and the standard library.
    """
    folder.mkdir()
    for name in closure(requirements):
        try:
            files = distribution(name).files or ()
        except PackageNotFoundError:
            continue
        for path in {
            file.parts[0]: file for file in files if file.parts[0] not in ("..", "__pycache__")
        }.values():
            link, target = (
                folder / path.parts[0],
                Path(os.fspath(path.locate())).parents[len(path.parts) - 1] / path.parts[0],
            )
            if not link.exists():
                link.symlink_to(target)
    return [
        sys.executable,
        "-S",
        "-c",
        f"import sys; sys.path[:0] = [{str(folder)!r}]; exec(sys.stdin.read())",
    ]
