"""Records of an evaluation: tables from which all of its figures are computed.

Images are named by their key; classes and labels are indices into the classes of the data. K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
import torch.nn.functional as F

from pipelines.distributed import Context, gather
from pipelines.evaluation.predictions import Predictions
from pipelines.storage.files import staged

OF_EXPLANATIONS = ["model", "explanation", "key", "class"]  # what a row of explanations is about
OF_GRIDS = ["game", "model", "explanation", "grid", "cell"]
FILES = ("predictions.parquet", "records.parquet", "grids.parquet")


@dataclass(frozen=True)
class Records:
    """The tables of one evaluation on one split, the same for any number of workers.

    Attributes:
        predictions: a row per image and model: `model`, `key`, `group` (-1: none), `labels` (the classes in
            the image), `logits` (K,). `prediction` and `runner_up` are the classes with the largest logits,
            each with its `_logit` and `_probability`; `true_logit` and `true_probability` are missing in
            multi-label data. `right` tells whether the label is predicted (multi-label: whether the decision
            on every class is right). Students have `explanation_similarity` and `empty_map`, see
            `scores.Similarity`. Probabilities are a softmax for single-label networks, otherwise a sigmoid.
        explanations: a row per image, model, class in the image and explanation: `model`, `explanation`,
            `key`, `class`, and of the image `group`, `prediction` and `right`. `logit` is that of the class;
            `contributions` is the sum of the mean-referenced map, `contributions_as_published` that of
            W(x)·x, and `logit_bias` belongs to no pixel. `boxed` tells whether the class has a box;
            `box_share` and `object_share` are the shares of the image that its boxes and its mask cover.
            `has_energy` and `has_union` are False if EPG or IoU are undefined; they are 0 then. `epg`,
            `size_corrected_epg`, `on_object_epg`; `iou` at `iou_threshold`; `iou_at_<threshold>`.
        grids: a row per grid, model, explanation and cell: `game`, `grid`, `model`, `explanation`, `cell`,
            `key`, `class`, `score`. The game `gridpg` has the grids that all models share,
            `gridpg_own_grids` those of each model.
        facts: what the tables do not tell: `split`, `tasks` (model -> task), `single_label` (whether images
            have one label), `decisions` (whether single-label networks decide on each class separately),
            `teacher`, `side` of the grids, `windows` (model -> number of windows that explain a grid),
            `skipped` (number of images that do not decode).
    """

    predictions: pandas.DataFrame
    explanations: pandas.DataFrame
    grids: pandas.DataFrame
    facts: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes `predictions.parquet`, `records.parquet` (the explanations) and `grids.parquet`."""
        for name, table in zip(FILES, (self.predictions, self.explanations, self.grids), strict=True):
            table.attrs = self.facts  # pandas writes them into the file
            with staged(folder / name) as path:
                table.to_parquet(path, index=False)

    @classmethod
    def load(cls, folder: Path) -> Records:
        """Reads the tables that `save` wrote."""
        predictions, explanations, grids = (pandas.read_parquet(folder / name) for name in FILES)
        return cls(predictions, explanations, grids, dict(predictions.attrs))

    @property
    def models(self) -> list[str]:
        """The names of the models, in the order of the evaluation."""
        return list(self.facts["tasks"])

    def right(self, model: str) -> dict[str, bool]:
        """Key -> True if the model's prediction is right."""
        rows = self.predictions[self.predictions["model"] == model]
        return dict(zip(rows["key"], rows["right"].tolist(), strict=True))

    def as_tensors(self) -> Predictions:
        """The predictions of all models as tensors."""
        of = {name: self.predictions[self.predictions["model"] == name] for name in self.models}
        logits = {name: torch.from_numpy(np.stack(rows["logits"].tolist())) for name, rows in of.items()}
        first = of[self.models[0]]
        labels = [torch.tensor(list(each)) for each in first["labels"]]
        if self.facts["single_label"]:
            wanted = torch.cat(labels)
        else:
            wanted = torch.zeros(len(labels), next(iter(logits.values())).shape[1], dtype=torch.int64)
            for row, each in zip(wanted, labels, strict=True):
                row[each] = 1
        groups = torch.from_numpy(first["group"].to_numpy(copy=True))
        return Predictions(list(first["key"]), wanted, logits, groups)


def joined(tables: list[pandas.DataFrame], context: Context, order: list[str]) -> pandas.DataFrame:
    """Joins the tables of all workers and sorts the rows by `order`, so that the workers have no effect."""
    some = [table for of_worker in gather(tables, context) for table in of_worker if len(table)]
    if not some:
        return pandas.DataFrame(columns=order)
    return pandas.concat(some).sort_values(order, ignore_index=True)


def predictions_table(name: str, task: str, predictions: Predictions) -> pandas.DataFrame:
    """The rows of `Records.predictions` of one model, without those of a student's explanations."""
    logits, labels = predictions.logits[name], predictions.labels
    shares = logits.double().softmax(1) if task == "multiclass" else logits.double().sigmoid()
    columns: dict[str, Any] = {"group": predictions.groups.numpy()}
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
            "key": predictions.keys,
            "labels": [row.nonzero()[:, 0].tolist() for row in present],
            "logits": list(logits.numpy()),
            "right": list(predictions.correct(name).values()),
            **columns,
        }
    )
