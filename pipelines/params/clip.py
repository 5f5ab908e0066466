"""Params of B-cosified CLIP: pairs of towers, and the B-cosification of the image tower."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from pipelines.params.base import NonNegativeFloat, PositiveFloat, Strict
from pipelines.params.data import DataParams
from pipelines.params.evaluation import ClipEvaluateParams
from pipelines.params.methods import DesignParams
from pipelines.params.training import MethodParams, ModelParams, NetworkParams


class ImageTextParams(MethodParams):
    """Training of an image tower and a text tower on captions. `optim.epochs: 0` keeps their weights."""

    loss: Literal["clip", "siglip"] = "clip"
    """Softmax over the pairs of a batch, or a sigmoid per pair."""
    locked: bool = False
    """Trains the text tower alone (Zhai et al., LiT, 2022)."""
    label_weight: NonNegativeFloat = 0.0
    """Weight of the loss of a linear classifier, which learns the labels of the images; 0: captions alone."""
    select: str = "val/loss"

    @model_validator(mode="after")
    def _labels_teach_a_tower(self) -> ImageTextParams:
        if self.locked and self.label_weight > 0:
            raise ValueError(
                "label_weight: labels teach the image tower, which is locked: 0, or locked: false"
            )
        return self


class ClipParams(DesignParams):
    """B-cosification of an image tower, which learns the original tower's embeddings from images alone."""

    loss: Literal["siglip", "cosine", "info_nce"] = "siglip"
    """Loss between embeddings. Those of the B-cosified and the original tower."""
    scale: PositiveFloat = 10.0
    """Factor of the cosines, in siglip."""
    pair_bias: float = -10.0
    """Bias of the logit of a pair, in siglip."""
    temperature_nce: PositiveFloat = 0.1
    """Divisor of the cosines, in info_nce."""
    negatives: Literal["batch", "local"] = "batch"
    """Negatives of a pair. Images of the effective batch, or of the worker's micro-batch."""
    position_embedding: Literal["keep", "remove"] = "keep"
    """Position embedding of a ViT or attention pool. For a ViT, remove takes the class token, too."""
    projection: Literal["linear", "bcos"] = "linear"
    """Last projection of the tower, after a ViT's last norm."""
    gap_reorder: bool = False
    logit_bias: float | None = 0.0
    select: str = "val/loss"

    @model_validator(mode="after")
    def _negatives_exist(self) -> ClipParams:
        if self.loss == "info_nce" and self.negatives == "batch":
            raise ValueError(
                "negatives: info_nce compares a target with the embeddings of all images, whose gradients "
                "stay on their worker: choose local (or loss: siglip)"
            )
        return self

    def design(self) -> dict[str, Any]:
        """The keyword arguments of `bcosify` for the tower at the start of training."""
        return super().design() | {
            "position_embedding": self.position_embedding,
            "projection": self.projection,
        }


class TowersParams(Strict):
    """An image tower with its text tower: the original pair, and the B-cosified image tower."""

    model: ModelParams
    """The image tower; options are those of the vision config."""
    text: NetworkParams
    """The text tower; options are those of the text config."""
    pretrain: ImageTextParams
    """Training of the original pair on captions."""
    bcosify: ClipParams
    """B-cosification of the image tower."""


class ClipGroupParams(Strict):
    """B-cosified CLIP: zero-shot models that show what a text looks at."""

    towers: list[Literal["cnn", "vit"]]
    """Pairs that are trained. None by default, because a pair takes minutes."""
    pairs: str
    """Key in `datasets`: images with captions. To train a pair, and to measure retrieval."""
    images: str
    """Key in `datasets`: images for B-cosification. Captions and labels are not used."""
    labelled: str
    """Key in `datasets`: for zero-shot classification and linear probes."""
    located: str
    """Key in `datasets`: images with boxes, for text localisation."""
    data: DataParams
    """How these images are read."""
    cnn: TowersParams
    """A convolutional image tower and its text tower."""
    vit: TowersParams
    """A vision transformer and its text tower."""
    evaluate: ClipEvaluateParams
    """Evaluation of the original and B-cosified towers."""
