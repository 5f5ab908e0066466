"""A job without a cluster: what is sent, what is fetched, what is refused in one line."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from dvc.repo import Repo
from mlflow import MlflowClient

from infra import package, submit
from infra.project import SubmitError, change
from pipelines import models
from pipelines.data.shards.manifest import MANIFEST, read_manifest
from pipelines.data.shards.writer import write_shards
from pipelines.models import ModelSpec
from pipelines.params import TrainingParams, load
from pipelines.storage.publish import describe, publish
from pipelines.training import TrainingError, cluster
from pipelines.training.launch import _check_gpus, is_autoscaled
from pipelines.workflow import trials
from pipelines.workflow.submitted_job import Input, inputs_for_all, pull_inputs, read_order
from tests.support.project import Project, Workspace
from tests.support.toy_source import ToySource, plain


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
    sent = {
        path.relative_to("runs/target").as_posix()
        for path in Path("runs/target").rglob("*")
        if path.is_file()
    }
    assert sent == {"pipelines/a.py", "notes/f.txt", "g.py"}
    assert size == 3 * len("ignored\n")


def test_a_working_directory_too_large_names_its_largest_folder(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_a_stage_run_here_names_a_ray_address_of_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = address.format(port=closed_port())
    monkeypatch.setenv("RAY_ADDRESS", place)
    # Other tests of this process may have started Ray.
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(TrainingError, match=rf"RAY_ADDRESS [^\n]*{place}[^\n]*$"),
        cluster(TrainingParams(workers=1)),
    ):
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


def test_a_trial_on_another_node_brings_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/manifest.json").write_text("{}")
    url = publish(tmp_path / "here", f"memory://{tmp_path.name}/shards/a", [MANIFEST])
    inputs = [Input("data/shards/a", url, (describe(tmp_path / "here", MANIFEST),))]
    monkeypatch.chdir(tmp_path)
    seen: list[Path] = []
    monkeypatch.setattr(
        trials, "task_of", lambda *_: seen.append(Path("data/shards/a", MANIFEST).absolute()) or sys.exit()
    )
    for _ in range(2):
        with pytest.raises(SystemExit):
            trials.run_trial(None, inputs, {}, "", print, 1)  # type: ignore[arg-type]
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
    assert inputs_for_all("memory://placed", folders) is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert inputs_for_all("runs", folders) is None
    inputs = inputs_for_all("memory://placed", folders)
    assert inputs is not None
    pull_inputs(inputs, tmp_path / "elsewhere")
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
def test_nodes_that_an_autoscaler_brought_are_told_from_those_started_by_hand(
    types: dict[str, str] | None, may: bool
) -> None:
    assert is_autoscaled(types) is may


@pytest.mark.parametrize(
    ("address", "types", "refused"),
    [
        ("", None, True),
        ("head:6379", None, False),
        ("head:6379", {"a": "node_a"}, True),
        ("head:6379", {"a": "head"}, False),
    ],
)
def test_gpus_may_come_later_where_there_is_an_autoscaler(
    address: str, types: dict[str, str] | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = json.dumps({"autoscaler_report": {"node_type_mapping": types}}).encode()
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(
        "ray.experimental.internal_kv._internal_kv_get", lambda name: status if types else None
    )
    with (
        pytest.raises(TrainingError, match="2 workers need 2 GPUs; there are at most 0")
        if refused
        else nullcontext()
    ):
        _check_gpus(TrainingParams(workers=[2, 4], gpus_per_worker=1))


@pytest.mark.parametrize(
    ("nodes", "gpus", "room"),
    [
        ([{"CPU": 8}], 0, 4),
        ([{"CPU": 3}, {"CPU": 1}, {}], 0, 1),  # both CPUs of a worker must be on one node
        ([{"CPU": 8, "GPU": 1}, {"CPU": 8}], 1, 1),
        ([{"CPU": 64, "GPU": 1}], 0.1, 10),
        ([], 0, 0),
    ],
)
def test_a_worker_runs_on_one_node(nodes: list[dict[str, float]], gpus: float, room: int) -> None:
    assert submit.room_for(nodes, {"CPU": 2, "GPU": gpus}) == room


GRAPH = """
stages:
  pretrain:
    cmd: python -m stages.pretrain
    deps: [data/shards/objects]
    params: [model, pretrain, training.workers]
    outs: [models/pretrain]
  distill:
    matrix: {run: [kd]}
    cmd: python -m stages.distill ${item.run}
    params: [distill, training.workers]
    outs: ["models/distill/${item.run}"]
  search:
    cmd: python -m stages.search
    params: [search]
    outs: [reports/search/trials.json]
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with toy shards and a graph of three stages, as the working directory."""
    monkeypatch.chdir(tmp_path)
    Workspace(tmp_path).compose("training.workers=1")
    samples = {
        "train": [plain(number) for number in range(32)],
        "val": [plain(number) for number in range(4)],
    }
    write_shards(ToySource(samples), Path("raw"), Path("data/shards/objects"), shard_size=20, progress=False)
    Path("dvc.yaml").write_text(GRAPH)
    Path(".gitignore").write_text("/data\n/models\n/weights.pt\n")
    commit = "git init -q && git add -A && git -c user.name=a -c user.email=a@b.example commit -qm all"
    subprocess.run(commit, shell=True, check=True)
    Repo.init().close()
    return tmp_path


def uploaded(storage: str) -> list[str]:
    """Returns all files in the storage."""
    filesystem, root = fsspec.url_to_fs(storage)
    return [path.removeprefix(f"{root}/") for path in filesystem.find(root)]


def test_what_a_job_needs_is_uploaded_once_and_its_order_goes_with_the_code(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"local://{small}/storage"
    assert submit.main(["pretrain", "--prepare", "--workers", "1:2", "--storage", storage]) == 0
    place = capsys.readouterr().out.split("prepared: ")[1].strip()
    shutil.unpack_archive(f"{place.removeprefix('local://')}/code.zip", small / "there")
    order = read_order(small / "there/code")
    manifest = read_manifest("data/shards/objects")
    (item,) = order.inputs
    assert order.place == place
    assert item == Input(
        "data/shards/objects", f"{storage}/shards/{manifest.digest[:16]}", (describe(item.folder, MANIFEST),)
    )
    shards = {
        path.name for path in Path("data/shards/objects").iterdir() if not path.name.endswith(".wids.json")
    }
    assert set(uploaded(item.url)) == shards
    assert load("params.yaml").training.workers == (1, 2)
    assert load(str(small / "there/code/params.yaml")).storage.root == storage


def cut_a_shard() -> None:
    next(Path("data/shards/objects").glob("train-*.tar")).write_bytes(b"cut")


def a_model() -> None:
    spec = ModelSpec("resnet8", ("circle", "square", "star"), 32, "conventional")
    models.save("models/pretrain", models.assemble(spec), spec)


def weights_that_git_ignores() -> None:
    network = models.build("resnet8", num_classes=3, options={"stem_stride": 2})
    torch.save(network.state_dict(), "weights.pt")


@pytest.mark.parametrize(
    ("stage", "changes", "before", "told"),
    [
        (
            "pretrain",
            {"pretrain.select": "val/nothing"},
            None,
            "pretrain.select: no metric 'val/nothing'; there are val/",
        ),
        ("pretrain", {"pretrain.optim.batch_size": 1}, None, "batch_size 1 (over all workers)"),
        ("pretrain", {"model.weights": "nowhere.pt"}, None, "weights nowhere.pt: no such file"),
        (
            "pretrain",
            {"model.weights": "weights.pt"},
            weights_that_git_ignores,
            "weights.pt: the job would not find it",
        ),
        (
            "pretrain",
            {"training.resume": "runs/pretrain/0"},
            None,
            "training.resume: there is no whole checkpoint in",
        ),
        ("pretrain", {}, cut_a_shard, "has 3 bytes, not"),
        ("pretrain", {"dataset": "scenes"}, None, "shards are not there"),
        ("distill@kd", {}, None, "no model in"),
        (
            "search",
            {"search.metrics": ["val/no"], "search.asha": None},
            a_model,
            "search.metrics: no metric 'val/no'",
        ),
    ],
)
def test_what_a_job_would_be_refused_for_is_said_before_anything_is_uploaded(
    stage: str,
    changes: dict[str, object],
    before: Any,
    told: str,
    small: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(Path("params.yaml"), changes)
    if before:
        before()
    params = Path("params.yaml").read_bytes()
    storage = f"memory://{small.name}"
    assert submit.main([stage, "--prepare", "--workers", "2", "--storage", storage]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert uploaded(storage) == []
    assert Path("params.yaml").read_bytes() == params


def test_an_override_from_before_a_rename_names_the_new_param(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "pretrain.lr=0.1", "--prepare", "--storage", f"memory://{small.name}"]
    assert submit.main(arguments) == 1
    assert capsys.readouterr().err == "infra.submit: params: pretrain.lr: renamed to pretrain.optim.lr\n"


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
    assert read_order(elsewhere / "code").place == place
    env = project.environment | {"PYTHONPATH": str(elsewhere / "code")}
    job = [sys.executable, "-m", "infra.job"]
    done = subprocess.run(job, cwd=elsewhere / "code", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((elsewhere / "code/data").rglob("*.tar"))  # the job reads them from the storage

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
    # The job had no tracking server, so its run is logged here.
    client = MlflowClient(f"sqlite:///{project.folder}/mlflow.db")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", "pretrain")
    assert [item.step for item in client.get_metric_history(run.info.run_id, "val/accuracy")] == [1, 2]
