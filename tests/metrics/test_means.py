"""Means over nothing are NaN, and every metric has a direction."""

import math

import pytest
import torch
from torch import nn

from pipelines.methods import E2KD, Guidance, Pretrain
from pipelines.methods.guidance import ObjectClassification
from pipelines.metrics import (
    Agreement,
    CalibrationError,
    IoU,
    LocalisationMetric,
    PointingGame,
    higher_is_better,
    measured,
    multiclass_metrics,
    multilabel_metrics,
    rising,
    with_arrows,
)
from pipelines.models import ModelSpec
from pipelines.params import DistillationParams, GuidanceParams, ImageTextParams
from tests.support import toy_tower
from tests.support.method_params import method_params

GUIDANCE = method_params(GuidanceParams, batch_size=4, localisation_weight=0.5)
NETWORK = nn.Linear(2, 8)


def student(labelled=True):
    spec = ModelSpec("toy", tuple("abcdefgh"), 8, "bcos")
    return E2KD(NETWORK, spec, nn.Linear(2, 8), method_params(DistillationParams), None, labelled)


METHODS = [
    Pretrain(NETWORK, "multiclass", 8),
    Pretrain(NETWORK, "multilabel", 8),
    student(),
    student(labelled=False),
    ObjectClassification(NETWORK, "multiclass", 8),
    Guidance(NETWORK, "multilabel", 8, GUIDANCE),
    toy_tower.taught(toy_tower.clip_params()),
    toy_tower.pair(method_params(ImageTextParams)),
]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize(
    "method", METHODS, ids=lambda method: f"{type(method).__name__}-{getattr(method, 'task', 'embedding')}"
)
def test_nothing_is_measured_on_no_image(method):
    assert measured(method.metrics().compute()) == {}


@pytest.mark.parametrize(
    "method", METHODS, ids=lambda method: f"{type(method).__name__}-{getattr(method, 'task', 'embedding')}"
)
def test_the_direction_of_a_name_is_that_of_the_metric(method):
    for name, metric in method.metrics().items():
        for figure, direction in getattr(metric, "figures", {name: metric.higher_is_better}).items():
            assert higher_is_better(f"val/{figure}") is direction


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("make", [Agreement, CalibrationError, IoU, LocalisationMetric, PointingGame])
def test_every_metric_of_nothing_is_absent(make):
    value = make().compute()
    values = value if isinstance(value, dict) else {"value": value}
    assert set(measured(values)) <= {"count", "undefined"}
    assert sum(measured(values).values()) == 0


def test_a_model_that_decides_for_no_class_has_a_recall_and_no_precision():
    metrics = multilabel_metrics(2)
    metrics.update(torch.full((3, 2), -1.0), torch.tensor([[1, 0], [0, 1], [0, 0]]))
    assert measured(metrics.compute()) == {"f1": 0.0, "recall": 0.0}
    unlabelled = multilabel_metrics(2)
    unlabelled.update(torch.tensor([[1.0, -1.0]]), torch.tensor([[0, 0]]))
    assert measured(unlabelled.compute()) == {"f1": 0.0, "precision": 0.0}


def test_logits_that_are_no_numbers_have_no_calibration():
    metrics = multiclass_metrics(3)
    metrics.update(torch.full((2, 3), math.nan), torch.tensor([0, 1]))
    assert "calibration_error" not in measured(metrics.compute())


def test_undefined_pairs_count_as_0_beside_defined_ones_and_missing_ones_never():
    metric = LocalisationMetric()
    metric.update(torch.zeros(2), torch.ones(2, dtype=torch.bool))
    assert "mean" not in measured(metric.compute())
    metric.update(
        torch.tensor([0.9, 0.6]), torch.zeros(2, dtype=torch.bool), missing=torch.tensor([True, False])
    )
    assert measured(metric.compute()) == {"mean": pytest.approx(0.2), "count": 3, "undefined": 3}


def test_what_falls_is_turned_and_marked():
    assert [
        rising(name, 0.5) for name in ("val/accuracy", "val/calibration_error", "train/distillation")
    ] == [0.5, -0.5, -0.5]
    assert with_arrows(["val/epg_small", "val/unexplained_share"]) == [
        "val/epg_small",
        "val/unexplained_share ↓",
    ]
    assert higher_is_better("train/explanation") is False
    assert [
        higher_is_better(name) for name in ("train/lr", "train/b_mean", "val/iou_threshold", "val/skipped")
    ] == [None] * 4
