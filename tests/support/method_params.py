"""Params of methods, with those of the optimiser among the others."""

from typing import Any, TypeVar

from pipelines.params import MethodParams, OptimiserParams

Kind = TypeVar("Kind", bound=MethodParams)


def method_params(kind: type[Kind], **values: Any) -> Kind:
    """Params of `kind`. Values of the optimiser go to `optim`, by default 1 epoch, batches of 8, lr 0.01."""
    optim = {name: value for name, value in values.items() if name in OptimiserParams.model_fields}
    own = {name: value for name, value in values.items() if name not in optim}
    return kind(optim=OptimiserParams(**{"epochs": 1, "batch_size": 8, "lr": 0.01, **optim}), **own)
