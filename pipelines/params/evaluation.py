"""Params of the evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from pipelines.params.base import Exponent, NonNegativeFloat, PositiveFloat, Sha256, Strict, odd


class PublishedParams(Strict):
    """A published B-cos network, trained on ImageNet."""

    name: str  # `b-cos-v2:resnet18`, `b-cosification:vitc_s`, ...: see `pipelines.models.published`
    weights: str  # its checkpoint, a local file or URL
    sha256: Sha256 | None = None


class EvaluateParams(Strict):
    """Accuracy, localisation and pictures on the test split."""

    batch_size: PositiveInt = 128
    workers: Annotated[int, Field(ge=0)] = 0
    grid_size: Annotated[int, Field(ge=2)] = 2  # n of the n x n pointing game
    grid_count: PositiveInt
    grid_batch: PositiveInt = 16  # grids at once
    smooth: Annotated[int, Field(ge=1), AfterValidator(odd)]  # side of the mean filter of maps, pixels
    posthoc: tuple[Literal["gradcam", "input_x_gradient", "integrated_gradients"], ...] = (
        "gradcam",
        "input_x_gradient",
    )
    pictures: Annotated[int, Field(ge=0)] = 16
    published: dict[
        Annotated[str, Field(pattern=r"^\w[\w.-]*$")], PublishedParams
    ] = {}  # evaluated too, by a name for reports
    seed: int = 0


class LinearProbeParams(Strict):
    """Linear probes of frozen features; the defaults are those of CLIP_benchmark, which the published figures come from."""

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 512
    lr: PositiveFloat = 0.1  # of AdamW at the first step, with a cosine schedule down to 0
    weight_decay: NonNegativeFloat = 0.0
    heads: Annotated[tuple[Literal["linear", "bcos"], ...], Field(min_length=1)] = ("linear",)
    losses: Annotated[tuple[Literal["cross_entropy", "bce"], ...], Field(min_length=1)] = ("cross_entropy",)
    b: Exponent = 2.0  # B of the head `bcos`
    seed: int = 0


Names = Literal["data", "imagenet"] | Annotated[tuple[str, ...], Field(min_length=1)]


class ClipEvaluateParams(Strict):
    """Zero-shot accuracy, retrieval, text localisation and linear probes of image towers."""

    batch_size: PositiveInt = 128
    workers: Annotated[int, Field(ge=0)] = 0
    text_batch: PositiveInt = 256  # texts at once through the text tower, which bounds its memory
    names: Names = "data"  # of the classes: the data's, open_clip's of ImageNet, or one's own in label order
    templates: str | tuple[str, ...] = (
        "imagenet"  # a list of open_clip (`imagenet`, `simple`, `plain`) or one's own
    )
    localisation_names: Names = "data"  # of the classes, in text localisation
    localisation_templates: str | tuple[str, ...] = "plain"  # of the texts that text localisation explains
    scale: PositiveFloat = 100.0  # logits are scale times cosine
    hold_norm: bool = (
        True  # hold the embedding's norm, so that contributions sum to the cosine; false: as published
    )
    posthoc: tuple[Literal["gradcam", "input_x_gradient", "integrated_gradients"], ...] = (
        "gradcam",
    )  # of conventional towers
    probe: LinearProbeParams = LinearProbeParams()
    text2concept: dict[
        Annotated[str, Field(pattern=r"^\w[\w.-]*$")], str
    ] = {}  # name -> folder of a B-cos classifier
    pictures: Annotated[int, Field(ge=0)] = 8  # of text localisation, for each B-cosified tower
    smooth: Annotated[int, Field(ge=1), AfterValidator(odd)] = (
        15  # side of the mean filter of their opacity, pixels
    )
    seed: int = 0  # draws which images these show
