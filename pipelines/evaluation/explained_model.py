"""Loads a trained model together with the attributions that explain it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipelines import models
from pipelines.attribution import Attribution
from pipelines.models import ModelError, ModelSpec


@dataclass(frozen=True)
class ExplainedModel:
    """A model under evaluation, its spec, and name -> attribution of its explanations."""

    model: nn.Module
    spec: ModelSpec
    explanations: dict[str, Attribution]


def load_explained_model(
    directory: str | Path, posthoc: Iterable[str], device: torch.device, guided: Attribution | None = None
) -> ExplainedModel:
    """Loads the frozen model in `directory` with its explanations and, if given, `guided`.

    A B-cos model has its own explanation, a conventional one those of `posthoc` that it supports: a network
    without convolutional features has no GradCAM.
    """
    model, spec = models.load(directory)
    return with_explanations(str(directory), model.to(device), spec, posthoc, guided)


def with_explanations(
    name: str, model: nn.Module, spec: ModelSpec, posthoc: Iterable[str], guided: Attribution | None = None
) -> ExplainedModel:
    """Freezes a model in memory and adds explanations as `load_explained_model` does.

    An unsupported explanation is left out with a printed line that begins with `name`.
    """
    model.requires_grad_(False)
    wanted = {method: Attribution(method) for method in (["bcos"] if spec.kind == "bcos" else posthoc)}
    if guided is not None and guided not in wanted.values():
        wanted["guided"] = guided
    device = next(model.buffers()).device  # every model of this project has the buffer `mean`
    probe = torch.zeros(1, 6, spec.image_size, spec.image_size, device=device)
    explanations: dict[str, Attribution] = {}
    for key, attribution in wanted.items():
        try:
            explanations[key] = attribution.resolved(model, probe)
        except ModelError as error:
            print(f"{name}: {error}; evaluated without")
    return ExplainedModel(model, spec, explanations)


def knows_positions(model: nn.Module) -> bool:
    """Returns True if the model has absolute position embeddings (ViTs), and so takes one image size only."""
    names = (name for named in (model.named_modules(), model.named_parameters()) for name, _ in named)
    return any(re.search(r"(^|\.)pos(itional|ition)?_embed", name) for name in names)
