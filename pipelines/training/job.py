"""The inputs of a training run (`Job`), its outcome (`Result`), and the selection of its best epochs."""

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
from pipelines.params import DataParams, MethodParams, OptimiserParams, TrainingParams
from pipelines.training import checkpoints, pareto

if TYPE_CHECKING:
    from pipelines.methods.method import Method
    from pipelines.models import ModelSpec


class TrainingError(UserError, RuntimeError):
    """Training cannot go on and would fail again. The message, one line, says why and what is kept."""


class EpochRecord(TypedDict):
    """An epoch in a run's history."""

    epoch: int  # epochs finished: 1 after the first; 0 is the untrained model
    step: int  # optimiser steps so far
    # train/<loss>, train/lr, train/images_per_second, train/skipped, train/<one of Method.epoch_metrics>,
    # val/<metric>
    metrics: dict[str, float]


@runtime_checkable
class Batches(Protocol):
    """An iterable of batches (dicts) with a length, as `loader` returns it."""

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
    """Returns the batches of one rank from `job.shards`; only `train` is shuffled and augmented.

    A batch of another split has at most as many images as the largest part of a batch that a worker trains on
    at once.

    Args:
        job: the run.
        split: name of the split in the manifest.
        context: rank, number of workers, and the device for images; `None` for one worker on the CPU.
        epoch: counted from 0.
        start_batch: first batch to read, counted from the beginning of the epoch, batches in `earlier`
            included.
        earlier: (world size, batches per rank) for each part of the epoch that other numbers of workers have
            read.
        fields: the fields to read besides images and labels.
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
    """Everything that a worker needs to train. Picklable; paths are absolute.

    Attributes:
        build: builds the method. A module-level function, or a `functools.partial` of one.
        shards: root of the shards, a path or any fsspec URL.
        data: how samples are read and transformed.
        params: of the method: its optimiser, and the selection of epochs.
        training: workers, precision, compilation, checkpoints.
        seed: seeds weights, data order and augmentation.
        directory: where checkpoints and history are stored, see `run_directory`.
        on_epoch: called on rank 0 with the record of each epoch, in order, once its checkpoint is written. An
            exception is printed and does not stop training. The record is then passed again after the next
            epoch and in the next `train`, until the call succeeds.
        report_key: the target of `on_epoch`, such as the id of an MLflow run. A new key gets the whole
            history again.
        batches: returns the batches of a split, with the arguments of `shard_batches`.
        subset: numbers of the training samples to read, see `loader`; `None` for all samples.
        explanations: root of stored explanations, which are read with the training samples; `None` for none.
        owner: the driver under whose lease the run writes, see `storage.lease`. `train` sets it.
        spec: the model's spec. If it is set, images of the data's size pass through the model before
            training.
    """

    build: Callable[[], Method]
    shards: str
    data: DataParams
    params: MethodParams
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

    @property
    def optim(self) -> OptimiserParams:
        """Optimiser and schedule."""
        return self.params.optim


@dataclass(frozen=True)
class Result:
    """A finished run, with its history and access to its weights."""

    directory: str
    history: list[EpochRecord]
    best: EpochRecord
    """The record of the epoch that `params.select` prefers."""
    kept: list[EpochRecord]
    (
        "Those whose checkpoints were kept, the best among them: "
        "where there are several objectives their Pareto front."
    )

    def load_best(self, module: nn.Module) -> None:
        """Loads the best epoch's weights into `module`; every key must match."""
        module.load_state_dict(checkpoints.load(self.directory, self.best["step"])["model"])

    def load_last(self, module: nn.Module) -> None:
        """Loads the last epoch's weights into `module`; every key must match."""
        module.load_state_dict(checkpoints.load(self.directory, self.history[-1]["step"])["model"])


Directions = Mapping[str, bool | None]  # metric -> True if higher is better, False if lower; None if neither


def directions(method: Method) -> dict[str, bool | None]:
    """Returns the directions of all figures by which epochs of `method` can be selected.

    Directions of evaluation metrics are torchmetrics' `higher_is_better`; the method's losses are better when
    lower.
    """
    found: dict[str, bool | None] = {}
    for name, metric in method.metrics().items():
        figures: Directions = getattr(metric, "figures", {name: metric.higher_is_better})
        found |= {f"val/{figure}": direction for figure, direction in figures.items()}
    return found | {f"train/{name}": False for name in getattr(method, "losses", ("loss",))}


