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
    """Loss on the pairs of a batch: softmax over all pairs, or a sigmoid for each pair."""
    locked: bool = False
    """Trains the text tower alone; the image tower is frozen (Zhai et al., LiT, 2022)."""
    label_weight: NonNegativeFloat = 0.0
    """Weight of the loss of a linear classifier, which learns the labels from image embeddings; 0: none."""
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
    """Loss between the embeddings of the B-cosified and the original tower."""
    scale: PositiveFloat = 10.0
    """Factor of the cosines in the loss siglip."""
    pair_bias: float = -10.0
    """Bias of the logit of a pair in the loss siglip."""
    temperature_nce: PositiveFloat = 0.1
    """Temperature: divisor of the cosines in the loss info_nce."""
    negatives: Literal["batch", "local"] = "batch"
    """Negatives are images of the whole batch, or of the worker's own micro-batch."""
    position_embedding: Literal["keep", "remove"] = "keep"
    """Keeps or removes the position embedding of a ViT or attention pool. A ViT's class token
    goes with it."""
    projection: Literal["linear", "bcos"] = "linear"
    """Last projection of the tower, which stays linear or becomes a B-cos layer."""
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
    """The image tower; for open_clip, `options` override `vision_cfg`."""
    text: NetworkParams
    """The text tower; `options` override `text_cfg`."""
    pretrain: ImageTextParams
    """Training of the original pair on captions."""
    bcosify: ClipParams
    """B-cosification of the image tower."""


class ClipGroupParams(Strict):
    """B-cosified CLIP: zero-shot models that show which pixels match a text."""

    towers: list[Literal["cnn", "vit"]]
    """Pairs of an image and a text tower that are trained. The default is none; a pair takes minutes."""
    pairs: str
    """Key in `datasets` of images with captions. The original pair is trained on them, and retrieval is
    measured on them."""
    images: str
    """Key in `datasets` of images for B-cosification. Captions and labels are not used."""
    labelled: str
    """Key in `datasets` of images for zero-shot accuracy and linear probes."""
    located: str
    """Key in `datasets` of images with boxes, for text localisation."""
    data: DataParams
    """How the images of these four data sets are read."""
    cnn: TowersParams
    """A convolutional image tower and its text tower."""
    vit: TowersParams
    """A vision transformer and its text tower."""
    evaluate: ClipEvaluateParams
    """Evaluation of the original and B-cosified towers."""
