"""A step with unequal shares, parts and missing images equals the step of the whole batch."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.bcos import BcosBatchNorm
from pipelines.data.shards.writer import write_shards
from pipelines.params import DataParams, TrainingParams
from pipelines.training import Context, Job, TrainingError, loop, train
from pipelines.training.job import shard_batches
from pipelines.training.loop import set_up
from pipelines.training.step import RunningStatistics, gradients, parts_per_worker, prepare_batch, share_of
from tests.support.toy import SIDE, SteadyMethod, ToyMethod, samples, toy_batches, toy_job
from tests.support.toy_source import ToySource, plain

PLAIN = partial(SteadyMethod, norm=False)
COUNT, BATCH, BROKEN = 192, 64, (3, 4, 5, 77, 130, 131)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Returns roots of shards of COUNT images: intact (False), or with the BROKEN images damaged (True)."""
    roots = {}
    for damaged in (False, True):
        images = [plain(i, image=b"none") if damaged and i in BROKEN else plain(i) for i in range(COUNT)]
        root = tmp_path_factory.mktemp("shards")
        write_shards(
            ToySource({"train": images, "val": images[:10]}), Path("raw"), root, shard_size=50, progress=False
        )
        roots[damaged] = str(root)
    return roots


def job_on(root: str, directory: Path, method: Any = PLAIN, **params: Any) -> Job:
    """Returns a toy job on shards that leaves out images that do not decode."""
    job = toy_job(directory, method, **{"batch_size": BATCH, "optimiser": "sgd", "lr": 0.1, **params})
    return replace(job, shards=root, batches=shard_batches, data=DataParams(image_size=SIDE, on_error="skip"))


def gradients_of_steps(job: Job, world_size: int) -> tuple[list[int], list[torch.Tensor], list[torch.Tensor]]:
    """Returns images, gradient and loss of each step of an epoch, with ranks computed one after the other."""
    images, found, losses = [], [], []
    run = set_up(Context(), job)
    run.objective.train()
    parameters = list(run.method.module.parameters())
    readers = [job.batches(job, "train", context=Context(rank, world_size)) for rank in range(world_size)]
    for batches in zip(*readers, strict=True):
        total = sum(len(batch["key"]) for batch in batches)
        images.append(total)
        found.append(torch.zeros(sum(parameter.numel() for parameter in parameters)))
        losses.append(torch.zeros(()))
        for rank, batch in enumerate(batches):
            if not batch["key"]:
                continue
            run.context = Context(rank, world_size)
            run.optimiser.zero_grad()
            weight = len(batch["key"]) * world_size / total
            share = replace(
                share_of(len(batch["key"]), Context(), False), total=torch.tensor(float(total)), weight=weight
            )
            loss = gradients(run, prepare_batch(run, batch, share), share)["loss"]
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
            found[-1] += gradient / world_size  # as DDP does
            losses[-1] += loss * len(batch["key"]) / total
    return images, found, losses


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(("world_size", "accumulate"), [(3, 1), (3, 4), (5, 1), (64, 1)])
def test_gradients_of_an_epoch_are_those_of_one_worker(
    shards: dict[bool, str], tmp_path: Path, damaged: bool, world_size: int, accumulate: int
) -> None:
    job = job_on(shards[damaged], tmp_path, workers=(1, world_size), accumulate=accumulate)
    whole, shared = (gradients_of_steps(job, workers) for workers in (1, world_size))
    kept = COUNT - len(BROKEN) if damaged else COUNT
    assert sum(whole[0]) == sum(shared[0]) == kept
    if not damaged:
        assert shared[0] == [BATCH] * 3
    # Steps of other numbers of workers have other images, so only the sums over all images must agree.
    for here, there in ((whole[1], shared[1]), (whole[2], shared[2])):
        one, other = (
            sum(count * each for count, each in zip(counts, values, strict=True)) / kept  # type: ignore[arg-type]
            for counts, values in ((whole[0], here), (shared[0], there))
        )
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_share_is_known_by_the_images_that_are_there() -> None:
    alone = share_of(7, Context(), may_be_idle=True)
    assert (alone.images, float(alone.total), alone.weight, alone.idle) == (7, 7.0, 1.0, False)


