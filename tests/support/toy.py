"""A tiny method and data, with all state that a resumed run must restore: dropout, BatchNorm, AdamW."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import nn

from pipelines.bcos import BcosBatchNorm
from pipelines.distributed import gather
from pipelines.params import DataParams, MethodParams, OptimiserParams, TrainingParams
from pipelines.training import Context, EpochRecord, Job, checkpoints, evaluate_split, train
from pipelines.training.loop import fit, set_up
from pipelines.training.step import compute_gradients

COUNT, CLASSES, SIDE = 48, 3, 4
ALL_RANKS = -1


def samples(count: int = COUNT) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images (N, 3, SIDE, SIDE) in [0, 1] and their labels (N,)."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(count) % CLASSES
    images = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    images[torch.arange(count), labels] += 0.3
    return images.clamp(0, 1), labels


def toy_batches(
    job: Job,
    split: str,
    *,
    context: Context | None = None,
    epoch: int = 0,
    start_batch: int = 0,
    count: int = COUNT,
    **_: Any,
) -> list[dict[str, Any]]:
    """Replaces `shard_batches`. Depends on seed, epoch and rank only; evaluation reads each sample once."""
    rank, world_size = (0, 1) if context is None else (context.rank, context.world_size)
    images, labels = samples(count)
    size = job.optim.batch_size
    if split == "train":
        order = torch.randperm(count, generator=torch.Generator().manual_seed(job.seed * 1000 + epoch))
        whole = order[: count // size * size].split(size)
        pieces = [piece[rank * size // world_size : (rank + 1) * size // world_size] for piece in whole][
            start_batch:
        ]
    else:
        cuts = (0, 40, count)[:world_size] + (count,) * world_size  # very uneven: a third rank gets no sample
        order = torch.arange(count)[cuts[rank] : cuts[rank + 1]]
        pieces = [piece for piece in order.split(job.training.largest_part(size)) if len(piece)]
    return [
        {"key": [f"{i:04d}" for i in piece], "image": images[piece], "label": labels[piece]}
        for piece in pieces
    ]


class Count(torchmetrics.Metric):
    """The number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        self.total += len(labels)

    def compute(self) -> torch.Tensor:
        return self.total


class ToyNetwork(nn.Module):
    """Registers its layers in another order than it uses them, so that DDP gets gradients out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, CLASSES)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(8 * SIDE * SIDE, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.dropout(self.norm(self.conv(images)).relu())
        return self.head(self.dropout(self.linear(features.flatten(1)).relu()))


class ToyMethod:
    """A small network, with an accident in the `at_step`-th step of the first process that reaches it."""

    fixed = ()
    fields = ()

    def __init__(self, accident: str = "", at_step: int = 0, marker: str = "", rank: int = 0) -> None:
        self.module = ToyNetwork()
        self.accident, self.at_step, self.marker, self.rank = accident, at_step, Path(marker), rank
        self.steps = 0

    def prepare(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the batch. In step `at_step`, adds the tensor `nan` or `poison`, or has the accident."""
        self.steps += 1
        made = {"image": batch["image"], "label": batch["label"]}
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.steps == self.at_step and self.rank in (rank, ALL_RANKS):
            if self.accident in ("nan", "poison"):
                made[self.accident] = torch.full((len(batch["label"]),), torch.nan)
            elif self.accident == "raise" and self.rank == ALL_RANKS:
                raise ConnectionError("accident on all ranks")
            elif self.accident and not self.marker.exists():
                self.happen()
        return made

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = model(batch["image"])
        loss = nn.functional.cross_entropy(logits, batch["label"])
        if "nan" in batch:
            loss = loss * batch["nan"].mean()
        if "poison" in batch:  # the loss is finite, its gradient is not
            weight = self.module.conv.weight
            loss = loss + (weight - weight.detach()).square().sum().sqrt()
        return {"loss": loss, "size": logits.square().mean()}

    def happen(self) -> None:
        """Leaves the marker, then has the accident."""
        self.marker.touch()
        if self.accident == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.accident == "kill driver":
            os.kill(int(os.environ["TOY_DRIVER"]), signal.SIGKILL)
            threading.Event().wait()  # until Ray ends this worker without a driver
        raise {"bug": ValueError, "raise": ConnectionError}[self.accident](f"accident at {self.at_step}")

    def metrics(self) -> torchmetrics.MetricCollection:
        """Metrics with sums, with a list state (calibration), with shared state (precision and recall)."""
        classification = torchmetrics.classification
        return torchmetrics.MetricCollection(
            {
                "accuracy": classification.MulticlassAccuracy(num_classes=CLASSES, average="micro"),
                "precision": classification.MulticlassPrecision(num_classes=CLASSES),
                "recall": classification.MulticlassRecall(num_classes=CLASSES),
                "calibration": classification.MulticlassCalibrationError(num_classes=CLASSES),
                "count": Count(),
            }
        )

    def update(self, metrics: torchmetrics.MetricCollection, model: nn.Module, batch: dict[str, Any]) -> None:
        metrics.update(model(batch["image"]).softmax(1), batch["label"])

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        decayed = [p for p in self.module.parameters() if p.ndim > 1]
        others = [p for p in self.module.parameters() if p.ndim <= 1]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def set_progress(self, epochs: float) -> None:
        self.module.dropout.p = 0.3 + 0.05 * int(epochs)

    def epoch_metrics(self) -> dict[str, float]:
        return {"dropout": self.module.dropout.p}


