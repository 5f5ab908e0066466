"""Params of the evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from pipelines.params.base import Sha256, Strict, odd


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
    posthoc: tuple[Literal["gradcam", "input_x_gradient", "integrated_gradients"], ...] = ("gradcam", "input_x_gradient")
    pictures: Annotated[int, Field(ge=0)] = 16
    published: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], PublishedParams] = {}  # evaluated too, by a name for reports
    seed: int = 0
