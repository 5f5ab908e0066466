"""Scores by removal of objects, on linear models, whose drops have a closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from pipelines.bcos import add_inverse
from pipelines.data.drawing.scene import CLASSES, Element, place_of, render
from pipelines.data.loading.loader import loader
from pipelines.distributed import Context
from pipelines.evaluation import removal
from pipelines.evaluation.removal import CHECKS, UNIFORM, _Scene, evaluate_removal, sample_keys
from pipelines.metrics import IMPORTANCE_THRESHOLDS
from pipelines.params import DataParams, ScenesParams
from tests.support.drawn import drawn_shards
from tests.support.linear import LinearClassifier, linear_model

COUNTS = {"train": 1, "val": 1, "test": 30}
OBJECTS = ScenesParams(source="scenes", counts=COUNTS, image_size=32)
SCENES = ScenesParams(
    source="scenes", variant="scenes", counts=COUNTS, image_size=32, objects_per_image=(1, 3)
)
DATA = DataParams(image_size=32)
KEYS = sample_keys(SCENES, "test", 12)


def found(models, params=SCENES, keys=KEYS, **options):
    return evaluate_removal(Context(), models, params, keys, DATA, **options)


def picture(key: str, *without: Element) -> torch.Tensor:
    pixels = render(SCENES, *place_of(key), without).pixels
    return add_inverse(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]


def test_the_network_sees_the_stored_image(tmp_path):
    shards = drawn_shards(tmp_path, 20, **SCENES.model_dump(exclude={"source", "shard_size"}))
    smaller = DataParams(image_size=24)
    (batch,) = loader(shards, "test", smaller, 30)
    for key, image in zip(batch["key"], batch["image"], strict=True):
        (seen,) = _Scene(SCENES, key, smaller, torch.device("cpu")).images([frozenset()])
        assert torch.equal(seen, add_inverse(image[None])[0])


def test_footprints_are_the_pixels_that_change():
    scene = _Scene(SCENES, KEYS[3], DATA, torch.device("cpu"))
    for element, footprint in zip(scene.elements, scene.footprints, strict=True):
        changed = (picture(KEYS[3], element) != picture(KEYS[3])).any(0)
        assert torch.equal(footprint, changed)
        assert footprint.any()


def test_scores_of_a_linear_model_are_those_of_its_terms():
    model = linear_model(CLASSES, 32, "multilabel")
    rows = {
        (row["key"], row["class"]): row
        for row in found({"linear": model}).rows
        if row["explanation"] == "terms"
    }
    weights, checked = model.model.weights.double(), 0
    for key in KEYS:
        scene = render(SCENES, *place_of(key))
        whole = picture(key).double()
        assert {label for of, label in rows if of == key} == set(scene.labels)
        for label in set(scene.labels):
            drops, sums = [], []
            for number in range(1, len(scene.labels) + 1):
                gone = picture(key, Element("object", number)).double()
                drops.append(float((weights[label] * (whole - gone)).sum()))
                footprint = (whole != gone).any(0)
                sums.append(float((weights[label] * (whole - 0.5))[:, footprint].sum()))
            row = rows[key, label]
            if len(drops) == 1:
                assert {"single_deletion", "most_important_object", "target_sensitivity"}.isdisjoint(row)
                assert 0 <= row["single_deletion_with_clutter"] <= 1
                continue
            assert row["single_deletion"] == pytest.approx(
                (1 + spearman_corrcoef(torch.tensor(drops), torch.tensor(sums)).item()) / 2, abs=1e-5
            )
            if max(drops) > 0:
                right = max(range(len(drops)), key=drops.__getitem__) == max(
                    range(len(sums)), key=sums.__getitem__
                )
                assert row["most_important_object"] == right
            else:
                assert "most_important_object" not in row
            checked += 1
    assert checked > 8


class Finder(LinearClassifier):
    """Logits are those of a linear classifier minus `offset` (K,)."""

    def __init__(self, weights: torch.Tensor, offset: torch.Tensor) -> None:
        super().__init__(weights)
        self.offset = offset

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) - self.offset


@pytest.mark.parametrize("right", [True, False])
def test_checks_remove_the_objects_that_an_explanation_calls_important(right, monkeypatch):
    """The network finds a class by its object alone. A map lies on this object, or on the other one."""
    for key in KEYS:
        scene = _Scene(SCENES, key, DATA, torch.device("cpu"))
        if len(scene.classes) == len(scene.objects) == 2 and not scene.footprints[:2].all(0).any():
            break
    own = scene.own[:, :2].int().argmax(1)  # object of each class
    weights, offset = torch.zeros(len(CLASSES), 6, 32, 32), torch.ones(len(CLASSES))
    for label, number in zip(scene.classes.tolist(), own.tolist(), strict=True):
        weights[label] = picture(key) - picture(key, scene.objects[number])
        offset[label] = (weights[label] * (picture(key) - 0.5 * weights[label])).sum()
    model = replace(linear_model(CLASSES, 32, "multilabel"), model=Finder(weights, offset))
    maps = scene.footprints[own if right else 1 - own].float()
    monkeypatch.setattr(removal, "_maps", lambda scene, explained: [("map", maps)])
    rows = found({"m": model}, keys=[key]).rows
    assert [row["class"] for row in rows] == scene.classes.tolist()
    for row in rows:
        for score in ("single_deletion", "most_important_object", "target_sensitivity", *CHECKS):
            assert row[score] == right, score
        assert row["completeness"] == pytest.approx((right + row["distractibility"]) / 2)
        assert row["distractibility"] == 1 or not right


def test_one_object_an_image():
    models = {"linear": linear_model(CLASSES, 32, "multiclass")}
    keys = sample_keys(OBJECTS, "test", 8)
    scores = found(models, OBJECTS, keys)
    assert len(scores.rows) == 8 * 2
    for row in scores.rows:
        assert {"single_deletion", "most_important_object", "target_sensitivity"}.isdisjoint(row)
        assert 0 <= row["single_deletion_with_clutter"] <= 1


def test_a_model_that_ignores_the_image_has_no_scores():
    model = linear_model(CLASSES, 32, "multilabel")
    model.model.weights.zero_()
    for row in found({"m": model}, keys=KEYS[:3]).rows:
        missing = {
            "single_deletion",
            "single_deletion_with_clutter",
            "most_important_object",
            "target_sensitivity",
        }
        assert (missing | {"distractibility", "completeness"}).isdisjoint(row)


def test_a_model_with_nan_has_no_scores():
    model = linear_model(CLASSES, 32, "multilabel")
    model.model.weights.fill_(math.nan)
    rows = found({"m": model}, keys=KEYS[:3]).rows
    assert rows
    assert all(set(row) == {"key", "model", "class", "explanation"} for row in rows)


def test_workers_share_the_images(monkeypatch):
    models = {
        "a": linear_model(CLASSES, 32, "multilabel"),
        "b": linear_model(CLASSES, 32, "multiclass", seed=1),
    }
    alone = found(models, keys=KEYS[:6])
    parts = [
        evaluate_removal(Context(rank, 2), models, SCENES, KEYS[:6], DATA, alone.thresholds)
        for rank in range(2)
        if not monkeypatch.setattr(removal, "gather", lambda value, context: [value])
    ]
    together = sorted((row for part in parts for row in part.rows), key=lambda row: row["key"])
    assert together == alone.rows


def test_thresholds_of_other_images_are_taken_over():
    models = {"linear": linear_model(CLASSES, 32, "multilabel")}
    high = {"linear": {"terms": IMPORTANCE_THRESHOLDS[-1], UNIFORM: IMPORTANCE_THRESHOLDS[-1]}}
    scores = found(models, thresholds=high)
    assert scores.thresholds == high
    chosen = found(models)
    assert set(chosen.thresholds["linear"]) == {"terms", UNIFORM}

    def mean(rows):
        values = [
            row["completeness"] for row in rows if row["explanation"] == UNIFORM and "completeness" in row
        ]
        return sum(values) / len(values)

    assert mean(chosen.rows) >= mean(scores.rows)