class SteadyMethod(ToyMethod):
    """A `ToyMethod` with constant dropout, so that it is compiled only once.

    Without a norm, the loss of a batch is the mean of the losses of its parts.
    """

    def __init__(self, *accident: Any, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__(*accident)
        self.module.dropout.p = dropout
        if not norm:
            self.module.norm = nn.Identity()

    def set_progress(self, epochs: float) -> None:
        pass


class BlockNetwork(nn.Module):
    """A network with a stage of two blocks, which have running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.dropout = nn.Dropout(0.0)  # not used, but `ToyMethod` sets its rate

        def block(norm: nn.Module) -> nn.Module:
            return Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm, nn.ReLU(), nn.Dropout(0.2)))

        self.stage = nn.Sequential(
            block(nn.BatchNorm2d(8)), block(BcosBatchNorm(8)), nn.Sequential(nn.ReLU())
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(self.stem(images)).mean((2, 3)))


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class BlockMethod(ToyMethod):
    """`ToyMethod` on `BlockNetwork`."""

    def __init__(self, *accident: Any) -> None:
        super().__init__(*accident)
        self.module = BlockNetwork()


def toy_job(directory: Path | str, method: Any = None, **overrides: Any) -> Job:
    """Returns a job of 3 epochs of 6 steps. `overrides` go to the params that have the key."""
    optim = {"epochs": 3, "batch_size": 8, "lr": 0.02, "weight_decay": 0.1, "clip": "agc", "clip_value": 0.1}
    training = {"workers": 0, "checkpoint_every": 2}
    own, others = {}, {}
    for name, value in overrides.items():
        if name in OptimiserParams.model_fields:
            optim[name] = value
        elif name == "select":
            own[name] = value
        elif name in TrainingParams.model_fields:
            training[name] = value
        else:
            others[name] = value
    return Job(
        build=method or ToyMethod,
        shards="",
        data=DataParams(image_size=SIDE),
        params=MethodParams(optim=OptimiserParams(**optim), **own),
        training=TrainingParams(**training),
        seed=3,
        directory=str(directory),
        batches=toy_batches,
        **others,
    )


def accident(
    kind: str,
    at_step: int,
    marker: Path | str = "",
    rank: int = 0,
    method: type[ToyMethod] = ToyMethod,
    **more: Any,
) -> partial[ToyMethod]:
    """Returns a `build` whose method has an accident in the `at_step`-th step of its process.

    With a marker, the accident happens only once.
    """
    return partial(method, kind, at_step, str(marker), rank, **more)


def weights(result: Any) -> dict[str, torch.Tensor]:
    """Returns the last weights of a finished run."""
    return checkpoints.load(result.directory, result.history[-1]["step"])["model"]


def identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Returns True if two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Returns the largest difference between two state dicts with the same keys."""
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def drawing_batches(job: Job, split: str, **place: Any) -> Any:
    """Returns `toy_batches` from a loader that draws random numbers when it starts and at each batch."""

    class Drawing(list):
        def __iter__(self) -> Any:
            torch.rand(3)
            for batch in super().__iter__():
                torch.rand(1)
                yield batch

    return Drawing(toy_batches(job, split, **place))


def evaluate_toy(context: Context, job: Job) -> dict[str, Any]:
    """Returns the metrics of an untrained network on the test split, and the keys that all ranks saw."""
    torch.manual_seed(1)
    method = ToyMethod()
    batches = toy_batches(job, "test", context=context)
    values = evaluate_split(method, method.module, batches, context)
    keys = gather([key for batch in batches for key in batch["key"]], context)
    return {"values": values, "keys": [key for part in keys for key in part]}


def fit_and_evaluate(context: Context, job: Job) -> dict[str, Any]:
    """Runs the job, then returns `evaluate_toy`."""
    fit(context, job)
    return evaluate_toy(context, job)


def gradients_of_epoch(context: Context, job: Job) -> dict[str, Any]:
    """Computes the gradients of an epoch without optimiser steps.

    Returns the mean gradient per image, the number of images of each step, and per rank the number of steps
    in which it has none.
    """
    run = set_up(context, job)
    run.objective.train()
    parameters, sums, images, idle = list(run.method.module.parameters()), [], [], 0
    for batch in job.batches(job, "train", context=context):
        run.optimiser.zero_grad()
        compute_gradients(run, batch)
        images.append(sum(gather(len(batch["key"]), context)))
        sums.append(images[-1] * torch.cat([parameter.grad.flatten() for parameter in parameters]))  # type: ignore[union-attr]
        idle += not batch["key"]
    return {"gradient": (sum(sums) / sum(images)).tolist(), "images": images, "idle": gather(idle, context)}  # type: ignore[union-attr]


def addresses_of_ray(context: Context, job: Job) -> tuple[str, str]:
    """Returns the address that Ray finds from this worker if there are two Rays, and the worker's own."""
    import ray
    from ray._private import services

    services.find_gcs_addresses = lambda: {"127.0.0.1:1", "127.0.0.1:2"}
    found = services.canonicalize_bootstrap_address_or_die(os.environ.get("RAY_API_SERVER_ADDRESS"))
    return found, ray.get_runtime_context().gcs_address


class Unlucky(SteadyMethod):
    """Fails once at each of the given steps."""

    def __init__(self, folder: str, steps: tuple[int, ...]) -> None:
        super().__init__()
        self.folder, self.at = Path(folder), steps

    def prepare(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        marker = self.folder / f"failed-at-{batch['step']}"
        if batch["step"] in self.at and not marker.exists():
            marker.touch()
            raise ConnectionError(f"accident at {batch['step']}")
        return super().prepare(batch)


def call_each(context: Context, arguments: dict[Callable[..., Any], Any]) -> list[Any]:
    """Returns the result of each function for its argument, one after the other on the same workers."""
    return [function(context, argument) for function, argument in arguments.items()]


def interrupt_and_evaluate(context: Context, whole: Job, broken: Job, healed: Job) -> dict[str, Any]:
    """Returns `evaluate_toy`, and whether a run that fails and resumes ends like one that does not.

    The failure is an error, which kills no process.
    """
    fit(context, whole)
    try:
        fit(context, broken)
    except ConnectionError:
        fit(context, healed)
    same = identical(*(checkpoints.load(job.directory, 12)["model"] for job in (whole, healed)))
    return {"same": same, **evaluate_toy(context, whole)}


class LoggedMethod(ToyMethod):
    """Logs each step to a file, and may kill its driver."""

    def __init__(self, log: str, name: str, *accident: Any) -> None:
        super().__init__(*accident, rank=ALL_RANKS)
        self.log, self.name = log, name

    def prepare(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        with open(self.log, "a") as file:
            file.write(f"{self.name} {batch['step']}\n")
        return super().prepare(batch)


def toy_trial(
    folder: str,
    kill_at: int,
    values: dict[str, Any],
    directory: str,
    on_epoch: Callable[[EpochRecord], None],
    sharing: int,
) -> dict[str, float]:
    """A trial of a search, which trains with `values`. The `kill_at`-th step kills the driver, once."""
    log = Path(folder, "steps")
    left = kill_at - len(log.read_text().splitlines()) if log.exists() else kill_at
    build = partial(LoggedMethod, str(log), Path(directory).name, "kill driver", left, f"{folder}/marker")
    values = {key.rpartition(".")[2]: value for key, value in values.items()}
    if values["lr"] > 0.1:
        raise ValueError("too fast")
    result = train(toy_job(directory, build, on_epoch=on_epoch, report_key=directory, **values), sharing)
    return {"val/accuracy": result.best["metrics"]["val/accuracy"], "val/gridpg": values["clip_value"]}


def compile_and_accumulate(context: Context, jobs: dict[str, Job]) -> dict[str, Any]:
    """Compares runs of `jobs`: compiled, with accumulated gradients, resumed and plain.

    Returns whether a compiled run resumes bit for bit, and the largest differences of the weights of the
    compiled and of the accumulating run from those of the plain run.
    """
    for name in ("plain", "compiled", "parts", "whole"):
        fit(context, jobs[name])
    with contextlib.suppress(ConnectionError):
        fit(context, jobs["broken"])
    fit(context, jobs["healed"])
    last = {name: checkpoints.load(job.directory, 18)["model"] for name, job in jobs.items()}
    return {
        "resumed": identical(last["whole"], last["healed"]),
        "compiled": difference(last["plain"], last["compiled"]),
        "parts": difference(last["plain"], last["parts"]),
    }
