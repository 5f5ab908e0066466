"""A linear classifier with a known map, as a model under evaluation."""

import torch
from torch import nn

from pipelines.attribution import Attribution
from pipelines.evaluation import ExplainedModel
from pipelines.models import ModelSpec


class LinearClassifier(nn.Module):
    """Logits are sums of weights (K, 6, H, W) times pixels; input x gradient is exact."""

    logit_bias = 0.0

    def __init__(self, weights: torch.Tensor, mean: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((6,), mean))
        self.register_buffer("weights", weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,kchw->nk", images, self.weights)


def linear_model(classes: tuple[str, ...], side: int, task: str, seed: int = 0) -> ExplainedModel:
    """Returns a classifier with random weights and the explanation `terms`, which is input x gradient."""
    weights = torch.randn(len(classes), 6, side, side, generator=torch.Generator().manual_seed(seed))
    spec = ModelSpec("linear", classes, side, "conventional", task)  # type: ignore[arg-type]
    return ExplainedModel(LinearClassifier(weights), spec, {"terms": Attribution("input_x_gradient")})
