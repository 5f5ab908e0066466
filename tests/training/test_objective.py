"""Memory format, compilation, parts and checkpointing do not change what the objective computes."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.bcos import bcosify, dynamic_weights
from pipelines.models import build
from pipelines.params import TrainingParams
from pipelines.training import Context, TrainingError, train
from pipelines.training.loop import set_up
from pipelines.training.objective import ISOLATED, blocks, build_objective, checkpoint_blocks
from pipelines.training.step import gradients, parts_per_worker
from tests.support.toy import (
    BlockMethod,
    SteadyMethod,
    ToyMethod,
    accident,
    difference,
    identical,
    samples,
    toy_job,
    weights,
)

PLAIN = partial(SteadyMethod, norm=False)  # no batch statistics, no dropout
SGD: dict[str, Any] = {"optimiser": "sgd", "lr": 0.1, "weight_decay": 0.0}  # Adam would amplify rounding


def last_weights(tmp_path: Path, name: str, method: Any = PLAIN, **params: Any) -> dict[str, torch.Tensor]:
    return weights(train(toy_job(tmp_path / name, method, **{**SGD, **params})))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_batch_in_parts_trains_as_the_whole_one(tmp_path: Path, parts: int) -> None:
    whole = last_weights(tmp_path, "whole")
    assert difference(whole, last_weights(tmp_path, "parts", accumulate=parts)) < 1e-5
    assert difference(whole, PLAIN().module.state_dict()) > 0.01


def test_parts_count_by_their_size(tmp_path: Path) -> None:
    images, labels = samples()
    batch = {"image": images[:7], "label": labels[:7]}
    found = []
    for parts in (1, 4):  # 2, 2, 2 and 1 images
        run = set_up(Context(), toy_job(tmp_path / "run", PLAIN, accumulate=parts))
        losses = gradients(run, batch)
        found.append([*losses.values(), *(parameter.grad for parameter in run.method.module.parameters())])
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-7) for one, other in zip(*found, strict=True))


def test_fewer_workers_take_more_parts_none_of_them_larger() -> None:
    for most, parts, batch_size in itertools.product(range(1, 9), (1, 2, 4), (48, 840, 1680)):
        training = TrainingParams(workers=(1, most), accumulate=parts)
        for world_size in (
            count
            for count in range(1, most + 1)
            if batch_size % count == 0 and batch_size % (most * parts) == 0
        ):
            share, taken = batch_size // world_size, parts_per_worker(training, batch_size, world_size)
            assert share % taken == 0
            assert share // taken <= batch_size // (most * parts)
            if world_size == most:
                assert taken == parts


def test_a_batch_is_one_part_where_the_workers_are_all_there() -> None:
    assert [
        parts_per_worker(TrainingParams(workers=workers), 12, max(1, workers)) for workers in (0, 1, 3)
    ] == [1, 1, 1]


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
def test_channels_last_is_a_matter_of_layout_and_resumes_bit_for_bit(tmp_path: Path, optimiser: str) -> None:
    params = {"optimiser": optimiser, "lr": 0.1 if optimiser == "sgd" else 0.001}
    rows, last = (
        last_weights(tmp_path, name, **params, channels_last=name == "last") for name in ("rows", "last")
    )
    assert last["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert not rows["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert difference(rows, last) < 1e-4
    broken = accident("raise", 9, tmp_path / "marker", method=SteadyMethod, norm=False)
    with pytest.raises(ConnectionError):
        last_weights(tmp_path, "broken", broken, channels_last=True, **params)
    assert identical(last, last_weights(tmp_path, "broken", channels_last=True, **params))


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_run_goes_on_in_another_layout(tmp_path: Path, optimiser: str) -> None:
    params = {"optimiser": optimiser, "lr": 0.1 if optimiser == "sgd" else 0.001}
    broken = accident("raise", 9, tmp_path / "marker", method=SteadyMethod, norm=False)
    with pytest.raises(ConnectionError):
        last_weights(tmp_path, "broken", broken, channels_last=False, **params)
    gone_on = last_weights(tmp_path, "broken", channels_last=True, **params)
    assert difference(gone_on, last_weights(tmp_path, "whole", channels_last=False, **params)) < 1e-4


def test_checkpointed_blocks_train_bit_for_bit_as_others(tmp_path: Path) -> None:
    kept, again = (
        last_weights(tmp_path, name, BlockMethod, checkpoint_activations=name == "again")
        for name in ("kept", "again")
    )
    assert identical(kept, again)  # statistics moved once per step, and dropout drew the same
    assert not torch.equal(kept["stage.1.body.1.running_var"], torch.ones(8))


def test_checkpointed_blocks_carry_the_whole_gradient_of_a_loss_on_w() -> None:
    torch.manual_seed(0)
    images, targets, found = torch.rand(4, 6, 8, 8), torch.arange(4), []
    network = bcosify(build("resnet8", options={"width": 4}))
    for module in (network, copy.deepcopy(network)):
        if found:
            checkpoint_blocks(module)
        logits, weights = dynamic_weights(module.train(), images, targets, create_graph=True)
        (logits.square().mean() + weights.square().mean()).backward()
        found.append(
            [logits, weights, *module.buffers(), *(parameter.grad for parameter in module.parameters())]
        )
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def saved_bytes(method: ToyMethod, **params: Any) -> int:
    """Returns the bytes of all tensors that the forward pass keeps for the backward pass."""
    objective = build_objective(method, toy_job("run", **params).training).train()
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    images, labels = samples()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective({"image": images, "label": labels})
    return total


def test_checkpointed_blocks_keep_less() -> None:
    assert saved_bytes(BlockMethod(), checkpoint_activations=True) < saved_bytes(BlockMethod()) / 2


def test_blocks_are_the_members_of_stages_that_have_layers() -> None:
    network = BlockMethod().module
    assert list(blocks(network)) == [network.stage[0], network.stage[1]]
    listed = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(1, 1)}), nn.ReLU()])
    assert list(blocks(nn.ModuleDict({"stage": listed}))) == [listed[0]]


def test_a_network_without_blocks_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^checkpoint_activations: ToyNetwork has no blocks [^\n]*$"):
        train(toy_job(tmp_path / "run", checkpoint_activations=True))


@pytest.mark.compile
def test_compiled_training_is_eager_training_up_to_rounding_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    eager = last_weights(tmp_path, "eager", SteadyMethod)
    assert difference(eager, last_weights(tmp_path, "compiled", SteadyMethod, compile=True)) < 1e-4
    drops = partial(SteadyMethod, dropout=0.3)
    whole = last_weights(tmp_path, "whole", drops, compile=True)
    with pytest.raises(ConnectionError):
        last_weights(
            tmp_path,
            "broken",
            accident("raise", 9, tmp_path / "m", method=SteadyMethod, dropout=0.3),
            compile=True,
        )
    assert identical(whole, last_weights(tmp_path, "broken", drops, compile=True))
    assert difference(whole, eager) > 1e-3


def test_batches_of_many_sizes_are_all_compiled() -> None:
    class Tells(SteadyMethod):
        def loss(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            return {"compiled": model(batch["image"]).sum() * 0 + float(torch.compiler.is_compiling())}

    images = samples()[0]
    objective = build_objective(Tells(), toy_job("run", compile=True).training)
    objective.compile(backend="eager", dynamic=False, **ISOLATED)  # tracing alone is enough, and quick
    assert [objective({"image": images[:size]})["compiled"].item() for size in range(2, 16)] == [1.0] * 14


@pytest.mark.compile
def test_what_the_compiler_cannot_do_is_one_line(tmp_path: Path) -> None:
    import torch._inductor.config as compiler

    torch.compiler.reset()  # before 2.13 torch would reuse code compiled in another test
    with (
        compiler.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(TrainingError, match=r"^compile: [^\n]*no-such-compiler[^\n]* .compile: false [^\n]*$"),
    ):
        last_weights(tmp_path, "run", SteadyMethod, compile=True)
