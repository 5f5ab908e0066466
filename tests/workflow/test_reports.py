import json
from pathlib import Path

from pipelines.workflow.reports import flat, leave_out


def test_nested_figures_are_flattened_with_slashes():
    assert flat({"test": {"accuracy": 1.0, "bcos": {"epg": 0.5}}}) == {"test/accuracy": 1.0, "test/bcos/epg": 0.5}


def test_an_item_that_the_params_leave_out_has_empty_reports_and_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leave_out("bcosify/scratch", "bcosify.starts")
    assert json.loads(Path("models/bcosify/scratch/left-out.json").read_text()) == {"because of": "bcosify.starts"}
    assert json.loads(Path("reports/bcosify/scratch/metrics.json").read_text()) == {}
    assert json.loads(Path("reports/bcosify/scratch/history.json").read_text()) == []
