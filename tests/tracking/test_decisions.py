"""Decisions on SQLite: what a crash, a rival or a hand leaves, and what is loaded as approved."""

import threading
from contextlib import nullcontext

import pytest
import torch
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.models import ModelSpec, assemble, save
from pipelines.tracking import TrackingError, deciding
from pipelines.tracking.deciding import OvertakenError, Request, decide
from pipelines.tracking.decisions import audit, look
from pipelines.tracking.provenance import content_digest, model_files
from tests.support.desk import NAME, aliases, statuses

pytestmark = pytest.mark.usefixtures("alice")


class Died(ConnectionError):
    """The process lost the registry at this moment."""


WRITES = (
    "create_run",
    "log_batch",
    "delete_registered_model_alias",
    "set_registered_model_alias",
    "set_model_version_tag",
    "set_terminated",
)


def die_at(write, monkeypatch):
    """Lets the write of this number (from 0) and all later ones fail; returns the list of those done."""
    done = []

    def dies(real):
        def call(*arguments, **keywords):
            if len(done) >= write:
                raise Died
            done.append(arguments)
            return real(*arguments, **keywords)

        return call

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, dies(getattr(MlflowClient, name)))
    return done


# Run, content, three aliases, four tags, end of the run.
@pytest.mark.parametrize("write", [0, 1, 2, 3, 4, 6, 9])
def test_an_approval_that_dies_between_its_writes_is_completed_when_it_is_asked_for_again(
    add, approve, client, monkeypatch, write
):
    add()
    approve("1")
    add()
    with monkeypatch.context() as dying:
        die_at(write, dying)
        status, told = approve("2")
        assert (status, told.count("\n")) == (1, 1)
    assert approve("2")[0] == 0
    assert aliases(client) == {"champion": "2", "previous": "1"}
    assert statuses(client) == ["FINISHED", "FINISHED"]
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id], "tags.stage = 'review'")
    assert len(runs) == 2
    assert client.get_model_version(NAME, "2").tags["decision.run"] == runs[0].info.run_id
    assert audit(client, NAME) == []


# Run, content, two aliases, four tags, end of the run.
@pytest.mark.parametrize("write", [1, 3, 4, 8])
def test_a_rollback_that_dies_between_its_writes_goes_back_once(
    add, approve, desk, client, monkeypatch, write
):
    for number in "123":
        add()
        approve(number)
    with monkeypatch.context() as dying:
        die_at(write, dying)
        assert desk("rollback", NAME, "--reason", "wrong")[0] == 1
    assert desk("rollback", NAME, "--reason", "wrong")[0] == 0
    assert aliases(client) == {"champion": "2", "previous": "1"}
    assert audit(client, NAME) == []


def as_on_a_server(monkeypatch):
    """Takes the lock away, so that decisions have to take turns."""
    monkeypatch.setattr(deciding, "alone", lambda uri, work: nullcontext(False))


@pytest.mark.parametrize("locked", [True, False])
def test_an_interrupted_decision_is_named_and_replaced_by_that_of_another_reviewer(
    add, approve, desk, client, monkeypatch, locked
):
    if not locked:
        as_on_a_server(monkeypatch)
        monkeypatch.setattr(deciding, "PATIENCE", 0.1)
    for _ in "123":
        add()
    approve("1")
    with monkeypatch.context() as dying:
        done = die_at(4, dying)
        approve("2")
    assert done[-1][-2:] == ("champion", "2")
    status, told = desk("audit", NAME)
    assert status == 1
    assert "champion is version 2, by the record (last decision 1) version 1" in told
    assert "decision 2 (approve version 2, alice (unverified)) is unfinished" in told
    monkeypatch.setenv("LOGNAME", "bob")
    assert approve("3")[0] == 0
    assert statuses(client) == ["FINISHED", "KILLED", "FINISHED"]
    assert aliases(client) == {"champion": "3", "previous": "1"}
    assert "replaced by decision 3" in desk("log", NAME, "--json")[1]
    assert desk("audit", NAME)[0] == 0


@pytest.mark.parametrize("locked", [True, False])
def test_of_two_reviewers_at_once_one_wins_and_the_other_is_told(add, client, monkeypatch, locked):
    if not locked:
        as_on_a_server(monkeypatch)
    outcomes = race(client.tracking_uri, [look(client, NAME)] * 2, [add(), add()])
    lost = [outcome for outcome in outcomes if isinstance(outcome, OvertakenError)]
    (won,) = (outcome for outcome in outcomes if isinstance(outcome, tuple))
    assert len(lost) == 1
    assert f"came first: alice (unverified) approved version {won[0].version}" in str(lost[0])
    assert sorted(statuses(client)) == ["FAILED", "FINISHED"]
    assert aliases(client)["champion"] == won[0].version
    assert "previous" not in aliases(client)
    assert audit(client, NAME) == []


