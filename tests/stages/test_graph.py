"""The whole graph at toy size, as users run it, with `dvc exp run`, `dvc repro`, `dvc metrics show`."""

import json
import os

import networkx
import pytest
import torch
import yaml
from dvc.repo import Repo

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.params import leaves
from stages.tools import search_apply
from tests.support.project import refused

pytestmark = pytest.mark.graph


@pytest.fixture(autouse=True)
def restored(project):
    """Restores params and lock of the first run after each test."""
    yield
    project.run("git checkout -q .")


@pytest.fixture(scope="module")
def shown(project):
    """Returns the output of `dvc metrics show`: metrics by the path of their file."""
    files = json.loads(project.run("dvc metrics show --json").stdout)[""]["data"]
    return {path: content["data"] for path, content in files.items()}


def test_metrics_of_both_models_are_shown(project, shown):
    found = shown["reports/evaluate/metrics.json"]["models"]
    assert set(found) == {"conventional", "bcosified"}
    for of_model in found.values():
        assert 0 <= of_model["accuracy"] <= 1
    assert found["bcosified"]["explanations"]["bcos"]["unexplained_share"] < 1e-4
    assert {"reports/pretrain/metrics.json", "reports/bcosify/pretrained/metrics.json"} <= set(shown)
    for folder in ("preview", "evaluate/pictures"):
        assert list((project.folder / "reports" / folder).glob("*.png"))


def test_students_are_evaluated_beside_their_teacher(project, shown):
    found = shown["reports/evaluate/students.json"]["models"]
    assert list(found) == ["teacher", "kd", "e2kd"]
    teacher = project.read("reports/evaluate/metrics.json")["models"]["bcosified"]
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


def test_a_classifier_is_evaluated_before_and_after_its_guidance(project):
    found = project.read("reports/evaluate_guidance/metrics.json")["test"]["models"]
    assert list(found) == ["unguided", "guided"]
    for of_model in found.values():
        assert {"f1", "recall", "mean_average_precision"} <= set(of_model)
        assert ("precision" in of_model) == (of_model["f1"] > 0)  # undefined if no class is predicted
        assert {
            "epg",
            "on_object_epg",
            "size_corrected_epg",
            "iou",
            "iou_at_0.5",
            "iou_threshold",
            "pairs",
            "epg_undefined",
        } <= set(of_model["explanations"]["bcos"])
    annotated = project.read("models/guide/annotated.json")
    assert annotated["count"] == len(set(annotated["keys"])) < 96
    assert models.read_spec(project.folder / "models/guide").task == "multilabel"
    assert list((project.folder / "reports/evaluate_guidance/pictures").glob("*.png"))


def upstream(project, *names):
    """Returns the names of the stages that DVC runs before `names`, with the present params."""
    with Repo(str(project.folder)) as repo:
        graph = repo.index.graph
        stages = {stage.name: stage for stage in graph}
        return {stage.name for name in names for stage in networkx.descendants(graph, stages[name])}


def test_a_teacher_from_elsewhere_waits_for_nothing_that_is_trained_here(project, tmp_path):
    trained_here = {"pretrain", "bcosify@pretrained"}
    assert trained_here <= upstream(project, "distill@e2kd") & upstream(project, "guide")
    for place in ("pyproject.toml", tmp_path):
        project.compose(f"distill.after={place}", f"guide.after={place}")
        waits_for = upstream(project, "distill@e2kd", "guide")
        assert {"teacher", "shard@objects", "backbone", "shard@scenes"} <= waits_for
        assert not waits_for & trained_here


def test_one_data_set_for_everything_and_the_baseline_from_scratch_are_in_the_graph(project):
    project.compose("dataset=scenes", "bcosify.starts=[pretrained, scratch]")
    before = upstream(project, "evaluate", "evaluate_guidance", "search", "register")
    assert {
        "shard@scenes",
        "bcosify@pretrained",
        "bcosify@scratch",
        "distill@kd",
        "classify",
        "evaluate",
    } <= before
    assert "shard@objects" not in before


