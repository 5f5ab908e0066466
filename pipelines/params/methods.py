"""Params of each method of training, and of the groups of stages around them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.params.base import Exponent, Fraction, NonNegativeFloat, PositiveFloat, Strict
from pipelines.params.data import DataParams
from pipelines.params.training import MethodParams, ModelParams


class PretrainParams(MethodParams):
    """Training of the conventional model. With `optim.epochs: 0` it keeps its pretrained weights."""

    mixup: NonNegativeFloat = 0.0
    """Parameter α of mixup's Beta distribution; 0: no mixup."""
    label_smoothing: Fraction = 0.0
    """Probability mass that is spread over all classes."""


class DesignParams(MethodParams):
    """The design choices of B-cosification (Arya et al. 2024), applied by `bcosify` before fine-tuning."""

    b: Exponent = 2.0
    """Exponent B of the B-cos layers, at the end of training."""
    b_mode: Literal["fixed", "scheduled", "learned"] = "fixed"
    """B is constant, rises linearly, or is a learned parameter of each layer."""
    b_start: Exponent = 1.0
    """First value of a scheduled or learned B."""
    b_epochs: PositiveInt = 2
    """Epochs in which a scheduled B rises from b_start to b."""
    b_decay: NonNegativeFloat = 1.0
    """Weight decay that pulls a learned B towards 2."""
    bias: Literal["remove", "fade", "decay", "keep"] = "remove"
    """Treatment of the biases of all layers, norms included. `fade` scales them to zero over `bias_epochs`;
    `decay` gives them the weight decay `bias_decay`."""
    bias_epochs: PositiveInt = 2
    """Epochs in which biases are scaled linearly to zero, if `bias: fade`."""
    bias_decay: NonNegativeFloat = 1.0
    """Weight decay of the biases, if `bias: decay`."""
    norm: Literal["uncentered", "uncentered_unshifted", "centered"] = "uncentered"
    """BatchNorm's mean is moved into its bias, dropped, or subtracted as usual."""
    stem_pool: Literal["average", "keep"] = "average"
    """The stem's max pooling becomes average pooling or stays."""
    gap_reorder: bool = True
    """Applies global average pooling after the classifier instead of before it."""
    activation: Literal["keep", "remove"] = "keep"
    """Keeps or removes the activation functions between layers."""
    logit_bias: float | None = None
    """Constant added to the logits; null: -log(classes - 1)."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits."""
    normalize_weight: bool = False
    """Divides weight vectors by their norms, as in B-cos networks from scratch."""
    max_out: PositiveInt = 1
    """Units per output (MaxOut), the largest of which is the output. Only `scratch` can have more than 1."""

    @model_validator(mode="after")
    def _exponents_fit(self) -> DesignParams:
        if self.b_mode == "learned" and self.b != 2:
            raise ValueError(
                f"b: a learned B is pulled towards 2, not {self.b:g}; b_start says where it starts"
            )
        if self.b_mode == "scheduled" and self.b_epochs > self.optim.epochs:
            raise ValueError(
                f"b_epochs: a schedule over {self.b_epochs} epochs does not reach b in "
                f"{self.optim.epochs} epochs"
            )
        return self

    @model_validator(mode="after")
    def _biases_fade(self) -> DesignParams:
        if self.bias == "fade" and self.bias_epochs > self.optim.epochs:
            raise ValueError(
                f"bias_epochs: biases that fade over {self.bias_epochs} epochs are not gone after "
                f"{self.optim.epochs}"
            )
        return self

    @model_validator(mode="after")
    def _biases_decay(self) -> DesignParams:
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
        """The keyword arguments of `bcosify` for the network at the start of training."""
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


class BcosificationParams(DesignParams):
    """The design choices of B-cosification (Arya et al. 2024), and the fine-tuning of the classifier."""

    mixup: NonNegativeFloat = 0.0
    """Parameter α of mixup's Beta distribution; 0: no mixup."""


class BcosifyParams(Strict):
    """B-cos networks: one from the pretrained model, and one from scratch as the baseline."""

    starts: Annotated[list[Literal["pretrained", "scratch"]], Field(min_length=1)]
    """B-cos networks that are trained. The first one becomes teacher, backbone and registered model."""
    pretrained: BcosificationParams
    """B-cosification of the pretrained model."""
    scratch: BcosificationParams
    """The same network from random weights."""

    @model_validator(mode="after")
    def _pretrained_weights_stay(self) -> BcosifyParams:
        if self.pretrained.max_out > 1:
            raise ValueError(
                f"pretrained.max_out: {self.pretrained.max_out} units are all drawn at random: "
                "for scratch alone"
            )
        return self


