"""Records: all figures follow from the stored tables, and each row from the model and its image."""

import pytest
import torch

from pipelines import models
from pipelines.attribution import attribute
from pipelines.bcos import add_inverse
from pipelines.data.loading.loader import loader
from pipelines.evaluation import evaluate, figures
from pipelines.evidence import Records
from pipelines.evidence.intervals import OF_EXPLANATIONS, OF_MODELS, interval, intervals, parts
from pipelines.metrics import THRESHOLDS, attribution_iou, box_masks, energy_pointing_game
from pipelines.params import DataParams, EvaluateParams
from pipelines.training import Context
from tests.support.drawn import drawn_shards, flat, known_by_heart, untrained_on_scenes

pytestmark = pytest.mark.xdist_group("records")  # one xdist worker trains the models for all tests

DATA = DataParams(image_size=32, augment="none")
PARAMS = EvaluateParams(batch_size=7, grid_size=2, grid_count=6, grid_batch=4, smooth=3, pictures=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    counts = {"train": 10, "val": 10, "test": 50}
    return drawn_shards(tmp_path_factory.mktemp("objects"), 20, image_size=32, counts=counts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    return known_by_heart(tmp_path_factory.mktemp("models"), shards, DATA)


@pytest.fixture(scope="module")
def records(trained, shards):
    return evaluate(Context(), trained, shards, DATA, PARAMS, teacher="bcos")


@pytest.fixture(scope="module")
def batch(shards):
    (batch,) = loader(shards, "test", DATA, 50)
    return batch


def test_stored_tables_give_the_same_figures(records, tmp_path):
    records.save(tmp_path)
    again = Records.load(tmp_path)
    assert again.facts == records.facts
    assert dict(flat(figures(again))) == pytest.approx(dict(flat(figures(records))), abs=1e-12)


def of_scenes(tmp_path):
    """Records of an untrained multi-label network."""
    return evaluate(Context(), *untrained_on_scenes(tmp_path, DATA), DATA, PARAMS)


def test_multilabel_tables_give_the_same_figures(tmp_path):
    records = of_scenes(tmp_path)
    records.save(tmp_path / "records")
    found = dict(flat(figures(Records.load(tmp_path / "records"))))
    assert found == pytest.approx(dict(flat(figures(records))), abs=1e-12)
    assert {"models/bcos/mean_average_precision", "models/bcos/explanations/bcos/on_object_epg"} <= set(found)
    assert len(records.explanations) == sum(map(len, records.predictions["labels"]))


def test_a_prediction_is_that_of_the_model(records, trained, batch):
    model, _ = models.load(trained["bcos"])
    with torch.no_grad():
        logits = model(add_inverse(batch["image"]))
    rows = records.predictions.query("model == 'bcos'").set_index("key").loc[batch["key"]]
    shares, best = logits.double().softmax(1), logits.topk(2)
    assert rows["prediction"].tolist() == best.indices[:, 0].tolist()
    assert rows["runner_up"].tolist() == best.indices[:, 1].tolist()
    assert rows["runner_up_logit"].tolist() == pytest.approx(best.values[:, 1].tolist(), abs=1e-5)
    assert rows["true_probability"].tolist() == pytest.approx(
        shares.gather(1, batch["label"][:, None])[:, 0].tolist(), abs=1e-5
    )
    assert rows["right"].tolist() == (best.indices[:, 0] == batch["label"]).tolist()


def test_an_explanation_sums_to_its_logit_and_is_scored_on_its_box(records, trained, batch):
    model, _ = models.load(trained["bcos"])
    images, targets = add_inverse(batch["image"]), batch["label"]
    maps = attribute(model, images, targets)
    masks = box_masks(batch["boxes"], targets, maps.shape[-2:])
    rows = records.explanations.query("model == 'bcos'").set_index("key").loc[batch["key"]]
    assert rows["epg"].tolist() == pytest.approx(energy_pointing_game(maps, masks).tolist(), abs=1e-5)
    assert rows["contributions"].add(rows["logit_bias"]).tolist() == pytest.approx(
        rows["logit"].tolist(), rel=1e-3, abs=1e-4
    )
    assert rows["contributions_as_published"].tolist() == pytest.approx(maps.sum((1, 2)).tolist(), rel=1e-3)
    for threshold in THRESHOLDS[::5]:
        expected = attribution_iou(maps, masks, threshold)
        assert rows[f"iou_at_{threshold}"].tolist() == pytest.approx(expected.tolist(), abs=0.02)


def test_a_students_similarity_is_that_of_the_dynamic_weights_or_of_gradcam(records, trained, batch):
    rows = records.predictions.set_index("model")["explanation_similarity"]
    assert rows["bcos"].isna().all()
    assert rows["conventional"].between(-1, 1).all()


def test_grids_name_their_images(records):
    shared = records.grids.query("game == 'gridpg' and model == 'bcos'")
    labels = records.predictions.query("model == 'bcos'").set_index("key")["labels"]
    assert len(shared) == 6 * 4
    assert [labels[key][0] for key in shared["key"]] == shared["class"].tolist()
    assert figures(records)["models"]["bcos"]["explanations"]["bcos"]["gridpg"] == pytest.approx(
        shared["score"].astype(float).mean(), abs=1e-12
    )


def test_the_parts_of_a_figure_give_the_figure(records):
    found = figures(records)["models"]["conventional"]
    measured = [(name, None, found[name]) for name in OF_MODELS if name in found]
    measured += [
        (name, explanation, scores[name])
        for explanation, scores in found["explanations"].items()
        for name in OF_EXPLANATIONS
        if name in scores
    ]
    names = {name for name, _, _ in measured}
    assert names >= {
        "accuracy",
        "agreement",
        "explanation_similarity",
        "epg",
        "iou",
        "gridpg",
        "unexplained_share",
    }
    for name, explanation, value in measured:
        columns = parts(records, "conventional", name, explanation)
        assert columns["top"].sum() / columns["bottom"].sum() == pytest.approx(value, abs=1e-12), name
        assert interval(columns).value == pytest.approx(value, abs=1e-12)


def test_the_parts_of_f1_give_f1(tmp_path):
    records = of_scenes(tmp_path)
    columns = parts(records, "bcos", "f1")
    assert len(columns) == 12
    assert columns["top"].sum() / columns["bottom"].sum() == pytest.approx(
        figures(records)["models"]["bcos"]["f1"]
    )


def test_figures_that_were_not_measured_have_no_parts(records):
    assert parts(records, "bcos", "explanation_similarity").empty
    assert parts(records, "bcos", "epg", "nothing").empty
    with pytest.raises(ValueError, match="one of accuracy, f1"):
        parts(records, "bcos", "acuracy")


@pytest.mark.parametrize("of", ["records", "scenes"])
def test_intervals_are_those_of_the_figures(of, records, tmp_path):
    records = records if of == "records" else of_scenes(tmp_path)
    found = dict(flat(figures(records)["models"]))
    bounds = dict(flat(intervals(records)))
    values = {name.removesuffix("/value"): value for name, value in bounds.items() if name.endswith("/value")}
    assert {name.rpartition("/")[2] for name in values} >= {"epg", "iou"}
    assert values == pytest.approx({name: found[name] for name in values}, abs=1e-12)
    assert all(bounds[f"{name}/low"] <= value <= bounds[f"{name}/high"] for name, value in values.items())
