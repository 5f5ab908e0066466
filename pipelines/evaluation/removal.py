"""Explanations of drawn scenes against the removal of single objects, see `metrics.removal`.

C classes that have an object in the image, K classes of the model, E elements of the scene (its objects, then
its pieces of clutter), T thresholds, H x W pixels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.attribution import explain
from pipelines.bcos import add_inverse
from pipelines.bcos.precision import exact_float32
from pipelines.data.drawing.scene import Element, Split, key_of, place_of, render
from pipelines.data.loading.transforms import eval_transform
from pipelines.distributed import Context, gather
from pipelines.evaluation.explained_model import ExplainedModel
from pipelines.evaluation.rows import Row, row, sampled
from pipelines.metrics import (
    IMPORTANCE_THRESHOLDS,
    data_check,
    distractibility,
    important,
    measured,
    names_most_important,
    removal_correlation,
    target_sensitivity,
)
from pipelines.params import DataParams, ScenesParams

UNIFORM = "uniform"  # the map that is 1 everywhere, which prefers large objects: a baseline for the scores
CHECKS = ("data_check", "preservation", "deletion_check")  # with distractibility, the parts of completeness
# model -> explanation -> share of the energy above which an element is important
ImportanceThresholds = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RemovalScores:
    """Results of `evaluate_removal`: rows (see `evaluation.rows`), sorted by key, and thresholds in use."""

    rows: list[Row]
    thresholds: dict[str, dict[str, float]]


def sample_keys(drawn: ScenesParams, split: Split, count: int, seed: int = 0) -> list[str]:
    """Keys of `count` images of a split (all if there are fewer), drawn by `seed`, in ascending order."""
    return [key_of(split, index) for index in sampled(drawn.counts[split], count, seed)]


@exact_float32()
def evaluate_removal(
    context: Context,
    models: Mapping[str, ExplainedModel],
    drawn: ScenesParams,
    keys: Sequence[str],
    data: DataParams,
    thresholds: ImportanceThresholds | None = None,
) -> RemovalScores:
    """Scores all explanations by removing objects from drawn scenes; returns them on every worker.

    There is a row per image, class that has an object in it, model and explanation, where `uniform` is the
    map that is 1 everywhere. Scores are in [0, 1], large is good, and absent where they are undefined:

    - `single_deletion` (correctness): over the objects; absent for an image with one object.
    - `single_deletion_with_clutter`: the same over objects and clutter, also for an image with one object.
    - `most_important_object` (correctness): absent for an image with one object.
    - `target_sensitivity` (contrastivity): absent for an image with one class.
    - `data_check`, `preservation`, `deletion_check` (completeness): absent where the model does not find the
      class. With all objects but the important ones removed, the model still finds the class
      (`preservation`); with the important ones removed, it no longer does (`deletion_check`). For an image
      with one object, each asks only whether this object is important.
    - `distractibility` (completeness): of objects and clutter.
    - `completeness`: (mean of the three checks + `distractibility`) / 2, as published; absent where one is.

    A multi-class model finds the class with the largest logit, a multi-label model those with a logit >= 0.

    Args:
        context: rank and device of this worker.
        models: name -> model with its explanations, with the classes of the data in their order.
        drawn: params of the drawn data set.
        keys: keys of the images, such as `sample_keys` gives; each worker takes its share.
        data: how images become the network's input.
        thresholds: those of another call, on validation images. `None` chooses for each model and explanation
            the threshold with the best completeness on these images, as FunnyBirds does.
    """
    found: list[tuple[Row, dict[str, Tensor]]] = []
    for key in keys[context.rank :: context.world_size]:
        scene = _Scene(drawn, key, data, context.device)
        for name, explained in models.items():
            found += _score(scene, name, explained) if scene.objects else []
    found = sorted(
        (each for part in gather(found, context) for each in part), key=lambda each: each[0]["key"]
    )
    chosen = (
        _best_thresholds(found) if thresholds is None else {name: dict(of) for name, of in thresholds.items()}
    )
    rows = [
        each | _at_threshold(of_thresholds, chosen[each["model"]][each["explanation"]])
        for each, of_thresholds in found
    ]
    return RemovalScores(rows, chosen)


class _Scene:
    """A scene as the network sees it, with any of its elements removed.

    Attributes:
        objects, elements: the objects, and all elements, whose removal changes a pixel of the network's
            input.
        footprints: (E, H, W) of bool, the pixels that the removal of each element changes.
        classes: (C,), the classes of the objects, ascending.
        own: (C, E) of bool, the objects of each class.
    """

    def __init__(self, drawn: ScenesParams, key: str, data: DataParams, device: torch.device) -> None:
        self.key, self.drawn, self.place, self.device = key, drawn, place_of(key), device
        self.view = eval_transform(data)
        self._images: dict[frozenset[Element], Tensor] = {}
        scene = render(drawn, *self.place)
        whole = self.images([frozenset()])
        changed = (self.images([frozenset([each]) for each in scene.elements]) != whole).any(1)
        visible = changed.flatten(1).any(1)
        self.elements = [each for each, seen in zip(scene.elements, visible.tolist(), strict=True) if seen]
        self.objects = [each for each in self.elements if each.kind == "object"]
        self.footprints = changed[visible]
        labels = torch.tensor([scene.labels[each.number - 1] for each in self.objects], device=device)
        self.classes = labels.unique()
        clutter = len(self.elements) - len(self.objects)
        self.own = F.pad(labels == self.classes[:, None], (0, clutter))

    def images(self, without: Sequence[frozenset[Element]]) -> Tensor:
        """The network's inputs without each of the sets of elements: (len(without), 6, H, W) in [0, 1]."""
        for removed in without:
            if removed not in self._images:
                pixels = torch.from_numpy(render(self.drawn, *self.place, removed).pixels).permute(2, 0, 1)
                seen = self.view({"image": pixels}, random.Random(0))["image"]
                self._images[removed] = add_inverse(seen.to(self.device)[None].float() / 255)[0]
        return torch.stack([self._images[removed] for removed in without])


