"""Elastic training on a Ray cluster that loses a node and gains one (`make test-infra`)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from pipelines.data.shards.writer import write_shards
from pipelines.params import DataParams
from pipelines.storage import files
from pipelines.training import EpochRecord, Job, Result, cluster, train
from pipelines.training.job import shard_batches
from tests.support import toy
from tests.support.toy_source import ToySource, plain

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.infra, pytest.mark.timeout(900)]
EPOCHS, STEPS, BATCH, COUNT = 6, 4, 64, 256  # three workers share a batch unequally
PARAMS = {
    "epochs": EPOCHS,
    "batch_size": BATCH,
    "optimiser": "sgd",
    "lr": 0.1,
    "keep_last": 100,
    "clip": "none",
}
# Steps, each the last of its epoch: a node is lost before the first, and one is added before the second.
LOSS, GAIN = 7, 15


class Step(NamedTuple):
    """The record of a worker that came to a step, with the keys of its samples."""

    node: str
    rank: int
    world_size: int
    step: int
    keys: list[str]


class Recorded(toy.SteadyMethod):
    """Records the gradient of each step, which stays in the optimiser until the next step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(norm=False)
        self.folder, self.last = folder, -1

    def prepare(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.last = batch["step"]
        return super().prepare(batch)

    def set_progress(self, epochs: float) -> None:
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if self.last >= 0 and first:
            gradient = torch.cat([parameter.grad.flatten() for parameter in self.module.parameters()])
            (self.folder / f"gradient-{self.last}").write_text(json.dumps(gradient.tolist()))


def gradients_of_epochs(folder: Path) -> list[torch.Tensor]:
    """Returns the mean gradient of each epoch, over the steps that counted."""
    each = torch.tensor(
        [json.loads((folder / f"gradient-{step}").read_text()) for step in range(EPOCHS * STEPS)]
    )
    return list(each.view(EPOCHS, STEPS, -1).mean(1))


class Watched(Recorded):
    """Records who takes each step. Three workers wait at LOSS until one is lost, two at GAIN for a third."""

    def prepare(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        import ray

        node, world_size = ray.get_runtime_context().get_node_id(), torch.distributed.get_world_size()
        with open(self.folder / "steps", "a") as file:
            file.write(
                json.dumps([node, torch.distributed.get_rank(), world_size, batch["step"], batch["key"]])
                + "\n"
            )
        if (world_size, batch["step"]) == (3, LOSS):
            wait_until(lambda: [lost for lost in self.folder.glob("lost-*") if lost.name != f"lost-{node}"])
        if (world_size, batch["step"]) == (2, GAIN):
            wait_until(lambda: False)
        return super().prepare(batch)


def tell(file: Path, record: EpochRecord) -> None:
    """Appends the record to a file; for `on_epoch`."""
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def told(file: Path) -> list[Any]:
    """Returns the values in the file, one per line."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(condition: Callable[[], Any]) -> None:
    """Waits until `condition()` holds."""
    while not condition():
        time.sleep(0.05)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and three nodes with one CPU each; RAY_ADDRESS names the cluster."""
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # it needs a dashboard
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for module in (toy, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)
    try:
        for _ in range(3):
            nodes.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
    finally:
        for module in (toy, sys.modules[__name__]):
            cloudpickle.unregister_pickle_by_value(module)
        nodes.shutdown()


def lose_and_gain(nodes: Cluster, folder: Path, training: Future[Any]) -> tuple[str, str]:
    """Removes the node of rank 0 when three workers are at LOSS, and adds a node when two are at GAIN.

    Returns the ids of the two nodes.
    """

    def at(world_size: int, step: int) -> list[Step]:
        if training.done():
            training.result()
        there = [Step(*line) for line in told(folder / "steps")]
        there = [each for each in there if (each.world_size, each.step) == (world_size, step)]
        return sorted(there, key=lambda each: each.rank) if len(there) == world_size else []

    wait_until(lambda: at(3, LOSS))
    (lost,) = (node for node in nodes.worker_nodes if node.node_id == at(3, LOSS)[0].node)
    nodes.remove_node(lost, allow_graceful=False)
    (folder / f"lost-{lost.node_id}").touch()
    wait_until(lambda: at(2, GAIN))
    return lost.node_id, nodes.add_node(num_cpus=1).node_id


def disturbed(nodes: Cluster, folder: Path, job: Job) -> tuple[Result, list[list[Step]]]:
    """Returns the result of a job that loses and gains a node, and its steps per number of workers."""
    elastic = {"workers": (1, 3), "max_failures": 1, "resize_every": 1.0}
    training = job.training.model_copy(update=elastic)
    job = replace(
        job, build=partial(Watched, folder), training=training, on_epoch=partial(tell, folder / "told")
    )
    with cluster(job.training), ThreadPoolExecutor() as pool:
        running = pool.submit(train, job)
        # In the main thread, because a node sets signal handlers.
        lost, gained = lose_and_gain(nodes, folder, running)
        result = running.result()

    taken = [Step(*line) for line in told(folder / "steps")]
    groups = [list(group) for _, group in groupby(taken, key=lambda each: each.world_size)]
    assert [group[0].world_size for group in groups] == [3, 2, 3]
    # Each number of workers resumes from the last checkpoint, and each of its workers takes each step once.
    for group, steps in zip(
        groups, (range(LOSS + 1), range(LOSS - 1, GAIN + 1), range(GAIN - 1, EPOCHS * STEPS)), strict=True
    ):
        wanted = [(rank, step) for step in steps for rank in range(group[0].world_size)]
        assert sorted((each.step, each.rank) for each in group) == sorted(
            (step, rank) for rank, step in wanted
        )
    before, between, after = ({each.node for each in group} for group in groups)
    assert between == before - {lost}
    assert after == between | {gained}
    return result, groups


def test_a_node_that_goes_and_one_that_comes_change_nothing_but_the_number_of_workers(
    nodes: Cluster, tmp_path: Path
) -> None:
    batches = partial(toy.toy_batches, count=COUNT)
    undisturbed = toy.toy_job(tmp_path / "undisturbed", partial(toy.SteadyMethod, norm=False), **PARAMS)
    undisturbed = train(replace(undisturbed, batches=batches))
    job = replace(toy.toy_job(tmp_path / "elastic", **PARAMS), batches=batches)
    elastic, _ = disturbed(nodes, tmp_path, job)

    assert [(record["epoch"], record["step"]) for record in elastic.history] == [
        (k, k * STEPS) for k in range(1, EPOCHS + 1)
    ]
    assert told(tmp_path / "told") == elastic.history == files.read_json(f"{job.directory}/history.json")
    written = [f"step-{step:08d}" for step in range(2, EPOCHS * STEPS + 1, 2)]
    folders = sorted(files.names_in(f"{job.directory}/checkpoints"))
    assert [name[: len(written[0])] for name in folders] == written
    for name in folders:
        assert (
            files.read_json(f"{job.directory}/checkpoints/{name}/complete.json")["epoch"]
            == int(name.split("-")[1]) // STEPS
        )

    # Each step has the same samples for any number of workers, so only the order of summation differs.
    assert toy.difference(toy.weights(undisturbed), toy.weights(elastic)) < 1e-4
    for here, there in zip(undisturbed.history, elastic.history, strict=True):
        assert there["metrics"]["val/accuracy"] == pytest.approx(
            here["metrics"]["val/accuracy"], abs=1 / COUNT
        )
        assert there["metrics"]["val/count"] == COUNT


def test_an_epoch_has_each_image_once_and_one_workers_gradient_however_the_workers_change(
    nodes: Cluster, tmp_path: Path
) -> None:
    source = ToySource(
        {"train": [plain(number) for number in range(COUNT)], "val": [plain(number) for number in range(8)]}
    )
    write_shards(source, Path("raw"), tmp_path / "shards", shard_size=25, progress=False)
    # With this learning rate the weights stay the same, so that gradients can be compared.
    job = toy.toy_job(tmp_path / "elastic", **{**PARAMS, "lr": 1e-20})
    job = replace(
        job, shards=str(tmp_path / "shards"), batches=shard_batches, data=DataParams(image_size=toy.SIDE)
    )
    _, groups = disturbed(nodes, tmp_path, job)
    (tmp_path / "alone").mkdir()
    train(replace(job, build=partial(Recorded, tmp_path / "alone"), directory=str(tmp_path / "alone/run")))
    for here, there in zip(
        gradients_of_epochs(tmp_path / "alone"), gradients_of_epochs(tmp_path), strict=True
    ):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)

    trained_on: dict[int, list[str]] = {}  # a repeated step replaces the lost one
    for group in groups:
        for step, together in groupby(sorted(group, key=lambda each: each.step), key=lambda each: each.step):
            trained_on[step] = [key for each in together for key in each.keys]
    for epoch in range(EPOCHS):
        keys = [key for step in range(epoch * STEPS, (epoch + 1) * STEPS) for key in trained_on[step]]
        assert sorted(keys) == [f"k{number:04d}" for number in range(COUNT)]
