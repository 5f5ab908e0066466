"""Whether an image finds its texts, and a text its image, among all others."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

TOPS = (1, 5, 10)
ROWS = 512  # images or texts that are compared with all others at once


class Recall(Metric):
    """Share of images that have one of their texts among the k nearest, and of texts that have their image there.

    `compute()` gives `image_to_text_recall_at_K` and `text_to_image_recall_at_K` of K = 1, 5, 10, in [0, 1]; NaN without any
    text. Nearness is the cosine. Others that are as near count as nearer: embeddings that are all the same find nothing. An image
    without texts is no query, but a text can find it.
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
        """`width` is D, of the embeddings."""
        super().__init__(**kwargs)
        self.width = width
        for name in ("images", "texts", "counts"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, texts: Tensor, image_of_text: Tensor | None = None) -> None:
        """Adds images and their texts.

        Args:
            images: embeddings (N, D).
            texts: embeddings (T, D).
            image_of_text: (T,) int64, the row of each text's image in `images`; None: text i is of image i.
        """
        owners = torch.arange(len(texts), device=texts.device) if image_of_text is None else image_of_text
        self.images.append(F.normalize(images.detach().float(), dim=1))
        self.texts.append(F.normalize(texts.detach().float(), dim=1)[owners.argsort(stable=True)])
        self.counts.append(owners.bincount(minlength=len(images)))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """Exchanges the states; a rank that had no batch gives empty ones of the right shape."""
        if not self.images:
            empty = torch.zeros(0, self.width, device=self.device)
            self.images, self.texts = [empty], [empty]
            self.counts = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        super()._sync_dist(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The six figures, float64."""
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
    """How many candidates of other owners are at least as near to each query as the nearest of its own: (Q,) int64.

    Args:
        queries: (Q, D), rows of norm 1.
        candidates: (C, D), likewise.
        owners: (Q,), of each query.
        owners_of_candidates: (C,).
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
