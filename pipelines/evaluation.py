"""Evaluation of trained models beside each other: accuracy, localisation, completeness, on the same images and the same grids.

Runs on any number of workers: each takes its part of the split and of the grids, and what they find is added up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision

from pipelines import models
from pipelines.attribution import Explainer, attribute_many, explain, explain_pairs, explainers, last_features
from pipelines.bcos import add_inverse, dynamic_weights
from pipelines.data.loader import NO_GROUP, loader
from pipelines.data.manifest import read_manifest
from pipelines.data.sample import DataError
from pipelines.data.transforms import eval_transform
from pipelines.metrics import (
    Agreement,
    Grid,
    GroupAccuracy,
    LocalisationMetric,
    UnexplainedShare,
    area_share,
    attribution_iou,
    box_masks,
    confidence,
    draw_grids,
    eligible,
    energy_pointing_game,
    explanation_similarity,
    grid_batches,
    grid_pointing_game,
    in_windows,
    multiclass_metrics,
    multilabel_metrics,
    object_masks,
    size_corrected,
    without_energy,
    without_union,
)
from pipelines.models import ModelError, ModelSpec
from pipelines.params import DataParams, EvaluateParams
from pipelines.training.distributed import Context, gather, to_device

Batch = dict[str, Any]
OWN = {"method": "bcos"}  # what explains a B-cos network, in `Subject.explanations`
BOX_SIZES = {"small": (0.0, 0.1), "medium": (0.1, 0.3), "large": (0.3, 1.0)}  # share of the image: above, up to


@dataclass(frozen=True)
class Subject:
    """A model under evaluation, and its explanations: name -> keyword arguments of `attribute_many`."""

    model: nn.Module
    spec: ModelSpec
    explanations: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Predictions:
    """What the models say of every image, of a batch or of the split (then sorted by key)."""

    keys: list[str]
    labels: Tensor  # (N,), or multi-hot (N, K)
    logits: dict[str, Tensor]  # (N, K) of each model
    groups: Tensor  # (N,), -1 for images without

    def right(self, name: str) -> dict[str, bool]:
        """Key -> whether the model called `name` is right, in all classes."""
        logits = self.logits[name]
        hits = logits.argmax(1) == self.labels if self.labels.ndim == 1 else ((logits >= 0) == self.labels.bool()).all(1)
        return dict(zip(self.keys, hits.tolist(), strict=True))


def evaluate(
    context: Context,
    directories: Mapping[str, str],
    shards: str,
    data: DataParams,
    params: EvaluateParams,
    split: str = "test",
    teacher: str | None = None,
    guided: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Predictions]:
    """Metrics of the models in `directories` (name -> folder) on `split`, and their predictions; the same on every worker.

    Where `teacher` names one of the models, the others are its students: `agreement` and `explanation_similarity` with it, the
    latter of the class that the teacher predicts. `guided` (`method` and `layer`) is one more explanation of all models; these
    were trained to decide on each class for itself, and F1 and the like are measured where images have one label, too.

    Returns:
        `{"models": {name: {"accuracy", ..., "explanations": {name: {"gridpg", "epg", ...}}}}, "grids": {...}, "images": N,
        "skipped": n}`, fractions in [0, 1]; and the predictions.

    Raises:
        DataError: nothing to evaluate.
    """
    if not read_manifest(shards).labelled:
        raise DataError(f"{shards}: images without labels cannot be evaluated; students' agreement on val is in their reports")
    subjects = {name: load_subject(path, params.posthoc, context.device, guided) for name, path in directories.items()}
    batches = partial(split_batches, shards, split, data, params.batch_size)
    single = [name for name, subject in subjects.items() if subject.spec.task == "multiclass"]
    accuracy = {name: multiclass_metrics(len(subjects[name].spec.classes)).to(context.device) for name in single}
    scores = {name: _Scores(subject, context.device) for name, subject in subjects.items()}
    students = [name for name in subjects if teacher is not None and name != teacher]
    follows = {name: _Following(subjects[name], subjects[str(teacher)], context.device) for name in students}
    seen: list[Predictions] = []
    mine = batches(rank=context.rank, world_size=context.world_size)
    for batch in mine:
        batch = to_device(batch, context.device)
        logits = {name: scores[name].update(batch) for name in subjects}
        for name in single:
            accuracy[name].update(logits[name], batch["label"])
        for name, following in follows.items():
            following.update(batch["image"], logits[name], logits[str(teacher)])
        groups = batch.get("group", torch.full((len(batch["key"]),), NO_GROUP))
        seen.append(
            Predictions(batch["key"], _wanted(batch).cpu(), {name: each.cpu() for name, each in logits.items()}, groups.cpu())
        )
    predictions = _predictions([part for of_worker in gather(seen, context) for part in of_worker])
    results: dict[str, Any] = {
        name: {
            **(_floats(accuracy[name].compute()) if name in single else {}),
            **(_decisions(predictions, name) if name not in single or guided is not None else {}),
            **_group_accuracies(predictions, name),
            **(follows[name].compute() if name in follows else {}),
            "explanations": scores[name].compute(context),
        }
        for name in subjects
    }
    found: dict[str, Any] = {
        "models": results,
        "images": len(predictions.keys),
        "skipped": sum(gather(mine.skipped, context)),
    }
    if len(single) == len(subjects):
        found["grids"] = _grid_scores(context, subjects, predictions, batches, params, results)
    return found, predictions


def evaluate_and_judge(
    context: Context, directories: Mapping[str, str], *arguments: Any
) -> tuple[dict[str, Any], dict[str, bool]]:
    """The metrics of `evaluate`, and for each image whether the last of the models is right: plain values, for `launch`."""
    found, predictions = evaluate(context, directories, *arguments)
    return found, predictions.right(list(directories)[-1])


def load_subject(
    directory: str, posthoc: Iterable[str], device: torch.device, guided: Mapping[str, Any] | None = None
) -> Subject:
    """The model in `directory` with its own explanation (B-cos) or those of `posthoc` that it has (conventional), and `guided`.

    A network without convolutional features has no GradCAM.
    """
    model, spec = models.load(directory)
    model.to(device).requires_grad_(False)
    methods = ["bcos"] if spec.kind == "bcos" else posthoc
    explanations: dict[str, dict[str, Any]] = {method: {"method": method} for method in methods}
    if guided is not None and (guided["layer"] is not None or guided["method"] not in explanations):
        explanations["guided"] = {key: value for key, value in guided.items() if value is not None}
    for name, options in list(explanations.items()):
        if options["method"] == "gradcam" and "layer" not in options:
            try:
                options["layer"] = last_features(model, torch.zeros(1, 6, spec.image_size, spec.image_size, device=device))
            except ModelError as error:
                print(f"{directory}: {error}; evaluated without")
                del explanations[name]
    return Subject(model, spec, explanations)


class _Scores:
    """Localisation and completeness of one model's explanations, for the classes that are in each image."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self.subject = subject
        self.metrics: dict[str, dict[str, Metric]] = {name: {} for name in subject.explanations}
        self.device = device

    def update(self, batch: Batch) -> Tensor:
        """Adds every (image, class) pair of a batch; returns the model's logits (N, K)."""
        images, present = add_inverse(batch["image"]), _present(batch, len(self.subject.spec.classes))
        rows, targets = present.nonzero(as_tuple=True)
        size = (images.shape[-2], images.shape[-1])
        boxes = [batch["boxes"][row] for row in rows.tolist()] if "boxes" in batch else []
        boxed = torch.tensor([bool((each[:, 0] == target).any()) for each, target in zip(boxes, targets, strict=bool(boxes))])
        by_box = box_masks(boxes, targets, size) if boxes else None
        by_object = object_masks(batch["mask"][rows], boxes, targets) if boxes and "mask" in batch else None
        if not self.subject.explanations:
            with torch.no_grad():
                return self.subject.model(images)
        for name, options in self.subject.explanations.items():
            logits, maps, *sums = explain_pairs(partial(self._explain, options), images, present)
            for key, each in zip(self._completeness(options), sums, strict=True):
                bias = float(self.subject.model.logit_bias)  # type: ignore[arg-type]
                self._metric(name, key).update(logits[rows, targets], bias, each)
            if by_box is not None:
                self._add_boxes(name, maps, by_box, boxed.to(maps.device))
                if by_object is not None:
                    shown, epg = by_object.flatten(1).any(1), energy_pointing_game(maps, by_object)
                    self._add_by_size(name, "on_object_epg", epg, without_energy(maps), area_share(by_box), shown)
        return logits

    def compute(self, context: Context) -> dict[str, dict[str, float]]:
        """For each explanation the means over all workers, and how many pairs were undefined; by size of the boxes too.

        `pairs_without_box` counts pairs of an image and a class that has no box there, `pairs_with_empty_boxes` those of which no
        box covers a pixel.
        """
        found: dict[str, dict[str, float]] = {}
        for name, metrics in self.metrics.items():
            found[name] = {}
            for key in sorted(set().union(*gather(list(metrics), context))):  # a worker may have had no image
                value = self._metric(name, key).compute()
                if key in ("pairs_without_box", "pairs_with_empty_boxes"):
                    found[name][key] = int(value["undefined"])
                elif isinstance(value, dict):
                    found[name] |= {key: float(value["mean"]), f"{key}_undefined": int(value["undefined"])}
                    if key.startswith("epg"):
                        found[name][f"{key.replace('epg', 'pairs')}"] = int(value["count"])
                else:
                    found[name][key] = float(value)
        return found

    def _explain(self, options: dict[str, Any], images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Logits (n, K), maps (n, T, H, W), and for each of `_completeness` the sum over its map's pixels (n, T)."""
        model = self.subject.model
        if options == OWN:
            logits, weights_NTCHW = dynamic_weights(model, images, targets)
            maps = (images[:, None] * weights_NTCHW).sum(2)
            baseline = (model.mean[:, None, None] * weights_NTCHW).double().sum((2, 3, 4))  # type: ignore[index]
            whole = maps.double().sum((2, 3))
            return logits, maps, whole, whole - baseline
        logits, maps = explain(model, images, targets, **options)
        return logits, maps, *(maps.double().sum((2, 3)) for _ in self._completeness(options))

    def _completeness(self, options: dict[str, Any]) -> tuple[str, ...]:
        """What is measured of how the map sums to the logit; of GradCAM, whose unit is another, and of layers nothing."""
        if options == OWN:
            return ("unexplained_share_as_published", "unexplained_share")
        return () if options["method"] == "gradcam" or "layer" in options else ("unexplained_share",)

    def _add_boxes(self, name: str, maps: Tensor, masks: Tensor, boxed: Tensor) -> None:
        """Scores of maps (P, H, W) against the boxes of the pairs that are `boxed` (P,): of those that cover a pixel."""
        shares = area_share(masks)
        located = shares > 0
        self._add(name, "pairs_without_box", boxed.float(), ~boxed)
        self._add(name, "pairs_with_empty_boxes", located.float(), boxed & ~located)
        epg, without = energy_pointing_game(maps, masks), without_energy(maps)
        for key, values, undefined in (
            ("epg", epg, without),
            ("size_corrected_epg", size_corrected(epg, shares), without | (shares == 1)),
            ("iou", attribution_iou(maps, masks), without_union(maps, masks)),
        ):
            self._add_by_size(name, key, values, undefined, shares, located)

    def _add_by_size(self, name: str, key: str, values: Tensor, undefined: Tensor, shares: Tensor, chosen: Tensor) -> None:
        """Adds a score (P,) of the pairs that are `chosen`, and of those of each of BOX_SIZES."""
        self._add(name, key, values[chosen], undefined[chosen])
        for size, (least, most) in BOX_SIZES.items():
            of_size = chosen & (shares > least) & (shares <= most)
            if of_size.any():
                self._add(name, f"{key}_{size}", values[of_size], undefined[of_size])

    def _add(self, name: str, key: str, values: Tensor, undefined: Tensor) -> None:
        self._metric(name, key).update(values, undefined)

    def _metric(self, name: str, key: str) -> Metric:
        make = UnexplainedShare if key.startswith("unexplained_share") else LocalisationMetric
        if key not in self.metrics[name]:
            self.metrics[name][key] = make().to(self.device)
        return self.metrics[name][key]


class _Following:
    """How far a student follows its teacher: in its answers, and where their explanations compare in those."""

    def __init__(self, student: Subject, teacher: Subject, device: torch.device) -> None:
        size, held = student.spec.image_size, student.spec.kind == teacher.spec.kind == "bcos"
        probe = torch.full((1, 6, size, size), 0.5, device=device)
        self.models = (student.model, teacher.model)
        self.explain: tuple[Explainer, Explainer] | None = None
        with suppress(ModelError):  # no GradCAM of one of the two
            self.explain = explainers(*self.models, probe, held=held)
        self.agreement, self.similarity = Agreement().to(device), LocalisationMetric().to(device)

    def update(self, images: Tensor, logits: Tensor, teacher_logits: Tensor) -> None:
        """Takes a batch of images (N, 3, H, W) and both models' logits of it."""
        self.agreement.update(logits, teacher_logits)
        if self.explain is None:
            return
        images, targets = add_inverse(images), teacher_logits.argmax(1)
        one, other = (explain(model, images, targets)[1] for explain, model in zip(self.explain, self.models, strict=True))
        empty = (one.flatten(1) == 0).all(1) | (other.flatten(1) == 0).all(1)
        self.similarity.update(explanation_similarity(one, other), empty)

    def compute(self) -> dict[str, float]:
        """The means over all workers; in how many pairs of maps one is zero."""
        found = {"agreement": float(self.agreement.compute())}
        if self.explain is None:
            return found
        similarity = self.similarity.compute()
        found["explanation_similarity"] = float(similarity["mean"])
        return found | {"explanation_similarity_undefined": int(similarity["undefined"])}


def _group_accuracies(predictions: Predictions, name: str) -> dict[str, float]:
    """Of one model, where images have one label and a group: the accuracy of the worst group and the mean over groups.

    `_class_group_` counts each pair of class and group as a group of its own (Sagawa et al., ICLR 2020).
    """
    known = predictions.groups != NO_GROUP
    if predictions.labels.ndim > 1 or not known.any():
        return {}
    logits, labels, groups = predictions.logits[name][known], predictions.labels[known], predictions.groups[known]
    count = int(groups.max()) + 1
    found: dict[str, float] = {}
    for kind, each, number in (("group", groups, count), ("class_group", labels * count + groups, logits.shape[1] * count)):
        metric = GroupAccuracy(number, sync_on_compute=False)  # every worker has all predictions
        metric.update(logits, labels, each)
        found |= {key.replace("group", kind): float(value) for key, value in metric.compute().items()}
    return found


def _decisions(predictions: Predictions, name: str) -> dict[str, float]:
    """Of one model, on each class for itself: `f1`, `precision`, `recall`, and `mean_average_precision`.

    The latter goes over the classes that are in any image.
    """
    logits, labels = predictions.logits[name], predictions.labels
    labels = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1])
    seen = labels.any(0)
    scores, count = logits[:, seen].sigmoid(), int(seen.sum())
    mean = multilabel_average_precision(scores, labels[:, seen], num_labels=count, average="macro", validate_args=False)
    return {**_floats(multilabel_metrics(logits.shape[1])(logits, labels)), "mean_average_precision": float(mean)}