def race(uri, seen, numbers):
    """Approves versions at the same time; returns what each approval returned or raised."""
    outcomes, start = [], threading.Barrier(len(numbers))

    def decides(state, number):
        start.wait()
        try:
            outcomes.append(decide(uri, Request("approve", NAME, number, "better"), state))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=decides, args=pair) for pair in zip(seen, numbers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_an_alias_that_was_moved_meanwhile_is_not_overwritten(add, client):
    for _ in "12":
        add()
    seen = look(client, NAME)
    client.set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(OvertakenError, match="the alias champion was moved meanwhile"):
        decide(client.tracking_uri, Request("approve", NAME, "2", "better"), seen)
    assert aliases(client)["champion"] == "1"


def test_an_alias_moved_by_hand_is_named_and_no_later_decision_hides_it(add, approve, desk, client):
    for number in "12":
        add()
        approve(number)
    add()
    client.set_registered_model_alias(NAME, "champion", "3")
    status, told = desk("audit", NAME)
    assert status == 1
    assert "champion is version 3, by the record (last decision 2) version 2: moved by hand" in told
    assert desk("rollback", NAME, "--reason", "wrong")[0] == 1
    add()
    assert desk("reject", "demo/4", "--reason", "wrong")[0] == 0
    assert desk("audit", NAME)[0] == 1
    assert approve("2")[0] == 0
    assert aliases(client) == {"champion": "2", "previous": "1"}
    assert desk("audit", NAME)[0] == 0


def test_deleting_the_run_of_a_decision_does_not_undo_it(add, approve, client):
    add()
    approve("1")
    client.delete_run(look(client, NAME).decisions[0].run_id)
    assert statuses(client) == ["FINISHED"]
    assert audit(client, NAME) == []


def test_after_the_champion_was_deleted_another_version_can_be_approved(add, approve, desk, client):
    for _ in "12":
        add()
    approve("1")
    client.delete_model_version(NAME, "1")
    assert "champion is no version, by the record (last decision 1) version 1" in desk("audit", NAME)[1]
    assert approve("2")[0] == 0
    assert aliases(client) == {"champion": "2"}
    assert desk("audit", NAME)[0] == 0


def test_a_version_without_a_run_can_be_looked_at_and_not_decided_on(add, approve, desk, client):
    client.create_model_version(NAME, "models/x", tags={"content.sha256": "ab"})
    assert desk("show", "demo/1")[0] == 0
    assert "register the model again" in approve("1")[1]
    assert aliases(client) == {}


def test_a_decision_in_an_experiment_without_versions_of_the_model_does_not_count(add, approve, client):
    add()
    add()
    approve("1")
    run = client.get_run(look(client, NAME).decisions[0].run_id)
    tags = {key: run.data.tags[key] for key in ("stage", "review.model")}
    false = client.create_run(client.create_experiment("elsewhere"), tags=tags).info.run_id
    for key, value in {**run.data.params, "version": "2", "number": "2", "follows": "1"}.items():
        client.log_param(false, key, value)
    client.set_terminated(false)
    assert [decision.version for decision in look(client, NAME).decisions] == ["1"]


@pytest.fixture
def stored(client, project, add):
    """Two versions whose models can be loaded; the first is approved by the test."""
    spec = ModelSpec("resnet20", ("cat", "dog"), 16, "bcos")
    experiment = client.get_experiment_by_name("demo").experiment_id
    for number in "12":
        run_id = client.create_run(experiment).info.run_id
        folder = project / number / "artifacts"
        torch.manual_seed(int(number))
        save(folder, assemble(spec), spec)
        digest = content_digest(model_files(folder))
        client.create_model_version(NAME, str(folder.parent), run_id, tags={"content.sha256": digest})
    return project


def test_only_an_approved_version_is_loaded_as_one(stored, approve, desk, client):
    def refused(uri="models:/demo/1"):
        with pytest.raises(TrackingError) as error:
            tracking.load(uri, approved=True)
        assert "\n" not in str(error.value)
        return str(error.value)

    def loads(uri="models:/demo/1"):
        return tracking.load(uri, approved=True)[1].classes == ("cat", "dog")

    assert "no decision approved it" in refused()
    approve("1")
    assert loads()
    assert loads("models:/demo@champion")
    client.set_model_version_tag(NAME, "1", "gates", "undecided")
    assert "its gates are undecided now" in refused()
    approve("1", "--override", "few images")
    assert loads()
    client.set_model_version_tag(NAME, "1", "content.sha256", "00")
    assert "its content is not what was approved" in refused()
    client.set_model_version_tag(NAME, "1", "content.sha256", look(client, NAME).decisions[0].digest)
    client.set_registered_model_alias(NAME, "champion", "2")
    assert "no decision approved it" in refused("models:/demo@champion")
    client.set_registered_model_alias(NAME, "previous", "1")
    assert "holds the alias previous, but no decision gave it" in refused("models:/demo@previous")
    assert loads()
    weights = stored / "1/artifacts/model.safetensors"
    weights.write_bytes((stored / "2/artifacts/model.safetensors").read_bytes())
    assert "its files are not those that were approved" in refused()
    desk("reject", "demo/1", "--reason", "wrong")
    assert "rejected version 1" in refused()
    assert "only a registered version" in refused(str(stored / "1"))


def test_registering_again_after_decisions_changes_nothing(project, client, manifest, approve, desk):
    spec = ModelSpec("resnet20", ("cat", "dog"), 16, "bcos")

    def register():
        for letter, accuracy in (("a", 0.5), ("b", 0.6)):
            tracking.register(
                f"models/{letter}",
                experiment="demo",
                name=NAME,
                metrics={"val/accuracy": accuracy},
                manifest=manifest,
                dataset="objects",
                compare="val/accuracy",
            )

    def snapshot():
        versions = [client.get_model_version(NAME, number) for number in "12"]
        return aliases(client), [item.tags for item in versions], look(client, NAME).decisions

    for letter in "ab":
        torch.manual_seed(ord(letter))
        save(f"models/{letter}", assemble(spec), spec)
    register()
    assert aliases(client) == {"candidate": "2"}
    for decision in (
        lambda: approve("1"),
        lambda: approve("2"),
        lambda: desk("rollback", NAME, "--reason", "wrong"),
        lambda: desk("reject", "demo/1", "--reason", "wrong", "--withdraw"),
    ):
        assert decision()[0] == 0
        before = snapshot()
        register()
        assert snapshot() == before
    assert aliases(client) == {}
