"""captum's integrated gradients, which can keep the graph of the maps for losses on them."""

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
    """Logits and integrated gradients along the line from the mean image; see `AttributionMethod`.

    Args:
        steps: points on the line at which gradients are taken.
        internal_batch_size: images per forward pass; `None` takes all points of the batch at once.

    Raises:
        ValueError: `layer` is given.

    Source: Sundararajan et al., 2017, eq. 1.
    """
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
        # captum repeats targets for its steps, unless there is only one
        every_step = target_ind.expand(len(logits))
        return torch.autograd.grad(
            logits.gather(1, every_step[:, None]).sum(), inputs, create_graph=create_graph
        )

    integral = IntegratedGradients(model)
    integral.gradient_func = gradients  # captum's own keeps no graph
    baseline = model.mean[:, None, None].expand_as(images)  # type: ignore[index]
    images = images if create_graph else images.detach()
    with torch.set_grad_enabled(create_graph):
        # before the maps: in training mode it updates running statistics, which the graph of the maps saves
        logits = model(images)
    targets = predicted(logits) if targets is None else targets
    # the integral is of a function of one image; in training mode, logits depend on the whole batch
    with evaluating(model):
        maps = [
            integral.attribute(
                images, baseline, targets_N, n_steps=steps, internal_batch_size=internal_batch_size
            ).sum(1)
            for targets_N in targets.view(len(targets), -1).unbind(1)
        ]
    return logits, torch.stack(maps, dim=1) if targets.ndim == 2 else maps[0]
