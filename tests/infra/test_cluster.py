"""A whole B-cosification on a Ray cluster with S3 and MLflow on PostgreSQL (`make test-infra`)."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import pytest
import s3fs
import torch

from infra import submit
from pipelines import models, tracking
from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.publish import publish_shards
from pipelines.params import DataParams
from pipelines.training import checkpoints
from tests.support import servers
from tests.support.project import Project

pytestmark = [pytest.mark.infra, pytest.mark.timeout(900)]
STORAGE = "s3://bcos/here"


@dataclass
class Cluster:
    """All servers, and a project whose stages are submitted to them."""

    storage: servers.Storage
    project: Project

    def submit(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs `python -m infra.submit`. A variable without a value is removed from the environment."""
        environment = {key: value for key, value in (self.project.environment | env).items() if value}
        return subprocess.run(
            [sys.executable, "-m", "infra.submit", *arguments],
            **{"cwd": self.project.folder, "env": environment, "capture_output": True, "text": True},
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not servers.POSTGRES:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        storage = stack.enter_context(servers.Storage())
        mine = {"AWS_ENDPOINT_URL": storage.url, **servers.KEYS}
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in mine.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bcos")
        project = Project(tmp_path_factory.mktemp("project"))
        env = {
            **project.environment,
            **mine,
            "OMP_NUM_THREADS": "1",
            "SHARD_CACHE": str(folder / "shards"),  # empty: workers bring each shard
        }
        database = stack.enter_context(servers.Postgres(env, folder))
        mlflow = stack.enter_context(servers.mlflow_server(database.url, "s3://bcos/mlflow", env, folder))
        patch.setenv("MLFLOW_TRACKING_URI", mlflow)
        token = secrets.token_hex(32)
        address = stack.enter_context(servers.ray_head(token, env, folder))
        project.environment = env | {
            **{"RAY_API_SERVER_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
            **{"MLFLOW_TRACKING_URI": mlflow, "PYTHONPATH": str(project.folder)},
        }
        project.compose()
        project.run("python -m dvc repro -q shard@objects")
        yield Cluster(storage, project)


@pytest.fixture(scope="module")
def bcosified(cluster: Cluster) -> str:
    """The output of both stages. The storage refuses every fifth request and is down for a while."""
    said = []
    cluster.storage.share = 0.2
    # The second stage reads cached shards, so the storage goes down when it writes a checkpoint.
    at = {"pretrain": ("GET", "/train-", 20), "bcosify@pretrained": ("PUT", "/checkpoints/", 20)}
    for number, (stage, leave_at) in enumerate(at.items(), start=1):
        cluster.storage.leave_at = leave_at
        done = cluster.submit(stage, "--workers", "1", "--storage", STORAGE)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert cluster.storage.outages == number
        said.append(done.stdout)
    cluster.storage.share = 0.0
    return "\n".join(said)


def test_the_stages_are_up_to_date_afterwards(cluster: Cluster, bcosified: str) -> None:
    status = cluster.project.run("python -m dvc status pretrain bcosify@pretrained").stdout
    assert "up to date" in status
    history = cluster.project.read("reports/bcosify/pretrained/history.json")
    assert [row["epoch"] for row in history] == [1, 2]
    assert "epoch 2/2" in bcosified
    assert cluster.storage.refused > 20


def test_checkpoints_and_shards_are_in_the_storage_and_none_of_it_here(
    cluster: Cluster, bcosified: str
) -> None:
    here = s3fs.S3FileSystem(skip_instance_cache=True)
    assert len(here.glob("bcos/here/pretrain/*/checkpoints/*/complete.json")) >= 2
    assert len(here.glob("bcos/here/bcosify/pretrained/*/checkpoints/*/complete.json")) >= 2
    assert len(here.glob("bcos/here/shards/*/manifest.json")) == 1
    assert not list(cluster.project.folder.glob("runs/*/*/checkpoints"))


def test_the_run_is_tracked_with_commit_and_every_epoch_once(cluster: Cluster, bcosified: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    commit = cluster.project.run("git rev-parse HEAD").stdout.strip()
    experiment = client.get_experiment_by_name("bcos")
    assert experiment is not None
    runs = {run.data.tags["stage"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"pretrain", "bcosify/pretrained"}
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.source.git.commit"] == commit
        steps = [item.step for item in client.get_metric_history(run.info.run_id, "val/accuracy")]
        assert steps == [1, 2]


def test_the_model_comes_back_from_the_registry(cluster: Cluster, bcosified: str) -> None:
    folder = cluster.project.folder / "models/bcosify/pretrained"
    manifest = read_manifest(str(cluster.project.folder / "data/shards/objects"))
    tracking.register(
        folder,
        experiment="bcos",
        name="bcos-smoke",
        metrics={"test/accuracy": 0.5},
        manifest=manifest.to_json(),
        dataset="objects",
    )
    (brought, spec), (own, _) = tracking.load("models:/bcos-smoke@candidate"), models.load(folder)
    assert spec.kind == "bcos"
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in brought.state_dict().items())


def test_an_epoch_has_each_sample_once_while_the_storage_fails_and_is_away(cluster: Cluster) -> None:
    shards = str(cluster.project.folder / "data/shards/objects")
    root = publish_shards(shards, "s3://bcos/outage")
    cluster.storage.share, keys = 0.2, []
    for batch in loader(
        root, "train", DataParams(image_size=32, augment="none", shuffle_buffer=8), 16, train=True
    ):
        keys += batch["key"]
        if len(keys) == 48:
            cluster.storage.__exit__()  # away before the next batch is asked for
            outage, began = threading.Timer(20, cluster.storage.__enter__), time.monotonic()
            outage.start()
    cluster.storage.share = 0.0
    assert time.monotonic() - began > 20
    assert len(keys) == len(set(keys)) == read_manifest(shards).count("train")


def test_checkpoints_are_written_and_read_across_an_outage(cluster: Cluster) -> None:
    outage = threading.Thread(target=cluster.storage.away, args=[5])
    outage.start()
    checkpoints.save("s3://bcos/outage/run", 1, {"model": {"a": torch.ones(3)}}, {"epoch": 1}, set(), 2)
    outage.join()
    assert (checkpoints.newest("s3://bcos/outage/run") or {})["step"] == 1


@pytest.mark.parametrize(
    ("arguments", "env", "told"),
    [
        (["pretran"], {}, "stage 'pretran' is not in dvc.yaml; those to submit are"),
        (["evaluate"], {}, "stage 'evaluate' does not run on workers"),
        (
            ["pretrain", "recipe=smoke", "pretrain.select=val/no", "--storage", STORAGE],
            {},
            "pretrain.select: no metric 'val/no'",
        ),
        (
            ["pretrain", "--gpus-per-worker", "1"],
            {},
            "need 1 GPUs and 1 CPUs; the cluster has 0 GPUs and 3 CPUs on 1 nodes",
        ),
        (["pretrain", "--storage", "s3://nowhere/x"], {}, "s3://nowhere/x: there is no such bucket"),
        (
            ["pretrain", "--storage", STORAGE],
            {"AWS_ACCESS_KEY_ID": ""},
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        (["pretrain"], {"RAY_AUTH_TOKEN": "0" * 64}, "refuses this token"),
        (["pretrain"], {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": ""}, "wants a token"),
        (["--stop", "nothing"], {}, "no job 'nothing' on this cluster"),
    ],
)
def test_bad_input_is_one_line(
    cluster: Cluster, arguments: list[str], env: dict[str, str], told: str
) -> None:
    if arguments[0] == "pretrain":
        arguments = [*arguments, "--workers", "1"]
    done = cluster.submit(
        *arguments, **{"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null", **env}
    )
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_search_runs_there_too_and_its_front_comes_back(cluster: Cluster, bcosified: str) -> None:
    project = cluster.project
    project.compose()
    project.run("python -m dvc repro -q explain classify")  # a search may depend on both
    done = cluster.submit(
        "search", "recipe=smoke", "search.trials=2", "search.asha=null", "--storage", STORAGE
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["status"] for row in project.read("reports/search/trials.json")] == ["finished", "finished"]
    assert "up to date" in project.run("python -m dvc status search").stdout
    assert (
        len(s3fs.S3FileSystem(skip_instance_cache=True).glob("bcos/here/search/*/trials/*/trial.json")) == 2
    )


def test_a_job_that_fails_passes_its_status_on(cluster: Cluster) -> None:
    done = cluster.submit(
        "pretrain", "recipe=smoke", "pretrain.optim.lr=1e30", "--workers", "1", "--storage", STORAGE
    )
    assert done.returncode == 1
    assert "is not a finite number" in done.stdout
    assert "brought" not in done.stdout


def test_an_interrupt_stops_following_and_not_the_job_and_stop_does(cluster: Cluster) -> None:
    arguments = [
        "pretrain",
        "recipe=smoke",
        "pretrain.optim.epochs=400",
        "--workers",
        "1",
        "--storage",
        STORAGE,
    ]
    command = [sys.executable, "-m", "infra.submit", *arguments]
    env, folder = cluster.project.environment, cluster.project.folder
    # SIGINT is ignored by default if the tests themselves run in the background.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=heard
    ) as following:
        assert following.stdout is not None
        job = next(line for line in following.stdout if line.startswith("stop")).split()[-1]
        next(line for line in following.stdout if "epoch 1/400" in line)
        following.send_signal(signal.SIGINT)
        assert f"the job goes on: python -m infra.submit --follow {job}" in following.stdout.read()
    assert following.returncode == submit.INTERRUPTED
    assert f"job {job}: stopping" in cluster.submit("--stop", job).stdout
    ended = cluster.submit("--follow", job)
    assert ended.returncode == 1
    assert f"job {job}: stopped" in ended.stderr
