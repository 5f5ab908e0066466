"""B-cosification: fine-tunes a converted network, or trains one from scratch as the baseline.

Source: Arya et al., B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable,
NeurIPS 2024.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines import models
from pipelines.bcos import check_held, clamp_b, fade_biases, is_bias, layer_b, set_b
from pipelines.losses import uniform_off_label_bce
from pipelines.methods.method import Classification

if TYPE_CHECKING:
    from pipelines.params import BcosificationParams, DesignParams


class FineTuning:
    """Mixin that schedules B and fades or decays the biases of a B-cos network, for any loss.

    Attributes:
        module: the B-cos network, made by `bcosify` with `params.design()`.
        params: mode and schedule of B, treatment of the biases, and their weight decays.
    """

    module: nn.Module
    params: DesignParams

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Returns up to four groups (matrices, vectors, biases, learned B), each with its own weight decay.

        Weights with two or more dimensions decay by `weight_decay`; other weights do not decay. Biases decay
        by `params.bias_decay` if `params.bias` is "decay". The offset B - 2 of a learned B decays by
        `params.b_decay`.
        """
        named = [
            (name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad
        ]
        weights = [
            (name, parameter) for name, parameter in named if not is_bias(name) and not is_exponent(name)
        ]
        bias_decay = self.params.bias_decay if self.params.bias == "decay" else 0.0
        groups = [
            {
                "params": [parameter for _, parameter in weights if parameter.ndim > 1],
                "weight_decay": weight_decay,
            },
            {"params": [parameter for _, parameter in weights if parameter.ndim <= 1], "weight_decay": 0.0},
            {"params": [parameter for name, parameter in named if is_bias(name)], "weight_decay": bias_decay},
            {
                "params": [parameter for name, parameter in named if is_exponent(name)],
                "weight_decay": self.params.b_decay,
            },
        ]
        return [group for group in groups if group["params"]]

    def set_progress(self, epochs: float) -> None:
        """Sets a scheduled B, and the share that is left of biases that fade.

        B moves linearly from `b_start` to `b` over the first `b_epochs` epochs, the share from 1 to 0 over
        the first `bias_epochs`. The network so moves away step by step from the one that it was made from.
        A learned B that the last step moved below 1 is set back to 1. Below 1 it has no gradient, and without
        weight decay it would stay there.
        """
        if self.params.b_mode == "scheduled":
            done = min(1.0, epochs / self.params.b_epochs)
            set_b(self.module, self.params.b_start + done * (self.params.b - self.params.b_start))
        elif self.params.b_mode == "learned":
            clamp_b(self.module)
        if self.params.bias == "fade":
            fade_biases(self.module, max(0.0, 1 - epochs / self.params.bias_epochs))

    def epoch_metrics(self) -> dict[str, float]:
        """Returns `b_mean`, `b/<layer>` unless B is fixed, and `bias_abs_mean` if the network has biases.

        `b_mean` is the mean of B over the layers, `bias_abs_mean` the mean |bias| over all elements of all
        biases.
        """
        exponents = layer_b(self.module)
        found = {"b_mean": sum(exponents.values()) / len(exponents)}
        if self.params.b_mode != "fixed":
            found |= {f"b/{name}": value for name, value in exponents.items()}
        biases = [
            parameter.detach().flatten()
            for name, parameter in self.module.named_parameters()
            if is_bias(name)
        ]
        if biases:
            found["bias_abs_mean"] = float(torch.cat(biases).abs().mean())
        return found


class Bcosification(FineTuning, Classification):
    """Trains a B-cos network by binary cross-entropy with off-label targets 1/K.

    Args:
        module: the B-cos network, made by `bcosify` with `params.design()`.
        task, num_classes: see `Classification`.
        params: see `FineTuning`.
    """

    def __init__(self, module: nn.Module, task: str, num_classes: int, params: BcosificationParams) -> None:
        super().__init__(module, task, num_classes, params.mixup)
        self.params = params

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": uniform_off_label_bce(model(batch["image"]), batch["target"])}


def is_exponent(name: str) -> bool:
    """Returns True if the parameter `name` is the learned B of a layer, stored as its offset B - 2."""
    return name.rpartition(".")[2] == "b_offset"


def build_bcosification(
    spec: models.ModelSpec, pretrained: str | Path | None, params: BcosificationParams, seed: int
) -> Bcosification:
    """Builds the method on the B-cos network that `spec` describes.

    The network starts from the weights of the conventional model in the folder `pretrained`, or from random
    weights drawn with `seed` if `pretrained` is `None`.

    Raises:
        ConversionError: a part of the network cannot be converted, or explanation mode cannot hold its
            factors.
    """
    torch.manual_seed(seed)
    network = None if pretrained is None else models.load(pretrained)[0].get_submodule("network")
    module = models.assemble(spec, network)
    check_held(module, torch.full((2, 6, spec.image_size, spec.image_size), 0.5))
    return Bcosification(module, spec.task, len(spec.classes), params)
