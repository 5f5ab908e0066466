import shutil
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

import pipelines
from pipelines.data.shards.manifest import MANIFEST
from pipelines.data.shards.sample import DataError
from pipelines.methods import check_pair
from pipelines.models import ModelError, ModelSpec
from pipelines.params import ModelParams, keyed, load
from pipelines.training import TrainingError
from pipelines.workflow import running


def test_a_local_weights_file_is_known_by_its_place_and_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.th").write_bytes(b"one")
    first = running.located(ModelParams(name="resnet8", weights="weights.th"))
    (tmp_path / "weights.th").write_bytes(b"two")
    second = running.located(ModelParams(name="resnet8", weights="weights.th"))
    assert first.weights == second.weights == str(tmp_path / "weights.th")
    assert first.sha256 != second.sha256
    tag = ModelParams(name="resnet18", weights="IMAGENET1K_V1")
    assert running.located(tag) == tag


def test_a_change_of_the_training_code_changes_its_digest(tmp_path, monkeypatch):
    for name in running.TRAINING_CODE:
        place = tmp_path / name
        place.write_text("") if place.suffix else (place.mkdir(), (place / "a.py").write_text(""))
    monkeypatch.setattr(pipelines, "__file__", str(tmp_path / "__init__.py"))
    before = running.code_digest()
    assert running.code_digest() == before
    (tmp_path / "training/a.py").write_text("# changed")
    assert running.code_digest() != before


def test_what_is_the_users_to_mend_ends_a_stage_with_its_line_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"params\.yaml"), running.stage():
        pass
    monkeypatch.setattr(running, "load", lambda: None)
    with pytest.raises(SystemExit, match="a broken shard"), running.stage():
        raise DataError("a broken shard")


@pytest.mark.parametrize("section", ["pretrain", "bcosify.scratch", "distill.e2kd", "guide.classify", "guide.guided"])
def test_errors_about_training_params_name_their_key(section):
    name = {"guide.classify": "classify", "guide.guided": "guide"}.get(section, section.replace(".", "/"))
    params = load()
    task = running.Task(params, name, attrgetter(section)(params), build=lambda: None, spec=None)
    assert task.section == section
    with pytest.raises(TrainingError, match=rf"^{section}\.select: no metric$"), keyed(task.section, task.optim):
        raise TrainingError("select: no metric")
    with pytest.raises(TrainingError, match=r"^the loss is NaN: 3$"), keyed(task.section, task.optim):
        raise TrainingError("the loss is NaN: 3")


def test_a_teacher_that_does_not_fit_is_told_by_its_key():
    params = load()
    teacher = ModelSpec("resnet8", ("a", "b"), 32, "conventional")
    student = ModelSpec("resnet8", ("a", "b"), 32, "bcos")
    with pytest.raises(ModelError, match=r"^distill\.teacher: a conventional teacher"), keyed("distill", params.distill):
        check_pair(student, teacher, explained=True)


def test_at_a_url_a_stage_whose_machine_was_lost_goes_on_as_the_same_run(tmp_path, monkeypatch):
    params = load()
    params = params.model_copy(update={"storage": params.storage.model_copy(update={"root": "memory://outlives"})})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/nowhere")
    splits = {"train": [{"name": "train-000000.tar", "bytes": 1, "sha256": "00" * 32, "count": 1}]}
    manifest = {"classes": ["a", "b"], "task": "multiclass", "source": "objects", "checksum": "ab" * 32, "splits": splits}
    manifest |= {"fields": {}}
    running.write_json(Path(running.shards_of(params.dataset), MANIFEST), manifest)
    keys = []

    def execute(lost):
        with pytest.raises(KeyError) if lost else nullcontext(), running.stage_run(params, "pretrain") as (run, _):
            keys.append(run.key)
            if lost:
                raise KeyError
        shutil.rmtree(tmp_path / "runs")

    for lost in (True, False, False):
        execute(lost)
    assert keys[0] == keys[1] != keys[2]


def test_nested_figures_are_flattened_with_slashes():
    assert running.flat({"test": {"accuracy": 1.0, "bcos": {"epg": 0.5}}}) == {"test/accuracy": 1.0, "test/bcos/epg": 0.5}


def test_dvc_and_run_directories_depend_on_the_same_of_training():
    stages = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text())["stages"]
    for name in ("pretrain", "bcosify", "distill", "classify", "guide"):
        assert {f"training.{key}" for key in running.COMPUTATION} == {
            param for param in stages[name]["params"] if param.startswith("training.")
        }