class _Logits:
    """Logits of one model for a scene without sets of its elements; each set is sent through it once."""

    def __init__(self, scene: _Scene, model: nn.Module) -> None:
        self.scene, self.model = scene, model
        self._known: dict[frozenset[Element], Tensor] = {}

    def __call__(self, without: Sequence[frozenset[Element]]) -> Tensor:
        """(len(without), K)."""
        if new := [removed for removed in dict.fromkeys(without) if removed not in self._known]:
            self._known |= dict(zip(new, self.model(self.scene.images(new)), strict=True))
        return torch.stack([self._known[removed] for removed in without])


def _score(scene: _Scene, name: str, explained: ExplainedModel) -> list[tuple[Row, dict[str, Tensor]]]:
    """Rows of one scene and model, and for each row the scores (T,) that need a threshold."""
    classes, own = scene.classes, scene.own
    logits_without = _Logits(scene, explained.model)
    singles = [frozenset([each]) for each in scene.elements]
    of_class = [frozenset(_chosen(scene.elements, members)) for members in own]
    logits = logits_without([frozenset(), frozenset(scene.objects), *singles, *of_class])
    finds = _finds(logits[:1], explained.spec.task)[0, classes]  # (C,)
    whole, empty = logits[0, classes].double(), logits[1, classes].double()
    left, left_of_class = logits[2:, classes].double().split([len(singles), len(of_class)])
    drops_CE, drops_CC = (whole - left).T, (whole - left_of_class).T
    count = len(scene.objects)

    found = []
    for explanation, maps_CHW in _maps(scene, explained):
        sums_CE = torch.einsum("chw,ehw->ce", maps_CHW.double(), scene.footprints.double())
        scores = {
            "single_deletion": removal_correlation(sums_CE[:, :count], drops_CE[:, :count]),
            "single_deletion_with_clutter": removal_correlation(sums_CE, drops_CE),
            "most_important_object": names_most_important(sums_CE[:, :count], drops_CE[:, :count]),
            "target_sensitivity": target_sensitivity(sums_CE @ own.double().T, drops_CC),
        }
        chosen_CTE = important(sums_CE, maps_CHW.double().clamp_min(0).sum((1, 2)))
        kept, removed = _finds_without(scene, logits_without, explained.spec.task, chosen_CTE[..., :count])
        checks = dict(
            zip(CHECKS, (data_check(chosen_CTE, own), kept.double(), 1 - removed.double()), strict=True)
        )
        of_thresholds = {
            check: each.masked_fill(~finds[:, None], torch.nan) for check, each in checks.items()
        }
        of_thresholds["distractibility"] = distractibility(chosen_CTE, drops_CE, whole - empty)
        broken = (sums_CE.isnan().any(1) | drops_CE.isnan().any(1))[:, None]
        of_thresholds = {key: each.masked_fill(broken, torch.nan) for key, each in of_thresholds.items()}
        for place, label in enumerate(classes.tolist()):
            of_row = row(
                scene.key, name, label, explanation, {key: each[place] for key, each in scores.items()}
            )
            found.append((of_row, {key: each[place].cpu() for key, each in of_thresholds.items()}))
    return found


