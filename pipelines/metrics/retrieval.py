"""Retrieval: recall of an image's texts, and of a text's image. N images, T texts, D dimensions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

TOPS = (1, 5, 10)
ROWS = 512  # queries per matrix product


class Recall(Metric):
    """Recall@k: share of images with an own text among the k nearest, and of texts with their image there.

    `compute()` returns `image_to_text_recall_at_k` and `text_to_image_recall_at_k` for k = 1, 5, 10, float64
    in [0, 1], NaN without texts. Similarity is the cosine. Ties count as nearer, so that constant embeddings
    find nothing. An image without texts is no query, but it is a candidate for texts.
    """

    higher_is_better = True
    full_state_update = False
    figures: ClassVar[dict[str, bool | None]] = {
        f"{way}_recall_at_{top}": True for way in ("image_to_text", "text_to_image") for top in TOPS
    }
    images: list[Tensor]
    texts: list[Tensor]
    counts: list[Tensor]

    def __init__(self, width: int, **kwargs: Any) -> None:
        """`width` is D, the dimension of the embeddings."""
        super().__init__(**kwargs)
        self.width = width
        for name in ("images", "texts", "counts"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, texts: Tensor, image_of_text: Tensor | None = None) -> None:
        """Adds images and their texts.

        Args:
            images: embeddings (N, D).
            texts: embeddings (T, D).
            image_of_text: (T,) int64, row in `images` of each text's image; by default text i belongs to
                image i.
        """
        owners = torch.arange(len(texts), device=texts.device) if image_of_text is None else image_of_text
        self.images.append(F.normalize(images.detach().float(), dim=1))
        self.texts.append(F.normalize(texts.detach().float(), dim=1)[owners.argsort(stable=True)])
        self.counts.append(owners.bincount(minlength=len(images)))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """Synchronises the states. A rank that had no batch contributes empty ones of the right shape."""
        if not self.images:
            empty = torch.zeros(0, self.width, device=self.device)
            self.images, self.texts = [empty], [empty]
            self.counts = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        super()._sync_dist(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        if len(self.images) == 0:
            return dict.fromkeys(self.figures, torch.tensor(torch.nan))
        images, texts, counts = (dim_zero_cat(state) for state in (self.images, self.texts, self.counts))
        owners = torch.arange(len(images), device=counts.device).repeat_interleave(counts)
        ranks = {
            "image_to_text": ranks_of_best(
                images, texts, torch.arange(len(images), device=owners.device), owners
            )[counts > 0],
            "text_to_image": ranks_of_best(
                texts, images, owners, torch.arange(len(images), device=owners.device)
            ),
        }
        return {
            f"{way}_recall_at_{top}": (found < top).double().mean()
            for way, found in ranks.items()
            for top in TOPS
        }


def ranks_of_best(
    queries: Tensor, candidates: Tensor, owners: Tensor, owners_of_candidates: Tensor
) -> Tensor:
    """Rank (from 0) of each query's nearest own candidate among all candidates: (Q,) int64.

    This is the number of candidates of other owners that are at least as near as the nearest own one.

    Args:
        queries: (Q, D), rows of norm 1.
        candidates: (C, D), rows of norm 1.
        owners: (Q,), the image of each query.
        owners_of_candidates: (C,), the image of each candidate.
    """
    found = [torch.zeros(0, dtype=torch.int64, device=queries.device)]
    for some, owner in zip(queries.split(ROWS), owners.split(ROWS), strict=True):
        cosines = some @ candidates.T
        own = owner[:, None] == owners_of_candidates
        best = (
            cosines.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
            if len(candidates)
            else cosines.new_zeros(len(some), 1)
        )
        found.append(((cosines >= best) & ~own).sum(1))
    return torch.cat(found)
