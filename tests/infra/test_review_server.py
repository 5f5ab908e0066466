"""The review desk with MLflow's basic-auth on PostgreSQL: users, rights, rivals, an outage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.tracking import review
from pipelines.tracking.decisions import audit, look
from pipelines.tracking.server import connect
from tests.support import servers

pytestmark = [pytest.mark.infra, pytest.mark.timeout(900)]
NAME, PASSWORD = "demo", "long and secret"
ROUNDS = 50
AUTH = """[mlflow]
default_permission = READ
database_uri = {database}
auth_cache_ttl_seconds = 600
"""


@dataclass(frozen=True)
class Server:
    """An MLflow server with a login, and its database."""

    address: str
    database: servers.Postgres


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the reviewers alice and bob, dora who may only write runs, and carl who may only read."""
    pytest.importorskip("flask_wtf", reason="basic-auth needs Flask-WTF")
    if not servers.POSTGRES:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    folder = tmp_path_factory.mktemp("review")
    login = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret of a test",
    }
    with servers.Postgres(os.environ, folder) as database:
        (folder / "auth.ini").write_text(AUTH.format(database=database.url))
        options = (database.url, str(folder / "artifacts"), os.environ | login, folder)
        with servers.mlflow_server(*options, "--app-name", "basic-auth") as address:
            with pytest.MonkeyPatch.context() as patch:
                log_in(patch, "admin")
                fill(address)
            yield Server(address, database)


def log_in(monkeypatch: pytest.MonkeyPatch, user: str, password: str = PASSWORD) -> None:
    """Makes this process a client of that user."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def fill(address: str) -> None:
    """Adds four versions of a model, and the users with their rights."""
    from mlflow.server import get_app_client

    client = connect(address)
    experiment = client.create_experiment("demo")
    client.create_registered_model(NAME)
    for number in "1234":
        run = client.create_run(experiment).info
        source, tags = f"{run.artifact_uri}/model", {"content.sha256": number * 64}
        client.create_model_version(NAME, source, run.run_id, tags=tags)
    users = get_app_client("basic-auth", tracking_uri=address)
    for user in ("alice", "bob", "carl", "dora"):
        users.create_user(user, PASSWORD)
    for user in ("alice", "bob", "dora"):
        users.grant_user_permission(user, "experiment", experiment, "EDIT")
    for user in ("alice", "bob"):
        users.grant_user_permission(user, "registered_model", NAME, "MANAGE")


@pytest.fixture
def desk(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Returns a function that runs a command as alice; returns its exit code and what it printed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    log_in(monkeypatch, "alice")

    def desk(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        status = review.main(arguments)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return desk


Desk = Callable[..., tuple[int, str]]


def aliases(server: Server) -> dict[str, str]:
    return dict(look(connect(server.address), NAME).aliases)


def test_the_server_names_the_reviewer(server: Server, desk: Desk) -> None:
    connect(server.address).set_registered_model_alias(NAME, "candidate", "1")
    status, told = desk("approve", "demo/1", "--reason", "better", "--json")
    assert status == 0, told
    decision = json.loads(told)
    assert (decision["reviewer"], decision["verified"]) == ("alice", True)
    assert aliases(server) == {"champion": "1"}
    assert connect(server.address).get_model_version(NAME, "1").tags["decision.by"] == "alice"


@pytest.mark.parametrize("user", ["carl", "dora"])
def test_a_reviewer_without_rights_changes_nothing(
    server: Server, desk: Desk, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    before = look(connect(server.address), NAME)
    log_in(monkeypatch, user)
    for command in (["approve", "demo/2"], ["reject", "demo/2"]):
        status, told = desk(*command, "--reason", "better")
        assert (status, told.count("\n")) == (1, 1), told
        assert "Permission denied" in told or "PERMISSION_DENIED" in told, told
    log_in(monkeypatch, "alice")
    after = look(connect(server.address), NAME)
    assert (after.aliases, after.effective) == (before.aliases, before.effective)
    assert "RUNNING" not in [decision.status for decision in after.decisions]
    assert "decision" not in connect(server.address).get_model_version(NAME, "2").tags


def test_a_wrong_password_is_one_line(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, "alice", "a wrong password")
    status, told = desk("approve", "demo/2", "--reason", "better")
    assert (status, told.count("\n")) == (1, 1), told


RIVAL = """
import json, sys
from pipelines.tracking.deciding import Request, decide
from pipelines.tracking.decisions import look
from pipelines.tracking.server import TrackingError, connect, tracking_uri

