"""Cosines of an image embedding with text embeddings, as logits that can be explained.

    cos_k = e·t_k / (‖e‖·‖t_k‖),   e the embedding of the image, t_k the embedding of text k

`CosineHead` takes the embedding of a whole tower, `UnpooledHead` one embedding per location of the tower's
last feature map.

The norm ‖e‖ depends on the image. If it is held, like every other factor, the contributions sum to the
cosine. If it is differentiated, as in the public code, they sum to 0, because the cosine does not change if e
is scaled.

Letters: N images, D embedding dimensions, K texts, C channels, L = h·w locations.

Source: Arya et al., B-cosification, NeurIPS 2024 (CLIP), and its public code.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos.convert import Conversion
from pipelines.bcos.errors import ConversionError
from pipelines.bcos.explanation import Holdable
from pipelines.bcos.layers import BcosLinear, layer_b
from pipelines.bcos.network import BcosNetwork
from pipelines.bcos.precision import widened

TINY = 1e-12  # least norm of an embedding, and least |cosine| of which a power is taken


class CosineHead(Holdable):
    """Embeddings (..., D) -> scale·cosine with each of K texts: (..., K), in float32 at least.

    Args:
        texts: (K, D) embeddings of the texts; kept as a buffer with rows of norm 1.
        scale: factor of all cosines, finite and above 0 (CLIP: 100).
        hold_norm: hold the norm of the embedding in explanation mode, so that contributions sum to the
            cosine. `False` differentiates the norm, as published, so that contributions sum to 0.

    Raises:
        ValueError: the texts are not (K, D), or the scale is not finite or not above 0.
    """

    texts: Tensor

    def __init__(self, texts: Tensor, scale: float = 1.0, hold_norm: bool = True) -> None:
        super().__init__()
        if texts.ndim != 2:
            raise ValueError(f"embeddings of texts are (K, D), not {tuple(texts.shape)}")
        if not 0 < scale < math.inf:
            raise ValueError(f"the scale of cosines is a finite number above 0, not {scale}")
        self.scale, self.hold_norm = float(scale), hold_norm
        self.register_buffer("texts", F.normalize(widened(texts.detach()), dim=-1))

    def forward(self, embeddings: Tensor) -> Tensor:
        embeddings = widened(embeddings)
        factor = self.scale / torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True).clamp_min(TINY)
        # half precision would leave three digits of a cosine
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(
                embeddings * (self.hold(factor) if self.hold_norm else factor),
                self.texts.to(embeddings.dtype),
            )

    def extra_repr(self) -> str:
        return f"{self.texts.shape[0]} texts, scale={self.scale:g}, hold_norm={self.hold_norm}"


class UnpooledHead(Holdable):
    """Unpooling of CLIP's attention pool, as published: features (N, C, h, w) -> logits of K texts (N, K).

        logit = mean_j t_j·|t_j|^(p-1),   t_j = cos(c(v(x_j)), text)

    x_j are the features at location j, v is the pool's linear projection to values and c its output
    projection, a B-cos layer. Queries and keys are dropped. Explanation mode holds the norm of c(v(x_j)) and
    the power |t_j|^(p-1).

    Args:
        value, projection: v and c.
        texts: (K, D) embeddings of the texts.
        p: 1 gives the mean cosine; p > 1 gives more weight to the locations with the largest |cosine|; 0
            takes the maximum, max_j t_j.
        positions: (h·w, C) position embeddings, which are added to the x_j.

    Raises:
        ValueError: p is neither 0 nor a finite number of at least 1; see also `CosineHead`.
    """

    positions: Tensor | None

    def __init__(
        self,
        value: nn.Module,
        projection: nn.Module,
        texts: Tensor,
        p: float = 1.0,
        positions: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not (p == 0 or 1 <= p < math.inf):
            raise ValueError(f"the power of the cosines is 0 (the best place) or at least 1, not {p}")
        self.value, self.projection, self.cosine, self.p = value, projection, CosineHead(texts), p
        self.register_buffer("positions", positions)

    def forward(self, features: Tensor) -> Tensor:
        cosines_NLK = self.cosines(features)
        if self.p == 0:
            return cosines_NLK.amax(1)
        with self.computing_factor():
            power = cosines_NLK.abs().clamp_min(TINY).pow(self.p - 1)  # clamped: finite derivatives at 0
        return (cosines_NLK * self.hold(power)).mean(1)

    def cosines(self, features: Tensor) -> Tensor:
        """Cosine of each location with each text: (N, C, h, w) -> (N, h·w, K)."""
        places_NLC = features.flatten(2).transpose(1, 2)
        if self.positions is not None:
            places_NLC = places_NLC + self.positions
        return self.cosine(self.projection(self.value(places_NLC)))


def unpooled(network: BcosNetwork, texts: Tensor, p: float = 1.0) -> BcosNetwork:
    """Copies a tower and replaces its attention pool by an `UnpooledHead`, so that it gives logits (N, K).

    A linear output projection becomes a B-cos layer with the exponent of the tower's last B-cos layer.

    Args:
        network: image tower of `bcosify`, (N, 6, H, W) -> embeddings (N, D). It is left untouched.
        texts: (K, D) embeddings of the texts.
        p: the power of the cosines, see `UnpooledHead`.

    Raises:
        ConversionError: the tower does not have exactly one attention pool.
        ValueError: see `UnpooledHead`.
    """
    copied = copy.deepcopy(network)
    pools = [
        name
        for name, module in copied.named_modules()
        if hasattr(module, "v_proj") and hasattr(module, "c_proj")
    ]
    if len(pools) != 1:
        raise ConversionError(
            f"unpooling takes a tower with one attention pool (v_proj, c_proj); this one has {len(pools)}"
        )
    pool: Any = copied.get_submodule(pools[0])
    projection: Any = pool.c_proj
    if not isinstance(projection, BcosLinear):
        projection = Conversion().child(projection, "c_proj")
        projection._configure(list(layer_b(network).values())[-1], 1, False)
    positions = pool.positional_embedding[1:].detach() if "positional_embedding" in pool._parameters else None
    copied.set_submodule(
        pools[0], UnpooledHead(pool.v_proj, projection, texts, p, positions).train(pool.training)
    )
    return copied
