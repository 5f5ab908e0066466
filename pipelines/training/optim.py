"""Optimisers, learning-rate schedules and gradient clipping, each by its name in the params."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from pipelines.params import OptimiserParams


def optimiser(groups: list[dict[str, Any]], params: OptimiserParams) -> torch.optim.Optimizer:
    """The optimiser over a method's parameter groups; a group's own `lr` or `weight_decay` wins over the params'.

    `sgd` has momentum 0.9; `adam` adds the weight decay to the gradient, `adamw` decouples it. All are torch's fused ones.
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
    """Gives moments the memory format of their parameters, which may be another one than where they were saved.

    Fused steps on CPUs take both as they lie in memory.
    """
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def set_learning_rate(
    optimiser: torch.optim.Optimizer, params: OptimiserParams, step: int, total: int
) -> float:
    """Sets what the schedule says for step `step` (from 0) of `total`; returns the first group's learning rate.

    The schedule is a function of the step alone, so there is no state to save. `onecycle` moves the momentum
    (Adam's first beta) against the learning rate, between 0.85 and 0.95 (Smith and Topin, 2018; torch's defaults).
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
    """The linear warm-up's factor: 1/warmup at step 0, 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def constant(step: int, total: int, warmup: int) -> tuple[float, None]:
    """Factor 1 after the warm-up."""
    return _warm(step, warmup), None


def cosine(step: int, total: int, warmup: int) -> tuple[float, None]:
    """Factor falling from 1 towards 0 along half a cosine, from the end of the warm-up to step `total`."""
    if step < warmup:
        return _warm(step, warmup), None
    return _anneal(1.0, 0.0, (step - warmup) / max(1, total - warmup)), None


def onecycle(step: int, total: int, warmup: int) -> tuple[float, float]:
    """Factor and momentum of the one-cycle schedule: 1/25 up to 1 in the first 30 %, then down to 1/250,000.

    A warm-up, where there is one, is the length of the rise.
    """
    peak = (warmup or 0.3 * total) - 1
    if step <= peak:
        done = step / peak if peak > 0 else 1.0
        return _anneal(1 / 25, 1.0, done), _anneal(0.95, 0.85, done)
    done = min(1.0, (step - peak) / max(1e-9, total - 1 - peak))
    return _anneal(1.0, 1 / 25e4, done), _anneal(0.85, 0.95, done)


def _anneal(start: float, end: float, done: float) -> float:
    """`start` at 0, `end` at 1, half a cosine in between."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


SCHEDULES: dict[str, Callable[[int, int, int], tuple[float, float | None]]] = {
    "constant": constant,
    "cosine": cosine,
    "onecycle": onecycle,
}


def clip_gradients(parameters: Iterable[nn.Parameter], params: OptimiserParams) -> None:
    """Clips gradients in place.

    `agc`: adaptive clipping (Brock et al., 2021, eq. 3): each unit's gradient norm is at most `clip_value` times its
    weight norm (at least 1e-3; a unit is a row of the weight, a bias or norm weight as a whole). All parameters are
    clipped, the classifier too, but for single numbers: a learned B is no unit of weights. `norm`: the norm of all
    gradients together is at most `clip_value`.
    """
    if params.clip == "agc":
        units = [parameter for parameter in parameters if parameter.ndim > 0]
        adaptive_clip_grad(units, clip_factor=params.clip_value, eps=1e-3)
    elif params.clip == "norm":
        nn.utils.clip_grad_norm_(parameters, params.clip_value)