uri = tracking_uri()
client = connect(uri)
for version in map(str.strip, iter(sys.stdin.readline, "")):
    seen = look(client, "demo")
    print("looked", flush=True)
    sys.stdin.readline()
    try:
        decision, _ = decide(uri, Request("approve", "demo", version, "better"), seen)
        print(json.dumps({"won": decision.number}), flush=True)
    except TrackingError as error:
        print(json.dumps({"told": str(error)}), flush=True)
"""


def test_of_two_reviewers_at_once_one_wins_and_the_other_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": server.address,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    log_in(monkeypatch, "admin")
    client = connect(server.address)
    rivals: list[Any] = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL],
            env=environment | {"MLFLOW_TRACKING_USERNAME": user},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for user in ("alice", "bob")
    ]
    try:
        for number in range(ROUNDS):
            versions = ("2", "3") if number % 2 == 0 else ("1", "4")
            before = look(client, NAME)
            for rival, version in zip(rivals, versions, strict=True):
                rival.stdin.write(f"{version}\n")
            assert [rival.stdout.readline() for rival in rivals] == ["looked\n"] * 2
            for rival in rivals:
                rival.stdin.write("go\n")
            answers = [json.loads(rival.stdout.readline()) for rival in rivals]
            state = look(client, NAME)
            (winner,) = (place for place, answer in enumerate(answers) if "won" in answer)
            assert "came first: " in answers[1 - winner]["told"]
            assert state.aliases["champion"] == versions[winner]
            assert state.aliases["previous"] == before.aliases["champion"]
            new = [item for item in state.decisions if item not in before.decisions]
            assert sorted((item.status, item.version) for item in new) == [
                ("FAILED", versions[1 - winner]),
                ("FINISHED", versions[winner]),
            ]
            assert {item.reviewer for item in new} == {"alice", "bob"}
            assert audit(client, NAME) == []
    finally:
        for rival in rivals:
            rival.stdin.close()
            rival.wait(60)


def test_an_approval_during_an_outage_of_the_database_is_completed_afterwards(
    server: Server, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    before = aliases(server)
    version = next(number for number in "12" if number != before["champion"])
    real = MlflowClient.set_registered_model_alias

    def fails(client: MlflowClient, name: str, alias: str, number: str) -> None:
        if alias == "champion":
            server.database.stop()
        real(client, name, alias, number)

    with monkeypatch.context() as outage:
        outage.setattr(MlflowClient, "set_registered_model_alias", fails)
        try:
            status, told = desk("approve", f"demo/{version}", "--reason", "better")
        finally:
            server.database.start()
    assert (status, told.count("\n")) == (1, 1), told
    assert aliases(server)["champion"] == before["champion"]
    assert desk("audit", NAME)[0] == 1
    status, told = desk("approve", f"demo/{version}", "--reason", "better")
    assert status == 0, told
    assert aliases(server) == {"champion": version, "previous": before["champion"]}
    assert desk("audit", NAME)[0] == 0
    runs = [item for item in look(connect(server.address), NAME).decisions if item.version == version]
    assert [item.status for item in runs[-1:]] == ["FINISHED"]


def test_an_alias_moved_by_hand_is_named_and_rollback_refuses_until_it_is_mended(
    server: Server, desk: Desk
) -> None:
    client, before = connect(server.address), aliases(server)
    stranger = next(number for number in "1234" if number not in before.values())
    client.set_registered_model_alias(NAME, "champion", stranger)
    status, told = desk("audit", NAME)
    assert (status, "moved by hand" in told) == (1, True)
    assert desk("rollback", NAME, "--reason", "wrong")[0] == 1
    client.set_registered_model_alias(NAME, "champion", before["champion"])
    assert desk("audit", NAME)[0] == 0
    assert desk("rollback", NAME, "--reason", "wrong")[0] == 0
    assert aliases(server)["champion"] == before["previous"]
    assert client.get_model_version(NAME, before["champion"]).tags["decision"] == "rejected"