class DistillationParams(MethodParams):
    """Distillation (Parchami-Araghi et al. 2024). With `explanation_weight: 0` it is plain distillation."""

    temperature: PositiveFloat = 1.0
    """Temperature τ of the softmax of student and teacher."""
    explanation_weight: NonNegativeFloat = 0.0
    """Weight λ of the explanation loss."""
    label_weight: NonNegativeFloat = 0.0
    """Weight α of the loss on the labels; 0: labels are not used."""
    explain_every: PositiveInt = 1
    """Every n-th step has the explanation loss; 1: every step."""
    explanations: Literal["live", "frozen"] = "live"
    """Teacher's explanations: live, or stored before training. `live` explains each augmented view. For
    `frozen`, the stage explain stores one explanation per image."""
    mixup: NonNegativeFloat = 0.0
    """Parameter α of mixup's Beta distribution; 0: no mixup."""

    @model_validator(mode="after")
    def _maps_follow(self) -> DistillationParams:
        if self.explanations == "frozen" and self.mixup > 0:
            raise ValueError(
                "mixup: frozen explanations are of single images, which cannot be mixed: set it to 0"
            )
        return self


class StudentParams(ModelParams):
    """The network that learns from the teacher."""

    kind: Literal["bcos", "conventional"] = "bcos"
    """Kind of the student's network. With a conventional student, explanations are compared by GradCAM."""
    normalize_weight: bool = True
    """Divides a B-cos student's weight vectors by their norms, as in B-cos networks from scratch."""

    def design(self) -> dict[str, Any]:
        """The keyword arguments of `bcosify`; empty for a conventional student."""
        return {"normalize_weight": self.normalize_weight} if self.kind == "bcos" else {}


class FrozenParams(Strict):
    """Format of the explanations that `explanations: frozen` stores."""

    resolution: PositiveInt | None = None
    """Height and width of the stored maps; null: image_size."""
    precision: Literal["float16", "float32"] = "float16"
    """Number format of the stored maps."""


class DistillParams(Strict):
    """Distillation: one student learns with the teacher's explanations (`e2kd`), one without as the baseline
    (`kd`)."""

    runs: Annotated[list[Literal["kd", "e2kd"]], Field(min_length=1)]
    """Students that are trained."""
    teacher: str
    """Folder of the teacher, or models:/NAME@ALIAS in the registry."""
    after: str
    """File or folder that DVC makes before the stage `teacher` runs. For a teacher that no stage here makes,
    name its folder; for one from the registry, name any file that exists, such as pyproject.toml."""
    student: StudentParams
    """The student's network."""
    shots: PositiveInt | None = None
    """Training images per class; null: all. A class with fewer gives all that it has."""
    shots_seed: int = 0
    """Seed for the random choice of these images."""
    frozen: FrozenParams
    """Format of the stored explanations."""
    kd: DistillationParams
    """Plain distillation, the baseline."""
    e2kd: DistillationParams
    """e²KD: distillation of answers and explanations."""


class ClassifyParams(MethodParams):
    """Training of the classifier before guidance. It is the backbone with a new head."""


class GuidanceParams(MethodParams):
    """Model guidance (Rao et al. 2023): the classifier of the stage `classify` is trained further, with a
    localisation loss on its explanations."""

    select: Literal["f1", "epg", "iou", "knee"] = "knee"
    """Epoch of the Pareto front that becomes the model. It is the best by F1, EPG or IoU on val, or the
    knee: the epoch nearest to the best of all three."""
    loss: Literal["energy", "l1", "rrr", "ppce", "size_corrected_energy"] = "energy"
    """Localisation loss."""
    alpha: Fraction = 0.5
    """Exponent α of size_corrected_energy. The higher it is, the more a small box counts; 0 gives energy."""
    localisation_weight: NonNegativeFloat
    """Weight λ of the localisation loss, summed over the images of a batch."""
    attribution: Literal["bcos", "input_x_gradient", "integrated_gradients", "gradcam"] = "bcos"
    """Explanation that is guided. All methods but bcos are for conventional networks."""
    layer: str | None = None
    """Module whose output is explained; null: the input. For gradcam, null is the last feature map."""
    annotated: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the training images whose boxes are used. Each class keeps at least one image."""
    annotated_seed: int = 0
    """Seed for the random choice of these images."""
    dilation: NonNegativeFloat = 0.0
    """Each side of a box moves outwards by this share of its width or height."""
    f1_floor: Fraction = 0.0
    """Training stops if F1 on val falls below this value."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Metrics of the Pareto front."""
        return ("val/f1", "val/epg", "val/iou")

    @property
    def floors(self) -> dict[str, float]:
        """The floor of F1."""
        return {"val/f1": self.f1_floor}

    @model_validator(mode="after")
    def _boxes_follow(self) -> GuidanceParams:
        if self.attribution == "integrated_gradients" and self.layer is not None:
            raise ValueError("layer: integrated gradients explain the input alone: set it to null")
        return self


class GuideParams(Strict):
    """Training of a multi-label classifier, and its guidance by boxes."""

    dataset: str
    """Key in `datasets` of images with boxes, for classify and guide. Set it by `-S guide=NAME`."""
    data: DataParams
    """How the images of guide.dataset are read."""
    backbone: str
    """Folder of the backbone, or models:/NAME@ALIAS in the registry."""
    after: str
    """File or folder that DVC makes before the stage `backbone` runs, like distill.after."""
    splits: Annotated[list[Literal["train", "val", "test"]], Field(min_length=1)]
    """Splits on which both classifiers are evaluated."""
    classify: ClassifyParams
    """Training of the classifier: the backbone with a new head."""
    guided: GuidanceParams
    """Further training of this classifier with guidance."""
