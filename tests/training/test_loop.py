"""Selection, checkpoints, errors and reports of the training loop."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics import MetricCollection

from pipelines.metrics import Accuracy
from pipelines.params import MethodParams
from pipelines.storage import files
from pipelines.training import Context, EpochRecord, Job, TrainingError, checkpoints, loop, train
from pipelines.training.job import best_record, is_finished
from tests.support.method_params import method_params
from tests.support.toy import ToyMethod, accident, identical, toy_batches, toy_job, weights


def kept_steps(directory: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in (directory / "checkpoints").iterdir())


def record(epoch: int, **metrics: float) -> EpochRecord:
    return EpochRecord(
        epoch=epoch, step=epoch * 10, metrics={f"val/{name}": value for name, value in metrics.items()}
    )


def test_nan_loss_stops_at_its_step_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    job = toy_job(tmp_path / "run", accident("nan", 9))
    with pytest.raises(
        TrainingError, match=r"^the loss of step 9 \(epoch 2\) is not a finite .* step 8 is kept in .*$"
    ):
        train(job)
    state = checkpoints.load(job.directory, 8)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert max(kept_steps(tmp_path / "run")) == 8


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path: Path) -> None:
    job = toy_job(tmp_path / "run", accident("poison", 10))
    with pytest.raises(
        TrainingError, match=r"a weight is not a finite number after step 10 .* step 8 is kept"
    ):
        train(job)
    assert max(kept_steps(tmp_path / "run")) == 8


def test_the_last_k_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    values = iter([0.2, 0.9, 0.5, 0.4, 0.3])
    job = toy_job(tmp_path / "run", scripted(values), epochs=5, keep_last=2)
    result = train(job)
    assert kept_steps(tmp_path / "run") == [12, 28, 30]
    assert result.best["epoch"] == 2
    best, last = ToyMethod().module, ToyMethod().module
    result.load_best(best)
    result.load_last(last)
    assert identical(best.state_dict(), checkpoints.load(job.directory, 12)["model"])
    assert identical(last.state_dict(), checkpoints.load(job.directory, 30)["model"])
    assert not identical(best.state_dict(), last.state_dict())


def test_a_notice_of_preemption_is_one_more_checkpoint_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, asked, save = [], [], loop.save
    monkeypatch.setattr(loop, "save", lambda run: (saved.append(run.step), save(run)))
    job = toy_job(tmp_path / "run", epochs=2, checkpoint_every=100, log_every=2)
    context = Context(preempted=lambda: asked.append(1) or len(asked) == 2)
    history = loop.fit(context, job)
    assert [row["step"] for row in history] == [6, 12]
    assert saved == [4, 6, 12]  # asked after steps 2 and 4, then no more; 6 and 12 end an epoch
    assert len(asked) == 2


def scripted(values: Any) -> Any:
    """Returns a method whose validation accuracies are `values`, one per epoch."""

    class Scripted(ToyMethod):
        def update(self, metrics: Any, model: Any, batch: Any) -> None:
            super().update(metrics, model, batch)
            metrics["accuracy"].compute = lambda: torch.tensor(self.value)

        def metrics(self) -> Any:
            self.value = next(values)
            return super().metrics()

    # Before the first epoch the loop reads the names of the metrics once.
    values = iter([0.0, *values])
    return Scripted


def chosen_by(select: str) -> MethodParams:
    return method_params(MethodParams, epochs=9, select=select)


def test_best_is_the_highest_or_of_a_loss_the_lowest_and_the_first_of_equals() -> None:
    history = [
        record(1, accuracy=0.5, loss=2.0),
        record(2, accuracy=0.7, loss=1.0),
        record(3, accuracy=0.7, loss=1.5),
        record(4, accuracy=float("nan"), loss=float("nan")),
    ]
    assert best_record(history, chosen_by("val/accuracy"))["epoch"] == 2
    assert best_record(history, chosen_by("val/loss"))["epoch"] == 2
    with pytest.raises(TrainingError, match="no metric 'val/f1'; there are val/accuracy, val/loss"):
        best_record(history, chosen_by("val/f1"))


@pytest.mark.parametrize(
    ("name", "first", "second", "best"),
    [
        ("val/accuracy", 0.5, 0.7, 2),
        ("val/calibration_error", 0.2, 0.1, 2),
        ("val/unexplained_share", 0.1, 0.2, 1),
        ("train/distillation", 3.0, 4.0, 1),
        ("train/localisation", 3.0, 2.0, 2),
        ("val/iou_at_0.5", 0.3, 0.2, 1),
    ],
)
def test_the_best_epoch_is_the_one_where_a_metric_is_better(
    name: str, first: float, second: float, best: int
) -> None:
    history = [record(epoch, accuracy=0.5) for epoch in (1, 2)]
    for row, value in zip(history, (first, second), strict=True):
        row["metrics"][name] = value
    assert best_record(history, chosen_by(name))["epoch"] == best


def test_an_epoch_that_did_not_measure_the_metric_is_never_the_best() -> None:
    history = [record(1, accuracy=0.5), record(2, accuracy=0.5, precision=0.1), record(3, accuracy=0.5)]
    assert best_record(history, chosen_by("val/precision"))["epoch"] == 2
    falling = [
        record(1, accuracy=0.5),
        record(2, accuracy=0.5, calibration_error=0.9),
        record(3, accuracy=0.5),
    ]
    assert best_record(falling, chosen_by("val/calibration_error"))["epoch"] == 2


def test_a_run_selects_by_the_direction_that_its_metric_has(tmp_path: Path) -> None:
    result = train(toy_job(tmp_path / "run", select="val/calibration"))
    found = [row["metrics"]["val/calibration"] for row in result.history]
    assert len(set(found)) == 3
    assert result.best["metrics"]["val/calibration"] == min(found)
    again = train(toy_job(tmp_path / "run", select="val/calibration"))  # the checkpoint has the direction
    assert again.best == result.best


@pytest.mark.parametrize(
    "select", ["val/count", "train/lr", "train/dropout", "val/skipped", "train/nonsense"]
)
def test_what_has_no_direction_is_refused_before_any_step(tmp_path: Path, select: str) -> None:
    job = toy_job(tmp_path / "run", accident("bug", 1, tmp_path / "marker"), select=select)
    with pytest.raises(TrainingError, match=rf"^select: [^\n]*'{select}'[^\n]*val/accuracy[^\n]*train/loss$"):
        train(job)
    assert not (tmp_path / "marker").exists()


class Unmeasured(ToyMethod):
    """Measures no accuracy in the first `epochs` epochs."""

    epochs, asked = 1, 0

    def metrics(self) -> Any:
        self.asked += 1
        metrics = super().metrics()
        if self.asked <= 1 + self.epochs:  # 1 for the names, before the first epoch
            metrics["accuracy"].compute = lambda: torch.tensor(torch.nan)
        return metrics


def test_a_metric_without_a_case_is_absent_and_its_epoch_not_the_best(tmp_path: Path) -> None:
    result = train(toy_job(tmp_path / "run", Unmeasured, epochs=2))
    assert [("val/accuracy" in row["metrics"]) for row in result.history] == [False, True]
    assert result.best["epoch"] == 2
    assert "NaN" not in (tmp_path / "run/history.json").read_text()


def test_a_metric_without_a_case_in_any_epoch_ends_the_run(tmp_path: Path) -> None:
    class Never(Unmeasured):
        epochs = 9

    with pytest.raises(TrainingError, match=r"^select: 'val/accuracy' was measured in no epoch"):
        train(toy_job(tmp_path / "run", Never, epochs=2))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_validation_without_an_image_ends_the_run_after_its_first_epoch(tmp_path: Path) -> None:
    class Unseen(ToyMethod):
        def metrics(self) -> Any:
            return MetricCollection({"accuracy": Accuracy()})

    def without_val(job: Job, split: str, **place: Any) -> Any:
        return toy_batches(job, split, **place) if split == "train" else []

    job = replace(toy_job(tmp_path / "run", Unseen), batches=without_val)
    with pytest.raises(TrainingError, match=r"^val: no image could be evaluated after epoch 1"):
        train(job)


def test_patience_counts_epochs_since_the_best(tmp_path: Path) -> None:
    params = toy_job(tmp_path, epochs=9, patience=2).params
    history = [
        record(1, accuracy=0.5),
        record(2, accuracy=0.7),
        record(3, accuracy=0.6),
        record(4, accuracy=0.7),
    ]
    assert [is_finished(history[:n], params) for n in range(5)] == [False, False, False, False, True]


def test_patience_ends_the_run(tmp_path: Path) -> None:
    job = toy_job(tmp_path / "run", scripted(iter([0.5, 0.7, 0.6, 0.7, 0.9, 0.9])), epochs=6, patience=2)
    assert [r["epoch"] for r in train(job).history] == [1, 2, 3, 4]


@pytest.mark.parametrize("select", ["val/f1", "accuracy"])
def test_an_unknown_selection_is_named_before_any_step(tmp_path: Path, select: str) -> None:
    job = toy_job(tmp_path / "run", accident("bug", 1, tmp_path / "marker"), select=select)
    with pytest.raises(
        TrainingError, match=rf"^select: no metric '{select}'; there are .*val/accuracy.*train/loss"
    ):
        train(job)


def test_images_that_validation_skips_are_counted(tmp_path: Path) -> None:
    job = toy_job(tmp_path / "run", epochs=1)
    result = train(replace(job, batches=skipping_batches))
    assert result.history[0]["metrics"]["val/skipped"] == 2


def skipping_batches(job: Any, split: str, **place: Any) -> Any:
    """Returns `toy_batches` as if the loader had skipped two images of the validation split."""

    class Skipping(list[Any]):
        skipped = 2 if split == "val" else 0

    batches = toy_batches(job, split, **place)
    return Skipping(batches) if split == "val" else batches


def test_no_epochs_leave_the_model_as_built_and_evaluate_it_once(tmp_path: Path) -> None:
    result = train(toy_job(tmp_path / "run", epochs=0))
    assert [r["epoch"] for r in result.history] == [0]
    assert result.history[0]["metrics"]["val/count"] == 48
    torch.manual_seed(0)
    trained = train(toy_job(tmp_path / "other", epochs=0))
    assert identical(weights(result), weights(trained))
    assert train(toy_job(tmp_path / "run", epochs=0)) == result


def test_reports_that_fail_stop_nothing_and_are_made_up_for_in_order(tmp_path: Path) -> None:
    seen: list[int] = []
    refuse = {2}

    def on_epoch(record: EpochRecord) -> None:
        if record["epoch"] in refuse:
            refuse.clear()
            raise ConnectionError("the server is away")
        seen.append(record["epoch"])

    result = train(toy_job(tmp_path / "run", on_epoch=on_epoch))
    assert len(result.history) == 3
    assert seen == [1, 2, 3]


def test_what_was_never_reported_is_reported_when_the_stage_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(record: EpochRecord) -> None:
        raise ConnectionError("the server is away")

    train(toy_job(tmp_path / "run", on_epoch=refuse))
    assert "epoch 1 was not reported (ConnectionError: the server is away)" in capsys.readouterr().out
    seen: list[int] = []
    for key in ("one", "one", "two"):
        train(toy_job(tmp_path / "run", on_epoch=lambda record: seen.append(record["epoch"]), report_key=key))
    assert seen == [1, 2, 3] * 2  # each key gets the history once


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write

    def full(place: str, content: bytes) -> None:
        if "step-00000010" in place:
            write(place, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(place, content)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(
        TrainingError, match=r"^no space left to write the checkpoint of step 10 .* step 8 is kept"
    ):
        train(toy_job(tmp_path / "run"))
    assert max(kept_steps(tmp_path / "run")) == 8
    monkeypatch.undo()
    assert identical(weights(train(toy_job(tmp_path / "run"))), weights(train(toy_job(tmp_path / "whole"))))


def test_a_write_that_fails_leaves_no_file_under_either_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files.write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        files.write_json(tmp_path / "a.json", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert files.read_json(tmp_path / "a.json") == 1


@pytest.mark.parametrize("url", ["memory://runs/a", "file://{}/b"])
def test_a_run_lives_on_any_storage(tmp_path: Path, url: str) -> None:
    job = toy_job(tmp_path / "local")
    whole = train(job)
    place = url.format(tmp_path)
    remote = train(type(job)(**{**vars(job), "directory": place}))
    assert identical(weights(whole), weights(remote))
    assert files.read_json(f"{place}/history.json") == remote.history


def test_bfloat16_is_for_the_computation_and_weights_stay_float32(tmp_path: Path) -> None:
    kinds: set[torch.dtype] = set()

    class Watched(ToyMethod):
        def loss(self, model: Any, batch: Any) -> Any:
            kinds.add(model(batch["image"]).dtype)
            return super().loss(model, batch)

    result = train(toy_job(tmp_path / "run", Watched, precision="bfloat16"))
    assert kinds == {torch.bfloat16}
    floating = [value for value in weights(result).values() if value.is_floating_point()]
    assert {value.dtype for value in floating} == {torch.float32}
    assert not identical(weights(result), weights(train(toy_job(tmp_path / "whole"))))
