"""What every stage does the same way: read its params, say what went wrong in one line, write its reports."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pipelines
from pipelines import models, tracking
from pipelines.bcos import ConversionError
from pipelines.data.loading.subsets import Subset
from pipelines.data.shards.manifest import Manifest, read_manifest
from pipelines.data.shards.publish import publish_explanations, publish_shards
from pipelines.data.shards.sample import DataError
from pipelines.data.shards.stored_explanations import INDEX
from pipelines.models import ModelError, ModelSpec, WeightsError
from pipelines.models.store import CONFIG, WEIGHTS
from pipelines.params import ModelParams, OptimiserParams, Params, ParamsError, load
from pipelines.storage import files
from pipelines.storage.errors import StorageError
from pipelines.storage.publish import publish
from pipelines.training import Job, Result, TrainingError, run_directory, train

REPORTS = Path("reports")
UNFINISHED = "execution.json"  # beside checkpoints at a URL: the key of the run that goes on with them
FOR_THE_USER = (
    ParamsError,
    DataError,
    ModelError,
    WeightsError,
    ConversionError,
    TrainingError,
    tracking.TrackingError,
    FileNotFoundError,
    StorageError,
)
COMPUTATION = {"workers", "precision", "accumulate", "channels_last", "compile"}  # params.training that change what is computed
# In pipelines; dvc.yaml names the same.
TRAINING_CODE = ("attribution", "bcos", "data", "losses.py", "methods", "metrics", "models", "training")


def shards_of(dataset: str) -> str:
    """The absolute root of a data set's shards."""
    return str(Path("data/shards", dataset).absolute())


def seen_by_all(params: Params) -> bool:
    """Whether the storage of the params is at a URL: workers may then be on other machines, and read what they need there."""
    return "://" in params.storage.root


def shards_for_all(params: Params) -> str:
    """The root of the run's shards that every worker sees."""
    shards = shards_of(params.dataset)
    return publish_shards(shards, params.storage.root) if seen_by_all(params) else shards


def model_for_all(params: Params, folder: Path) -> str:
    """The place of a model, in a folder here, that every worker sees."""
    if not seen_by_all(params):
        return str(folder)
    url = f"{params.storage.root.rstrip('/')}/models/{models.digest(folder)[:16]}"
    return publish(folder, url, (CONFIG, WEIGHTS))


def models_for_all(params: Params, folders: Mapping[str, str]) -> dict[str, str]:
    """`model_for_all` of each folder, by the same names."""
    return {name: model_for_all(params, Path(folder)) for name, folder in folders.items()}


def explanations_for_all(params: Params, root: str | None) -> str | None:
    """The root of stored explanations, in a folder here, that every worker sees."""
    return publish_explanations(root, params.storage.root) if root and seen_by_all(params) else root


