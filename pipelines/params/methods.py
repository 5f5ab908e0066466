"""Params of each method: its own, and its optimiser's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.params.base import Exponent, Fraction, NonNegativeFloat, PositiveFloat, Strict
from pipelines.params.data import DataParams
from pipelines.params.training import ModelParams, OptimiserParams


class PretrainParams(OptimiserParams):
    """The conventional model. `epochs: 0` takes the pretrained weights as they come."""

    label_smoothing: Fraction = 0.0


class BcosificationParams(OptimiserParams):
    """The design choices of Arya et al. 2024 (methods of `bcosify`), and the fine-tuning after them."""

    b: Exponent = 2.0  # in the end
    b_mode: Literal["fixed", "scheduled", "learned"] = "fixed"
    b_start: Exponent = 1.0  # where a schedule or learning starts
    b_epochs: PositiveInt = 2  # over which a schedule goes from b_start to b, in equal parts a step
    b_decay: NonNegativeFloat = 1.0  # weight decay that pulls a learned B towards 2
    bias: Literal["remove", "fade", "decay", "keep"] = "remove"
    bias_epochs: PositiveInt = 2  # over which biases fade to zero, in equal parts a step
    bias_decay: NonNegativeFloat = 1.0  # weight decay on biases (the norms' too), where they decay
    norm: Literal["uncentered", "uncentered_unshifted", "centered"] = "uncentered"
    stem_pool: Literal["average", "keep"] = "average"
    gap_reorder: bool = True
    activation: Literal["keep", "remove"] = "keep"
    logit_bias: float | None = None  # none: -log(classes - 1)
    temperature: PositiveFloat = 1.0
    normalize_weight: bool = False
    max_out: PositiveInt = 1  # units of which each output is the maximum

    @model_validator(mode="after")
    def _exponents_fit(self) -> BcosificationParams:
        if self.b_mode == "learned" and self.b != 2:
            raise ValueError(
                f"b: a learned B is pulled towards 2, not {self.b:g}; b_start says where it starts"
            )
        if self.b_mode == "scheduled" and self.b_epochs > self.epochs:
            raise ValueError(
                f"b_epochs: a schedule over {self.b_epochs} epochs does not reach b in {self.epochs} epochs"
            )
        return self

    @model_validator(mode="after")
    def _biases_fade(self) -> BcosificationParams:
        if self.bias == "fade" and self.bias_epochs > self.epochs:
            raise ValueError(
                f"bias_epochs: biases that fade over {self.bias_epochs} epochs are not gone after {self.epochs}"
            )
        return self

    @model_validator(mode="after")
    def _biases_decay(self) -> BcosificationParams:
        if self.bias == "decay" and self.bias_decay == 0:
            raise ValueError(
                "bias_decay: biases that decay need a decay above 0; bias: keep leaves them as they are"
            )
        return self

    @property
    def settled(self) -> int:
        """Epochs until B has its final value and biases have faded."""
        b_epochs = self.b_epochs if self.b_mode == "scheduled" else 0
        return max(b_epochs, self.bias_epochs if self.bias == "fade" else 0)

    def design(self) -> dict[str, Any]:
        """The keyword arguments of `bcosify` for the network as training starts."""
        names = (
            "b_mode",
            "bias",
            "norm",
            "stem_pool",
            "gap_reorder",
            "activation",
            "logit_bias",
            "temperature",
        )
        chosen = self.model_dump(include={*names, "normalize_weight", "max_out"})
        return {"b": self.b if self.b_mode == "fixed" else self.b_start, **chosen}


class BcosifyParams(Strict):
    """Which B-cos networks are trained: from the `pretrained` model, and from `scratch` as the baseline."""

    starts: Annotated[list[Literal["pretrained", "scratch"]], Field(min_length=1)]
    pretrained: BcosificationParams
    scratch: BcosificationParams

    @model_validator(mode="after")
    def _pretrained_weights_stay(self) -> BcosifyParams:
        if self.pretrained.max_out > 1:
            raise ValueError(
                f"pretrained.max_out: {self.pretrained.max_out} units are all drawn at random: for scratch alone"
            )
        return self


class DistillationParams(OptimiserParams):
    """The loss of Parchami-Araghi et al. 2024, and its training; an `explanation_weight` of 0 is plain distillation."""

    temperature: PositiveFloat = 1.0  # τ
    explanation_weight: NonNegativeFloat = 0.0  # λ
    label_weight: NonNegativeFloat = 0.0  # α
    explain_every: PositiveInt = 1  # explanations are matched on every so many-th step alone
    explanations: Literal["live", "frozen"] = (
        "live"  # the teacher's: of each view, or stored once, of the fixed one
    )

    @model_validator(mode="after")
    def _maps_follow(self) -> DistillationParams:
        if self.explanations == "frozen" and self.mixup > 0:
            raise ValueError(
                "mixup: frozen explanations are of single images, which cannot be mixed: set it to 0"
            )
        return self


class StudentParams(ModelParams):
    """The network that learns. It is made B-cos, from random weights or from those named, or stays conventional."""

    kind: Literal["bcos", "conventional"] = "bcos"
    normalize_weight: bool = True  # of B-cos layers, for students from random weights

    def design(self) -> dict[str, Any]:
        """The keyword arguments of `bcosify`; none for a conventional student."""
        return {"normalize_weight": self.normalize_weight} if self.kind == "bcos" else {}


class FrozenParams(Strict):
    """How explanations are stored."""

    resolution: PositiveInt | None = None  # side of the maps, cells; none: image_size
    precision: Literal["float16", "float32"] = "float16"


class DistillParams(Strict):
    """Which students are trained: `e2kd`, and as the baseline plain distillation, `kd`."""

    runs: Annotated[list[Literal["kd", "e2kd"]], Field(min_length=1)]
    teacher: str  # folder of a model, or `models:/name@alias` in the registry
    after: str  # what DVC makes, and watches, before the teacher is taken: a path
    student: StudentParams
    shots: PositiveInt | None = (
        None  # training images a class, or all of a class that has fewer; none: all of them
    )
    shots_seed: int = 0  # draws which ones
    frozen: FrozenParams
    kd: DistillationParams
    e2kd: DistillationParams


class GuidanceParams(OptimiserParams):
    """The loss of Rao et al. 2023, and its training, on the classifier of the stage `classify`."""

    select: Literal["f1", "epg", "iou", "knee"] = (
        "knee"  # of the Pareto front of these three on `val`, the best of one; or its knee
    )
    loss: Literal["energy", "l1", "rrr", "ppce", "size_corrected_energy"] = "energy"
    alpha: Fraction = (
        0.5  # α of size_corrected_energy: the higher, the more a small box counts; 0: as in energy
    )
    localisation_weight: NonNegativeFloat  # λ, of the sum of the loss over the images of an effective batch
    attribution: Literal["bcos", "input_x_gradient", "integrated_gradients", "gradcam"] = "bcos"
    layer: str | None = (
        None  # name of a module whose output is explained; none: the input, for gradcam the last features
    )
    annotated: Annotated[float, Field(gt=0.0, le=1.0)] = (
        1.0  # share of the training images whose boxes are used
    )
    annotated_seed: int = 0  # draws which ones
    dilation: NonNegativeFloat = 0.0  # by which each side of a box moves out, of the box's width or height
    f1_floor: Fraction = 0.0  # of val; below it training stops

    @property
    def objectives(self) -> tuple[str, ...]:
        """Those of the Pareto front."""
        return ("val/f1", "val/epg", "val/iou")

    @property
    def floors(self) -> dict[str, float]:
        """That of F1."""
        return {"val/f1": self.f1_floor}

    @model_validator(mode="after")
    def _boxes_follow(self) -> GuidanceParams:
        if self.mixup > 0:
            raise ValueError("mixup: boxes are of single images, which cannot be mixed: set it to 0")
        if self.attribution == "integrated_gradients" and self.layer is not None:
            raise ValueError("layer: integrated gradients explain the input alone: set it to null")
        return self


class GuideParams(Strict):
    """A classifier of what is in an image, from a backbone with a new head, and then its guidance by boxes."""

    dataset: str  # of `datasets`; it needs boxes
    data: DataParams
    backbone: str  # folder of a model, or `models:/name@alias` in the registry
    after: str  # what DVC makes, and watches, before the backbone is taken: a path
    splits: Annotated[
        list[Literal["train", "val", "test"]], Field(min_length=1)
    ]  # that both classifiers are evaluated on
    classify: OptimiserParams
    guided: GuidanceParams
