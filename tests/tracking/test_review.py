"""The review desk on SQLite: what each command changes, prints and refuses."""

import json

import pytest

from pipelines.tracking import review
from pipelines.tracking.decisions import audit, look
from tests.support.desk import NAME, aliases, statuses

pytestmark = pytest.mark.usefixtures("alice")


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