@contextmanager
def stage() -> Iterator[Params]:
    """The params of a stage; what is the user's to mend ends it with one line instead of a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # tells each time where it found credentials
    try:
        yield load()
    except FOR_THE_USER as error:
        sys.exit(str(error))


def bring(source: str, out: Path) -> None:
    """Leaves the model at `source`, a folder, a file in one, or `models:/name@alias` in the registry, in the folder `out`."""
    if not source.startswith("models:/"):
        source = str(Path(source).parent if Path(source).is_file() else source)
    models.save(out, *tracking.load(source))


def spec_of(params: Params, manifest: Manifest, **more: Any) -> ModelSpec:
    """The spec of a model of this run's architecture for this run's data; raises `DataError` where that has no classes."""
    if not manifest.labelled:
        raise DataError(f"dataset: {params.dataset} has no labels: only students of a teacher learn from it (distill)")
    return ModelSpec(
        name=params.model.name,
        classes=tuple(manifest.classes),
        image_size=params.data.image_size,
        task=manifest.task,  # type: ignore[arg-type]
        mean=params.model.mean,
        std=params.model.std,
        options=params.model.options,
        **more,
    )


def student_spec(params: Params, manifest: Manifest, teacher: ModelSpec) -> ModelSpec:
    """The student of the params, for the classes of the data, or where that has no labels for those of the teacher."""
    student = params.distill.student
    return ModelSpec(
        name=student.name,
        classes=tuple(manifest.classes) if manifest.labelled else teacher.classes,
        image_size=params.data.image_size,
        kind=student.kind,
        task=manifest.task if manifest.labelled else teacher.task,  # type: ignore[arg-type]
        mean=student.mean,
        std=student.std,
        options=student.options,
        design=student.design(),
    )


def located(model: ModelParams) -> ModelParams:
    """`model` with a local weights file by its absolute path, as workers may run elsewhere, and its sha256."""
    if not Path(model.weights).is_file():
        return model
    digest = model.sha256 or files.file_digest(model.weights)
    return model.model_copy(update={"weights": os.path.abspath(model.weights), "sha256": digest})


@contextmanager
def stage_run(
    params: Params, name: str, *settings: Any, upstream: tuple[str | Path, ...] = (), context: str = "training"
) -> Iterator[tuple[tracking.StageRun, str]]:
    """The tracked run of a stage, and the folder where a killed stage goes on: with the same work, never with stale one.

    Args:
        params: of the run.
        name: of the stage.
        settings: the params that the outcome depends on; with the shards, the code and `upstream` they name the folder.
        upstream: models of earlier stages that the outcome depends on.
        context: what the data is for, as MLflow shows it.
    """
    shards = shards_of(params.dataset)
    manifest = read_manifest(shards)
    origin = (manifest.digest, code_digest(), *(models.digest(path) for path in upstream))
    directory = run_directory(params.storage.root, name, params.dataset, *settings, *origin)
    outlives = "://" in directory  # the journal is on this machine, and may be lost with it
    with tracking.stage_run(
        name,
        experiment=params.tracking.experiment,
        params=params.model_dump(mode="json"),
        directory=directory,
        inputs={"shards": shards, **{Path(path).name: str(path) for path in upstream}},
        key=files.read_json(f"{directory}/{UNFINISHED}") if outlives else None,
    ) as run:
        if outlives:
            files.write_json(f"{directory}/{UNFINISHED}", run.key)
        run.dataset(manifest.to_json(), name=params.dataset, context=context)
        yield run, directory
    if outlives:
        try:
            files.write_json(f"{directory}/{UNFINISHED}", None)
        except OSError as error:  # the stage is done
            print(
                f"{directory}/{UNFINISHED} stays: {error}; run again, the stage would go on with this MLflow run", file=sys.stderr
            )


@dataclass(frozen=True)
class Task:
    """What a training stage trains.

    Attributes:
        params: of the run; `data` and `dataset` are those that the stage reads.
        name: of the stage, and of its folders in `models` and `reports`.
        optim: the stage's own params.
        build: makes the method, in every worker.
        spec: of the trained model.
        upstream: models of earlier stages that `build` starts from.
        model: which weights are trained, where they are not those of `upstream`.
        subset: the training images to take, where it is not all of them; `models/<name>/subset.json` lists them.
        explanations: root of stored explanations of the training images.
        notes: file name -> what else it was trained on, as JSON; goes beside the model.
    """

    params: Params
    name: str
    optim: OptimiserParams
    build: Callable[[], Any]
    spec: ModelSpec
    upstream: tuple[Path, ...] = ()
    model: ModelParams | None = None
    subset: Subset | None = None
    explanations: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def all_notes(self) -> dict[str, Any]:
        """`notes`, and the subset."""
        return dict(self.notes) | ({} if self.subset is None else {"subset.json": self.subset.to_json()})

    def settings(self) -> tuple[Any, ...]:
        """The params that the outcome depends on."""
        index = None if self.explanations is None else Path(self.explanations, INDEX).read_text()
        start = None if self.model is None else located(self.model)
        # Of a Pareto front another point can be chosen without training again.
        chosen = self.optim.model_dump(mode="json", exclude={"select"} if len(self.optim.objectives) > 1 else None)
        computation = self.params.training.model_dump(include=COMPUTATION)
        return (self.params.seed, self.params.data, asdict(self.spec), start, chosen, computation, self.all_notes(), index)

    def job(self, directory: str, **more: Any) -> Job:
        """The job of the training loop, in `directory`; `more` are further arguments of `Job`."""
        params = self.params
        return Job(
            build=self.build,
            shards=shards_for_all(params),
            data=params.data,
            optim=self.optim,
            training=params.training,
            seed=params.seed,
            directory=directory,
            subset=None if self.subset is None else self.subset.numbers,
            explanations=explanations_for_all(params, self.explanations),
            **more,
        )


def train_stage(task: Task) -> None:
    """Trains the task and leaves the best epoch's model in `models/<name>`, its figures in `reports/<name>`."""
    name = task.name
    with stage_run(task.params, name, *task.settings(), upstream=task.upstream) as (run, directory):
        result = train(task.job(directory, on_epoch=run.epoch_logger(), report_key=run.key))
        save_best(task, result, Path("models", name))
        report(name, result, task.optim.objectives)
        for file, content in task.all_notes().items():
            files.write_json(Path("models", name, file), content)
            run.artifact(Path("models", name, file), "model")
        run.history(result.history)
        run.model(Path("models", name))


def save_best(task: Task, result: Result, out: Path) -> None:
    """Leaves the best epoch's model in the folder `out`."""
    module = task.build().module
    result.load_best(module)
    models.save(out, module, task.spec)


def report(name: str, result: Result, objectives: Sequence[str]) -> None:
    """Writes `reports/<name>/metrics.json` (of the best epoch) and `history.json` (all epochs, for plots).

    Of several objectives, `front.json` lists the epochs of their Pareto front, where their checkpoints are, and which was chosen.
    """
    best, folder = result.best, REPORTS / name
    files.write_json(folder / "metrics.json", {"epoch": best["epoch"], **best["metrics"]})
    files.write_json(folder / "history.json", [{"epoch": row["epoch"], **row["metrics"]} for row in result.history])
    if len(objectives) > 1:
        of = {row["epoch"]: {objective: row["metrics"][objective] for objective in objectives} for row in result.kept}
        steps = {row["epoch"]: f"{result.directory}/checkpoints/step-{row['step']:08d}" for row in result.kept}
        front = [{"epoch": epoch, **of[epoch], "checkpoint": steps[epoch], "chosen": epoch == best["epoch"]} for epoch in of]
        files.write_json(folder / "front.json", front)


def code_digest(names: Sequence[str] = TRAINING_CODE) -> str:
    """The sha256 of code in `pipelines`, by default of what training runs: no run goes on with another's checkpoints."""
    content = hashlib.sha256()
    for name in names:
        place = Path(pipelines.__file__).parent / name
        for path in sorted(place.rglob("*.py")) or [place]:
            content.update(path.read_bytes())
    return content.hexdigest()


def flat(nested: Mapping[str, Any]) -> dict[str, float]:
    """Nested figures as `a/b/c` -> value."""
    found: dict[str, float] = {}
    for key, value in nested.items():
        inner = flat(value) if isinstance(value, Mapping) else {"": value}
        found |= {f"{key}/{rest}".rstrip("/"): number for rest, number in inner.items()}
    return found
