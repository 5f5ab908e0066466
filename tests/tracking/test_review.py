"""The review desk on SQLite: what decisions change, what is refused, and what a crash or a rival leaves."""

import json
import threading
from contextlib import nullcontext

import pytest
import torch
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.models import ModelSpec, assemble, save
from pipelines.tracking import TrackingError, deciding, review
from pipelines.tracking.deciding import OvertakenError, Request, decide
from pipelines.tracking.decisions import audit, look
from pipelines.tracking.provenance import content_digest, model_files

NAME = "demo"


@pytest.fixture(autouse=True)
def alice(monkeypatch):
    monkeypatch.setenv("LOGNAME", "alice")


@pytest.fixture
def add(client, project):
    """Returns a function that adds a version and returns its number."""
    experiment = client.create_experiment("demo", artifact_location=(project / "mlartifacts").as_uri())
    client.create_registered_model(NAME)

    def add(gates=None, **tags):
        run = client.create_run(experiment)
        tags = {"content.sha256": run.info.run_id, **({"gates": gates} if gates else {}), **tags}
        version = client.create_model_version(NAME, "models/x", run.info.run_id, tags=tags)
        client.set_registered_model_alias(NAME, "candidate", version.version)
        return str(version.version)

    return add


@pytest.fixture
def desk(capsys):
    """Returns a function that runs a command and returns its exit code and what it printed."""

    def desk(*arguments):
        capsys.readouterr()
        status = review.main(arguments)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return desk


@pytest.fixture
def approve(desk):
    def approve(number, *more):
        return desk("approve", f"{NAME}/{number}", "--reason", "better", *more)

    return approve


def aliases(client):
    return {key: str(value) for key, value in client.get_registered_model(NAME).aliases.items()}


def statuses(client):
    return [decision.status for decision in look(client, NAME).decisions]


def test_an_approval_moves_the_aliases_and_is_a_run_in_the_experiment_of_the_version(add, approve, client):
    add()
    assert approve("1")[0] == 0
    add("pass")
    status, told = approve("2")
    assert status == 0
    assert "alice (unverified) approved version 2" in told
    assert aliases(client) == {"champion": "2", "previous": "1"}
    tags = client.get_model_version(NAME, "2").tags
    decision = look(client, NAME).decisions[-1]
    assert {key: value for key, value in tags.items() if key.startswith("decision")} == {
        "decision": "approved",
        "decision.by": "alice (unverified)",
        "decision.reason": "better",
        "decision.run": decision.run_id,
    }
    run = client.get_run(decision.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.experiment_id == client.get_experiment_by_name("demo").experiment_id
    assert run.data.tags["stage"] == "review"
    assert (decision.number, decision.follows, decision.gates, decision.verified) == (2, 1, "pass", False)
    assert decision.digest == tags["content.sha256"]
    assert decision.before == {"candidate": "2", "champion": "1"}
    assert decision.after == {"champion": "2", "previous": "1"}
    assert audit(client, NAME) == []


def test_asked_again_an_approval_is_not_doubled(add, approve, client):
    add()
    approve("1")
    status, told = approve("1")
    assert (status, "as before" in told) == (0, True)
    assert statuses(client) == ["FINISHED"]


@pytest.mark.parametrize("gates", ["fail", "undecided"])
def test_failed_or_undecided_gates_need_an_override(add, approve, client, gates):
    add(gates)
    status, told = approve("1")
    assert status == 1
    assert f"its gates are {gates}; --override REASON overrides" in told
    assert approve("1", "--override", " ")[0] == 1
    assert statuses(client) == []
    assert approve("1", "--override", "the test split is small")[0] == 0
    (decision,) = look(client, NAME).decisions
    assert (decision.gates, decision.override) == (gates, "the test split is small")
    assert aliases(client) == {"champion": "1"}


def test_an_empty_or_endless_reason_is_refused_and_a_missing_one_is_wrong_usage(add, desk, client):
    add()
    assert desk("approve", "demo/1", "--reason", " \n")[0] == 1
    assert desk("approve", "demo/1", "--reason", "x" * 5000)[0] == 1
    with pytest.raises(SystemExit) as wrong:
        desk("approve", "demo/1")
    assert wrong.value.code == 2
    assert statuses(client) == []


def test_a_rejected_version_loses_candidate_and_never_counts_as_approved(add, approve, desk, client):
    add()
    assert desk("reject", "demo/1", "--reason", "blurred maps")[0] == 0
    assert aliases(client) == {}
    assert client.get_model_version(NAME, "1").tags["decision"] == "rejected"
    approve("1")  # a later decision counts
    add()
    approve("2")
    assert desk("reject", "demo/1", "--reason", "blurred maps after all")[0] == 0
    assert aliases(client) == {"champion": "2"}  # a rollback must not bring it back
    assert client.get_model_version(NAME, "1").tags["decision.reason"] == "blurred maps after all"
    assert audit(client, NAME) == []


def test_the_champion_is_only_rejected_when_that_is_asked_for(add, approve, desk, client):
    add()
    approve("1")
    status, told = desk("reject", "demo@champion", "--reason", "wrong")
    assert (status, "is the champion" in told) == (1, True)
    assert desk("reject", "demo@champion", "--reason", "wrong", "--withdraw")[0] == 0
    assert aliases(client) == {}
    assert audit(client, NAME) == []


def test_a_rollback_rejects_the_champion_and_brings_the_previous_ones_back(add, approve, desk, client):
    for number in "123":
        add()
        approve(number)
    assert aliases(client) == {"champion": "3", "previous": "2"}
    assert desk("rollback", NAME, "--reason", " ")[0] == 1
    assert desk("rollback", NAME, "--reason", "wrong at night")[0] == 0
    assert aliases(client) == {"champion": "2", "previous": "1"}
    assert client.get_model_version(NAME, "3").tags["decision"] == "rejected"
    assert client.get_model_version(NAME, "2").tags["decision"] == "approved"
    assert desk("rollback", NAME, "--reason", "wrong by day")[0] == 0
    assert aliases(client) == {"champion": "1"}
    status, told = desk("rollback", NAME, "--reason", "wrong")
    assert (status, told.count("\n")) == (1, 1)
    assert "no version has the alias previous" in told
    assert audit(client, NAME) == []


def test_a_rollback_is_refused_if_the_previous_champion_fails_its_gates_now(add, approve, desk, client):
    for number in "12":
        add()
        approve(number)
    client.set_model_version_tag(NAME, "1", "gates", "fail")
    status, told = desk("rollback", NAME, "--reason", "wrong")
    assert (status, "its gates are fail now" in told) == (1, True)
    assert aliases(client) == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["show", "dmeo/1"], "there is no registered model 'dmeo'; nearest: demo"),
        (["log", "models:/dmo"], "there is no registered model 'dmo'; nearest: demo"),
        (["show", "demo/7"], "demo has no version 7; nearest: 1, 2"),
        (["show", "models:/demo@cand"], "no version of demo has the alias 'cand'; nearest: candidate"),
        (["approve", "demo/3", "--reason", "x"], "demo has no version 3; nearest: 1, 2"),
    ],
)
def test_what_does_not_exist_is_one_line_with_the_nearest(add, desk, arguments, near):
    add()
    add()
    assert desk(*arguments) == (1, f"{near}\n")


