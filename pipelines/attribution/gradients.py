"""Attribution by gradients: input (or features of a layer) times gradient, summed over channels.

In explanation mode (`bcos`), the gradient is the dynamic weight W(x). Without it (`input_x_gradient`), it is
the ordinary gradient.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipelines.attribution.features import forward_with_features
from pipelines.bcos.explain import contribution_map, dynamic_weights, input_gradients
from pipelines.bcos.explanation import Explanation, explaining


def bcos(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | None,
    *,
    layer: str | None,
    create_graph: bool,
    centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits and maps Σ_c W_c(x)·x_c with the dynamic weights W(x); see `AttributionMethod`.

    At a layer with features f, the maps are Σ_c W_c·f_c. `centered` maps of the input are Σ_c W_c(x)·(x_c -
    m_c), m the mean image. torch.compile can trace maps of the input.

    Source: Böhle et al., B-cos Alignment, TPAMI 2024, eq. 6.
    """
    if layer is None:
        logits, weights = dynamic_weights(model, images, targets, create_graph)
        return logits, contribution_map(_centered(model, images) if centered else images, weights)
    explanation = Explanation(detach=not create_graph)
    with explaining(model, explanation):
        logits, features, weights = gradients_at(model, images, targets, layer, create_graph)
    explanation.holding = False  # releases the factors: a loss on the maps needs its full gradient
    return logits, contribution_map(features, weights)


def input_x_gradient(
    model: nn.Module, images: Tensor, targets: Tensor | None, *, layer: str | None, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """Logits and maps Σ_c (x_c - m_c)·∂logit/∂x_c, m the mean image; see `AttributionMethod`.

    At a layer with features f, the maps are Σ_c f_c·∂logit/∂f_c.

    Source: Shrikumar et al., 2016.
    """
    logits, values, gradients = gradients_at(model, images, targets, layer, create_graph)
    return logits, contribution_map(_centered(model, values) if layer is None else values, gradients)


def gradients_at(
    model: nn.Module, images: Tensor, targets: Tensor | None, layer: str | None, create_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, K), values, and gradients of the targets' logits with respect to the values.

    The values (N, C, h, w) are the images, or the features of `layer`. Gradients are (N, C, h, w), or (N, T,
    C, h, w) for targets (N, T).
    """
    if layer is not None:
        logits, values = forward_with_features(model, images, layer, cut=not create_graph)
    else:
        values = images if images.requires_grad and create_graph else images.detach().requires_grad_()
        logits = model(values)
    gradients = input_gradients(logits, targets, values, create_graph)
    return logits, values if create_graph else values.detach(), gradients


def _centered(model: nn.Module, images: Tensor) -> Tensor:
    return images - model.mean[:, None, None]  # type: ignore[index]
