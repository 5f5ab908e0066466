"""The DVC side of a submitted stage: its params, its inputs and outputs, its entry in `dvc.lock`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.params import Params, check_names, load
from pipelines.storage import files
from pipelines.storage.errors import one_line

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

PARAMS = Path("params.yaml")
DATA = ("data", "models")  # folders with outputs of stages that later stages need
TRAINS = "training.workers"  # stages that depend on this param run on workers
ALSO = ("explain", "search")  # further stages that run on workers


class SubmitError(UserError, RuntimeError):
    """A stage cannot be submitted, or its outputs cannot be fetched. The message is one line."""


@dataclass(frozen=True)
class Stage:
    """A stage as DVC resolved it.

    Attributes:
        name: name as DVC addresses it, e.g. `bcosify@pretrained`.
        command: shell command that runs the stage.
        inputs: folders of earlier stages' outputs that the stage depends on.
        outputs: files and folders that the stage makes.
        state: sha256 over DVC's record of its command, dependencies and params.
    """

    name: str
    command: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: str


@contextmanager
def params_set(overrides: Sequence[str], changes: dict[str, Any]) -> Iterator[Params]:
    """Sets values in `params.yaml` and yields the params. If the block raises, the file is restored.

    Args:
        overrides: overrides as for `dvc exp run -S`. If there are any, the params are composed anew from the
            recipes.
        changes: dotted key -> value, set after the overrides.
    """
    before = PARAMS.read_bytes()
    params = set_params(overrides, changes)
    try:
        yield params
    except BaseException:
        if PARAMS.read_bytes() != before:
            files.write(PARAMS, before)
        raise


def set_params(overrides: Sequence[str], changes: dict[str, Any]) -> Params:
    """Sets values in `params.yaml` if all are valid, and returns the params. Arguments as in `params_set`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PARAMS.name)
        shutil.copy2(PARAMS, path)
        if overrides:
            compose(path, overrides)
        change(path, changes)
        params = load(path)
        if overrides or changes:
            shutil.copy2(path, PARAMS)
    return params


def compose(path: Path, overrides: Sequence[str]) -> None:
    """Composes params from the project's recipes, as `dvc exp run -S` does, and writes them to `path`."""
    from dvc.utils.hydra import compose_and_dump

    check_names(override.lstrip("+~").partition("=")[0] for override in overrides)
    with open_repo() as repo:
        hydra = repo.config["hydra"]
        recipes = os.path.join(repo.root_dir, hydra["config_dir"])
        try:
            compose_and_dump(str(path), recipes, None, hydra["config_name"], repo.root_dir, list(overrides))
        except Exception as error:  # Hydra's errors have no common base class
            raise SubmitError(f"{' '.join(overrides)}: {one_line(error)}") from None


def change(path: Path, changes: dict[str, Any]) -> None:
    """Sets dotted keys in a params file."""
    from dvc.utils.hydra import apply_overrides

    if changes:
        apply_overrides(str(path), [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def stages(name: str) -> list[Stage]:
    """Returns the stages that DVC finds under this name: one, or all of a matrix.

    Raises:
        SubmitError: there is no such stage, it does not run on workers, or an input is missing here.
    """
    with open_repo() as repo:
        return _stages(repo, name)


def stages_of(job: str) -> list[Stage]:
    """Returns the stages that a job runs, by its name (see `job_of`); raises `SubmitError` like `stages`."""
    with open_repo() as repo:
        names = {
            name
            for stage in submittable(repo)
            for name in (stage.addressing, stage.addressing.partition("@")[0])
        }
        found = [
            name for name in names if job_of(name, job[-8:]) == job and re.fullmatch("[0-9a-f]{8}", job[-8:])
        ]
        if not found:
            raise SubmitError(
                f"{job[:100]!a} is no job of a stage in dvc.yaml; "
                "wanted is STORAGE/jobs/STAGE-NUMBER, as was printed"
            )
        return _stages(repo, found[0])


def job_of(stage: str, number: str) -> str:
    """Returns the name of a job for a stage or a matrix of stages; `number` has 8 hexadecimal digits."""
    return f"{stage.replace('@', '-')}-{number}"


def _stages(repo: Repo, name: str) -> list[Stage]:
    from dvc.exceptions import DvcException
    from dvc.stage.exceptions import StageNotFound

    trained = submittable(repo)
    try:
        found = list(repo.stage.collect(name))
    except StageNotFound:
        found = []
    if not found or any(stage not in trained for stage in found):
        what = "does not run on workers: run it here" if found else "is not in dvc.yaml"
        names = ", ".join(sorted({*(stage.addressing for stage in trained)}))
        raise SubmitError(f"stage {name!r} {what}; those to submit are {names}")
    try:
        return [describe(stage) for stage in found]
    except DvcException as error:
        raise SubmitError(f"{name}: {one_line(error)}: make it first") from None


def submittable(repo: Repo) -> list[PipelineStage]:
    """Returns the stages that run on workers."""
    from dvc.dependency.param import ParamsDependency

    def trains(stage: PipelineStage) -> bool:
        return any(isinstance(dep, ParamsDependency) and TRAINS in dep.params for dep in stage.deps)

    return [stage for stage in repo.index.stages if trains(stage) or stage.addressing in ALSO]


def check_no_links(outputs: Sequence[str]) -> None:
    """Raises `SubmitError` if an output or a folder around it is a link.

    An output itself may be a link into DVC's cache.
    """
    with open_repo() as repo:
        cache = Path(repo.cache.local.path).resolve()
    for output in outputs:
        for path in (*reversed(Path(output).parents), Path(output)):
            made_by_dvc = path == Path(output) and path.resolve().is_relative_to(cache)
            if path.is_symlink() and not made_by_dvc:
                raise SubmitError(
                    f"{path} is a link to {os.readlink(path)!a}: outputs are put at their own place alone"
                )


def describe(stage: PipelineStage) -> Stage:
    """Returns the stage as it is now, with its dependencies hashed anew."""
    from dvc.stage.serialize import to_single_stage_lockfile

    stage.save_deps()
    recorded = {
        key: value
        for key, value in to_single_stage_lockfile(stage).items()
        if key in ("cmd", "deps", "params")
    }
    return Stage(
        name=stage.addressing,
        command=stage.cmd,
        inputs=tuple(dep.def_path for dep in stage.deps if Path(dep.def_path).parts[0] in DATA),
        outputs=tuple(out.def_path for out in stage.outs),
        state=hashlib.sha256(json.dumps(recorded, sort_keys=True, default=str).encode()).hexdigest(),
    )


def commit(name: str) -> None:
    """Records the stage's present outputs and inputs in `dvc.lock` (`dvc commit --force`)."""
    with open_repo() as repo:
        repo.commit(name, force=True)


def version() -> tuple[str, bool]:
    """Returns the checked-out git commit, and True if tracked files differ from it.

    Differences in `dvc.lock` and `params.yaml` do not count.
    """
    try:
        sha = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock", f":!{PARAMS}")
    except subprocess.CalledProcessError as error:
        raise SubmitError(f"git: {error.stderr.strip()}") from None
    return sha, bool(changed)


def git(*arguments: str) -> str:
    """Returns the output of a git command."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def open_repo() -> Repo:
    """Opens the DVC project of the working directory; raises `SubmitError` if there is none."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        return Repo()
    except NotDvcRepoError:
        raise SubmitError(f"{Path.cwd()} is not in the project: no .dvc here or above") from None
