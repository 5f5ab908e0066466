"""Params of a network, and of what does not depend on the method that trains it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.params.base import NonNegativeFloat, PositiveFloat, Sha256, Strict


class NetworkParams(Strict):
    """Which network, and which weights to start from."""

    name: str  # `resnet20` (CIFAR), a torchvision name, a timm name, or `torchvision:name`, `timm:name`, `open_clip:name`
    weights: str = "none"  # `none`, a library tag such as IMAGENET1K_V2, or a local file or URL
    sha256: Sha256 | None = None  # of the file that `weights` names
    options: dict[str, Any] = {}  # further keyword arguments of the architecture's own constructor


class ModelParams(NetworkParams):
    """A network of images, and how these are normalised."""

    mean: tuple[float, float, float] | None = (
        None  # of RGB; none: the weights' own, ImageNet's where these say nothing
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None  # likewise


class StorageParams(Strict):
    """Where training leaves what must survive it, and finds what its workers read."""

    root: Annotated[str, Field(min_length=1)] = "runs"  # folder or fsspec URL


class TrainingParams(Strict):
    """The one loop and its launch: what does not depend on the method."""

    workers: Annotated[int, Field(ge=0)] | tuple[PositiveInt, PositiveInt] = (
        1  # 0: this process; N; [MIN, MAX]: elastic
    )
    gpus_per_worker: NonNegativeFloat = 0.0
    cpus_per_worker: PositiveFloat = (
        1.0  # its loader's processes included; at least one for each and one for itself
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: PositiveInt = (
        1  # parts of a worker's batch whose gradients make one step; more if workers are missing
    )
    channels_last: bool = True  # memory format of images and convolutions; compiled they have it anyway
    compile: bool = False  # the objective by torch.compile
    checkpoint_activations: bool = (
        False  # blocks keep their input alone and compute the rest again in the backward pass
    )
    checkpoint_every: PositiveInt = 100  # steps
    keep_last: PositiveInt = 2  # checkpoints, beside the best one
    max_failures: Annotated[int, Field(ge=-1)] = (
        3  # restarts of the worker group between two checkpoints; -1: without end
    )
    resize_every: NonNegativeFloat = 60.0  # seconds after which elastic workers look for nodes that came
    log_every: PositiveInt = 20  # steps
    resume: str | None = (
        None  # directory of a stage's run whose code or params were others: its checkpoints are gone on with
    )

    @property
    def most_workers(self) -> int:
        """How many workers there may be, this process counted as one."""
        return max(1, self.workers) if isinstance(self.workers, int) else self.workers[1]

    @property
    def least_workers(self) -> int:
        """How few workers there may be, this process counted as one."""
        return max(1, self.workers) if isinstance(self.workers, int) else self.workers[0]

    def largest_part(self, batch_size: int) -> int:
        """Images that a worker takes at once of a batch of `batch_size` over all workers, when all workers are there.

        It bounds a worker's memory: with fewer workers, each takes more parts, none larger.
        """
        return math.ceil(math.ceil(batch_size / self.most_workers) / self.accumulate)

    def with_loader(self, processes: int) -> TrainingParams:
        """These params with CPUs for a worker that has so many loader processes: one for each, and one for itself."""
        needed = 1.0 + processes if processes else 0.0
        return self.model_copy(update={"cpus_per_worker": max(self.cpus_per_worker, needed)})

    @model_validator(mode="after")
    def _least_and_most(self) -> TrainingParams:
        if not isinstance(self.workers, int) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers: the least ({self.workers[0]}) is above the most ({self.workers[1]})")
        return self

    @model_validator(mode="after")
    def _compiled_or_checkpointed(self) -> TrainingParams:
        if self.compile and self.checkpoint_activations:
            raise ValueError(
                "compile and checkpoint_activations: choose one, the compiler decides itself what is kept"
            )
        return self


class OptimiserParams(Strict):
    """Optimiser, learning-rate schedule and clipping of one training run."""

    epochs: Annotated[int, Field(ge=0)]
    batch_size: PositiveInt  # effective: over all workers
    optimiser: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Literal["none", "agc", "norm"] = "none"
    clip_value: PositiveFloat = 0.01
    mixup: NonNegativeFloat = 0.0  # alpha of the Beta distribution of the mixing share; 0: no mixing
    select: str = "val/accuracy"  # the metric whose best epoch is kept
    patience: PositiveInt | None = None  # epochs without a better `select` before stopping
    validate_every: PositiveInt = 1  # epochs; the last one is validated in any case

    @property
    def settled(self) -> int:
        """Warm-up epochs (while B is scheduled); earlier epochs are never selected as best."""
        return 0

    @property
    def objectives(self) -> tuple[str, ...]:
        """Metrics by which epochs are kept: the best epoch of one metric, the Pareto front of several."""
        return (self.select,)

    @property
    def floors(self) -> dict[str, float]:
        """Metric -> floor; training stops below a floor, and such an epoch is not selected."""
        return {}
