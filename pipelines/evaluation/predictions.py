"""The predictions of models for every image, and their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

from pipelines.data.loading.batch import NO_GROUP
from pipelines.data.shards.sample import DataError
from pipelines.metrics import measured, multilabel_metrics


@dataclass(frozen=True)
class Predictions:
    """Labels and the logits of each model, of the images of a batch or of the split (then sorted by key)."""

    keys: list[str]
    labels: Tensor  # (N,), or multi-hot (N, K)
    logits: dict[str, Tensor]  # (N, K) of each model
    groups: Tensor  # (N,), -1 for images without

    @classmethod
    def joined(cls, parts: list[Predictions]) -> Predictions:
        """All workers' predictions in one order, whatever their number.

        Raises:
            DataError: there are none.
        """
        if not parts:
            raise DataError("no image to evaluate: the split is empty, or none of its images decodes")
        keys = [key for part in parts for key in part.keys]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        logits = {name: torch.cat([part.logits[name] for part in parts])[order] for name in parts[0].logits}
        labels, groups = (
            torch.cat([getattr(part, name) for part in parts])[order] for name in ("labels", "groups")
        )
        return cls([keys[index] for index in order], labels, logits, groups)

    def correct(self, name: str) -> dict[str, bool]:
        """Key -> whether the prediction of the model called `name` is correct, in all classes."""
        logits = self.logits[name]
        hits = (
            logits.argmax(1) == self.labels
            if self.labels.ndim == 1
            else ((logits >= 0) == self.labels.bool()).all(1)
        )
        return dict(zip(self.keys, hits.tolist(), strict=True))

    def decisions(self, name: str) -> dict[str, float]:
        """`f1`, `precision`, `recall` and `mean_average_precision` of the model called `name`, each class a decision of its own.

        The last is the mean over the classes that are in any image. What cannot be measured, such as the precision of a model
        that decides for no class at all, is left out.
        """
        logits = self.logits[name]
        labels = self.labels if self.labels.ndim == 2 else F.one_hot(self.labels, logits.shape[1])
        found = measured(multilabel_metrics(logits.shape[1])(logits, labels))
        seen = labels.any(0)
        if not seen.any():
            return found
        scores, count = logits[:, seen].sigmoid(), int(seen.sum())
        mean = multilabel_average_precision(
            scores, labels[:, seen], num_labels=count, average="macro", validate_args=False
        )
        return found | measured({"mean_average_precision": mean})

    def group_accuracies(self, name: str) -> dict[str, float]:
        """Worst and mean accuracy over groups of the model called `name`; empty unless images have one label and a group.

        `_class_group_` counts each pair of class and group as a group of its own (Sagawa et al., ICLR 2020).
        """
        known = self.groups != NO_GROUP
        if self.labels.ndim > 1 or not known.any():
            return {}
        logits, labels, groups = self.logits[name][known], self.labels[known], self.groups[known]
        hits = (logits.argmax(1) == labels).double()
        found: dict[str, float] = {}
        for kind, each in (("group", groups), ("class_group", labels * (int(groups.max()) + 1) + groups)):
            counts = each.bincount()
            accuracies = (each.bincount(hits) / counts)[counts > 0]  # of the groups that have images
            found |= {
                f"worst_{kind}_accuracy": float(accuracies.min()),
                f"mean_{kind}_accuracy": float(accuracies.mean()),
            }
        return found
