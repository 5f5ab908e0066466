"""Pictures of a fixed, seeded set of images, some that the model gets right and some wrong, with every explanation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipelines.attribution import attribute
from pipelines.bcos import add_inverse, contribution_map, dynamic_weights, rgba
from pipelines.evaluation import Batch, Subject, images_by_key, load_subject, split_batches
from pipelines.params import DataParams, EvaluateParams
from pipelines.pictures import choose, save_panels

ROWS = 4  # images a file


def draw_gallery(
    folder: Path, directories: Mapping[str, str], shards: str, data: DataParams, params: EvaluateParams, split: str = "test"
) -> list[Path]:
    """Writes panels of `params.pictures` images to `folder` and returns their paths.

    The images are drawn by `params.seed`, half of them wrong, as the last of the models in `directories` (name -> folder) sees
    them. Each model's explanations are those of the class that it predicts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    subjects = {name: load_subject(path, params.posthoc, torch.device("cpu")) for name, path in directories.items()}
    judge = list(subjects.values())[-1]
    keys, right, truths = _judgements(judge, split_batches(shards, split, data, params.batch_size))
    chosen = choose(right, params.pictures, params.seed).tolist()
    images = images_by_key(split_batches(shards, split, data, params.batch_size), {keys[index] for index in chosen})
    paths = []
    for start in range(0, len(chosen), ROWS):
        rows = chosen[start : start + ROWS]
        batch = add_inverse(torch.stack([images[keys[index]] for index in rows]))
        panels: dict[str, Tensor] = {}
        titles = [f"{keys[index]}\ntrue: {truths[index]}" for index in rows]
        for name, subject in subjects.items():
            predicted, explanations = _explained(subject, batch, params.smooth)
            panels |= {f"{name}\n{title}": maps for title, maps in explanations.items()}
            titles = [f"{title}\n{name}: {guess}" for title, guess in zip(titles, predicted, strict=True)]
        paths.append(folder / f"panels-{start // ROWS:02d}.png")
        save_panels(paths[-1], batch, panels, titles)
    return paths


@torch.no_grad()
def _judgements(subject: Subject, batches: list[Batch]) -> tuple[list[str], Tensor, list[str]]:
    """Of every image its key, whether the model is right (in all classes), and its true classes."""
    classes, found = subject.spec.classes, []
    for batch in batches:
        logits = subject.model(add_inverse(batch["image"]))
        if "label" in batch:
            right, present = logits.argmax(1) == batch["label"], [[label] for label in batch["label"].tolist()]
        else:
            right = ((logits >= 0) == batch["labels"].bool()).all(1)
            present = [row.nonzero()[:, 0].tolist() for row in batch["labels"]]
        truths = [", ".join(classes[label] for label in labels) for labels in present]
        found += list(zip(batch["key"], right.tolist(), truths, strict=True))
    found.sort()
    keys, rights, names = zip(*found, strict=True)
    return list(keys), torch.tensor(rights), list(names)


def _explained(subject: Subject, images: Tensor, smooth: int) -> tuple[list[str], dict[str, Tensor]]:
    """The class that the model predicts for each image, with its confidence, and the explanations of this class."""
    with torch.no_grad():
        logits = subject.model(images)
    targets = logits.argmax(1)
    shares = (logits.softmax(1) if subject.spec.task == "multiclass" else logits.sigmoid()).amax(1)
    pairs = zip(targets.tolist(), shares.tolist(), strict=True)
    predicted = [f"{subject.spec.classes[target]} ({share:.0%})" for target, share in pairs]
    if subject.spec.kind == "bcos":
        _, weights = dynamic_weights(subject.model, images, targets)
        return predicted, {"weights": rgba(images, weights, smooth), "contributions": contribution_map(images, weights)}
    return predicted, {name: attribute(subject.model, images, targets, **kw) for name, kw in subject.explanations.items()}
