"""The journal survives a crash at any write. The server gets each metric once, one request an epoch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage.errors import DamagedFileError
from pipelines.tracking import runs, sync
from pipelines.tracking.journal import UNREADABLE_TAG, Journal
from pipelines.tracking.relog import main as relog
from pipelines.tracking.runs import EpochLogger, StageRun, stage_run
from pipelines.tracking.server import tracking_uri

EPOCHS, METRICS = 30, 15
PLACE = "runs/pretrain/0123"


def record(epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "metrics": {f"val/{name:02d}": epoch + name / 100 for name in range(METRICS)},
    }


def begin(key: str | None = None) -> StageRun:
    """Starts a run that nothing closes, as if the stage's process was killed."""
    return StageRun.begin("pretrain", "demo", {}, PLACE, {}, key)


def journal_with(tmp_path: Path, *lines: bytes) -> Journal:
    """Returns the journal of a killed execution, with these bytes after its first metric."""
    journal = Journal(tmp_path)
    journal.begin("pretrain", "demo", {}, {})
    journal.add_metrics({"val/a": 0.5}, 1)
    with open(journal.root / "metrics.jsonl", "ab") as file:
        file.write(b"".join(lines))
    return journal


BAD = [
    b'{"key": "val/a", "val',
    b"\0" * 40,
    b"\xff\xfe{}",
    b"null",
    b'{"key": "val/a"}',
    b"\n\n",
    b'["val/a", 1.0, 2, 3]',
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("ended", [b"", b"\n"])
def test_a_bad_line_is_skipped_and_counted_and_what_follows_is_whole(
    tmp_path: Path, bad: bytes, ended: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = journal_with(tmp_path, bad, ended)
    content = (journal.root / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in journal.metrics()] == [1]
    assert (journal.root / "metrics.jsonl").read_bytes() == content  # a reader changes nothing
    journal.begin("pretrain", "demo", {}, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert "unreadable line(s)" in line
    assert int(journal.head["tags"][UNREADABLE_TAG]) >= 1
    journal.add_metrics({"val/a": 0.6}, 2)
    journal.add_metrics({"val/a": 0.7}, 3)
    assert [(row["step"], row["value"]) for row in journal.metrics()] == [(1, 0.5), (2, 0.6), (3, 0.7)]


def test_a_whole_line_without_its_end_counts(tmp_path: Path) -> None:
    line = json.dumps({"key": "val/a", "value": 0.6, "step": 2, "timestamp": 5}).encode()
    journal = journal_with(tmp_path, line)
    journal.add_metrics({"val/a": 0.9}, 2)
    journal.add_metrics({"val/a": 0.7}, 3)
    assert [(row["step"], row["value"]) for row in journal.metrics()] == [(1, 0.5), (2, 0.6), (3, 0.7)]


@pytest.mark.parametrize("content", [b"", b"\0\0", b'{"key": "a', b"[]", b'{"key": "a"}'])
def test_a_head_that_cannot_be_read_is_one_line_and_the_stage_begins_anew(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = journal_with(tmp_path)
    (journal.root / "run.json").write_bytes(content)
    assert not journal.exists
    with pytest.raises(
        DamagedFileError, match=r"^[^\n]*run\.json: missing or unreadable: run the stage again$"
    ):
        _ = journal.head
    assert relog([str(tmp_path)]) == 1
    assert "tracking/run.json is unreadable: run the stage again" in capsys.readouterr().err
    assert (journal.root / "run.json").read_bytes() == content
    journal.begin("pretrain", "demo", {}, {})
    assert (journal.head["status"], journal.metrics()) == ("RUNNING", [])


@pytest.fixture
def asked(client: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of each method of MLflow's client, and under `rows` the metrics that were sent."""
    count: Counter[str] = Counter()

    def counted(name: str) -> Any:
        method = getattr(type(client), name)

        def call(self: Any, *args: Any, **more: Any) -> Any:
            count[name] += 1
            count["rows"] += len(more.get("metrics", ()))
            return method(self, *args, **more)

        return call

    names = [
        name
        for name in vars(type(client))
        if name.split("_")[0] in ("log", "get", "search", "set", "update", "create")
    ]
    for name in names:
        monkeypatch.setattr(type(client), name, counted(name))
    return count


def there(client: Any, run_id: str | None) -> list[tuple[str, int, float]]:
    """Returns name, step and value of each metric on the server."""
    keys = client.get_run(run_id).data.metrics
    return sorted(
        (key, item.step, item.value) for key in keys for item in client.get_metric_history(run_id, key)
    )


def expected(epochs: int) -> list[tuple[str, int, float]]:
    """Returns the metrics that the server has after `epochs` epochs."""
    rows = [
        (key, epoch, value)
        for epoch in range(1, epochs + 1)
        for key, value in record(epoch)["metrics"].items()
    ]
    return sorted(rows)


def test_an_epoch_costs_one_request_and_sends_its_own_metrics(client: Any, asked: Counter[str]) -> None:
    with stage_run("pretrain", experiment="demo", params={}, directory=PLACE) as run:
        asked.clear()
        logger = run.epoch_logger()
        for epoch in range(1, EPOCHS + 1):
            logger(record(epoch))
        assert asked == {"log_batch": EPOCHS, "rows": EPOCHS * METRICS}
        run.history([record(epoch) for epoch in range(1, EPOCHS + 1)])
    assert (asked["rows"], asked["get_metric_history"]) == (EPOCHS * METRICS, 0)
    assert asked.total() - asked["rows"] < EPOCHS + 10
    assert there(client, run.run_id) == expected(EPOCHS)


def test_an_answer_that_is_lost_sends_the_same_again_and_the_server_has_it_once(
    client: Any, monkeypatch: pytest.MonkeyPatch, asked: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, send = begin(), sync.log_rows

    def lose(*arguments: Any) -> None:
        send(*arguments)
        raise ConnectionError("[Errno 104] Connection reset by peer")

    logger = run.epoch_logger()
    with monkeypatch.context() as flaky:
        flaky.setattr(sync, "log_rows", lose)
        flaky.setattr(runs, "LEAST_REST", 0.0)
        flaky.setattr(runs, "monotonic", lambda: 0.0)
        logger(record(1))
    logger._ask_at = 0.0
    logger(record(2))
    assert there(client, run.run_id) == expected(2)
    assert Journal(PLACE).sent(str(run.run_id)) == 2 * METRICS


def test_what_was_appended_and_not_sent_when_the_process_died_is_sent_by_the_next_one(
    client: Any, asked: Counter[str]
) -> None:
    first = begin()
    first.epoch_logger()(record(1))
    Journal(PLACE).add_metrics(record(2)["metrics"], 2)  # killed before it asked the server
    second = begin()
    second.epoch_logger()(record(3))
    assert second.run_id == first.run_id
    assert asked["get_metric_history"] == 0
    assert asked["rows"] == 3 * METRICS
    assert there(client, first.run_id) == expected(3)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[3]", b'{"run_id": "another", "lines": 30}'])
def test_where_it_is_not_known_what_was_sent_the_server_is_asked_once(
    client: Any, asked: Counter[str], content: bytes | None
) -> None:
    first = begin()
    first.epoch_logger()(record(1))
    note = Journal(PLACE).root / "sent.json"
    note.unlink() if content is None else note.write_bytes(content)
    second = begin()
    for epoch in (2, 3):
        second.epoch_logger()(record(epoch))
    assert asked["get_metric_history"] == METRICS
    assert there(client, first.run_id) == expected(3)


def test_what_a_worker_elsewhere_has_logged_is_completed_and_not_doubled(
    client: Any, project: Path, asked: Counter[str]
) -> None:
    with stage_run("pretrain", experiment="demo", params={}, directory=PLACE) as run:
        elsewhere = EpochLogger(tracking_uri(), run.run_id, str(project / "elsewhere"))
        for epoch in (1, 3):  # the server was down after the second
            elsewhere(record(epoch))
        run.history([record(epoch) for epoch in (1, 2, 3)])
        run.metrics({"test/accuracy": 0.5})
    assert asked["get_metric_history"] == METRICS + 1
    assert there(client, run.run_id) == sorted([*expected(3), ("test/accuracy", 0, 0.5)])


def test_many_metrics_are_sent_in_requests_of_a_thousand(client: Any, asked: Counter[str]) -> None:
    run = begin()
    asked.clear()
    run.metrics({f"val/{number}": 1.0 for number in range(2500)})
    assert asked == {"log_batch": 3, "rows": 2500}


def test_a_run_that_another_driver_goes_on_with_is_not_ended(client: Any) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        stage_run("pretrain", experiment="demo", params={}, directory=PLACE, taken_over=lambda: True) as run,
    ):
        raise ZeroDivisionError
    assert Journal(PLACE).head["status"] == "RUNNING"
    assert client.get_run(run.run_id).info.status == "RUNNING"
