"""Cosines of an image's embedding with texts, as logits that are explained: of a whole tower, and of each place of its last map.

    cos_k = e·t_k / (‖e‖·‖t_k‖),   e the embedding, t_k that of text k

‖e‖ depends on the image. Held, like every other factor, it leaves contributions that sum to the cosine. Differentiated, as in the
released code, it leaves contributions that sum to 0: the cosine does not change when e is scaled.

Source: Arya et al., B-cosification, NeurIPS 2024, section 4 (CLIP), and its public code.
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

TINY = 1e-12  # least norm of an embedding


class CosineHead(Holdable):
    """Embeddings (..., D) -> scale·cosine with each of K texts (..., K), in float32 at least.

    Args:
        texts: (K, D) embeddings of the texts; kept as a buffer whose rows have norm 1.
        scale: factor of all cosines, above 0; 100 is CLIP's.
        hold_norm: hold the norm of the embedding in explanation mode, so that contributions of a cosine sum to it; `False`
            differentiates it, as published, and contributions sum to 0.

    Raises:
        ValueError: texts that are not (K, D), or a scale that is no finite number above 0.
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
        """(..., D) -> (..., K)."""
        embeddings = widened(embeddings)
        factor = self.scale / torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True).clamp_min(TINY)
        with torch.autocast(
            embeddings.device.type, enabled=False
        ):  # half precision would leave three digits of a cosine
            return F.linear(
                embeddings * (self.hold(factor) if self.hold_norm else factor),
                self.texts.to(embeddings.dtype),
            )

    def extra_repr(self) -> str:
        """The layer's arguments, as `print` shows them."""
        return f"{self.texts.shape[0]} texts, scale={self.scale:g}, hold_norm={self.hold_norm}"


class UnpooledHead(Holdable):
    """The published unpooling of CLIP's attention pool: features (N, C, h, w) -> a logit for each of K texts (N, K).

    Queries and keys are dropped. The embedding of place j is c(v(x_j)), v the linear projection to values and c the output
    projection, a B-cos layer. t_j is its cosine with a text, its norm held. The logit is mean_j t_j·|t_j|^(p-1), the power held;
    p = 0 stands for the best place, max_j t_j.

    Args:
        value, projection: v and c.
        texts: (K, D) embeddings of the texts.
        p: 0, or 1 or above: 1 is the mean cosine, more gives more weight to the places that are most like the text.
        positions: (h·w, C) position embeddings, added to the places.

    Raises:
        ValueError: another p, or see `CosineHead`.
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
        """(N, C, h, w) -> (N, K)."""
        cosines_NLK = self.cosines(features)
        if self.p == 0:
            return cosines_NLK.amax(1)
        with self.computing_factor():
            power = cosines_NLK.abs().clamp_min(TINY).pow(self.p - 1)  # finite second derivatives at 0
        return (cosines_NLK * self.hold(power)).mean(1)

    def cosines(self, features: Tensor) -> Tensor:
        """The cosine of each place with each text: (N, C, h, w) -> (N, h·w, K)."""
        places_NLC = features.flatten(2).transpose(1, 2)
        if self.positions is not None:
            places_NLC = places_NLC + self.positions
        return self.cosine(self.projection(self.value(places_NLC)))


def unpooled(network: BcosNetwork, texts: Tensor, p: float = 1.0) -> BcosNetwork:
    """A copy of a tower with an attention pool that gives the unpooled logits (N, K) of texts, see `UnpooledHead`.

    An output projection that is linear becomes a B-cos layer, with the exponent of the tower's last B-cos layer.

    Args:
        network: (N, 6, H, W) -> embeddings (N, D), of `bcosify`; it is left untouched.
        texts: (K, D).
        p: the power of the cosines.

    Raises:
        ConversionError: a tower without an attention pool.
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
