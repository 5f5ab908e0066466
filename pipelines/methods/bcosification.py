"""B-cosification: fine-tuning a converted network (or, as a baseline, training a B-cos network from scratch).

Source: Arya et al., B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable, NeurIPS 2024.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines import models
from pipelines.bcos import check_held, clamp_b, is_bias, layer_b, set_b
from pipelines.losses import uniform_off_label_bce
from pipelines.methods.method import Classification

if TYPE_CHECKING:
    from pipelines.params import BcosificationParams


class FineTuning:
    """How B and the biases of a B-cos network are treated during training, whatever it learns.

    Attributes:
        module: the B-cos network, made with `params.design()`.
        params: the choices.
    """

    module: nn.Module
    params: BcosificationParams

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weights of two and more dimensions, others, biases, learned Bs: each group with the decay that the params say."""
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
        """Sets B to where its schedule is: linear from `b_start` to `b` over `b_epochs` epochs.

        A learned B that the last step took below 1 is set back to 1: below 1 it has no gradient, so without weight decay it
        would stay there.
        """
        if self.params.b_mode == "scheduled":
            done = min(1.0, epochs / self.params.b_epochs)
            set_b(self.module, self.params.b_start + done * (self.params.b - self.params.b_start))
        elif self.params.b_mode == "learned":
            clamp_b(self.module)

    def epoch_metrics(self) -> dict[str, float]:
        """`b_mean`; if B is not fixed, `b/<layer>` of each layer; if there are biases, `bias_abs_mean`, the mean |bias|."""
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
    """Binary cross-entropy with off-label targets 1/K, on a network of `bcosify` made with `params.design()`.

    Args:
        module, task, num_classes: as in `Classification`.
        params: how B and the biases are treated during training.
    """

    def __init__(self, module: nn.Module, task: str, num_classes: int, params: BcosificationParams) -> None:
        super().__init__(module, task, num_classes, params.mixup)
        self.params = params

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a prepared batch."""
        return {"loss": uniform_off_label_bce(model(batch["image"]), batch["target"])}


def is_exponent(name: str) -> bool:
    """Whether a parameter of this name is a layer's learned B."""
    return name.rpartition(".")[2] == "b_offset"


def build_bcosification(
    spec: models.ModelSpec, pretrained: str | Path | None, params: BcosificationParams, seed: int
) -> Bcosification:
    """The method on the B-cos network of `spec`, started from the conventional model in the folder `pretrained`.

    Where that is None the weights are drawn by `seed`.

    Raises:
        ConversionError: the network has a part that cannot be converted, or that explanation mode would not hold.
    """
    torch.manual_seed(seed)
    network = None if pretrained is None else models.load(pretrained)[0].get_submodule("network")
    module = models.assemble(spec, network)
    check_held(module, torch.full((2, 6, spec.image_size, spec.image_size), 0.5))
    return Bcosification(module, spec.task, len(spec.classes), params)
