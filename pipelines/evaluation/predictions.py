"""Predictions of models for every image, and their scores. N images, K classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

from pipelines.data.loading.batch import NO_GROUP
from pipelines.data.shards.sample import DataError
from pipelines.evidence import Records
from pipelines.metrics import measured, multilabel_metrics


@dataclass(frozen=True)
class Predictions:
    """Labels, and the logits of each model, for a batch or for the whole split (then sorted by key)."""

    keys: list[str]
    labels: Tensor  # (N,), or multi-hot (N, K)
    logits: dict[str, Tensor]  # model -> (N, K)
    groups: Tensor  # (N,), -1 for images without a group

    @classmethod
    def joined(cls, parts: list[Predictions]) -> Predictions:
        """Joins all workers' predictions and sorts them by key, so that the number of workers has no effect.

        Raises:
            DataError: there are no predictions.
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

    @classmethod
    def of(cls, records: Records) -> Predictions:
        """The predictions of all models in records of an evaluation."""
        of = {name: records.predictions[records.predictions["model"] == name] for name in records.models}
        logits = {name: torch.from_numpy(np.stack(rows["logits"].tolist())) for name, rows in of.items()}
        first = of[records.models[0]]
        labels = [torch.tensor(list(each)) for each in first["labels"]]
        if records.facts["single_label"]:
            wanted = torch.cat(labels)
        else:
            wanted = torch.zeros(len(labels), next(iter(logits.values())).shape[1], dtype=torch.int64)
            for row, each in zip(wanted, labels, strict=True):
                row[each] = 1
        groups = torch.from_numpy(first["group"].to_numpy(copy=True))
        return cls(list(first["key"]), wanted, logits, groups)

    def correct(self, name: str) -> dict[str, bool]:
        """Key -> True if the model `name` predicts correctly (for multi-label data in every class)."""
        logits = self.logits[name]
        hits = (
            logits.argmax(1) == self.labels
            if self.labels.ndim == 1
            else ((logits >= 0) == self.labels.bool()).all(1)
        )
        return dict(zip(self.keys, hits.tolist(), strict=True))

    def decisions(self, name: str) -> dict[str, float]:
        """`f1`, `precision`, `recall` (micro) and `mean_average_precision` of the model `name`.

        Each class is a binary decision. The mean average precision is over the classes that occur in an
        image. Scores that are undefined, such as the precision of a model that predicts no class, are absent.
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
        """Worst and mean accuracy of the model `name` over groups; empty without groups or single labels.

        The `class_group` scores take each pair of class and group as one group (Sagawa et al., ICLR 2020).
        """
        known = self.groups != NO_GROUP
        if self.labels.ndim > 1 or not known.any():
            return {}
        logits, labels, groups = self.logits[name][known], self.labels[known], self.groups[known]
        hits = (logits.argmax(1) == labels).double()
        found: dict[str, float] = {}
        for kind, each in (("group", groups), ("class_group", labels * (int(groups.max()) + 1) + groups)):
            counts = each.bincount()
            accuracies = (each.bincount(hits) / counts)[counts > 0]  # of groups with images
            found |= {
                f"worst_{kind}_accuracy": float(accuracies.min()),
                f"mean_{kind}_accuracy": float(accuracies.mean()),
            }
        return found

    def table(self, name: str, task: str) -> pandas.DataFrame:
        """The rows of `Records.predictions` of the model `name`, without a student's explanations.

        `task` is that of the model, `multiclass` or `multilabel`.
        """
        logits, labels = self.logits[name], self.labels
        shares = logits.double().softmax(1) if task == "multiclass" else logits.double().sigmoid()
        columns: dict[str, Any] = {"group": self.groups.numpy()}
        single = labels.ndim == 1
        present = F.one_hot(labels, logits.shape[1]) if single else labels
        first = logits.argmax(1)
        second = logits.scatter(1, first[:, None], -torch.inf).argmax(1)
        named = {"prediction": first, "runner_up": second} | ({"true": labels} if single else {})
        for role, classes in named.items():
            if role != "true":
                columns[role] = classes.numpy()
            for what, values in (("logit", logits), ("probability", shares)):
                columns[f"{role}_{what}"] = values.gather(1, classes[:, None])[:, 0].numpy()
        return pandas.DataFrame(
            {
                "model": name,
                "key": self.keys,
                "labels": [row.nonzero()[:, 0].tolist() for row in present],
                "logits": list(logits.numpy()),
                "right": list(self.correct(name).values()),
                **columns,
            }
        )
