"""The code, params, models and data that an outcome depends on, defined in one place.

A run's directory is named by a hash of them (`storage.paths.run_directory`). So a stage resumes from its own
checkpoints, never from stale ones. `dvc.yaml` lists the same code and params; tests/workflow/test_identity.py
compares the two.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipelines
from pipelines.params import DataParams, Params, TrainingParams, leaves

if TYPE_CHECKING:
    from pipelines.workflow.tasks import Task

ROOT = Path(pipelines.__file__).parents[1]
PACKAGES = ("pipelines", "stages", "infra")
# Modules that record and display, which changes no outcome.
RECORDING = ("pipelines.tracking", "pipelines.progress")
# Modules that train a task; their imports count too.
TRAINING = ("pipelines.workflow.tasks", "pipelines.training")

# Params of `training` that change the result.
COMPUTATION = {"workers", "precision", "accumulate", "channels_last", "compile"}
SPEED = {"loader_workers", "verify"}  # params of `data` that change only the speed

# Searched stage -> params outside the searchable ones that its training depends on.
INPUTS: dict[str, tuple[str, ...]] = {
    "bcosify": ("model",),
    "distill": ("distill.shots", "distill.shots_seed", "distill.frozen"),
    "guide": (),
    "clip": (),
}


def of_data(data: DataParams) -> dict[str, Any]:
    """Returns the params of `data` that an outcome depends on."""
    return data.model_dump(mode="json", exclude=SPEED)


def of_computation(training: TrainingParams) -> dict[str, Any]:
    """Returns the params of `training` that an outcome depends on."""
    return training.model_dump(mode="json", include=COMPUTATION)


def of_training(task: Task) -> tuple[Any, ...]:
    """Returns the params and stored inputs that the trained weights depend on."""
    # With several objectives, `select` only chooses an epoch of the Pareto front, which needs no new
    # training.
    method = task.method.model_dump(
        mode="json", exclude={"select"} if len(task.method.objectives) > 1 else None
    )
    return (
        task.params.seed,
        of_data(task.params.data),
        asdict(task.spec),
        task.weights(),
        method,
        of_computation(task.params.training),
        task.all_notes(),
        task.stored_index(),
    )


def of_search(params: Params, task: Task) -> tuple[Any, ...]:
    """Returns the params and stored inputs that trials of a search depend on, without the values it draws.

    A search therefore stays the same if the values of one of its trials become the params.
    """
    drawn = {params.search.epochs_key, *(dimension.key for dimension in params.search.space)}
    places = (*params.search.searchable, *INPUTS[params.search.stage.partition("@")[0]])
    content = leaves(params.model_dump(mode="json"))
    speed = {f"{place}.{knob}" for place in ("data", "guide.data", "clip.data") for knob in SPEED}
    read = {key for key in content if f"{key}.".startswith(tuple(f"{place}." for place in places))}
    fixed = {key: content[key] for key in sorted(read - drawn - speed)}
    how = params.search.model_dump(mode="json", exclude={"trials", "concurrency", "workers"})
    computation = {key: value for key, value in of_computation(params.training).items() if key != "workers"}
    return (fixed, how, computation, params.evaluate, task.stored_index())


# Code -------------------------------------------------------------------------------------------------------


def code_digest(*modules: str) -> str:
    """Returns the sha256 over the project's files that run when `modules` are used."""
    content = hashlib.sha256()
    for path in code_files(*modules):
        content.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return content.hexdigest()


def code_files(*modules: str) -> list[Path]:
    """Returns the sorted files of `modules` and of all modules of this project that they import in turn.

    Imports are read from the syntax tree, including those inside functions. Left out are imports under `if
    TYPE_CHECKING`, because they do not run, modules of `RECORDING`, and files without a statement.
    """
    found: set[str] = set()
    left = list(modules)
    while left:
        module = left.pop()
        if module not in found and not module.startswith(RECORDING):
            found.add(module)
            left.extend(_imports(module))
    paths = (_file(module) for module in found)
    return sorted(path for path in paths if path is not None and _has_statements(path))


@cache
def _imports(module: str) -> frozenset[str]:
    """Returns the project's modules that `module` imports (also inside functions), and its parent package."""
    found = {module.rpartition(".")[0]} - {""}
    path = _file(module)
    tree = ast.parse("" if path is None else path.read_text())
    found |= {node.value for node in ast.walk(tree) if _names_rules(node)}  # type: ignore[attr-defined]
    for node in _import_statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            # An imported name may be a module itself.
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in found if _file(name) is not None)


def _names_rules(node: Any) -> bool:
    """Returns True for a string that names a module of conversion rules: `convert` imports it on demand."""
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("pipelines.models.rules.")
    )


def _import_statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yields the import statements of a syntax tree, without those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (
            isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        ):
            yield from _import_statements(node)


@cache
def _file(module: str) -> Path | None:
    """Returns the file of a module or package, `None` if it is not one of this project."""
    place = ROOT.joinpath(*module.split("."))
    in_project = module.partition(".")[0] in PACKAGES
    return next(
        (path for path in (place.with_suffix(".py"), place / "__init__.py") if in_project and path.is_file()),
        None,
    )


@cache
def _has_statements(path: Path) -> bool:
    """Returns True if a file has a statement besides its docstring."""
    body = ast.parse(path.read_text()).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)
