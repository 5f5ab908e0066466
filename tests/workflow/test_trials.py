"""The metrics of a search, its lines on metrics that it cannot measure, and its reports."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipelines.data.shards.manifest import MANIFEST, Manifest
from pipelines.methods import Pretrain
from pipelines.models import ModelSpec
from pipelines.params import ParamsError, load, replaced
from pipelines.training import TrainingError
from pipelines.workflow import trials
from pipelines.workflow.reports import trials_table, what_a_search_shows
from pipelines.workflow.tasks import Task
from pipelines.workflow.trials import report_search, track_trial, with_measurable_metrics


def checked(folder, monkeypatch, metrics, classes=("a", "b"), asha=None, **fields):
    """Returns the metrics that a search on data with these classes can measure."""
    params = replaced(load(), {"search.metrics": metrics, "search.asha": asha})
    place = folder / "data/shards" / params.dataset
    place.mkdir(parents=True)
    fields = dict.fromkeys(("train", "val", "test"), ()) | fields
    manifest = Manifest(tuple(classes), "multiclass", "nowhere", "0" * 64, dict.fromkeys(fields, ()), fields)
    (place / MANIFEST).write_text(json.dumps(manifest.to_json()))
    monkeypatch.chdir(folder)
    spec = ModelSpec("resnet8", tuple(classes), 32, "bcos")
    task = Task(
        params, "x", params.pretrain, build=lambda: Pretrain(None, "multiclass", len(classes)), spec=spec
    )
    return with_measurable_metrics(params, task).search.metrics


def test_a_grid_of_more_classes_than_there_are_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    assert checked(tmp_path / "few", monkeypatch, ["val/gridpg", "val/accuracy"]) == ["val/accuracy"]
    told = (
        "search.metrics: val/gridpg cannot be measured: a grid shows 4 classes (evaluate.grid_size), "
        "the data has 2; trials"
    )
    assert capsys.readouterr().out.startswith(told)
    monkeypatch.undo()
    assert checked(tmp_path / "enough", monkeypatch, ["val/accuracy", "val/gridpg"], "abcd") == [
        "val/accuracy",
        "val/gridpg",
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        (
            ["val/gridpg"],
            r"val/gridpg cannot be measured: a grid shows 4 classes \(evaluate.grid_size\), the data has 2$",
        ),
        (["val/iou"], r"no metric 'val/iou'; there are val/accuracy, val/calibration_error, val/gridpg$"),
        (["val/skipped"], r"no metric 'val/skipped'; there are"),
    ],
)
def test_what_cannot_be_searched_by_is_refused_in_one_line(tmp_path, monkeypatch, metrics, told):
    with pytest.raises(ParamsError, match=rf"^search\.metrics: {told}"):
        checked(tmp_path, monkeypatch, metrics)


def test_figures_of_boxes_are_searched_by_where_validation_has_boxes(tmp_path, monkeypatch):
    wanted = ["val/calibration_error", "val/iou", "val/iou_at_0.5"]
    assert checked(tmp_path, monkeypatch, wanted, val=("boxes",)) == wanted


def trial(status="finished", **metrics):
    named = {f"val/{name}": value for name, value in metrics.items()}
    history = [{"epoch": 1, "step": 1, "metrics": named}]
    return {
        "values": {"x.lr": 0.1},
        "started": 0.0,
        "status": status,
        "history": history,
        "metrics": named,
        "error": "",
    }


class Run:
    """Keeps what is logged."""

    def __init__(self):
        self.logged, self.tags = {}, {}

    def metrics(self, values):
        self.logged |= values

    def tag(self, key, value):
        self.tags[key] = value

    def artifact(self, path):
        assert path.is_file()


def reported(folder, monkeypatch, found, names):
    monkeypatch.chdir(folder)
    run = Run()
    report_search(run, found, names)
    read = {
        name: json.loads((trials.OUT / f"{name}.json").read_text()) for name in ("trials", "front", "metrics")
    }
    return SimpleNamespace(**read, run=run)


def test_a_metric_that_one_trial_could_not_measure_is_in_no_report_of_it(tmp_path, monkeypatch):
    found = [trial(accuracy=0.5, gridpg=0.3), trial(accuracy=0.9), trial("stopped", accuracy=0.1)]
    reports = reported(tmp_path, monkeypatch, found, ["val/accuracy", "val/gridpg"])
    assert reports.metrics == {
        "finished": 2,
        "stopped": 1,
        "front": 2,
        "val/accuracy": 0.9,
        "val/gridpg": 0.3,
    }
    assert reports.trials[1]["metrics"] == {"val/accuracy": 0.9}
    assert reports.run.logged == {"val/accuracy": 0.9, "val/gridpg": 0.3}


def test_the_best_of_what_falls_is_the_lowest(tmp_path, monkeypatch):
    found = [trial(accuracy=0.5, calibration_error=0.3), trial(accuracy=0.4, calibration_error=0.1)]
    found.append(trial(accuracy=0.3, calibration_error=0.2))
    reports = reported(tmp_path, monkeypatch, found, ["val/calibration_error", "val/accuracy"])
    assert [row["trial"] for row in reports.front] == [1, 0]
    assert reports.metrics == {"finished": 3, "front": 2, "val/calibration_error": 0.1, "val/accuracy": 0.5}


def test_a_metric_that_no_trial_could_measure_is_named_and_the_others_choose(tmp_path, monkeypatch, capsys):
    found = [trial(accuracy=0.5), trial(accuracy=0.9)]
    reports = reported(tmp_path, monkeypatch, found, ["val/accuracy", "val/gridpg"])
    assert reports.metrics == {"finished": 2, "front": 1, "val/accuracy": 0.9}
    assert "val/gridpg was measured in no trial: too few classes" in capsys.readouterr().out


def test_where_nothing_could_be_measured_the_search_ends_and_its_trials_are_kept(tmp_path, monkeypatch):
    with pytest.raises(
        TrainingError, match=r"^search\.metrics: no trial has measured val/gridpg; the trials are in"
    ):
        reported(tmp_path, monkeypatch, [trial(accuracy=0.5)], ["val/gridpg"])
    assert json.loads((tmp_path / trials.OUT / "trials.json").read_text())[0]["status"] == "finished"


def test_a_trial_says_what_it_could_not_measure(monkeypatch, capsys):
    monkeypatch.setattr(trials.tracking, "child_run", lambda *arguments, **more: None)
    params = replaced(load(), {"search.metrics": ["val/accuracy", "val/gridpg"]})
    track_trial(params, None, "runs", trial(accuracy=0.5))
    assert capsys.readouterr().out.startswith(
        "trial finished: val/accuracy 0.500, val/gridpg not measured (too few classes"
    )
    track_trial(params, None, "runs", trial("stopped", accuracy=0.5))
    assert capsys.readouterr().out == "trial stopped: val/accuracy 0.500 (lr 0.1)\n"


def test_beside_a_few_trials_stands_what_they_can_show():
    assert "in the best 39% of the space" in what_a_search_shows(6)
    assert "in the best 17% of the space" in what_a_search_shows(16)
    console = Console(width=200)
    rows = [{"trial": 1, "values": {"x.lr": 0.1}, "metrics": {"val/calibration_error": 0.1}}]
    with console.capture() as shown:
        console.print(trials_table(["val/calibration_error", "val/gridpg"], rows, 6))
    assert "val/calibration_error ↓" in shown.get()
    assert "gridpg" not in shown.get()
    assert "What 6 trials can show" in shown.get()
