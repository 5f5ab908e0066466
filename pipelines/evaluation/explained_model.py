"""What is evaluated: a trained model and its explanations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines import models
from pipelines.attribution import last_features
from pipelines.models import ModelError, ModelSpec

OWN = {"method": "bcos"}  # what explains a B-cos network, in `Subject.explanations`


@dataclass(frozen=True)
class Subject:
    """A model under evaluation, and its explanations: name -> keyword arguments of `attribute_many`."""

    model: nn.Module
    spec: ModelSpec
    explanations: dict[str, dict[str, Any]]


def load_subject(
    directory: str | Path, posthoc: Iterable[str], device: torch.device, guided: Mapping[str, Any] | None = None
) -> Subject:
    """The model in `directory` with its own explanation (B-cos) or those of `posthoc` that it has (conventional), and `guided`.

    A network without convolutional features has no GradCAM.
    """
    model, spec = models.load(directory)
    model.to(device).requires_grad_(False)
    methods = ["bcos"] if spec.kind == "bcos" else posthoc
    explanations: dict[str, dict[str, Any]] = {method: {"method": method} for method in methods}
    if guided is not None and (guided["layer"] is not None or guided["method"] not in explanations):
        explanations["guided"] = {key: value for key, value in guided.items() if value is not None}
    for name, options in list(explanations.items()):
        if options["method"] == "gradcam" and "layer" not in options:
            try:
                options["layer"] = last_features(model, torch.zeros(1, 6, spec.image_size, spec.image_size, device=device))
            except ModelError as error:
                print(f"{directory}: {error}; evaluated without")
                del explanations[name]
    return Subject(model, spec, explanations)


def knows_positions(model: nn.Module) -> bool:
    """Whether the network has embeddings of absolute positions, and so one image size that it is made for, as ViTs have."""
    names = (name for named in (model.named_modules(), model.named_parameters()) for name, _ in named)
    return any(re.search(r"(^|\.)pos(itional|ition)?_embed", name) for name in names)
