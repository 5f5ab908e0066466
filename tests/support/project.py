"""Projects for tests: a git repository like a user's, and folders in which stages run in this process."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import compose_and_dump

ROOT = Path(__file__).parents[2]
OUTPUTS = ("data", "models", "reports", "runs")


class Workspace:
    """A folder with the params and outputs of stages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def compose(self, *overrides: str, recipe: str = "smoke") -> None:
        """Writes `params.yaml` as `dvc exp run -S recipe=RECIPE -S OVERRIDE ...` does."""
        path, recipes = str(self.folder / "params.yaml"), str(ROOT / "pipelines/recipes")
        compose_and_dump(path, recipes, None, "config", str(ROOT), [f"recipe={recipe}", *overrides])

    def read(self, path: str) -> Any:
        """The JSON file at `path`."""
        return json.loads((self.folder / path).read_text())

    def copy(self, folder: Path) -> "Workspace":
        """Returns a workspace in `folder` with writable copies of the params and outputs (DVC's are not)."""
        for name in OUTPUTS:
            shutil.copytree(self.folder / name, folder / name, copy_function=shutil.copyfile)
        shutil.copyfile(self.folder / "params.yaml", folder / "params.yaml")
        return Workspace(folder)


class Project(Workspace):
    """A copy of the working tree in a git repository of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "DVC", "GIT"))
        }
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.run("git init -q && git add -A && git -c user.name=a -c user.email=a@b.example commit -qm all")

    def run(self, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a shell command in the project; raises `AssertionError` if it fails and `check` is set."""
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done


def refused(main: Callable[..., object], *arguments: object) -> str:
    """Asserts that a stage's `main` exits with one line, and returns the line."""
    with pytest.raises(SystemExit) as ended:
        main(*arguments)
    line = ended.value.code
    assert isinstance(line, str)
    assert "\n" not in line
    return line