def best_record(
    history: list[EpochRecord], params: MethodParams, known: Directions | None = None
) -> EpochRecord:
    """Returns the record in `kept_records` with the best `params.select`, the first of equals.

    If `params.select` is "knee", it is the knee of the Pareto front, see `pareto.knee`.

    Raises:
        TrainingError: see `check_objectives`.
    """
    known = _by_name(history) if known is None else known
    kept = kept_records(history, params, known)
    if len(kept) == 1:
        return kept[0]
    if params.select == "knee":
        return kept[pareto.knee([_point(record, params.objectives, known) for record in kept])]
    name = next(
        (name for name in params.objectives if name in (params.select, f"val/{params.select}")), params.select
    )
    return max(kept, key=lambda record: _point(record, (name,), known))


def kept_records(
    history: list[EpochRecord], params: MethodParams, known: Directions | None = None
) -> list[EpochRecord]:
    """Returns the records to keep: the best by one objective, or the Pareto front of several.

    Only validated epochs count; without any, the last record is returned. Epochs before `params.settled`
    (while B follows its schedule) and epochs below a floor count only if there are no others. An epoch that
    has not measured an objective is worse in it than all that have.

    Args:
        history: the run's history.
        params: has the objectives, floors, and the number of warm-up epochs.
        known: directions of the run's figures; `None` for those that `higher_is_better` knows by name.

    Raises:
        TrainingError: see `check_objectives`.
    """
    validated = [record for record in history if _is_validated(record)]
    if not validated:
        return history[-1:]
    known = _by_name(history) if known is None else known
    check_objectives(params, known)
    wanted = [
        record
        for record in validated
        if record["epoch"] >= params.settled and not _below_floor(record, params)
    ]
    candidates = wanted or validated
    points = [_point(record, params.objectives, known) for record in candidates]
    if len(params.objectives) == 1:
        return [max(zip(candidates, points, strict=True), key=lambda pair: pair[1])[0]]
    return [candidates[index] for index in pareto.front(points)]


def check_objectives(params: MethodParams, known: Directions) -> None:
    """Raises `TrainingError` if an objective is not a known figure or has no direction."""
    names = ", ".join(name for name, direction in known.items() if direction is not None)
    for objective in params.objectives:
        if objective not in known:
            raise TrainingError(f"select: no metric {objective!r}; there are {names}")
        if known[objective] is None:
            raise TrainingError(
                f"select: it is not known whether {objective!r} should rise or fall; choose one of {names}"
            )


def check_measured(history: list[EpochRecord], params: MethodParams) -> None:
    """Raises `TrainingError` if no validated epoch has measured an objective, so that none is the best."""
    validated = [record["metrics"] for record in history if _is_validated(record)]
    for objective in params.objectives:
        if validated and not any(objective in metrics for metrics in validated):
            raise TrainingError(
                f"select: {objective!r} was measured in no epoch, because no image gave a case of it"
            )


def _is_validated(record: EpochRecord) -> bool:
    return any(name.startswith("val/") for name in record["metrics"])


def _by_name(history: list[EpochRecord]) -> Directions:
    """Returns the directions of the figures in `history`; `None` for names that have no known direction."""
    return {name: higher_is_better(name) for record in history for name in record["metrics"]}


def _point(record: EpochRecord, names: Sequence[str], known: Directions) -> tuple[float, ...]:
    """Returns the metrics `names`, negated if lower is better; -inf for those that were not measured."""
    values = ((record["metrics"].get(name, math.nan), known[name]) for name in names)
    return tuple(-math.inf if math.isnan(value) else value if higher else -value for value, higher in values)


def _below_floor(record: EpochRecord, params: MethodParams) -> bool:
    return any(record["metrics"].get(name, math.inf) < floor for name, floor in params.floors.items())


def is_finished(history: list[EpochRecord], params: MethodParams, known: Directions | None = None) -> bool:
    """Returns True if a run with this history has nothing left to train.

    That is so after all epochs, if `patience` epochs brought no better one, or once the last epoch is below a
    floor.
    """
    if not history:
        return False
    if history[-1]["epoch"] >= params.optim.epochs or _below_floor(history[-1], params):
        return True
    best = best_record(history, params, known)["epoch"]
    return (
        params.optim.patience is not None
        and best >= params.settled
        and history[-1]["epoch"] - best >= params.optim.patience
    )
