"""The IoU threshold is chosen on validation per model and explanation; unmeasured scores are absent."""

import json
import shutil

import pandas
import pytest
import torch

from pipelines import models
from pipelines.attribution import attribute
from pipelines.bcos import add_inverse
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import MANIFEST
from pipelines.evaluation import evaluate, figures
from pipelines.evaluation.figures import explanation_figures
from pipelines.evaluation.predictions import Predictions
from pipelines.evaluation.scores import Regions, localisation_columns
from pipelines.evaluation.thresholds import best_thresholds, with_iou
from pipelines.metrics import THRESHOLDS, attribution_iou, box_masks
from pipelines.models import ModelSpec
from pipelines.params import DataParams, EvaluateParams
from pipelines.training import Context
from tests.support.drawn import CLASSES, drawn_shards

DATA = DataParams(image_size=32, augment="none")
PARAMS = EvaluateParams(
    batch_size=7, grid_size=2, grid_count=6, grid_batch=4, smooth=3, pictures=3, posthoc=("gradcam",)
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return drawn_shards(
        tmp_path_factory.mktemp("objects"), 20, image_size=32, counts={"train": 2, "val": 12, "test": 14}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("conventional", "bcos"):
        torch.manual_seed(0)
        spec = ModelSpec("resnet8", CLASSES, 32, kind)
        models.save(folder / kind, models.assemble(spec), spec)
    return {kind: str(folder / kind) for kind in ("conventional", "bcos")}


def mean_iou(shards, split, folder, method, threshold):
    (batch,) = loader(shards, split, DATA, 50)
    model, _ = models.load(folder)
    maps = attribute(model, add_inverse(batch["image"]), batch["label"], method=method)
    return (
        attribution_iou(maps, box_masks(batch["boxes"], batch["label"], maps.shape[-2:]), threshold)
        .double()
        .mean()
        .item()
    )


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_threshold_is_the_best_of_the_list_on_validation(shards, folders, split):
    found = figures(evaluate(Context(), folders, shards, DATA, PARAMS, split))["models"]
    for name, method in (("conventional", "gradcam"), ("bcos", "bcos")):
        scores = found[name]["explanations"][method]
        on_val = [mean_iou(shards, "val", folders[name], method, threshold) for threshold in THRESHOLDS]
        assert on_val[THRESHOLDS.index(scores["iou_threshold"])] == pytest.approx(max(on_val), abs=1e-6)
        expected = {
            key: mean_iou(shards, split, folders[name], method, t)
            for key, t in (("iou", scores["iou_threshold"]), ("iou_at_0.5", 0.5))
        }
        assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_without_boxes_in_validation_there_is_no_iou_but_at_one_half(shards, folders, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "shards")
    content = json.loads((copy / MANIFEST).read_text())
    content["fields"]["val"] = []
    (copy / MANIFEST).write_text(json.dumps(content))
    found = figures(evaluate(Context(), {"bcos": folders["bcos"]}, str(copy), DATA, PARAMS))
    scores = found["models"]["bcos"]["explanations"]["bcos"]
    assert "iou_at_0.5" in scores
    assert not {"iou", "iou_threshold", "iou_small", "iou_medium"} & set(scores)
    assert "NaN" not in json.dumps(found)


def scores_of(masks, boxed):
    """Figures of flat maps against these masks."""
    columns = localisation_columns(torch.ones(len(masks), 8, 8), Regions(boxed, masks, None))
    rows = pandas.DataFrame({name: values.numpy() for name, values in columns.items()})
    rows = rows.assign(model="model", explanation="map")
    return explanation_figures(with_iou(rows, best_thresholds(rows)))


def test_pairs_whose_boxes_cover_no_pixel_or_all_of_them_are_counted():
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[0], masks[1, :4] = True, True
    found = scores_of(masks, torch.tensor([True, True, True, False]))
    assert (found["pairs_without_box"], found["pairs_with_empty_boxes"], found["pairs"]) == (1, 1, 2)
    assert (found["epg"], found["epg_undefined"]) == (0.75, 0)
    # Boxes that cover the whole image leave no size-corrected score.
    assert (found["size_corrected_epg"], found["size_corrected_epg_undefined"]) == (0.0, 1)
    assert (found["pairs_large"], found["epg_large"]) == (2, 0.75)


def test_a_map_that_is_not_a_number_leaves_no_mean():
    columns = localisation_columns(
        torch.tensor([1.0, torch.nan])[:, None, None].expand(2, 8, 8),
        Regions(torch.tensor([True, True]), torch.ones(2, 8, 8, dtype=torch.bool), None),
    )
    rows = pandas.DataFrame({name: values.numpy() for name, values in columns.items()})
    found = explanation_figures(rows)
    assert found["pairs"] == 2
    assert not {"epg", "iou_at_0.5"} & set(found)


def test_boxes_that_cover_no_pixel_measure_nothing():
    found = scores_of(torch.zeros(3, 8, 8, dtype=torch.bool), torch.tensor([True, True, False]))
    assert found["pairs"] == 0
    assert (found["pairs_with_empty_boxes"], found["pairs_without_box"]) == (2, 1)
    assert not {"epg", "size_corrected_epg", "iou", "iou_threshold", "iou_at_0.5"} & set(found)
    assert "NaN" not in json.dumps(found)


def test_boxes_of_whole_images_have_no_size_corrected_score():
    found = scores_of(torch.ones(2, 8, 8, dtype=torch.bool), torch.tensor([True, True]))
    assert found["epg"] == 1
    assert "size_corrected_epg" not in found
    assert found["size_corrected_epg_undefined"] == 2


@pytest.mark.parametrize(
    "labels", [torch.zeros(3, 2, dtype=torch.long), torch.tensor([[1, 0], [0, 1], [1, 1]])]
)
def test_decisions_about_nothing_are_absent(labels):
    predictions = Predictions(
        ["a", "b", "c"], labels, {"model": torch.full((3, 2), -1.0)}, torch.full((3,), -1)
    )
    found = predictions.decisions("model")
    assert set(found) == ({"f1", "recall", "mean_average_precision"} if labels.any() else set())


def test_unexplained_share_is_what_the_map_misses():
    rows = pandas.DataFrame({"logit": [1.0, -4.0], "logit_bias": -1.0, "contributions": 2.0})
    assert explanation_figures(rows) == {"unexplained_share": pytest.approx(5 / 5)}  # logits: 2 and -3
    rows.loc[2] = {"logit": 4.0, "logit_bias": -1.0, "contributions": 5.0}
    assert explanation_figures(rows) == {"unexplained_share": pytest.approx(5 / 10)}
