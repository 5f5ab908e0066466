"""The protocol of a training method, and `Classification`, the base of those that train classifiers.

Shapes: N images of H x W pixels, K classes, M rows of all workers.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torchvision.transforms.v2 import MixUp

from pipelines.bcos import add_inverse
from pipelines.data.loading.batch import Batch


class Method(Protocol):
    """A trainable module with its losses and metrics, which does not know where it runs.

    Attributes:
        module: the module that is trained. Checkpoints hold the state of this module only.
        fixed: frozen modules that `prepare` and `update` use, such as a teacher.
        fields: the fields of a batch that the method reads besides images and labels, see `loader`.
        shared: names of tensors of `prepare` whose rows from all workers `loss` needs, see `loss`.
        losses: names that `loss` returns, in at least some steps. An epoch can be selected by any of them.
    """

    module: nn.Module
    fixed: tuple[nn.Module, ...]
    fields: tuple[str, ...]
    shared: tuple[str, ...]
    losses: tuple[str, ...]

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the arguments of `loss`, tensors with one row per image. Random numbers are drawn here.

        Args:
            batch: the loader's fields and three more. `step` is the number of optimiser steps done, which a
                resumed run continues to count. `step_images`, a scalar tensor, is the number of images in
                this step over all workers. `parts` is the number of parts in which `loss` gets the batch.
        """
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns named scalars, each a mean over the images of a prepared batch; `loss` is minimised.

        `model` is `module`. For each tensor NAME in `shared`, `batch` also has `all_NAME` (M, ...), without
        gradient: the rows of all images of the step, on all workers, padded with rows of zeros to the same M
        in every step. `row` (N,) int64 is the index of each image's own row in `all_NAME`.

        Must be a pure function of its inputs (no random numbers, no state): it may be compiled and called on
        parts of a batch.
        """
        ...

    def metrics(self) -> Any:
        """Returns a fresh torchmetrics collection for one evaluation pass.

        A metric's `higher_is_better` is the direction in which epochs are selected by it. A search takes the
        direction from `directions`, which must agree. A metric whose `compute` returns several
        figures has a dict `figures` of their names and directions. A mean over nothing is NaN.
        """
        ...

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Adds an evaluation batch of the loader to `metrics`."""
        ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Returns the parameter groups of the optimiser."""
        ...

    def set_progress(self, epochs: float) -> None:
        """Sets the method's own schedules, such as that of B, to their values after `epochs` epochs.

        `epochs` is fractional within an epoch. Called before each step and before the evaluation after an
        epoch.
        """
        ...

    def epoch_metrics(self) -> dict[str, float]:
        """Returns figures of the module at the end of an epoch, besides losses and evaluation metrics."""
        ...


class Classification:
    """Base of methods that train a classifier: input, mixup, metrics and parameter groups.

    Args:
        module: (N, 6, H, W) in [0, 1] -> logits (N, K).
        task: `multiclass` (batches have `label`) or `multilabel` (batches have `labels`).
        num_classes: K.
        mixup: alpha of the Beta distribution of the mixing share (Zhang et al., 2018); 0 for no mixing.
    """

    fixed: tuple[nn.Module, ...] = ()
    fields: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("loss",)

    def __init__(self, module: nn.Module, task: str, num_classes: int, mixup: float = 0.0) -> None:
        self.module, self.task, self.num_classes = module, task, num_classes
        self._mix = MixUp(alpha=mixup, num_classes=num_classes) if mixup > 0 else None

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `image` (N, 6, H, W) in [0, 1] and `target`.

        `target` is class indices (N,), or (N, K) in [0, 1] if images are mixed or have several labels.
        """
        images, targets = batch["image"], self.targets(batch)
        if self._mix is not None:
            images, targets = self._mix(images, targets)
        return {"image": add_inverse(images), "target": targets}

    def targets(self, batch: Batch) -> Tensor:
        """Returns class indices (N,), or for the task `multilabel` labels (N, K) of {0, 1}."""
        return batch["label"] if self.task == "multiclass" else batch["labels"]

    def metrics(self) -> Any:
        from pipelines.metrics.classification import multiclass_metrics, multilabel_metrics

        make = multiclass_metrics if self.task == "multiclass" else multilabel_metrics
        return make(self.num_classes)

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        targets = self.targets(batch)
        metrics.update(model(add_inverse(batch["image"])), targets if targets.ndim == 1 else targets.long())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return weight_groups(self.module, weight_decay)

    def set_progress(self, epochs: float) -> None:
        """Does nothing, because there are no schedules by default."""

    def epoch_metrics(self) -> dict[str, float]:
        return {}


def weight_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups trainable parameters: weight decay for two or more dimensions, none for biases and norms."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