def experiments(project):
    """The commits of DVC's experiments."""
    listed = project.run("git for-each-ref refs/exps").stdout.splitlines()
    return {line for line in listed if "refs/exps/exec/" not in line}


def test_a_point_of_the_search_becomes_an_experiment(project, monkeypatch, capfd):
    trials, front = project.read("reports/search/trials.json"), project.read("reports/search/front.json")
    assert [row["trial"] for row in trials] == [0, 1, 2]
    assert [row["trial"] for row in trials if row["on_front"]] == sorted(row["trial"] for row in front)
    params = leaves(yaml.safe_load((project.folder / "params.yaml").read_text()))
    searched = [f"bcosify.pretrained.{key}" for key in ("b", "bias", "optim.lr")]
    as_params_are = {key: params[key] for key in searched}
    assert trials[0]["values"] == as_params_are

    monkeypatch.chdir(project.folder)
    for name in os.environ.keys() - project.environment.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", project.environment["PATH"])
    before = experiments(project)
    assert search_apply.main(["1", "shard@objects"]) == 0
    assert capfd.readouterr().out.startswith("dvc exp run -S recipe=smoke -S ")
    after = leaves(yaml.safe_load((project.folder / "params.yaml").read_text()))
    assert {key: after[key] for key in trials[1]["values"]} == trials[1]["values"]
    assert len(experiments(project) - before) == 1
    assert (
        refused(search_apply.main, ["3"])
        == "3: there is no such trial; reports/search/trials.json has 0 to 2"
    )


def test_plots_and_experiments_are_shown(project):
    project.run("dvc plots show --json")
    assert "recipe" in project.run("dvc exp show --csv").stdout
    project.run("dvc metrics diff")


def test_again_changes_nothing_and_registers_nothing(project):
    before = {
        name: (project.folder / name).read_bytes()
        for name in ("dvc.lock", "params.yaml", "reports/register.json")
    }
    told = project.run("dvc repro").stdout
    assert told.count("didn't change, skipping") == 22
    assert "is in the registry already" in told
    assert {name: (project.folder / name).read_bytes() for name in before} == before


LOAD = """
import sys, torch
from pipelines import tracking
_, uri, images, logits = sys.argv
model, spec = tracking.load(uri)
torch.save(model(torch.load(images)), logits)
"""


def test_the_registered_version_gives_the_trained_models_logits_in_a_new_process(project, tmp_path):
    images = add_inverse(torch.rand(4, 3, 32, 32))
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "load.py").write_text(LOAD)
    uri, environment = (
        project.read("reports/register.json")["uri"],
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false PYTHONPATH=.",
    )
    project.run(f"{environment} python {tmp_path}/load.py {uri} {tmp_path}/images.pt {tmp_path}/logits.pt")
    model, _ = models.load(project.folder / "models/bcosify/pretrained")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(images))


def test_a_lost_registry_is_made_again(project):
    for path in project.folder.glob("mlflow.db*"):
        path.unlink()
    told = project.run("dvc repro --single-item register").stdout
    assert "registered" in told
    assert "is in the registry already" not in told
    assert project.read("reports/register.json")["version"] == "1"


def test_a_bad_param_ends_the_stage_with_one_line(project):
    path = project.folder / "params.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "sead": 1}))
    done = project.run("python -m stages.pretrain", check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "params.yaml: sead: unknown key (value 1)"


def test_an_unknown_model_ends_the_run_with_one_line(project):
    done = project.run("dvc exp run -S recipe=smoke -S model.name=resnet8o", check=False)
    project.run("dvc checkout -q --force")
    assert done.returncode != 0
    assert "unknown model 'resnet8o'; near it: resnet8" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_an_unknown_recipe_is_refused(project):
    done = project.run("dvc exp run -S recipe=nothing", check=False)
    assert done.returncode != 0
    assert "nothing" in done.stdout + done.stderr