@pytest.mark.parametrize("text", ["demo", "demo/", "demo/latest", "@champion", "a/b@champion"])
def test_what_names_no_version_is_wrong_usage(desk, text):
    with pytest.raises(SystemExit) as wrong:
        desk("show", text)
    assert wrong.value.code == 2


def test_each_command_prints_json(add, approve, desk, client, project):
    add("pass", **{"metric.test/accuracy": "0.5", "metric.test/epg": "nan"})
    add("fail", **{"metric.test/accuracy": "0.75"})
    gates = [{"name": "accuracy", "metric": "test/accuracy", "outcome": "pass", "interval": [0.4, 0.6]}]
    (project / "gates.json").write_text(json.dumps(gates))
    client.log_artifact(client.get_model_version(NAME, "1").run_id, str(project / "gates.json"))

    def parsed(*arguments):
        status, told = desk(*arguments, "--json")
        return status, json.loads(told)

    assert parsed("approve", "demo/1", "--reason", "[bold]good[/]")[1]["number"] == 1
    assert [row["aliases"] for row in parsed("list")[1]] == [["champion"], ["candidate"]]
    shown = parsed("show", "demo@champion")[1]
    assert shown["gate_results"] == gates
    assert shown["figures"] == {"test/accuracy": 0.5}
    assert shown["decisions"][0]["reason"] == "[bold]good[/]"
    assert parsed("diff", "demo/1", "demo/2")[1]["figures"] == {"test/accuracy": [0.5, 0.75]}
    assert parsed("diff", "demo/1", "demo/2")[1]["tags"]["gates"] == ["pass", "fail"]
    assert parsed("log", NAME)[1][0]["after"] == {"candidate": "2", "champion": "1"}
    assert parsed("audit", NAME) == (0, [])
    assert "[bold]good[/]" in desk("log", NAME)[1]


def test_tables_fit_100_columns_and_have_no_colours_without_a_terminal(add, approve, desk, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    add("fail")
    approve("1", "--override", "a long reason " * 20 + "with an escape \x1b[31m")
    for command in (["list"], ["show", "demo/1"], ["log", NAME], ["audit", NAME]):
        status, told = desk(*command)
        assert status == 0
        assert "\x1b" not in told
        assert all(len(line) <= 100 for line in told.splitlines() if "mlflow ui" not in line)


@pytest.mark.parametrize("command", review.EXAMPLES)
def test_help_has_an_example_that_parses(desk, capsys, command):
    with pytest.raises(SystemExit) as done:
        desk(command, "--help")
    assert done.value.code == 0
    assert "example:\n  python -m pipelines.tracking.review " in capsys.readouterr().out


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