def _maps(scene: _Scene, explained: ExplainedModel) -> list[tuple[str, Tensor]]:
    """Explanations of the whole scene for its classes, as pairs of name and maps (C, H, W)."""
    image = scene.images([frozenset()])
    maps = []
    for name, attribution in explained.explanations.items():
        maps.append((name, explain(explained.model, image, scene.classes[None], attribution)[1][0]))
    uniform = torch.ones(len(scene.classes), *image.shape[-2:], device=image.device)
    return [*maps, (UNIFORM, uniform)]


def _finds_without(
    scene: _Scene, logits_without: _Logits, task: str, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Does the model find each class with only the chosen objects kept, and with them removed? (C, T) each.

    `chosen` (C, T, objects) is of bool and has few different rows.
    """
    different, place = chosen.flatten(0, 1).unique(dim=0, return_inverse=True)
    removed = [frozenset(_chosen(scene.objects, row)) for row in (*~different, *different)]
    finds = _finds(logits_without(removed), task)[:, scene.classes].view(2, len(different), -1)
    own_class = torch.arange(len(scene.classes), device=chosen.device)[:, None]
    without_others, without_chosen = finds[:, place.view(chosen.shape[:2]), own_class]
    return without_others, without_chosen


def _finds(logits: Tensor, task: str) -> Tensor:
    """(N, K) of bool, True for the classes that a model finds, by its logits (N, K)."""
    return F.one_hot(logits.argmax(1), logits.shape[1]).bool() if task == "multiclass" else logits >= 0


def _chosen(elements: Sequence[Element], members: Tensor) -> list[Element]:
    """The elements for which `members`, of bool, is True."""
    return [each for each, member in zip(elements, members.tolist(), strict=True) if member]


def _best_thresholds(found: Sequence[tuple[Row, dict[str, Tensor]]]) -> dict[str, dict[str, float]]:
    """Model -> explanation -> threshold with the best completeness, the lowest of ties."""
    groups: dict[tuple[str, str], list[dict[str, Tensor]]] = {}
    for each, of_thresholds in found:
        groups.setdefault((each["model"], each["explanation"]), []).append(of_thresholds)
    best: dict[str, dict[str, float]] = {}
    for (model, explanation), of_rows in groups.items():
        means = {key: torch.stack([each[key] for each in of_rows]).nanmean(0) for key in of_rows[0]}
        total = _completeness(means).nan_to_num(nan=-1)
        best.setdefault(model, {})[explanation] = IMPORTANCE_THRESHOLDS[int(total.argmax())]
    return best


def _completeness(scores: Mapping[str, Tensor]) -> Tensor:
    """Completeness from its four parts (T,)."""
    return (sum(scores[check] for check in CHECKS) / len(CHECKS) + scores["distractibility"]) / 2


def _at_threshold(of_thresholds: Mapping[str, Tensor], threshold: float) -> dict[str, float]:
    """The defined scores of a row at its explanation's threshold."""
    place = IMPORTANCE_THRESHOLDS.index(threshold)
    scores = {**of_thresholds, "completeness": _completeness(of_thresholds)}
    return measured({key: values[place] for key, values in scores.items()})
