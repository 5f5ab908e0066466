"""Params of a network, of its optimiser, and of the training loop."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.params.base import Count, NonNegativeFloat, PositiveFloat, Sha256, Strict


class NetworkParams(Strict):
    """A network, and the weights that it starts from."""

    name: str
    """Architecture: a CIFAR ResNet such as resnet20, or a name of torchvision or timm. `torchvision:NAME`,
    `timm:NAME` and `open_clip:NAME` say which library; `open_clip:FILE.json` reads a config in
    open_clip's format."""
    weights: str = "none"
    """Initial weights: none (random), a tag of the library such as IMAGENET1K_V2, or a file or URL."""
    sha256: Sha256 | None = None
    """Checksum of the weights file."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the architecture's constructor."""


class ModelParams(NetworkParams):
    """A network for images, with the normalisation of its input."""

    mean: tuple[float, float, float] | None = None
    """Mean of the RGB channels in [0, 1]; null: that of the weights. If they have none, it is ImageNet's."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation of the RGB channels; null: as for the mean."""


class OptimiserParams(Strict):
    """Optimiser, learning-rate schedule, gradient clipping and length of one training run."""

    epochs: Count
    """Passes over the training split; 0 keeps the initial weights."""
    batch_size: PositiveInt
    """Images per optimiser step, over all workers."""
    optimiser: Literal["adam", "adamw", "sgd"] = "adamw"
    """Optimiser."""
    lr: PositiveFloat
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of parameters with two or more dimensions. Biases and norms have none."""
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    """Learning-rate schedule."""
    warmup_steps: Count = 0
    """Steps of linear warm-up. With onecycle, the steps in which the rate rises; 0: 30 % of all steps."""
    clip: Literal["none", "agc", "norm"] = "none"
    """Gradient clipping: none, adaptive for each unit, or by the global norm."""
    clip_value: PositiveFloat = 0.01
    """Largest ratio of gradient norm to weight norm (agc), or largest gradient norm (norm)."""
    patience: PositiveInt | None = None
    """Epochs without a better `select` after which training stops; null: none."""
    validate_every: PositiveInt = 1
    """Epochs between validations. The last epoch is always validated."""


class MethodParams(Strict):
    """Params that every method of training has: its optimiser, and which epoch is kept."""

    select: str = "val/accuracy"
    """Metric that decides which epoch is kept."""
    optim: OptimiserParams
    """Optimiser, schedule and length of training."""

    @property
    def settled(self) -> int:
        """Warm-up epochs (while B is scheduled); earlier epochs are never selected as best."""
        return 0

    @property
    def objectives(self) -> tuple[str, ...]:
        """Metrics that decide which epochs are kept: the best epoch of one, the Pareto front of several."""
        return (self.select,)

    @property
    def floors(self) -> dict[str, float]:
        """Metric -> floor. Training stops below a floor, and such an epoch is not selected."""
        return {}


class TrainingParams(Strict):
    """The training loop and its workers, the same for all stages that train."""

    workers: Count | tuple[PositiveInt, PositiveInt] = 1
    """Number of Ray workers, or [MIN, MAX] if it is elastic; 0: training runs in the stage's own process."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs that each Ray worker reserves."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that each Ray worker reserves. With loader processes, it reserves at least one for each of them
    and one for itself."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Data type of autocast; weights stay float32."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimiser step and worker. If elastic workers are missing, the others take more of
    them. Validation batches have the size of a micro-batch."""
    channels_last: bool = True
    """Images and convolutions use the memory format channels_last. Compiled networks always use it."""
    compile: bool = False
    """Compiles network and loss (torch.compile); the first step takes minutes."""
    checkpoint_activations: bool = False
    """Recomputes activations in the backward pass: less memory, more time."""
    checkpoint_every: PositiveInt = 100
    """Optimiser steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Number of latest checkpoints that are kept besides the best."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts of Ray workers allowed between two checkpoints; -1: no limit."""
    resize_every: NonNegativeFloat = 60.0
    """Seconds between searches for new nodes, if workers are elastic."""
    log_every: PositiveInt = 20
    """Optimiser steps between log lines."""
    resume: str | None = None
    """Directory of an earlier run to continue, although code or params changed. Null: a stage whose code or
    params changed starts anew."""

    @property
    def most_workers(self) -> int:
        """Largest number of workers; the stage's own process counts as one."""
        return max(1, self.workers) if isinstance(self.workers, int) else self.workers[1]

    @property
    def least_workers(self) -> int:
        """Smallest number of workers; the stage's own process counts as one."""
        return max(1, self.workers) if isinstance(self.workers, int) else self.workers[0]

    def largest_part(self, batch_size: int) -> int:
        """Largest micro-batch of a batch of `batch_size` images, with all workers present.

        It bounds the memory of a worker. If workers are missing, the others take more micro-batches.
        """
        return math.ceil(math.ceil(batch_size / self.most_workers) / self.accumulate)

    def with_loader(self, processes: int) -> TrainingParams:
        """Returns a copy whose workers reserve a CPU per loader process and one for themselves."""
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


class StorageParams(Strict):
    """The place of checkpoints, and of the files that workers on other machines read."""

    root: Annotated[str, Field(min_length=1)] = "runs"
    """Folder or fsspec URL of checkpoints. A URL also has shards, models and stored explanations."""
