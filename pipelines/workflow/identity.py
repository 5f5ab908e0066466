"""What an outcome depends on, said once: code, params, models and data.

A run's directory is named by a hash of these (`storage.paths.run_directory`), so that a stage goes on with its own checkpoints
and never with stale ones. `dvc.yaml` lists the same code and params; tests/workflow/test_identity.py holds the two
together.
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
RECORDING = (
    "pipelines.tracking",
    "pipelines.progress",
)  # code that records and shows, and decides no outcome
TRAINING = (
    "pipelines.workflow.tasks",
    "pipelines.training",
)  # modules that train a task, with all they import

COMPUTATION = {
    "workers",
    "precision",
    "accumulate",
    "channels_last",
    "compile",
}  # params.training that change what is computed
SPEED = {"loader_workers", "verify"}  # params.data that change the speed alone

INPUTS: dict[str, tuple[str, ...]] = {  # params of a searched stage's training that are not searched
    "bcosify": ("model",),
    "distill": ("distill.shots", "distill.shots_seed", "distill.frozen"),
    "guide": (),
    "clip": (),
}


def of_data(data: DataParams) -> dict[str, Any]:
    """The params of data that an outcome depends on."""
    return data.model_dump(mode="json", exclude=SPEED)


def of_computation(training: TrainingParams) -> dict[str, Any]:
    """The params of the training loop that an outcome depends on."""
    return training.model_dump(mode="json", include=COMPUTATION)


def of_training(task: Task) -> tuple[Any, ...]:
    """The params and stored inputs that the weights of a training depend on."""
    # Of a Pareto front another epoch can be chosen without training again.
    optim = task.optim.model_dump(mode="json", exclude={"select"} if len(task.optim.objectives) > 1 else None)
    return (
        task.params.seed,
        of_data(task.params.data),
        asdict(task.spec),
        task.weights(),
        optim,
        of_computation(task.params.training),
        task.all_notes(),
        task.stored_index(),
    )


def of_search(params: Params, task: Task) -> tuple[Any, ...]:
    """What the trials of a search depend on besides their values.

    The values that are drawn are no part of it: the search stays the same if one of its points becomes the params.
    """
    drawn = {f"{params.search.section}.epochs", *(dimension.key for dimension in params.search.space)}
    places = (*params.search.searchable, *INPUTS[params.search.stage.partition("@")[0]])
    content = leaves(params.model_dump(mode="json"))
    speed = {f"{place}.{knob}" for place in ("data", "guide.data", "clip.data") for knob in SPEED}
    read = {key for key in content if f"{key}.".startswith(tuple(f"{place}." for place in places))}
    fixed = {key: content[key] for key in sorted(read - drawn - speed)}
    how = params.search.model_dump(mode="json", exclude={"trials", "concurrency", "workers"})
    computation = {key: value for key, value in of_computation(params.training).items() if key != "workers"}
    return (fixed, how, computation, params.evaluate, task.stored_index())


# Code -----------------------------------------------------------------------------------------------------------------


def code_digest(*modules: str) -> str:
    """The sha256 over the project's files that run when `modules` are used."""
    content = hashlib.sha256()
    for path in code_files(*modules):
        content.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return content.hexdigest()


def code_files(*modules: str) -> list[Path]:
    """The project's files that run when `modules` are used: their own and those of their transitive imports, sorted.

    Imports are read from the syntax tree, those inside functions too. Imports under `if TYPE_CHECKING` do not run, and those of
    `RECORDING` decide nothing. Files without a statement are left out.
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
    """Modules of this project that importing `module` and calling its functions imports, the packages around it among them."""
    found = {module.rpartition(".")[0]} - {""}
    path = _file(module)
    tree = ast.parse("" if path is None else path.read_text())
    found |= {node.value for node in ast.walk(tree) if _names_rules(node)}  # type: ignore[attr-defined]
    for node in _import_statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            found |= {
                str(node.module),
                *(f"{node.module}.{alias.name}" for alias in node.names),
            }  # a name may be a module
    return frozenset(name for name in found if _file(name) is not None)


def _names_rules(node: Any) -> bool:
    """Whether a node is the name of a module with conversion rules, as a string: `convert` imports it when it needs it."""
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("pipelines.models.rules.")
    )


def _import_statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a syntax tree, without those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (
            isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        ):
            yield from _import_statements(node)


@cache
def _file(module: str) -> Path | None:
    """The file of a module or package of this project, None if it is not one."""
    place = ROOT.joinpath(*module.split("."))
    in_project = module.partition(".")[0] in PACKAGES
    return next(
        (path for path in (place.with_suffix(".py"), place / "__init__.py") if in_project and path.is_file()),
        None,
    )


@cache
def _has_statements(path: Path) -> bool:
    """Whether a file has a statement besides its docstring."""
    body = ast.parse(path.read_text()).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)
