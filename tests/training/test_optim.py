"""Schedules and clipping against their definitions and torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipelines.params import OptimiserParams
from pipelines.training.optim import clip_gradients, optimiser, set_learning_rate

TOTAL = 40


def params(**values: Any) -> OptimiserParams:
    return OptimiserParams(**{"epochs": 1, "batch_size": 1, "lr": 0.5, **values})


def rates(settings: OptimiserParams, total: int = TOTAL) -> list[float]:
    made = optimiser([{"params": [nn.Parameter(torch.ones(2))]}], settings)
    return [set_learning_rate(made, settings, step, total) for step in range(total)]


def test_constant_stays_and_warm_up_rises_in_equal_steps_to_the_full_rate() -> None:
    assert rates(params(schedule="constant")) == [0.5] * TOTAL
    assert rates(params(schedule="constant", warmup_steps=5))[:6] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    )


def test_cosine_is_torchs_after_its_warm_up() -> None:
    reference = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=TOTAL - 8)
    expected = []
    for _ in range(TOTAL - 8):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        scheduler.step()
    values = rates(params(schedule="cosine", warmup_steps=8))
    assert values[8:] == pytest.approx(expected)
    assert values[7] == 0.5


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_onecycle_is_torchs(name: str, warmup: int) -> None:
    settings = params(schedule="onecycle", optimiser=name, warmup_steps=warmup)
    made, reference = (optimiser([{"params": [nn.Parameter(torch.ones(2))]}], settings) for _ in range(2))
    share = warmup / TOTAL if warmup else 0.3
    scheduler = torch.optim.lr_scheduler.OneCycleLR(reference, max_lr=0.5, total_steps=TOTAL, pct_start=share)
    for step in range(TOTAL):
        set_learning_rate(made, settings, step, TOTAL)
        mine, theirs = made.param_groups[0], reference.param_groups[0]
        assert mine["lr"] == pytest.approx(theirs["lr"])
        key = "momentum" if name == "sgd" else "betas"
        assert mine[key] == pytest.approx(theirs[key])
        reference.step()
        if step < TOTAL - 1:
            scheduler.step()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_short_runs_keep_within_the_full_rate(schedule: str, total: int, warmup: int) -> None:
    assert all(0 < rate <= 0.5 for rate in rates(params(schedule=schedule, warmup_steps=warmup), total))


def test_a_groups_own_rate_and_decay_win_and_are_scheduled_too() -> None:
    groups = [
        {"params": [nn.Parameter(torch.ones(2))]},
        {"params": [nn.Parameter(torch.ones(2))], "lr": 0.1, "weight_decay": 0.0},
    ]
    settings = params(schedule="constant", warmup_steps=2, weight_decay=0.3)
    made = optimiser(groups, settings)
    set_learning_rate(made, settings, 0, TOTAL)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.25, 0.05])
    assert [group["weight_decay"] for group in made.param_groups] == [0.3, 0.0]


def test_agc_bounds_each_row_by_its_own_weights_norm() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight[0] = 0.0  # eps, not this norm of 0, is the bound
    layer.weight.grad, layer.bias.grad = torch.randn(4, 5), torch.full((4,), 1e-6)
    direction = nn.functional.normalize(layer.weight.grad, dim=1)
    clip_gradients(layer.parameters(), params(clip="agc", clip_value=0.02))
    limit = 0.02 * layer.weight.detach().norm(dim=1).clamp(min=1e-3)
    assert torch.allclose(layer.weight.grad.norm(dim=1), limit)
    assert torch.allclose(nn.functional.normalize(layer.weight.grad, dim=1), direction, atol=1e-5)
    assert torch.equal(layer.bias.grad, torch.full((4,), 1e-6))  # below its bound


def test_norm_bounds_all_gradients_together_and_none_leaves_them() -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    clip_gradients(parameters, params(clip="none"))
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in parameters)
    clip_gradients(parameters, params(clip="norm", clip_value=0.5))
    assert torch.cat([parameter.grad for parameter in parameters]).norm() == pytest.approx(0.5, rel=1e-5)
