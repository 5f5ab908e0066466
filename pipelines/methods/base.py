"""What a way of training has to say; everything else is the loop's."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from pipelines.bcos import add_inverse

Batch = dict[str, Any]


class Method(Protocol):
    """A trainable module with its losses and metrics. It does not know where it runs."""

    module: nn.Module

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named scalars of a training batch; `loss` is the one to minimise. `model` is `module`, possibly wrapped."""
        ...

    def metrics(self) -> Any:
        """A fresh torchmetrics collection for one evaluation pass."""
        ...

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Takes an evaluation batch into `metrics`."""
        ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser."""
        ...

    def begin_epoch(self, epoch: int) -> None:
        """Sets what the method's own schedules say for `epoch`, counted from 0."""
        ...


class Classification:
    """What the ways of training a classifier share: the input, the metrics, the parameter groups.

    Args:
        module: (N, 6, H, W) in [0, 1] -> logits (N, K).
        task: `multiclass` (a batch has `label`) or `multilabel` (`labels`).
        num_classes: K.
    """

    def __init__(self, module: nn.Module, task: str, num_classes: int) -> None:
        self.module, self.task, self.num_classes = module, task, num_classes

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
        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def begin_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""