def _present(batch: Batch, classes: int) -> Tensor:
    """Which classes are in each image: (N, K) of bool."""
    return F.one_hot(batch["label"], classes).bool() if "label" in batch else batch["labels"].bool()


def split_batches(shards: str, split: str, data: DataParams, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Any:
    """The batches of one worker in an evaluation pass."""
    return loader(
        shards,
        split,
        batch_size=batch_size,
        transform=eval_transform(data),
        rank=rank,
        world_size=world_size,
        workers=data.loader_workers,
        on_error=data.on_error,
        verify=data.verify,
    )


def _wanted(batch: Batch) -> Tensor:
    """Labels (N,), or multi-hot (N, K), as int64."""
    return batch["label"] if "label" in batch else batch["labels"].long()


def _predictions(parts: list[Predictions]) -> Predictions:
    """All workers' predictions in one order, whatever their number."""
    if not parts:
        raise DataError("no image to evaluate: the split is empty, or none of its images decodes")
    keys = [key for part in parts for key in part.keys]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    logits = {name: torch.cat([part.logits[name] for part in parts])[order] for name in parts[0].logits}
    labels, groups = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("labels", "groups"))
    return Predictions([keys[index] for index in order], labels, logits, groups)


def _grid_scores(
    context: Context,
    subjects: Mapping[str, Subject],
    predictions: Predictions,
    batches: Any,
    params: EvaluateParams,
    results: dict[str, Any],
) -> dict[str, Any]:
    """Plays the grid pointing game, enters the scores into `results`, and returns what the grids were.

    `gridpg` is on the same grids for all models, of images that all of them classify correctly with sigmoid(logit) > 0.5;
    `gridpg_own_grids` on each model's own, as published. `grid_windows` is how many windows a grid is explained in.
    """
    draw = partial(_draw, predictions, params)
    common = draw(list(subjects))
    played = {name: (common, draw([name])) for name in subjects}
    wanted = {index for pair in played.values() for grids in pair for grid in _share(context, grids) for index in grid.images}
    found = examples_by_key(batches(), {predictions.keys[index] for index in wanted})
    table = {index: found[predictions.keys[index]].image for index in wanted}
    for name, subject in subjects.items():
        results[name]["grid_windows"] = (2 * params.grid_size + 1) ** 2 if knows_positions(subject.model) else 1
        for explanation, options in subject.explanations.items():
            for key, grids in zip(("gridpg", "gridpg_own_grids"), played[name], strict=True):
                scores = LocalisationMetric().to(context.device)
                explain_many = grid_explainer(subject, options)
                for tiled, classes in grid_batches(
                    _share(context, grids),
                    lambda indices: add_inverse(torch.stack([table[index] for index in indices]).to(context.device) / 255),
                    params.grid_batch,
                ):
                    scores.update(grid_pointing_game(explain_many, tiled, classes, params.smooth).flatten())
                if grids:
                    results[name]["explanations"][explanation][key] = float(scores.compute()["mean"])
    correct = eligible(predictions.labels, *predictions.logits.values())
    return {"side": params.grid_size, "count": len(common), "eligible_images": int(correct.sum())}


