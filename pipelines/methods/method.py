"""The protocol of a training method: what the loop asks of it. `Classification` is the base of those that train classifiers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torchvision.transforms.v2 import MixUp

from pipelines.bcos import add_inverse
from pipelines.data.loading.batch import Batch


class Method(Protocol):
    """A trainable module with its losses and metrics. It does not know where it runs."""

    module: nn.Module
    fixed: tuple[
        nn.Module, ...
    ]  # take part in `prepare` and `update`, as a teacher does, and never train: no part of the state
    fields: tuple[str, ...]  # what it reads of batches beside images and labels, see `loader`
    shared: tuple[str, ...]  # tensors of `prepare` of which `loss` needs the rows of all workers, see there
    losses: tuple[
        str, ...
    ]  # names that `loss` returns, in some steps at least: an epoch can be selected by any of them

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """The arguments of `loss` from a batch of the loader: tensors with one row per image. Draws its random numbers here.

        Beside what the loader gives, `batch` has `step`, the number of optimiser steps done (a resumed run has the same);
        `step_images`, a scalar tensor, the images of this step on all workers; `parts`, in how many parts the loss will be taken.
        """
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named scalars of a prepared batch, each a mean over its images; `loss` is the one to minimise. `model` is `module`.

        Of each tensor NAME that is `shared`, `batch` has `all_NAME` (M, ...) too: the rows of all images of the step, on all
        workers, M the same in every step, without gradient. `row` (N,) int64 says which of them belongs to each image; rows of
        zeros belong to none.

        Must be a pure function of its inputs (no random numbers, no state): it may be compiled and called on parts of a batch.
        """
        ...

    def metrics(self) -> Any:
        """A fresh torchmetrics collection for one evaluation pass.

        A metric's `higher_is_better` says by which direction epochs are selected and params searched. A metric whose `compute`
        returns several figures has `figures`, a dict of their names and directions. A mean over nothing is NaN.
        """
        ...

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Takes an evaluation batch of the loader into `metrics`."""
        ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser."""
        ...

    def set_progress(self, epochs: float) -> None:
        """Sets what the method's own schedules say after `epochs` epochs, a fraction in mid-epoch.

        Called before each step and before the evaluation at an epoch's end.
        """
        ...

    def epoch_metrics(self) -> dict[str, float]:
        """Figures of the module at an epoch's end, beside losses and evaluation."""
        ...


class Classification:
    """The input, mixup, metrics and parameter groups that all methods of training a classifier share.

    Args:
        module: (N, 6, H, W) in [0, 1] -> logits (N, K).
        task: `multiclass` (a batch has `label`) or `multilabel` (`labels`).
        num_classes: K.
        mixup: alpha of the Beta distribution from which the mixing share is drawn; 0: no mixing (Zhang et al., 2018).
    """

    fixed: tuple[nn.Module, ...] = ()
    fields: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("loss",)

    def __init__(self, module: nn.Module, task: str, num_classes: int, mixup: float = 0.0) -> None:
        self.module, self.task, self.num_classes = module, task, num_classes
        self._mix = MixUp(alpha=mixup, num_classes=num_classes) if mixup > 0 else None

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, 6, H, W) in [0, 1] and `target`: class indices (N,), or where mixed or multilabel (N, K) in [0, 1]."""
        images, targets = batch["image"], self.targets(batch)
        if self._mix is not None:
            images, targets = self._mix(images, targets)
        return {"image": add_inverse(images), "target": targets}

    def targets(self, batch: Batch) -> Tensor:
        """(N,) class indices, or (N, K) of {0, 1}."""
        return batch["label"] if self.task == "multiclass" else batch["labels"]

    def metrics(self) -> Any:
        """A fresh torchmetrics collection of this task."""
        from pipelines.metrics.classification import multiclass_metrics, multilabel_metrics

        make = multiclass_metrics if self.task == "multiclass" else multilabel_metrics
        return make(self.num_classes)

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Takes an evaluation batch into `metrics`."""
        targets = self.targets(batch)
        metrics.update(model(add_inverse(batch["image"])), targets if targets.ndim == 1 else targets.long())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on weights of two and more dimensions, none on biases and norms."""
        return weight_groups(self.module, weight_decay)

    def set_progress(self, epochs: float) -> None:
        """Nothing changes from epoch to epoch."""

    def epoch_metrics(self) -> dict[str, float]:
        """None."""
        return {}


def weight_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters for an optimiser: decay on those of two and more dimensions, none on biases and norms."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
