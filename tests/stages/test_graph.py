"""The whole graph at toy size, as a user runs it: `dvc exp run`, `dvc repro`, `dvc metrics show`, the registry."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipelines import models
from pipelines.bcos import add_inverse
from tests.support.project import Project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    project.run("dvc exp run -S recipe=smoke")
    project.run("git add -A && git -c user.name=a -c user.email=a@b.example commit -qm trained")
    return project


@pytest.fixture(autouse=True)
def as_it_was(project):
    """After a test that changed params or outputs, both are those of the first run again."""
    yield
    if project.run("git status --porcelain").stdout:
        project.run("git checkout -q . && dvc checkout -q --force")


def test_metrics_of_both_models_are_shown(project):
    shown = json.loads(project.run("dvc metrics show --json").stdout)[""]["data"]
    found = shown["reports/evaluate/metrics.json"]["data"]["models"]
    assert set(found) == {"conventional", "bcosified"}
    for of_model in found.values():
        assert 0 <= of_model["accuracy"] <= 1
    assert found["bcosified"]["explanations"]["bcos"]["unexplained_share"] < 1e-4
    assert {"reports/pretrain/metrics.json", "reports/bcosify/pretrained/metrics.json"} <= set(shown)
    assert list((project.folder / "reports/evaluate/pictures").glob("*.png"))


def test_students_are_evaluated_beside_their_teacher(project):
    shown = json.loads(project.run("dvc metrics show --json").stdout)[""]["data"]
    found = shown["reports/evaluate/students.json"]["data"]["models"]
    assert list(found) == ["teacher", "kd", "e2kd"]
    teacher = json.loads((project.folder / "reports/evaluate/metrics.json").read_text())["models"]["bcosified"]
    assert found["teacher"]["accuracy"] == teacher["accuracy"]
    for run in ("kd", "e2kd"):
        assert 0 <= found[run]["agreement"] <= 1
        assert -1 <= found[run]["explanation_similarity"] <= 1
        assert {"worst_group_accuracy", "accuracy"} <= set(found[run])
        subset = project.read(f"models/distill/{run}/subset.json")
        assert subset["count"] == len(set(subset["keys"])) == 60
        held_out = project.read(f"models/distill/{run}/validation.json")
        assert held_out["count"] == len(set(held_out["keys"]) - set(subset["keys"])) == 48
        assert models.read_spec(project.folder / f"models/distill/{run}").kind == "bcos"
    assert list((project.folder / "reports/evaluate/student_pictures").glob("*.png"))


def test_a_teacher_is_taken_from_the_registry(project):
    name = project.read("reports/register.json")["uri"]
    project.run(f"dvc exp run -S recipe=smoke -S distill.teacher={name} -S distill.kd.epochs=1 distill")
    brought, trained = (models.digest(project.folder / path) for path in ("models/teacher", "models/bcosify/pretrained"))
    assert brought == trained
    done = project.run("dvc exp run -S recipe=smoke -S distill.teacher=models:/bcos-smoke@nobody teacher", check=False)
    assert "Traceback" not in done.stdout + done.stderr
    assert "nobody" in done.stdout + done.stderr


def test_a_teacher_from_elsewhere_waits_for_nothing_that_is_trained_here(project):
    project.run("sed -i 's|^  after: .*|  after: pyproject.toml|' params.yaml")
    waits_for = set(re.findall(r"[a-z0-9@]+", project.run("dvc dag distill@e2kd; dvc dag guide").stdout))
    assert {"teacher", "shard@objects", "backbone", "shard@scenes"} <= waits_for
    assert not waits_for & {"pretrain", "bcosify@pretrained"}


def test_students_learn_from_images_without_labels(project, tmp_path):
    for number in range(40):
        path = tmp_path / f"images/{'train' if number < 32 else 'val'}/{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    shutil.copytree(project.folder / "models/bcosify/pretrained", tmp_path / "teacher")
    data = f"-S dataset=imagefolder -S datasets.imagefolder.root={tmp_path}/images -S datasets.imagefolder.labelled=false"
    shape = "-S data.image_size=32 -S data.eval_resize=32 -S data.augment=flip -S distill.shots=null"
    teacher = f"-S distill.teacher={tmp_path}/teacher -S distill.after={tmp_path}/teacher"
    command = f"dvc exp run -S recipe=smoke {data} {shape} {teacher}"
    done = project.run(f"{command} distill@e2kd", check=False)
    assert "no metric 'val/accuracy'; there are val/agreement" in done.stdout + done.stderr
    ran = project.run(f"{command} -S distill.e2kd.select=val/agreement distill@e2kd").stdout
    assert "stages.pretrain" not in ran
    assert 0 <= project.read("reports/distill/e2kd/metrics.json")["val/agreement"] <= 1
    done = project.run(f"{command} pretrain", check=False)
    assert "dataset: imagefolder has no labels" in done.stdout + done.stderr


def test_frozen_explanations_are_stored_once_and_learned_from(project):
    project.run("dvc exp run -S recipe=smoke -S distill.e2kd.explanations=frozen -S distill.frozen.resolution=16 distill@e2kd")
    index = project.read("data/explanations/explanations.json")
    assert sum(shard["count"] for shard in index["shards"]) == 60
    assert index["teacher"] == models.digest(project.folder / "models/teacher")
    assert project.read("reports/distill/e2kd/metrics.json")["train/explanation"] > 0


def test_a_pair_that_does_not_fit_ends_the_stage_before_training(project):
    done = project.run("dvc exp run -S recipe=smoke -S distill.teacher=models/pretrain distill@e2kd", check=False)
    told = done.stdout + done.stderr
    assert done.returncode != 0
    assert "distill.teacher: a conventional teacher has no dynamic weights" in told
    assert "Traceback" not in told


def test_a_class_with_too_few_images_ends_the_stage_with_one_line(project):
    done = project.run("dvc exp run -S recipe=smoke -S distill.shots=1000 distill@kd", check=False)
    assert "shots: 1000 images a class are asked for; class" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_classifier_is_evaluated_before_and_after_its_guidance(project):
    found = project.read("reports/evaluate_guidance/metrics.json")["test"]["models"]
    assert list(found) == ["unguided", "guided"]
    for of_model in found.values():
        assert {"f1", "precision", "recall", "mean_average_precision"} <= set(of_model)
        assert {"epg", "on_object_epg", "size_corrected_epg", "iou", "pairs", "epg_undefined"} <= set(
            of_model["explanations"]["bcos"]
        )
    annotated = project.read("models/guide/annotated.json")
    assert annotated["count"] == len(set(annotated["keys"])) < 96
    assert models.read_spec(project.folder / "models/guide").task == "multilabel"
    assert list((project.folder / "reports/evaluate_guidance/pictures").glob("*.png"))


def test_another_point_of_the_front_is_taken_without_training_again(project):
    front = project.read("reports/guide/front.json")
    assert [row["chosen"] for row in front].count(True) == 1
    done = project.run("dvc exp run -S recipe=smoke -S guide.guided.select=epg guide")
    assert "epoch 1/2" not in done.stdout + done.stderr
    best = max(row["val/epg"] for row in front)
    assert project.read("reports/guide/metrics.json")["val/epg"] == best


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
def test_what_cannot_be_guided_ends_the_stage_with_one_line(project, change, told):
    done = project.run(f"dvc exp run -S recipe=smoke -S {change} guide", check=False)
    assert done.returncode != 0
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_point_of_the_search_becomes_an_experiment(project):
    trials, front = project.read("reports/search/trials.json"), project.read("reports/search/front.json")
    assert [row["trial"] for row in trials] == [0, 1, 2]
    assert [row["trial"] for row in trials if row["on_front"]] == sorted(row["trial"] for row in front)
    before = yaml.safe_load((project.folder / "params.yaml").read_text())["bcosify"]["pretrained"]
    as_it_was = {f"bcosify.pretrained.{key}": before[key] for key in ("b", "bias", "lr")}
    assert trials[0]["values"] == as_it_was  # as the params are
    told = project.run("python -m stages.tools.search_apply 1 search").stdout
    assert told.startswith("dvc exp run -S recipe=smoke -S ")
    after = yaml.safe_load((project.folder / "params.yaml").read_text())["bcosify"]["pretrained"]
    assert {key: after[key.rpartition(".")[2]] for key in trials[1]["values"]} == trials[1]["values"]
    assert project.read("reports/search/trials.json") == trials  # the same search, not run again
    done = project.run("python -m stages.tools.search_apply 3", check=False)
    assert (done.returncode, done.stderr.strip().splitlines()) == (
        1,
        ["3: there is no such trial; reports/search/trials.json has 0 to 2"],
    )


def test_another_stage_is_searched_by_its_own_metrics(project):
    space = "[{key: guide.guided.loss, choice: [energy, l1]}]"
    changes = f"-S recipe=smoke -S search.stage=guide -S 'search.space={space}' -S 'search.metrics=[val/f1,val/iou]'"
    project.run(f"dvc exp run {changes} -S search.asha=null -S search.trials=2 -S search.shots=5 search")
    trials = project.read("reports/search/trials.json")
    assert [(row["status"], row["values"]["guide.guided.loss"]) for row in trials] == [("finished", "energy"), ("finished", "l1")]
    done = project.run(f"dvc exp run {changes} -S 'search.metrics=[val/f1,val/gridpg]' search", check=False)
    assert "search.metrics: no metric 'val/gridpg'; there are val/" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_with_a_storage_the_shards_are_read_there(project, tmp_path):
    settings = f"sed -i 's|^  root: runs.*|  root: file://{tmp_path}/storage|' params.yaml"
    project.run(f"{settings} && python -m stages.distill kd")
    project.run(f"mkdir {tmp_path}/shards && mv data/shards/objects/*.tar {tmp_path}/shards && rm -r models/distill/kd")
    project.run("python -m stages.distill kd && python -m stages.evaluate")  # a job on a cluster has no shards of its own
    subset = project.read("models/distill/kd/subset.json")
    assert subset["count"] == 60
    frozen = "p['distill']['e2kd']['explanations'] = 'frozen'"
    change = f"import yaml; p = yaml.safe_load(open('params.yaml')); {frozen}; yaml.safe_dump(p, open('params.yaml', 'w'))"
    project.run(f'python -c "{change}" && python -m stages.explain && python -m stages.distill e2kd')
    assert project.read("reports/distill/e2kd/metrics.json")["train/explanation"] > 0
    assert not list(tmp_path.glob("storage/stored/*"))  # moved here, and published by their content for the students
    assert list(tmp_path.glob("storage/explanations/*/explanations.json"))
    project.run(f"mv {tmp_path}/shards/*.tar data/shards/objects")


def test_plots_and_experiments_are_shown(project):
    project.run("dvc plots show --json")
    assert "recipe" in project.run("dvc exp show --csv").stdout
    project.run("dvc metrics diff")


def test_again_changes_nothing_and_registers_nothing(project):
    before = {name: (project.folder / name).read_bytes() for name in ("dvc.lock", "params.yaml", "reports/register.json")}
    told = project.run("dvc repro").stdout
    assert told.count("didn't change, skipping") == 14
    assert "is in the registry already" in told
    assert {name: (project.folder / name).read_bytes() for name in before} == before


LOAD = """
import sys, torch
from pipelines import tracking
model, spec = tracking.load(sys.argv[1])
torch.save(model(torch.load("images.pt")), "logits.pt")
"""


def test_the_registered_version_gives_the_trained_models_logits_in_a_new_process(project):
    images = add_inverse(torch.rand(4, 3, 32, 32))
    torch.save(images, project.folder / "images.pt")
    (project.folder / "load.py").write_text(LOAD)
    uri = project.read("reports/register.json")["uri"]
    project.run(f"MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false PYTHONPATH=. python load.py {uri}")
    model, _ = models.load(project.folder / "models/bcosify/pretrained")
    assert torch.equal(torch.load(project.folder / "logits.pt"), model(images))


def test_a_lost_registry_is_made_again(project):
    for path in project.folder.glob("mlflow.db*"):
        path.unlink()
    told = project.run("dvc repro").stdout
    assert "registered" in told
    assert "is in the registry already" not in told
    assert project.read("reports/register.json")["version"] == "1"


def test_a_bad_param_ends_the_stage_with_one_line(project):
    path = project.folder / "params.yaml"
    content = path.read_text()
    try:
        path.write_text(yaml.safe_dump({**yaml.safe_load(content), "sead": 1}))
        done = project.run("python -m stages.pretrain", check=False)
    finally:
        path.write_text(content)
    assert done.returncode == 1
    assert done.stderr.strip() == "params.yaml: sead: unknown key (value 1)"


def test_an_unknown_recipe_is_refused(project):
    done = project.run("dvc exp run -S recipe=nothing", check=False)
    assert done.returncode != 0
    assert "nothing" in done.stdout + done.stderr


def test_multilabel_data_and_the_baseline_from_scratch_run_through_the_graph(project):
    changes = [
        "dataset=scenes",
        "datasets.scenes.image_size=32",
        "datasets.scenes.counts={train: 64, val: 32, test: 32}",
        "data.image_size=32",
        "model.name=resnet8",
        "training.workers=0",
        "pretrain.epochs=1",
        "bcosify.starts=[pretrained, scratch]",
        "bcosify.pretrained.epochs=1",
        "evaluate.pictures=2",
        "distill.shots=2",
        "distill.kd.epochs=1",
        "distill.kd.batch_size=8",
        "guide.classify.epochs=1",
        "guide.guided.epochs=1",
        "search.trials=2",
        "search.epochs=1",
    ]
    project.run("dvc exp run " + " ".join(f"-S '{change}'" for change in changes))
    found = project.read("reports/evaluate/metrics.json")["models"]
    assert set(found) == {"conventional", "bcosified", "bcos_from_scratch"}
    assert all(0 <= of_model["f1"] <= 1 for of_model in found.values())
    assert "bcos-scenes" in project.read("reports/register.json")["uri"]
    assert "f1" in project.run("python -m stages.tools.summary").stdout.lower()


def test_an_unknown_model_ends_the_stage_with_one_line(project):
    done = project.run("dvc exp run -S recipe=smoke -S model.name=resnet8o", check=False)
    assert done.returncode != 0
    assert "unknown model 'resnet8o'; near it: resnet8" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