def grid_explainer(subject: Subject, options: dict[str, Any]) -> Any:
    """What gives the maps of grids (G, 6, H, W) for classes (G, T): of ViTs in windows of their own image size."""
    explain_many = partial(attribute_many, subject.model, **options)
    return in_windows(explain_many, subject.spec.image_size) if knows_positions(subject.model) else explain_many


def knows_positions(model: nn.Module) -> bool:
    """Whether the network has embeddings of absolute positions, and so one image size that it is made for, as ViTs have."""
    names = (name for named in (model.named_modules(), model.named_parameters()) for name, _ in named)
    return any(re.search(r"(^|\.)pos(itional|ition)?_embed", name) for name in names)


def _draw(predictions: Predictions, params: EvaluateParams, names: list[str]) -> list[Grid]:
    """Grids of images that the models called `names` all get right."""
    logits = [predictions.logits[name] for name in names]
    return draw_grids(
        confidence(predictions.labels, *logits),
        predictions.labels,
        predictions.keys,
        eligible(predictions.labels, *logits),
        n=params.grid_size,
        count=params.grid_count,
        seed=params.seed,
    )


@dataclass(frozen=True)
class Example:
    """An image of the split, as bytes: many of them are held at once."""

    image: Tensor  # uint8 (3, H, W)
    classes: list[int]
    boxes: Tensor  # (n, 5): class, xmin, ymin, xmax, ymax


def examples_by_key(batches: Iterable[Batch], wanted: set[str]) -> dict[str, Example]:
    """The examples of the keys that are wanted, from one pass."""
    found: dict[str, Example] = {}
    for batch in batches if wanted else ():
        boxes = batch.get("boxes", [torch.zeros(0, 5)] * len(batch["key"]))
        for key, image, labels, of_image in zip(batch["key"], batch["image"], _wanted(batch), boxes, strict=True):
            if key in wanted:
                classes = labels.nonzero()[:, 0].tolist() if labels.ndim else [int(labels)]
                found[key] = Example((image * 255).round().byte(), classes, of_image)
    return found


def _share(context: Context, grids: list[Grid]) -> list[Grid]:
    """The grids of this worker."""
    return grids[context.rank :: context.world_size]


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
