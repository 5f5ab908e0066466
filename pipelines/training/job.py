"""What a training run is given (`Job`) and what it leaves (`Result`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

from torch import nn

from pipelines.data.loading.loader import loader
from pipelines.distributed import Context
from pipelines.errors import UserError
from pipelines.metrics import higher_is_better
from pipelines.params import DataParams, OptimiserParams, TrainingParams
from pipelines.training import checkpoints, pareto

if TYPE_CHECKING:
    from pipelines.methods.method import Method
    from pipelines.models import ModelSpec


class TrainingError(UserError, RuntimeError):
    """Training cannot go on and would fail the same way again: one line that names the cause and what is kept."""


class EpochRecord(TypedDict):
    """One line of a run's history. `epoch` counts finished epochs: 1 after the first; 0 is the untrained model."""

    epoch: int
    step: int  # optimiser steps so far
    metrics: dict[
        str, float
    ]  # train/<loss>, train/lr, train/images_per_second, train/skipped, train/<of method>, val/<metric>


@runtime_checkable
class Batches(Protocol):
    """What a loader gives: an iterable of batches (dicts) that knows its length."""

    def __iter__(self) -> Any: ...
    def __len__(self) -> int: ...


def shard_batches(
    job: Job,
    split: str,
    *,
    context: Context | None = None,
    epoch: int = 0,
    start_batch: int = 0,
    earlier: Sequence[tuple[int, int]] = (),
    fields: Sequence[str] = (),
) -> Batches:
    """The batches of one rank, read from `job.shards`; `train` is shuffled and augmented, any other split is not.

    Batches of other splits are as large as the largest part of a batch that training takes at once.

    Args:
        job: the run.
        split: its name in the manifest.
        context: rank, number of workers, and the device for images; None: one worker on the CPU.
        epoch: counted from 0.
        start_batch: counted from the epoch's beginning, batches of `earlier` included.
        earlier: (world size, batches), taken with other numbers of workers.
        fields: that the method reads beside images and labels.
    """
    context = context or Context()
    train = split == "train"
    return loader(
        job.shards,
        split,
        job.data,
        job.optim.batch_size if train else job.training.largest_part(job.optim.batch_size),
        context=context,
        train=train,
        seed=job.seed,
        epoch=epoch,
        start_batch=start_batch - sum(batches for _, batches in earlier),
        earlier=earlier,
        subset=job.subset if train else None,
        explanations=job.explanations if train else None,
        fields=fields,
    )


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to train, picklable; paths are absolute.

    Attributes:
        build: makes the method: a module-level function, or a `functools.partial` of one.
        shards: root of the shards (a path or any fsspec URL).
        directory: where checkpoints and history live, see `run_directory`.
        on_epoch: called on rank 0 with each epoch's record, in order, once its checkpoint is written. What it raises
            is printed and never stops training; the record is offered again after the next epoch and by the next
            `train`, until the call succeeds.
        report_key: names where `on_epoch` reports to (an MLflow run's id): a new key gets the whole history again.
        batches: makes the batches of a split, called as `shard_batches` is.
        subset: numbers of the training samples to read, see `loader`; None: all samples.
        explanations: root of stored explanations of the training samples, which then come with them.
        owner: names the driver under whose lease the run writes, see `storage.lease`; `train` sets it.
        spec: of the model, where it is one of this project: then images of the data's size are passed through it before training.
    """

    build: Callable[[], Method]
    shards: str
    data: DataParams
    optim: OptimiserParams
    training: TrainingParams
    seed: int
    directory: str
    on_epoch: Callable[[EpochRecord], None] | None = None
    report_key: str = ""
    batches: Callable[..., Batches] = shard_batches
    subset: tuple[int, ...] | None = None
    explanations: str | None = None
    owner: str = ""
    spec: ModelSpec | None = None


@dataclass(frozen=True)
class Result:
    """A finished run: its history, and its weights on demand."""

    directory: str
    history: list[EpochRecord]
    best: EpochRecord
    """The record of the epoch that `optim.select` prefers."""
    kept: list[EpochRecord]
    """Those whose checkpoints were kept, the best among them: where there are several objectives their Pareto front."""

    def load_best(self, module: nn.Module) -> None:
        """Loads the best epoch's weights into `module`; every key must match."""
        module.load_state_dict(checkpoints.load(self.directory, self.best["step"])["model"])

    def load_last(self, module: nn.Module) -> None:
        """Loads the last epoch's weights into `module`; every key must match."""
        module.load_state_dict(checkpoints.load(self.directory, self.history[-1]["step"])["model"])


Directions = Mapping[str, bool | None]  # metric -> whether the higher is the better; None if neither is


def directions(method: Method) -> dict[str, bool | None]:
    """The directions of all figures by which an epoch of `method` may be asked to be selected.

    They come from the evaluation metrics (torchmetrics' `higher_is_better`); the method's own losses get better as they fall.
    """
    found: dict[str, bool | None] = {}
    for name, metric in method.metrics().items():
        figures: Directions = getattr(metric, "figures", {name: metric.higher_is_better})
        found |= {f"val/{figure}": direction for figure, direction in figures.items()}
    return found | {f"train/{name}": False for name in getattr(method, "losses", ("loss",))}


def best_record(
    history: list[EpochRecord], optim: OptimiserParams, known: Directions | None = None
) -> EpochRecord:
    """The one of `kept_records` with the best `select`, the first of equals; the knee of the front if `select` is `knee`.

    Raises:
        TrainingError: see `check_objectives`.
    """
    known = _by_name(history) if known is None else known
    kept = kept_records(history, optim, known)
    if len(kept) == 1:
        return kept[0]
    if optim.select == "knee":
        return kept[pareto.knee([_point(record, optim.objectives, known) for record in kept])]
    name = next(
        (name for name in optim.objectives if name in (optim.select, f"val/{optim.select}")), optim.select
    )
    return max(kept, key=lambda record: _point(record, (name,), known))


def kept_records(
    history: list[EpochRecord], optim: OptimiserParams, known: Directions | None = None
) -> list[EpochRecord]:
    """The records whose checkpoints are worth keeping: the best by `optim.objectives`, the Pareto front if there are several.

    As soon as one epoch was validated, only such epochs count. Epochs before `optim.settled` (a scheduled B is not yet what it
    shall be) or below a floor count only as long as there are no others. By a metric that an epoch has not measured, this epoch
    is worse than all others.

    Args:
        history: of the run.
        optim: what to select by.
        known: the directions of the run's figures; None: those that `higher_is_better` knows by their names.

    Raises:
        TrainingError: see `check_objectives`.
    """
    validated = [record for record in history if _is_validated(record)]
    if not validated:
        return history[-1:]
    known = _by_name(history) if known is None else known
    check_objectives(optim, known)
    wanted = [
        record for record in validated if record["epoch"] >= optim.settled and not _below_floor(record, optim)
    ]
    candidates = wanted or validated
    points = [_point(record, optim.objectives, known) for record in candidates]
    if len(optim.objectives) == 1:
        return [max(zip(candidates, points, strict=True), key=lambda pair: pair[1])[0]]
    return [candidates[index] for index in pareto.front(points)]


def check_objectives(optim: OptimiserParams, known: Directions) -> None:
    """Raises `TrainingError` if an objective is none of the `known` figures, or has no direction."""
    names = ", ".join(name for name, direction in known.items() if direction is not None)
    for objective in optim.objectives:
        if objective not in known:
            raise TrainingError(f"select: no metric {objective!r}; there are {names}")
        if known[objective] is None:
            raise TrainingError(
                f"select: it is not known whether {objective!r} should rise or fall; choose one of {names}"
            )


def check_measured(history: list[EpochRecord], optim: OptimiserParams) -> None:
    """Raises `TrainingError` if no validated epoch has measured an objective: then none is the best."""
    validated = [record["metrics"] for record in history if _is_validated(record)]
    for objective in optim.objectives:
        if validated and not any(objective in metrics for metrics in validated):
            raise TrainingError(
                f"select: {objective!r} was measured in no epoch, because no image gave a case of it"
            )


def _is_validated(record: EpochRecord) -> bool:
    return any(name.startswith("val/") for name in record["metrics"])


def _by_name(history: list[EpochRecord]) -> Directions:
    """The directions of the figures in `history`, as far as their names are known."""
    return {name: higher_is_better(name) for record in history for name in record["metrics"]}


def _point(record: EpochRecord, names: Sequence[str], known: Directions) -> tuple[float, ...]:
    """The record's metrics of these names, turned so that the higher is the better; -inf if not measured."""
    values = ((record["metrics"].get(name, math.nan), known[name]) for name in names)
    return tuple(-math.inf if math.isnan(value) else value if higher else -value for value, higher in values)


def _below_floor(record: EpochRecord, optim: OptimiserParams) -> bool:
    return any(record["metrics"].get(name, math.inf) < floor for name, floor in optim.floors.items())


def is_finished(history: list[EpochRecord], optim: OptimiserParams, known: Directions | None = None) -> bool:
    """Whether a run with this history has nothing left to train: all epochs done, its patience at an end, or below a floor."""
    if not history:
        return False
    if history[-1]["epoch"] >= optim.epochs or _below_floor(history[-1], optim):
        return True
    best = best_record(history, optim, known)["epoch"]
    return (
        optim.patience is not None and best >= optim.settled and history[-1]["epoch"] - best >= optim.patience
    )
