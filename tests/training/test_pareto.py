"""The Pareto front, its knee, and the checkpoints that a run keeps by them."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.params import GuidanceParams
from pipelines.training import EpochRecord, checkpoints, train
from pipelines.training.job import best_record, is_finished, kept_records
from pipelines.training.pareto import BIN, front, knee
from tests.support.method_params import method_params
from tests.support.toy import ToyMethod, toy_job


def test_a_front_is_what_no_point_beats_and_beats_all_the_rest():
    generator = torch.Generator().manual_seed(0)
    points = [
        [BIN * number for number in row] for row in torch.randint(40, (60, 3), generator=generator).tolist()
    ]
    chosen = front(points)

    def beats(one, other):
        return all(a >= b for a, b in zip(one, other, strict=True)) and one != other

    assert not any(beats(points[i], points[j]) for i, j in itertools.permutations(chosen, 2))
    for index in set(range(60)) - set(chosen):
        assert any(beats(points[i], points[index]) or points[i] == points[index] for i in chosen)


def test_figures_in_one_bin_are_equal_and_the_first_stands_for_all():
    assert front([(0.501, 0.9), (0.504, 0.9), (0.506, 0.2)]) == [0, 2]
    assert front([(0.5, math.nan), (0.5, 0.1)]) == [1]
    assert front([(math.nan, math.nan)]) == [0]


def test_the_knee_is_nearest_to_the_best_of_everything():
    assert knee([(1.0, 0.0), (0.9, 0.8), (0.0, 1.0)]) == 1
    assert knee([(0.3, 0.3)]) == 0
    assert knee([(0.5, 0.2), (0.5, 0.4), (0.5, math.nan)]) == 1
    assert knee([(0.9, -0.2), (0.9, -0.4), (0.9, -math.inf)]) == 0  # -inf is not taken as 0, the best
    assert knee([(0.5, -math.inf), (0.9, -math.inf)]) == 1


def record(epoch: int, f1: float, epg: float, iou: float) -> EpochRecord:
    return EpochRecord(epoch=epoch, step=epoch * 10, metrics={"val/f1": f1, "val/epg": epg, "val/iou": iou})


HISTORY = [
    record(1, 0.9, 0.2, 0.1),
    record(2, 0.85, 0.5, 0.3),
    record(3, 0.7, 0.4, 0.4),
    record(4, 0.6, 0.6, 0.2),
]
HISTORY += [record(5, 0.55, 0.3, 0.1)]


def params(**changes):
    return method_params(GuidanceParams, **{"epochs": 9, "localisation_weight": 0.1, **changes})


@pytest.mark.parametrize(("select", "epoch"), [("f1", 1), ("epg", 4), ("iou", 3), ("knee", 2)])
def test_each_selection_takes_its_point_of_the_front(select, epoch):
    assert [row["epoch"] for row in kept_records(HISTORY, params())] == [1, 2, 3, 4]
    assert best_record(HISTORY, params(select=select))["epoch"] == epoch


def test_before_the_first_validation_the_last_epoch_is_the_best():
    unvalidated = [EpochRecord(epoch=epoch, step=epoch, metrics={"train/loss": 1.0}) for epoch in (1, 2)]
    assert best_record(unvalidated, params())["epoch"] == 2
    assert not is_finished(unvalidated, params(patience=1))
    assert best_record([*unvalidated, record(3, 0.5, 0.5, 0.5)], params())["epoch"] == 3


def test_training_stops_below_the_floor_and_such_an_epoch_is_not_on_the_front():
    floor = params(f1_floor=0.65, select="epg")
    assert [is_finished(HISTORY[:n], floor) for n in range(1, 5)] == [False, False, False, True]
    assert best_record(HISTORY[:4], floor)["epoch"] == 2
    assert best_record(HISTORY[3:], floor)["epoch"] == 4  # every epoch is below the floor


def test_the_checkpoints_of_the_front_stay(tmp_path: Path):
    scripted = iter([HISTORY[0], *HISTORY])  # the first is for the names

    class Scripted(ToyMethod):
        def metrics(self):
            metrics = super().metrics()
            for name, value in next(scripted)["metrics"].items():
                one = metrics["accuracy"].clone()
                one.compute = lambda value=value: torch.tensor(value)
                metrics.add_metrics({name.removeprefix("val/"): one})
            return metrics

    job = toy_job(tmp_path / "run", Scripted, epochs=5, keep_last=1, checkpoint_every=1000)
    result = train(replace(job, params=params(epochs=5, batch_size=job.optim.batch_size)))
    assert [row["epoch"] for row in result.kept] == [1, 2, 3, 4]
    for row in result.kept:
        assert checkpoints.load(result.directory, row["step"])["model"]
