"""The stages of CLIP at toy size, in this process: train two towers, B-cosify one, evaluate."""

import json

import pytest

from pipelines import models
from stages import clip, evaluate_clip, fetch, image_text, shard
from stages.tools import explain_text
from tests.support.project import Workspace, refused

pytestmark = pytest.mark.graph

TOY = (
    "datasets.captioned.counts={train: 48, val: 24, test: 24}",
    "clip.towers=[cnn]",
    *(
        "clip.cnn.pretrain.optim.epochs=1",
        "clip.cnn.pretrain.optim.batch_size=24",
        "clip.cnn.pretrain.optim.warmup_steps=1",
    ),
    *(
        "clip.cnn.bcosify.optim.epochs=1",
        "clip.cnn.bcosify.optim.batch_size=24",
        "clip.evaluate.pictures=1",
        "training.workers=0",
    ),
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    toy = Workspace(tmp_path)
    toy.compose(*TOY, recipe="clip_scenes")
    fetch.main("captioned")
    shard.main("captioned")
    return toy


def test_a_pair_is_trained_b_cosified_evaluated_and_explained(toy, tmp_path):
    for tower in ("cnn", "vit"):
        image_text.main(tower)
        clip.main(tower)
    assert toy.read("models/clip/vit/left-out.json") == {"because of": "clip.towers"}
    original, bcos = (models.read_spec(tmp_path / f"models/{stage}/cnn") for stage in ("image_text", "clip"))
    assert (original.kind, bcos.kind, original.task, bcos.task) == (
        "conventional",
        "bcos",
        "embedding",
        "embedding",
    )
    assert bcos.design["projection"] == "linear"
    texts = [
        models.load_text_tower(tmp_path / f"models/{stage}/cnn").encode(["a circle"])
        for stage in ("image_text", "clip")
    ]
    assert texts[0].equal(texts[1])
    evaluate_clip.main()
    found = toy.read("reports/evaluate_clip/metrics.json")
    assert set(found) == {"zero_shot", "linear_probe", "retrieval", "text_localisation"}
    assert all(set(of_models["models"]) == {"cnn_original", "cnn_bcos"} for of_models in found.values())
    assert found["retrieval"]["images"] == found["zero_shot"]["images"] == 24
    localised = found["text_localisation"]["models"]
    assert localised["cnn_bcos"]["bcos"]["unexplained_share"] < 1e-3
    assert set(localised["cnn_original"]) == {"gradcam"}
    (picture,) = (tmp_path / "reports/evaluate_clip/pictures").glob("*.png")
    explain_text.main(["models/clip/cnn", str(picture), "a red circle", "a star", "--out", "explained.png"])
    assert (tmp_path / "explained.png").stat().st_size > 0


def test_data_without_captions_is_refused_before_training(toy, tmp_path):
    manifest = tmp_path / "data/shards/captioned/manifest.json"
    content = json.loads(manifest.read_text())
    content["fields"]["val"] = ["boxes"]
    manifest.write_text(json.dumps(content))
    assert "clip.pairs: no image of val in captioned has a caption" in refused(image_text.main, "cnn")


def test_data_without_labels_cannot_teach_them(toy, tmp_path):
    manifest = tmp_path / "data/shards/captioned/manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "classes": [], "task": "unlabelled"}))
    assert "clip.cnn.pretrain.label_weight: captioned has no labels" in refused(image_text.main, "cnn")
