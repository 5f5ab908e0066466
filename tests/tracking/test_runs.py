import json
import pickle
import shutil

import pytest

from pipelines.tracking import EpochLogger, StageRun, runs, stage_run
from pipelines.tracking.journal import Journal
from pipelines.tracking.relog import main as relog
from pipelines.tracking.server import tracking_uri

PARAMS = {"seed": 3, "model": {"name": "resnet20", "mean": [0.5, 0.25]}, "note": "x" * 7000}


def record(epoch, value):
    return {"epoch": epoch, "step": 10 * epoch, "metrics": {"val/accuracy": value, "train/loss": 1 - value}}


def history(client, run_id, key="val/accuracy"):
    return [(item.step, item.value) for item in client.get_metric_history(run_id, key)]


def open_run(directory="runs/pretrain/0123"):
    return stage_run(
        "pretrain", experiment="demo", params=PARAMS, directory=directory, inputs={"shards": "data/shards"}
    )


def open_and_kill():
    """Starts a run that nothing closes, as if the stage's process was killed."""
    return StageRun.begin("pretrain", "demo", PARAMS, "runs/pretrain/0123", {"shards": "data/shards"})


def test_a_run_holds_params_tags_metrics_artifacts_and_data_set(client, manifest, project):
    (project / "picture.png").write_bytes(b"png")
    with open_run() as run:
        run.metrics({"test/accuracy": 0.75})
        run.pictures([project / "picture.png"])
        run.dataset(manifest, name="objects", context="training")
    logged = client.get_run(run.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.params["seed"] == "3"
    assert logged.data.params["model.name"] == "resnet20"
    assert logged.data.params["model.mean"] == "[0.5, 0.25]"
    assert len(logged.data.params["note"]) == runs.LONGEST_VALUE
    assert logged.data.tags["stage"] == "pretrain"
    assert {"torch", "python", "dvc.inputs"} <= logged.data.tags.keys()
    assert history(client, run.run_id, "test/accuracy") == [(0, 0.75)]
    assert [item.path for item in client.list_artifacts(run.run_id, "pictures")] == ["pictures/picture.png"]
    (dataset,) = [item.dataset for item in logged.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("objects", ("ab" * 32)[:36])
    assert json.loads(dataset.profile)["samples"] == {"train": 14, "test": 7}
    assert (project / "mlartifacts" / run.run_id).is_dir()


def test_a_killed_stage_goes_on_with_its_run_and_neither_loses_nor_doubles_metrics(client):
    first = open_and_kill()
    logger = pickle.loads(pickle.dumps(first.epoch_logger()))
    logger(record(1, 0.5))
    logger(record(2, 0.6))
    with open_run() as second:
        logger = second.epoch_logger()
        logger(record(2, 0.6))
        logger(record(3, 0.7))
        second.history([record(1, 0.5), record(2, 0.6), record(3, 0.7), record(4, 0.8)])
    assert second.run_id == first.run_id
    assert history(client, second.run_id) == [(1, 0.5), (2, 0.6), (3, 0.7), (4, 0.8)]
    assert client.get_run(second.run_id).info.status == "FINISHED"


def test_what_was_on_disk_alone_when_the_stage_was_killed_reaches_the_server(client):
    run = open_and_kill()
    Journal(run.directory).add_metrics({"val/accuracy": 0.5}, 1)
    with open(run.directory / "tracking" / "metrics.jsonl", "a") as file:
        file.write('{"key": "val/accu')  # cut short by the kill
    with open_run() as again:
        again.metrics({"val/accuracy": 0.6}, 2)
    assert history(client, run.run_id) == [(1, 0.5), (2, 0.6)]


def test_a_finished_stage_gets_a_new_run(client):
    with open_run() as first:
        first.metrics({"val/accuracy": 0.5}, 1)
    with open_run() as second:
        second.metrics({"val/accuracy": 0.25}, 1)
    assert second.run_id != first.run_id
    assert second.key != first.key
    assert history(client, second.run_id) == [(1, 0.25)]


def test_a_deleted_run_is_made_again(client):
    first = open_and_kill()
    first.metrics({"val/accuracy": 0.5}, 1)
    client.delete_run(first.run_id)
    with open_run() as second:
        second.metrics({"val/accuracy": 0.6}, 2)
    assert second.run_id != first.run_id
    assert history(client, second.run_id) == [(1, 0.5), (2, 0.6)]


def test_a_failing_stage_fails_as_before_and_its_run_says_so(client):
    with pytest.raises(ValueError, match="the cause"), open_run() as run:
        raise ValueError("the cause")
    assert client.get_run(run.run_id).info.status == "FAILED"


def test_a_dead_server_costs_seconds_and_one_line_and_relog_logs_everything_once(
    client, project, manifest, monkeypatch, capsys, dead_server
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    (project / "picture.png").write_bytes(b"png")
    with open_run() as run:
        logger = run.epoch_logger()
        for epoch in (1, 2, 3):
            logger(record(epoch, epoch / 10))
        run.metrics({"test/accuracy": 0.75})
        run.pictures([project / "picture.png"])
        run.dataset(manifest, name="objects", context="training")
    (line,) = capsys.readouterr().err.splitlines()
    assert "not reachable" in line
    assert "python -m pipelines.tracking.relog runs/pretrain/0123" in line

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert relog(["runs/pretrain/0123"]) == 0
    assert relog(["runs/pretrain/0123"]) == 0
    experiment = client.get_experiment_by_name("demo")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["model.name"] == "resnet20"
    assert history(client, logged.info.run_id) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert history(client, logged.info.run_id, "test/accuracy") == [(0, 0.75)]
    assert len(logged.inputs.dataset_inputs) == 1
    assert [item.path for item in client.list_artifacts(logged.info.run_id, "pictures")] == [
        "pictures/picture.png"
    ]


def test_a_server_that_dies_in_the_middle_is_left_alone_for_a_while_and_gets_the_rest_when_it_is_back(
    client, monkeypatch, capsys
):
    asked, clock = [], [1000.0]
    monkeypatch.setattr(runs, "monotonic", lambda: clock[0])

    def time_out(*arguments):
        asked.append(arguments)
        clock[0] += 7
        raise ConnectionError("[Errno 111] Connection refused")

    with open_run() as run:
        logger = run.epoch_logger()
        logger(record(1, 0.5))
        with monkeypatch.context() as dead:
            dead.setattr(runs, "log_metrics", time_out)
            logger(record(2, 0.6))
            clock[0] += 69
            logger(record(3, 0.7))
            run.metrics({"test/accuracy": 0.75})
        assert history(client, run.run_id) == [(1, 0.5)]
        clock[0] += 1
        logger(record(4, 0.8))
        assert history(client, run.run_id) == [(1, 0.5), (2, 0.6), (3, 0.7), (4, 0.8)]
    assert len(asked) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert history(client, run.run_id) == [(1, 0.5), (2, 0.6), (3, 0.7), (4, 0.8)]
    assert history(client, run.run_id, "test/accuracy") == [(0, 0.75)]


def test_a_finished_run_that_no_server_has_is_not_replaced(client, monkeypatch, dead_server):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    for accuracy in (0.5, 0.6):
        with open_run() as run:
            run.metrics({"val/accuracy": accuracy}, int(10 * accuracy))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with open_run() as last:
        last.metrics({"val/accuracy": 0.7}, 7)
    (old,) = [r for r in client.search_runs(["1"]) if r.info.run_id != last.run_id]
    assert history(client, old.info.run_id) == [(5, 0.5), (6, 0.6)]
    assert history(client, last.run_id) == [(7, 0.7)]


def test_a_worker_that_does_not_see_the_journal_logs_to_the_server_alone(client, project):
    with open_run() as run:
        EpochLogger(tracking_uri(), run.run_id, str(project / "elsewhere"))(record(1, 0.5))
        assert not (project / "elsewhere").exists()
        run.history([record(1, 0.5), record(2, 0.6)])
    assert history(client, run.run_id) == [(1, 0.5), (2, 0.6)]


def test_relog_names_a_folder_without_a_run(project, capsys):
    assert relog(["runs/none"]) == 1
    assert capsys.readouterr().err == "runs/none: nothing was tracked here (no tracking/run.json)\n"


def test_children_of_a_run_at_a_url_are_logged_with_it_later(client, project, monkeypatch, dead_server):
    place = "s3://bucket/runs/search/0123"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    with stage_run("search", experiment="demo", params=PARAMS, directory=place) as run:
        child = {"params": {"lr": 0.1}, "history": [record(1, 0.5)], "metrics": {}, "status": "FINISHED"}
        runs.child_run(run, "trial", experiment="demo", directory=f"{place}/trials/abcd", **child)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert relog(["runs/search/0123"]) == 0
    experiment = client.get_experiment_by_name("demo")
    logged = {each.data.tags["stage"]: each for each in client.search_runs([experiment.experiment_id])}
    assert logged.keys() == {"search", "trial"}
    assert logged["trial"].data.tags["mlflow.parentRunId"] == logged["search"].info.run_id
    assert history(client, logged["trial"].info.run_id) == [(1, 0.5)]


def test_where_checkpoints_are_at_a_url_the_journal_is_here(client, project):
    with open_run("s3://bucket/deep/runs/pretrain/0123") as run:
        run.metrics({"val/accuracy": 0.5}, 1)
    assert run.directory == project / "runs" / "pretrain" / "0123"
    assert history(client, run.run_id) == [(1, 0.5)]


def test_a_stage_whose_machine_was_lost_goes_on_as_the_same_run_with_the_same_children(client, project):
    place, keys = "s3://bucket/runs/search/0123", [None]
    child = {"params": {}, "history": [record(1, 0.5)], "metrics": {}, "status": "FINISHED"}
    for _ in range(2):
        run = StageRun.begin("search", "demo", PARAMS, place, {}, keys[-1])
        keys.append(run.key)
        run.metrics({"val/accuracy": 0.5}, len(keys))
        runs.child_run(run, "trial", experiment="demo", directory=f"{place}/trials/abcd", **child)
        shutil.rmtree(run.directory)
    assert keys[1] == keys[2]
    experiment = client.get_experiment_by_name("demo")
    logged = {
        each.data.tags["stage"]: each.info.run_id for each in client.search_runs([experiment.experiment_id])
    }
    assert len(client.search_runs([experiment.experiment_id])) == len(logged) == 2
    assert history(client, logged["search"]) == [(2, 0.5), (3, 0.5)]
    assert history(client, logged["trial"]) == [(1, 0.5)]


def test_children_that_ended_while_the_server_was_away_are_logged_when_the_run_ends(
    client, project, monkeypatch, dead_server
):
    child = {"params": {}, "history": [record(1, 0.5)], "metrics": {}, "status": "FINISHED"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    run = StageRun.begin("search", "demo", PARAMS, "runs/search/0123", {})
    runs.child_run(run, "trial", experiment="demo", directory="runs/search/0123/trials/abcd", **child)
    run._uri = f"sqlite:///{project}/mlflow.db"  # the server is back
    run.end("FINISHED")
    experiment = client.get_experiment_by_name("demo")
    assert {each.data.tags["stage"] for each in client.search_runs([experiment.experiment_id])} == {
        "search",
        "trial",
    }


def test_an_experiment_in_a_copy_that_dvc_deletes_leaves_its_journal_in_the_project(
    client, project, monkeypatch, capsys, dead_server
):
    server = f"sqlite:///{project}/mlflow.db"
    for name in ("tidy-owl", "other-owl"):  # two experiments at once, with the same stage
        copy = project / ".dvc/tmp/exps/standalone" / name
        copy.mkdir(parents=True)
        monkeypatch.chdir(copy)
        monkeypatch.setenv("DVC_ROOT", str(project))
        monkeypatch.setenv("DVC_EXP_NAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
        with open_run() as run:
            run.metrics({"val/accuracy": 0.5}, 1)
        assert f"relog runs/pretrain/0123-{name}`" in capsys.readouterr().err
        shutil.rmtree(copy)
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert relog(["runs/pretrain/0123-tidy-owl", "runs/pretrain/0123-other-owl"]) == 0
    logged = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert {each.data.tags["dvc.experiment"] for each in logged} == {"tidy-owl", "other-owl"}


def test_no_secret_of_an_address_reaches_mlflow_the_journal_or_a_line(project, manifest, monkeypatch, capsys):
    address = "https://user:s3cr3t@host/x.zip?X-Amz-Signature=s3cr3t"
    params = {
        "datasets": {"imagefolder": {"root": address}},
        "roots": [address],
        "storage": {"root": "s3://key:s3cr3t@bucket/runs"},
    }
    inputs = {"teacher": address}
    with stage_run(
        "fetch", experiment="demo", params=params, directory="runs/fetch/0123", inputs=inputs
    ) as run:
        run.tag("resumed_from", address)
        run.dataset(manifest | {"source": f"imagefolder: {address}"}, name="mine", context="training")
        child = {
            "params": {"weights": address},
            "history": [record(1, 0.5)],
            "metrics": {},
            "status": "FINISHED",
        }
        runs.child_run(run, "trial", experiment="demo", directory="runs/fetch/0123/trials/abcd", **child)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:s3cr3t@127.0.0.1:1/?token=s3cr3t")
    with open_run():
        pass
    assert "s3cr3t" not in "".join(capsys.readouterr())
    for path in (path for path in project.rglob("*") if path.is_file()):
        assert b"s3cr3t" not in path.read_bytes(), path
    assert b"https://host/x.zip?***" in (project / "mlflow.db").read_bytes()


@pytest.mark.parametrize("key", ["a' or tags.stage != '", "", {"key": 1}, "x" * 10 + "'"])
def test_a_key_from_a_storage_that_others_write_to_is_no_part_of_a_filter(client, key):
    other = open_and_kill()
    run = StageRun.begin("pretrain", "demo", PARAMS, "s3://bucket/runs/pretrain/4567", {}, key)
    assert run.key != key
    assert run.run_id not in (None, other.run_id)
