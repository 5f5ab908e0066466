"""A job without a cluster: what is sent, what comes back, what is refused in one line."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra import package, submit
from infra.project import SubmitError
from pipelines import models
from pipelines.data.shards.manifest import MANIFEST
from pipelines.models import ModelSpec
from pipelines.params import TrainingParams
from pipelines.storage import files
from pipelines.storage.publish import publish
from pipelines.training import TrainingError, cluster
from pipelines.training.launch import _check_gpus, is_autoscaled
from pipelines.workflow import trials
from pipelines.workflow.submitted_job import place_of_inputs, pull_inputs
from tests.support.project import Project


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with code, data, models and an environment."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "pipelines/a.py",
        "data/b.tar",
        "models/c/model.json",
        ".dvc/config",
        ".venv/d",
        "runs/e",
        "notes/f.txt",
        "g.py",
        ".gitignore",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("ignored\n")
    Path("ignored").write_text("x")
    subprocess.run(["git", "init", "-q"], check=True)
    return tmp_path


def test_code_is_sent_without_data_models_environments_and_what_git_ignores(repository: Path) -> None:
    size = package.pack(repository / "runs/target")
    sent = {path.relative_to("runs/target").as_posix() for path in Path("runs/target").rglob("*") if path.is_file()}
    assert sent == {"pipelines/a.py", "notes/f.txt", "g.py"}
    assert size == 3 * len("ignored\n")


def test_a_working_directory_too_large_names_its_largest_folder(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "LIMIT", 2**20)
    Path("notes/large.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(SubmitError, match=r"has 3 MiB, 3 of them in notes/; at most 1 are sent[^\n]*$"):
        package.pack(repository / "runs/target")
    assert not Path("runs/target").exists()


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("", "the address of a job server is wanted, http://HEAD:8265, not ''"),
        ("head:6379", "the address of a job server is wanted, http://HEAD:8265, not 'head:6379'"),
        ("http://127.0.0.1:{port}", "no Ray cluster at http://127.0.0.1:{port}: "),
    ],
)
def test_an_address_of_nothing_is_one_line(
    address: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = closed_port()
    for name in (submit.ADDRESS, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert submit.main(["pretrain", "--address", address.format(port=port)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told.format(port=port) in line


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "http://127.0.0.1:{port}"])
def test_a_stage_run_here_names_a_ray_address_of_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = address.format(port=closed_port())
    monkeypatch.setenv("RAY_ADDRESS", place)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of this process may have started one
    with pytest.raises(TrainingError, match=rf"RAY_ADDRESS [^\n]*{place}[^\n]*$"), cluster(TrainingParams(workers=1)):
        pass


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("1:4", [1, 4])])
def test_workers_are_a_number_or_a_range(text: str, value: object) -> None:
    assert submit.workers(text) == value


def test_no_secret_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage:9000")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    sent = submit.sent()
    assert sent["AWS_ENDPOINT_URL"] == "http://storage:9000"
    assert "secret" not in str(sent)


def test_a_trial_on_another_node_brings_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/manifest.json").write_text("{}")
    item = {"folder": "data/shards/a", "url": publish(tmp_path / "here", "memory://shards/a", [MANIFEST]), "names": [MANIFEST]}
    files.write_json("memory://jobs/a/order.json", {"stages": [], "inputs": [item], "environment": {}})
    monkeypatch.chdir(tmp_path)
    seen: list[Path] = []
    monkeypatch.setattr(trials, "task_of", lambda *_: seen.append(Path("data/shards/a", MANIFEST).absolute()) or sys.exit())
    for _ in range(2):
        with pytest.raises(SystemExit):
            trials.run_trial(None, "memory://jobs/a", {}, "", print, 1)  # type: ignore[arg-type]
    assert seen[0] == seen[1]
    assert seen[0].read_text() == "{}"
    assert not seen[0].is_relative_to(tmp_path / "data")


def test_a_search_on_a_cluster_at_an_address_puts_its_inputs_where_trials_find_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, made = ModelSpec("resnet8", ("a", "b"), 8, kind="conventional"), tmp_path / "models/pretrain"
    monkeypatch.chdir(tmp_path)
    models.save(made, models.assemble(spec), spec)
    folders = (made, tmp_path / "data/explanations")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert place_of_inputs("memory://placed", folders) is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert place_of_inputs("runs", folders) is None
    place = place_of_inputs("memory://placed", folders)
    assert place is not None
    pull_inputs(place, tmp_path / "elsewhere")
    assert models.digest(tmp_path / "elsewhere/models/pretrain") == models.digest(made)


@pytest.mark.parametrize(
    ("types", "may"),
    [
        (None, True),
        ({}, True),
        ({"10.0.0.1": "node_10.0.0.1"}, False),
        ({"10.0.0.1": "head"}, True),
        ({"10.0.0.1": "node_10.0.0.1", "10.0.0.2": "gpu"}, True),
    ],
)
def test_nodes_that_an_autoscaler_brought_are_told_from_those_started_by_hand(types: dict[str, str] | None, may: bool) -> None:
    assert is_autoscaled(types) is may


@pytest.mark.parametrize(
    ("address", "types", "refused"),
    [("", None, True), ("head:6379", None, False), ("head:6379", {"a": "node_a"}, True), ("head:6379", {"a": "head"}, False)],
)
def test_gpus_may_come_later_where_there_is_an_autoscaler(
    address: str, types: dict[str, str] | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = json.dumps({"autoscaler_report": {"node_type_mapping": types}}).encode()
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda name: status if types else None)
    with pytest.raises(TrainingError, match="2 workers need 2 GPUs; there are at most 0") if refused else nullcontext():
        _check_gpus(TrainingParams(workers=[2, 4], gpus_per_worker=1))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with shards, at toy size."""
    project = Project(tmp_path_factory.mktemp("project"))
    project.environment |= {"PYTHONPATH": str(project.folder), "OMP_NUM_THREADS": "1"}
    project.compose()
    project.run("python -m dvc repro -q shard@objects")
    return project


@pytest.mark.ray
def test_a_job_that_ran_elsewhere_leaves_the_stage_up_to_date_here(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = f"local://{tmp_path}/storage"
    assert submit.main(["pretrain", "--prepare", "--workers", "1", "--storage", storage]) == 0
    place = capsys.readouterr().out.split("prepared: ")[1].strip()
    assert submit.main(["--take", place]) == 1
    assert "no result.json" in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere"
    shutil.unpack_archive(f"{place.removeprefix('local://')}/code.zip", elsewhere)
    assert not (elsewhere / "code/data").exists()
    env = project.environment | {"PYTHONPATH": str(elsewhere / "code")}
    job = [sys.executable, "-m", "infra.job", place]
    done = subprocess.run(job, cwd=elsewhere / "code", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((elsewhere / "code/data").rglob("*.tar"))  # read where they were published

    params = project.folder / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("workers: 1\n", "workers: 3\n"))
    assert submit.main(["--take", place]) == 1
    assert "no longer those submitted" in capsys.readouterr().err
    assert not (project.folder / "models/pretrain").exists()
    params.write_text(before)
    assert submit.main(["--take", place]) == 0
    assert "brought and recorded" in capsys.readouterr().out
    assert "up to date" in project.run("python -m dvc status pretrain").stdout
    assert project.read("reports/pretrain/metrics.json")["epoch"] >= 1
    client = MlflowClient(f"sqlite:///{project.folder}/mlflow.db")  # where the job had no server, it is tracked here
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", "pretrain")
    assert [item.step for item in client.get_metric_history(run.info.run_id, "val/accuracy")] == [1, 2]
