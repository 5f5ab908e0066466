"""captum's integrated gradients, with a graph of the maps where one is asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipelines.attribution.features import evaluating
from pipelines.bcos.explain import predicted


def integrated_gradients(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | None,
    *,
    layer: str | None,
    create_graph: bool,
    steps: int = 32,
    internal_batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrated gradients along the line from the mean image. Source: Sundararajan et al., 2017, eq. 1."""
    from captum.attr import IntegratedGradients

    if layer is not None:
        raise ValueError("integrated_gradients explains the input alone: leave `layer` out")

    def gradients(
        forward_fn: Callable[[Tensor], Tensor],
        inputs: tuple[Tensor],
        target_ind: Tensor,
        additional_forward_args: None = None,
    ) -> tuple[Tensor, ...]:
        logits = forward_fn(inputs[0])
        every_step = target_ind.expand(
            len(logits)
        )  # captum repeats the targets for its steps, but not a single one
        return torch.autograd.grad(
            logits.gather(1, every_step[:, None]).sum(), inputs, create_graph=create_graph
        )

    integral = IntegratedGradients(model)
    integral.gradient_func = gradients  # captum's own keeps no graph
    baseline = model.mean[:, None, None].expand_as(images)  # type: ignore[index]
    images = images if create_graph else images.detach()
    with torch.set_grad_enabled(create_graph):
        logits = model(images)  # first: in training mode it moves statistics that the graph of the maps keeps
    targets = predicted(logits) if targets is None else targets
    with evaluating(
        model
    ):  # the integral is of a function of one image, which a network in training mode is not
        maps = [
            integral.attribute(
                images, baseline, targets_N, n_steps=steps, internal_batch_size=internal_batch_size
            ).sum(1)
            for targets_N in targets.view(len(targets), -1).unbind(1)
        ]
    return logits, torch.stack(maps, dim=1) if targets.ndim == 2 else maps[0]
