"""Params of image towers and text towers: how a pair is trained, and how an image tower is B-cosified."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from pipelines.params.base import PositiveFloat, Strict
from pipelines.params.data import DataParams
from pipelines.params.evaluation import ClipEvaluateParams
from pipelines.params.methods import BcosificationParams
from pipelines.params.training import ModelParams, NetworkParams, OptimiserParams


class ImageTextParams(OptimiserParams):
    """An image tower and a text tower trained on images with captions. `epochs: 0` takes both as they come."""

    loss: Literal["clip", "siglip"] = "clip"  # open_clip's: softmax over a batch, or each pair on its own
    locked: bool = (
        False  # the image tower stays as it is, and the text tower is trained to it (Zhai et al., LiT, 2022)
    )
    select: str = "val/loss"

    @model_validator(mode="after")
    def _captions_follow(self) -> ImageTextParams:
        if self.mixup > 0:
            raise ValueError("mixup: captions are of single images, which cannot be mixed: set it to 0")
        return self


class ClipParams(BcosificationParams):
    """The design choices and the fine-tuning of a B-cosified image tower, which learns the embeddings of the original one."""

    loss: Literal["siglip", "cosine", "info_nce"] = "siglip"
    scale: PositiveFloat = 10.0  # of cosines, in siglip
    pair_bias: float = -10.0  # of a pair's logit, in siglip
    temperature_nce: PositiveFloat = 0.1  # of cosines, in info_nce
    negatives: Literal["batch", "local"] = (
        "batch"  # images of the effective batch, or those that a worker takes at once
    )
    position_embedding: Literal["keep", "remove"] = "keep"
    projection: Literal["linear", "bcos"] = "linear"  # the matrix after a ViT's last norm
    gap_reorder: bool = False
    logit_bias: float | None = 0.0
    select: str = "val/loss"

    @model_validator(mode="after")
    def _negatives_exist(self) -> ClipParams:
        if self.loss == "info_nce" and self.negatives == "batch":
            raise ValueError(
                "negatives: info_nce compares a target with the embeddings of all images, and their gradients stay on their "
                "worker: choose local (or loss: siglip)"
            )
        return self

    @model_validator(mode="after")
    def _teacher_follows(self) -> ClipParams:
        if self.mixup > 0:
            raise ValueError("mixup: an image tower learns the embeddings of single images: set it to 0")
        return self

    def design(self) -> dict[str, Any]:
        """The keyword arguments of `bcosify` for the tower as training starts."""
        return super().design() | {
            "position_embedding": self.position_embedding,
            "projection": self.projection,
        }


class TowersParams(Strict):
    """An image tower with its text tower: the original pair, and the B-cosified image tower."""

    model: (
        ModelParams  # of the image tower: `open_clip:RN50`, or `open_clip:FILE`, a JSON config of one's own
    )
    text: NetworkParams  # of the text tower, likewise
    pretrain: ImageTextParams
    bcosify: ClipParams


class ClipGroupParams(Strict):
    """B-cosified CLIP: which towers, on which data sets, and how they are evaluated."""

    towers: list[Literal["cnn", "vit"]]  # that are trained
    pairs: str  # of `datasets`: images with captions, that the original pair is trained on and retrieval is measured on
    images: str  # that B-cosification learns from, without captions or labels
    labelled: str  # for zero-shot classification and linear probes
    located: str  # with boxes, for text localisation
    data: DataParams  # how these are read
    cnn: TowersParams
    vit: TowersParams
    evaluate: ClipEvaluateParams