def test_no_part_is_larger_than_when_all_workers_are_there() -> None:
    for most in range(1, 9):
        for accumulate in (1, 3, 4):
            training = TrainingParams(workers=(1, most), accumulate=accumulate)
            for world_size in range(1, most + 1):
                for share in {64 // world_size, ceil(64 / world_size)}:
                    parts = parts_per_worker(training, 64, world_size)
                    assert (
                        ceil(share / min(share, parts))
                        <= training.largest_part(64)
                        == ceil(ceil(64 / most) / accumulate)
                    )
                    assert parts == accumulate or world_size < most


def test_a_batch_that_has_fewer_images_than_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^batch_size 8 .* each of up to 9 workers$"):
        train(toy_job(tmp_path / "run", workers=(2, 9)))


# Running statistics -----------------------------------------------------------------------------------------


class Normalised(nn.Module):
    """Has running statistics of several kinds, and one other buffer."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(3, momentum=momentum),
                BcosBatchNorm(3, momentum=momentum),
                BcosBatchNorm(3, momentum=momentum, centered=True),
            ]
        )
        self.register_buffer("bound", torch.full((3,), -torch.inf))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return sum(norm(images).square().mean((1, 2, 3)) for norm in self.norms)  # type: ignore[return-value]


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
def test_the_parts_of_a_batch_move_running_statistics_as_far_as_the_whole(momentum: float | None) -> None:
    images = samples()[0][:7] * torch.arange(1, 8)[:, None, None, None]
    whole = Normalised(momentum)
    whole(images[:5])  # statistics then differ from their initial 0 and 1
    parted = copy.deepcopy(whole)
    before = {name: buffer.clone() for name, buffer in whole.named_buffers()}
    whole(images)
    statistics = RunningStatistics(parted)
    for part in images.tensor_split(4):  # 2, 2, 2 and 1 images
        with statistics.part(len(part) / 7):
            parted(part)
    statistics.settle()
    found, expected = dict(parted.named_buffers()), dict(whole.named_buffers())
    step = 1 / 2 if momentum is None else momentum  # this is the second batch of a cumulative average
    for name, buffer in found.items():
        if name.endswith("running_mean"):
            torch.testing.assert_close(buffer, expected[name], rtol=1e-5, atol=1e-6)
        elif name.endswith("running_var"):
            # The mean of the parts' variances replaces the variance of the whole batch.
            unbiased = name.startswith("norms.0")
            inside = [
                part.var((0, 2, 3), unbiased=unbiased) * len(part) / 7 for part in images.tensor_split(4)
            ]
            torch.testing.assert_close(buffer, before[name].lerp(sum(inside), step), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(buffer, expected[name])  # the batch counts once; other buffers stay


def test_a_run_in_parts_counts_and_moves_once_a_step(tmp_path: Path) -> None:
    momenta = []

    class Watched(SteadyMethod):
        def loss(self, model: Any, batch: Any) -> Any:
            momenta.append(self.module.norm.momentum)
            return super().loss(model, batch)

    job = toy_job(tmp_path / "run", Watched, epochs=1, accumulate=4)
    run = set_up(Context(), job)
    loop.train_epoch(run)
    assert len(momenta) == 24
    assert int(run.method.module.norm.num_batches_tracked) == 6
    other = set_up(Context(), toy_job(tmp_path / "other", SteadyMethod, epochs=1, lr=1e-9, accumulate=4))
    whole = set_up(Context(), toy_job(tmp_path / "whole", SteadyMethod, epochs=1, lr=1e-9))
    for each in (other, whole):  # the tiny learning rate keeps weights, and so features, the same
        loop.train_epoch(each)
    torch.testing.assert_close(
        other.method.module.norm.running_mean, whole.method.module.norm.running_mean, rtol=1e-4, atol=1e-5
    )


# Validation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "largest"), [(1, 16), (3, 6), (8, 2)])
def test_validation_takes_no_more_images_at_once_than_training(
    shards: dict[bool, str], tmp_path: Path, accumulate: int, largest: int
) -> None:
    taken: dict[str, set[int]] = {"train": set(), "val": set()}
    graphs = []

    class Watched(SteadyMethod):
        def loss(self, model: Any, batch: Any) -> Any:
            taken["train"].add(len(batch["image"]))
            return super().loss(model, batch)

        def update(self, metrics: Any, model: Any, batch: Any) -> None:
            taken["val"].add(len(batch["image"]))
            graphs.append(model(batch["image"]).requires_grad)
            super().update(metrics, model, batch)

    job = job_on(shards[False], tmp_path / "run", Watched, epochs=1, batch_size=16, accumulate=accumulate)
    result = train(job)
    assert max(taken["train"]) == largest
    assert max(taken["val"]) == min(largest, 10)
    assert result.history[0]["metrics"]["val/count"] == 10
    assert not any(graphs)


# Errors -----------------------------------------------------------------------------------------------------


class Hungry(ToyMethod):
    """Runs out of GPU memory at step `at_step`."""

    def loss(self, model: Any, batch: Any) -> Any:
        if self.steps == self.at_step:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1 GiB free."
            )
        return super().loss(model, batch)


def test_too_little_memory_for_the_first_step_is_final_and_later_is_not(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError,
        match=r"^the first step does not fit the GPU \(accumulate: 1, [^\n]*CUDA out of memory$",
    ):
        train(toy_job(tmp_path / "first", partial(Hungry, "", 1)))
    with pytest.raises(torch.OutOfMemoryError):
        train(toy_job(tmp_path / "later", partial(Hungry, "", 2)))


def test_metrics_of_an_epoch_are_means_over_its_images_however_they_are_shared(tmp_path: Path) -> None:
    tallies = []
    for world_size in (1, 3):
        sums = []
        for rank in range(world_size):
            tally = loop.Tally()
            for batch in toy_batches(toy_job(tmp_path), "train", context=Context(rank, world_size)):
                tally.add({"x": batch["image"].mean()}, len(batch["key"]), 0)
            sums.append(tally.state())
        losses, counts, _ = loop.merge(sums)
        tallies.append(losses["x"] / counts["x"])
    assert tallies[0] == pytest.approx(tallies[1], rel=1e-6)
