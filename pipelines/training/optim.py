"""Optimisers, learning-rate schedules and gradient clipping, chosen by their names in the params."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from pipelines.params import OptimiserParams


def optimiser(groups: list[dict[str, Any]], params: OptimiserParams) -> torch.optim.Optimizer:
    """Returns torch's fused optimiser over a method's parameter groups.

    `lr` and `weight_decay` of a group override those of `params`. `sgd` has momentum 0.9. `adam` adds the
    weight decay to the gradient, `adamw` decouples it.
    """
    settings: dict[str, Any] = {"lr": params.lr, "weight_decay": params.weight_decay, "fused": True}
    if params.optimiser == "sgd":
        result: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9, **settings)
    elif params.optimiser == "adam":
        result = torch.optim.Adam(groups, **settings)
    else:
        result = torch.optim.AdamW(groups, **settings)
    for group in result.param_groups:
        group["initial_lr"] = group["lr"]
    return result


def match_memory_formats(optimiser: torch.optim.Optimizer) -> None:
    """Converts the optimiser's moments to the memory format of their parameters.

    They may have been saved in another format, and fused steps on CPUs read both in memory order, ignoring
    strides.
    """
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def set_learning_rate(
    optimiser: torch.optim.Optimizer, params: OptimiserParams, step: int, total: int
) -> float:
    """Sets the learning rate of step `step` (from 0) of `total`; returns that of the first group.

    The schedule is a function of the step alone, so there is no state to save. `onecycle` also moves the
    momentum (Adam's first beta) against the learning rate, between 0.85 and 0.95 (Smith and Topin, 2018;
    torch's defaults).
    """
    factor, momentum = SCHEDULES[params.schedule](step, total, params.warmup_steps)
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif momentum is not None:
            group["momentum"] = momentum
    return optimiser.param_groups[0]["lr"]


def _warm(step: int, warmup: int) -> float:
    """Returns the factor of a linear warm-up: 1/warmup at step 0, 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def constant(step: int, total: int, warmup: int) -> tuple[float, None]:
    """Returns factor 1 after the warm-up."""
    return _warm(step, warmup), None


def cosine(step: int, total: int, warmup: int) -> tuple[float, None]:
    """Returns a factor that falls from 1 after the warm-up to 0 at step `total`, along half a cosine."""
    if step < warmup:
        return _warm(step, warmup), None
    return _anneal(1.0, 0.0, (step - warmup) / max(1, total - warmup)), None


def onecycle(step: int, total: int, warmup: int) -> tuple[float, float]:
    """Returns factor and momentum of the one-cycle schedule.

    The factor rises from 1/25 to 1 in the first 30 % of the steps, or during the warm-up if there is one.
    Then it falls to 1/250,000.
    """
    peak = (warmup or 0.3 * total) - 1
    if step <= peak:
        done = step / peak if peak > 0 else 1.0
        return _anneal(1 / 25, 1.0, done), _anneal(0.95, 0.85, done)
    done = min(1.0, (step - peak) / max(1e-9, total - 1 - peak))
    return _anneal(1.0, 1 / 25e4, done), _anneal(0.85, 0.95, done)


def _anneal(start: float, end: float, done: float) -> float:
    """Interpolates from `start` at `done` = 0 to `end` at `done` = 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


SCHEDULES: dict[str, Callable[[int, int, int], tuple[float, float | None]]] = {
    "constant": constant,
    "cosine": cosine,
    "onecycle": onecycle,
}


def clip_gradients(parameters: Iterable[nn.Parameter], params: OptimiserParams) -> None:
    """Clips gradients in place, as `params.clip` says.

    `agc` is adaptive clipping (Brock et al., 2021, eq. 3). It bounds the gradient norm of each unit by
    `clip_value` times the unit's weight norm, taken as at least 1e-3. A unit is a row of a weight, or a whole
    bias or norm weight. The classifier is clipped too. Scalars are not, because a learned B is not a unit of
    weights. `norm` bounds the norm of all gradients together by `clip_value`.
    """
    if params.clip == "agc":
        units = [parameter for parameter in parameters if parameter.ndim > 0]
        adaptive_clip_grad(units, clip_factor=params.clip_value, eps=1e-3)
    elif params.clip == "norm":
        nn.utils.clip_grad_norm_(parameters, params.clip_value)
