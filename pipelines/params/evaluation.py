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
    """Evaluation of all models on the test split: accuracy, localisation, pictures."""

    batch_size: PositiveInt = 128
    """Images per batch and worker."""
    workers: Count = 0
    """Ray workers; 0: the stage's process."""
    grid_size: Annotated[int, Field(ge=2)] = 2
    """Rows and columns of a grid in the grid pointing game."""
    grid_count: PositiveInt
    """Number of grids in the grid pointing game."""
    grid_batch: PositiveInt = 16
    """Grids per batch."""
    smooth: Annotated[int, Field(ge=1), AfterValidator(odd)]
    """Side of the mean filter that smooths maps, an odd number of pixels."""
    posthoc: tuple[PostHoc, ...] = ("gradcam", "input_x_gradient")
    """Methods that explain the conventional model."""
    pictures: Count = 16
    """Images that are drawn with their explanations."""
    published: dict[Label, PublishedParams] = {}
    """Published networks to evaluate beside the run's own: name in the reports -> network."""
    seed: int = 0
    """Seed for the random choice of grids and pictures."""


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
    """Exponent B of the head `bcos`."""
    seed: int = 0
    """Seed of the initial weights and of the order of features."""


class ClipEvaluateParams(Strict):
    """Zero-shot accuracy, retrieval, text localisation and linear probes of image towers."""

    batch_size: PositiveInt = 128
    """Images per batch and worker."""
    workers: Count = 0
    """Ray workers; 0: the stage's process."""
    text_batch: PositiveInt = 256
    """Texts per batch of the text tower."""
    names: Names = "data"
    """Class names in the texts, or a list of names. `data` takes the names of the data set, `imagenet` those
    of open_clip for ImageNet; a list has the order of the labels."""
    templates: str | tuple[str, ...] = "imagenet"
    """Templates around a class name. They are open_clip's imagenet (80) or simple (7), plain
    (`a photo of a {}.`), or a list of texts with {} for the name."""
    localisation_names: Names = "data"
    """The same as `names`, for text localisation."""
    localisation_templates: str | tuple[str, ...] = "plain"
    """The same as `templates`, for text localisation."""
    scale: PositiveFloat = 100.0
    """Factor of the cosines in zero-shot logits."""
    hold_norm: bool = True
    """Holds the embedding's norm, so that contributions sum to the cosine. If false, the norm is
    differentiated as published, and contributions sum to 0."""
    posthoc: tuple[PostHoc, ...] = ("gradcam",)
    """Methods that explain the original towers."""
    probe: LinearProbeParams = LinearProbeParams()
    """Linear probes of the frozen features."""
    text2concept: dict[Label, str] = {}
    """Baseline Text2Concept: name in the reports -> folder of a B-cos classifier. A linear map takes its
    features to CLIP's embeddings."""
    pictures: Count = 8
    """Images per tower that are drawn with explanations of texts."""
    smooth: Annotated[int, Field(ge=1), AfterValidator(odd)] = 15
    """Side of the mean filter that smooths these pictures' opacity, an odd number of pixels."""
    seed: int = 0
    """Seed for the random choice of these images."""
