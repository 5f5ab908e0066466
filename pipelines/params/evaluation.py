"""Params of the evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from pipelines.params.base import Count, Exponent, NonNegativeFloat, PositiveFloat, Sha256, Strict, odd

PostHoc = Literal["gradcam", "input_x_gradient", "integrated_gradients"]
Label = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Names = Literal["data", "imagenet"] | Annotated[tuple[str, ...], Field(min_length=1)]


class PublishedParams(Strict):
    """A published B-cos network, trained on ImageNet."""

    name: str
    """`b-cos-v2:resnet18`, `b-cosification:vitc_s`, and others of `pipelines.models.published`."""
    weights: str
    """File or URL of its checkpoint."""
    sha256: Sha256 | None = None
    """Checksum of the checkpoint."""


class EvaluateParams(Strict):
    """Accuracy, localisation and pictures on the test split."""

    batch_size: PositiveInt = 128
    """Images per batch and worker."""
    workers: Count = 0
    """Ray workers; 0: the stage's process."""
    grid_size: Annotated[int, Field(ge=2)] = 2
    """n of the n x n grid pointing game."""
    grid_count: PositiveInt
    """Grids of the pointing game."""
    grid_batch: PositiveInt = 16
    """Grids per batch."""
    smooth: Annotated[int, Field(ge=1), AfterValidator(odd)]
    """Side of the mean filter over maps, odd, pixels."""
    posthoc: tuple[PostHoc, ...] = ("gradcam", "input_x_gradient")
    """Explanations of the conventional model."""
    pictures: Count = 16
    """Images that are drawn with their explanations."""
    published: dict[Label, PublishedParams] = {}
    """Published networks, by a name for the reports. They are evaluated, too."""
    seed: int = 0
    """Seed of the draw of grids and pictures."""


class LinearProbeParams(Strict):
    """Linear probes of frozen features. The defaults are those of CLIP_benchmark, as in published figures."""

    epochs: PositiveInt = 20
    """Passes over the features."""
    batch_size: PositiveInt = 512
    """Features per step."""
    lr: PositiveFloat = 0.1
    """Learning rate of AdamW, with a cosine schedule."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    heads: Annotated[tuple[Literal["linear", "bcos"], ...], Field(min_length=1)] = ("linear",)
    """Heads that are trained."""
    losses: Annotated[tuple[Literal["cross_entropy", "bce"], ...], Field(min_length=1)] = ("cross_entropy",)
    """Losses that each head is trained with."""
    b: Exponent = 2.0
    """B of the head bcos."""
    seed: int = 0
    """Seed of initial weights and order."""


class ClipEvaluateParams(Strict):
    """Zero-shot accuracy, retrieval, text localisation and linear probes of image towers."""

    batch_size: PositiveInt = 128
    """Images per batch and worker."""
    workers: Count = 0
    """Ray workers; 0: the stage's process."""
    text_batch: PositiveInt = 256
    """Texts per batch of the text tower."""
    names: Names = "data"
    """Class names, or a list. Those of the data, open_clip's of ImageNet, or a list in label order."""
    templates: str | tuple[str, ...] = "imagenet"
    """Texts around a class name. open_clip's imagenet (80), simple (7) or plain, or texts with {}."""
    localisation_names: Names = "data"
    """Class names in text localisation."""
    localisation_templates: str | tuple[str, ...] = "plain"
    """Templates in text localisation."""
    scale: PositiveFloat = 100.0
    """Factor of the cosines in the logits."""
    hold_norm: bool = True
    """Holds the embedding's norm; then contributions sum to the cosine. False: as published."""
    posthoc: tuple[PostHoc, ...] = ("gradcam",)
    """Explanations of the original towers."""
    probe: LinearProbeParams = LinearProbeParams()
    """Linear probes of the frozen features."""
    text2concept: dict[Label, str] = {}
    """Classifiers of the baseline Text2Concept. Name → folder of a B-cos classifier, whose features are
    mapped into CLIP's space."""
    pictures: Count = 8
    """Images of text localisation that are drawn per tower."""
    smooth: Annotated[int, Field(ge=1), AfterValidator(odd)] = 15
    """Side of the mean filter over the opacity of these pictures, odd, pixels."""
    seed: int = 0
    """Seed of the draw of these images."""
