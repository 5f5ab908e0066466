"""Deletion, insertion and single deletion of several models on a sample of a split."""

import math
from functools import partial

import pytest
import torch

from pipelines.attribution import attribute
from pipelines.bcos import add_inverse
from pipelines.data.drawing.scene import CLASSES
from pipelines.data.loading.loader import loader
from pipelines.distributed import Context
from pipelines.evaluation import faithfulness
from pipelines.evaluation.faithfulness import evaluate_faithfulness
from pipelines.metrics import deletion, insertion
from pipelines.params import DataParams
from tests.support.drawn import drawn_shards
from tests.support.linear import linear_model

DATA = DataParams(image_size=16)
OPTIONS = {"steps": 4, "batch_size": 7}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return drawn_shards(
        tmp_path_factory.mktemp("scenes"),
        20,
        variant="scenes",
        objects_per_image=(1, 3),
        image_size=16,
        counts={"train": 1, "val": 1, "test": 30},
    )


@pytest.fixture
def models():
    return {
        "one": linear_model(CLASSES, 16, "multilabel"),
        "other": linear_model(CLASSES, 16, "multiclass", seed=1),
    }


def test_rows_are_the_metrics_of_each_image_and_class(models, shards):
    found = evaluate_faithfulness(Context(), models, shards, DATA, count=10, **OPTIONS)
    (batch,) = loader(shards, "test", DATA, 30)
    probability = {"one": torch.sigmoid, "other": partial(torch.softmax, dim=1)}
    assert len({row["key"] for row in found.rows}) == 10
    for row in found.rows:
        place = batch["key"].index(row["key"])
        assert batch["labels"][place, row["class"]]
        model, image = models[row["model"]].model, add_inverse(batch["image"][place : place + 1])
        target = torch.tensor([row["class"]])
        maps = attribute(model, image, target, method="input_x_gradient")
        options = {"steps": 4, "probability": probability[row["model"]]}
        assert row["deletion"] == pytest.approx(
            deletion(model, image, maps, target, **options).item(), abs=1e-5
        )
        assert row["insertion"] == pytest.approx(
            insertion(model, image, maps, target, **options).item(), abs=1e-5
        )
        assert row["single_deletion"] == pytest.approx(1)  # the terms of a linear model
    per_model = [sum(row["model"] == name for row in found.rows) for name in models]
    chosen = [batch["key"].index(key) for key in {row["key"] for row in found.rows}]
    assert per_model == [int(batch["labels"][chosen].sum())] * 2


def test_mean_curves_have_the_mean_areas(models, shards):
    found = evaluate_faithfulness(Context(), models, shards, DATA, count=10, **OPTIONS)
    for name in models:
        for kind, curve in found.curves[name]["terms"].items():
            mean = [row[kind] for row in found.rows if row["model"] == name]
            assert len(curve) == 5
            assert torch.trapezoid(torch.tensor(curve), dx=1 / 4).item() == pytest.approx(
                sum(mean) / len(mean)
            )


def test_the_sample_is_seeded(models, shards):
    def keys(**options):
        return [
            row["key"]
            for row in evaluate_faithfulness(Context(), models, shards, DATA, **options, **OPTIONS).rows
        ]

    drawn = keys(count=8)
    assert drawn == sorted(drawn) == keys(count=8)
    assert drawn != keys(count=8, seed=1)
    assert len(set(keys(count=200))) == 30


def test_workers_share_the_images(models, shards, monkeypatch):
    alone = evaluate_faithfulness(Context(), models, shards, DATA, count=9, **OPTIONS).rows
    monkeypatch.setattr(faithfulness, "gather", lambda value, context: [value])
    parts = [
        evaluate_faithfulness(Context(rank, 2), models, shards, DATA, count=9, **OPTIONS) for rank in range(2)
    ]
    together = sorted((row for part in parts for row in part.rows), key=lambda row: row["key"])
    assert [list(row.values())[:4] for row in together] == [list(row.values())[:4] for row in alone]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_model_with_nan_has_no_scores(models, shards):
    models["one"].model.weights.fill_(math.nan)
    found = evaluate_faithfulness(Context(), models, shards, DATA, count=5, **OPTIONS)
    assert all(
        set(row) == {"key", "model", "class", "explanation"} for row in found.rows if row["model"] == "one"
    )
    assert all("deletion" in row for row in found.rows if row["model"] == "other")
