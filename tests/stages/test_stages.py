"""Stages in this process, on the outputs of the graph: with other params, and with bad ones."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import models, params
from pipelines.errors import UserError
from pipelines.tracking.server import connect, tracking_uri
from stages import (
    backbone,
    bcosify,
    classify,
    distill,
    evaluate,
    evaluate_guidance,
    explain,
    fetch,
    gates,
    guide,
    pretrain,
    register,
    search,
    shard,
    teacher,
)
from stages.tools import front_picture, summary
from tests.support.project import refused

pytestmark = pytest.mark.graph


def test_a_teacher_is_taken_from_the_registry(workspace):
    uri = workspace.read("reports/register.json")["uri"]
    shutil.rmtree("models/teacher")
    workspace.compose(f"distill.teacher={uri}", "distill.kd.optim.epochs=1")
    teacher.main()
    assert models.digest("models/teacher") == models.digest("models/bcosify/pretrained")
    distill.main("kd")
    assert workspace.read("reports/distill/kd/metrics.json")["epoch"] == 1
    workspace.compose("distill.teacher=models:/bcos-smoke@nobody")
    assert "nobody" in refused(teacher.main)


def test_students_learn_from_images_without_labels(workspace, tmp_path):
    for number in range(40):
        path = tmp_path / f"images/{'train' if number < 32 else 'val'}/{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    data = [
        "dataset=imagefolder",
        f"datasets.imagefolder.root={tmp_path}/images",
        "datasets.imagefolder.labelled=false",
    ]
    shape = ["data.image_size=32", "data.eval_resize=32", "data.augment=flip", "distill.shots=null"]
    workspace.compose(*data, *shape)
    fetch.main("imagefolder")
    shard.main("imagefolder")
    assert "no metric 'val/accuracy'; there are val/agreement" in refused(distill.main, "e2kd")
    assert "dataset: imagefolder has no labels" in refused(pretrain.main)
    workspace.compose(*data, *shape, "distill.e2kd.select=val/agreement")
    distill.main("e2kd")
    assert 0 <= workspace.read("reports/distill/e2kd/metrics.json")["val/agreement"] <= 1


def test_frozen_explanations_are_stored_once_and_learned_from(workspace):
    workspace.compose("distill.e2kd.explanations=frozen", "distill.frozen.resolution=16")
    shutil.rmtree("data/explanations")
    explain.main()
    index = workspace.read("data/explanations/explanations.json")
    assert sum(shard["count"] for shard in index["shards"]) == 60
    assert index["teacher"] == models.digest("models/teacher")
    distill.main("e2kd")
    assert workspace.read("reports/distill/e2kd/metrics.json")["train/explanation"] > 0


def test_a_pair_that_does_not_fit_ends_the_stage_before_training(workspace, capsys):
    workspace.compose("distill.teacher=models/pretrain")
    teacher.main()
    assert "distill.teacher: a conventional teacher has no dynamic weights" in refused(distill.main, "e2kd")
    assert "epoch" not in capsys.readouterr().out


def test_a_class_with_too_few_images_gives_all_of_them_and_one_line_says_so(workspace, caplog):
    workspace.compose("distill.shots=1000", "distill.kd.optim.epochs=0")
    distill.main("kd")
    assert workspace.read("models/distill/kd/subset.json")["count"] == 192
    assert [
        line
        for line in caplog.messages
        if line.startswith("shots: 1000 images a class; 10 of 10 classes have fewer in train")
    ]


def test_another_point_of_the_front_is_taken_without_training_again(workspace, capsys):
    front = workspace.read("reports/guide/front.json")
    assert [row["chosen"] for row in front].count(True) == 1
    workspace.compose("guide.guided.select=epg")
    guide.main()
    assert "epoch 1/2" not in capsys.readouterr().out
    best = max(row["val/epg"] for row in front)
    assert workspace.read("reports/guide/metrics.json")["val/epg"] == best
    workspace.compose("guide.guided.localisation_weight=0.5")
    guide.main()
    assert "epoch 1/2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "guide.guided.localisation_weight=-1",
            "guide.guided.localisation_weight: Input should be greater than or equal to 0 (got -1)",
        ),
        ("guide.guided.layer=body.layer33", "has no layer 'body.layer33'; near it: body.layer3"),
    ],
)
def test_what_cannot_be_guided_ends_the_stage_with_one_line(workspace, change, told):
    workspace.compose(change)
    assert told in refused(guide.main)


def test_the_search_is_not_run_again_with_the_values_of_one_of_its_trials(workspace, capsys):
    trials = workspace.read("reports/search/trials.json")
    workspace.compose(*(f"{key}={value}" for key, value in trials[1]["values"].items()))
    search.main()
    assert workspace.read("reports/search/trials.json") == trials
    assert "epoch" not in capsys.readouterr().out


def test_another_stage_is_searched_by_its_own_metrics(workspace, ray_workers):
    space = "search.space=[{key: guide.guided.loss, choice: [energy, l1]}]"
    changes = ["search.stage=guide", space, "search.asha=null", "search.trials=2", "search.shots=5"]
    workspace.compose(*changes, "search.metrics=[val/f1,val/iou]")
    search.main()
    trials = workspace.read("reports/search/trials.json")
    assert [(row["status"], row["values"]["guide.guided.loss"]) for row in trials] == [
        ("finished", "energy"),
        ("finished", "l1"),
    ]
    workspace.compose(*changes, "search.metrics=[val/f1,val/gridpg]")
    assert "search.metrics: no metric 'val/gridpg'; there are val/" in refused(search.main)


def test_with_a_storage_the_shards_are_read_there(workspace, tmp_path):
    storage = f"storage.root=file://{tmp_path}/storage"
    workspace.compose(storage)
    distill.main("kd")
    # A job on a cluster has no local shards.
    for path in workspace.folder.glob("data/shards/objects/*.tar"):
        path.unlink()
    shutil.rmtree("models/distill/kd")
    distill.main("kd")
    evaluate.main()
    assert workspace.read("models/distill/kd/subset.json")["count"] == 60
    workspace.compose(storage, "distill.e2kd.explanations=frozen")
    shutil.rmtree("data/explanations")
    explain.main()
    distill.main("e2kd")
    assert workspace.read("reports/distill/e2kd/metrics.json")["train/explanation"] > 0
    # Written to the storage, and read from it.
    assert len(list(tmp_path.glob("storage/explanations/*/explanations.json"))) == 1
    assert [path.name for path in workspace.folder.glob("data/explanations/*")] == ["explanations.json"]


def test_multilabel_data_and_the_baseline_from_scratch_run_through_all_stages(workspace, ray_workers, capsys):
    for folder in ("data", "models", "reports"):
        shutil.rmtree(folder)
    workspace.compose(
        "dataset=scenes",
        "datasets.scenes.image_size=32",
        "datasets.scenes.counts={train: 64, val: 32, test: 32}",
        "data.image_size=32",
        "model.name=resnet8",
        "training.workers=0",
        "pretrain.optim.epochs=1",
        "bcosify.starts=[pretrained, scratch]",
        "bcosify.pretrained.optim.epochs=1",
        "evaluate.pictures=2",
        "distill.shots=2",
        "distill.kd.optim.epochs=1",
        "distill.kd.optim.batch_size=8",
        "guide.classify.optim.epochs=1",
        "guide.guided.optim.epochs=1",
        "search.trials=2",
        "search.epochs=1",
        "gates=[{name: any, metric: f1, threshold: 0}, {name: none, metric: f1, threshold: 2}]",
        recipe="default",
    )
    fetch.main("scenes")
    shard.main("scenes")
    pretrain.main()
    bcosify.main("pretrained")
    bcosify.main("scratch")
    teacher.main()
    explain.main()
    distill.main("kd")
    distill.main("e2kd")
    evaluate.main()
    backbone.main()
    classify.main()
    guide.main()
    evaluate_guidance.main()
    search.main()
    gates.main()
    register.main()
    found = workspace.read("reports/evaluate/metrics.json")["models"]
    assert set(found) == {"conventional", "bcosified", "bcos_from_scratch"}
    assert all(0 <= of_model["f1"] <= 1 for of_model in found.values())
    uri = workspace.read("reports/register.json")["uri"]
    assert "bcos-scenes" in uri
    assert [gate["outcome"] for gate in workspace.read("reports/gates.json")["gates"]] == ["pass", "fail"]
    version = connect(tracking_uri()).get_model_version(*uri.removeprefix("models:/").split("/"))
    assert (version.tags["gates"], version.aliases) == ("fail", [])
    capsys.readouterr()
    summary.main()
    assert "f1" in capsys.readouterr().out.lower()


def test_the_front_picture_explains_a_class_that_all_networks_find(workspace, tmp_path, monkeypatch):
    settings = params.load()
    networks = [models.load(f"models/{name}")[0] for name in ("bcosify/pretrained", "pretrain", "guide")]
    for image, target, boxes in front_picture.examples(settings, networks, 2):
        assert all(network(image[None]).argmax() == target for network in networks)
        assert len(boxes) > 0
    images = [(torch.rand(6, 32, 32), target, torch.tensor([[2.0, 2, 20, 20]])) for target in (0, 1)]
    monkeypatch.setattr(front_picture, "examples", lambda *_: iter(images))
    pictures = [tmp_path / "one.png", tmp_path / "other.png"]
    for path in pictures:
        front_picture.draw(settings, 2, path)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    monkeypatch.setattr(front_picture, "examples", lambda *_: iter(()))
    with pytest.raises(UserError, match="no test image"):
        front_picture.draw(settings, 2, tmp_path / "none.png")
