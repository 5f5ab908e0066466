"""Records of an evaluation: tables from which all of its figures are computed.

Images are named by their key; classes and labels are indices into the classes of the data. K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

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
