"""Every knob of the pipeline, as strict pydantic models. `params.yaml` is read here and nowhere else."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Exponent = Annotated[float, Field(ge=1.0)]  # B
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


class ParamsError(ValueError):
    """A bad key, type or value in the params: one line that names it and what is allowed."""


class Strict(BaseModel):
    """A group of params: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


# Data sets ------------------------------------------------------------------------------------------------------------


class DatasetParams(Strict):
    """What every data set has, whatever its source."""

    shard_size: PositiveInt = 1000  # samples a shard
    val_count: PositiveInt | None = None  # images held out of `train` where the source has no `val` of its own
    split_seed: int = 0  # draws which ones


class ScenesParams(DatasetParams):
    """Drawn by a seeded generator: `objects` (one object, multiclass) or `scenes` (several, multilabel)."""

    source: Literal["scenes"]
    variant: Literal["objects", "scenes"] = "objects"
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    counts: dict[Literal["train", "val", "test"], PositiveInt]
    objects_per_image: tuple[PositiveInt, PositiveInt] = (1, 1)  # least, most
    correlation: dict[Literal["train", "val", "test"], Fraction] = {}  # of class and background; 0 where not named
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> ScenesParams:
        least, most = self.objects_per_image
        missing = {"train", "val", "test"} - set(self.counts)
        if missing:
            raise ValueError(f"counts: {', '.join(sorted(missing))} missing")
        if least > most:
            raise ValueError(f"objects_per_image: the least ({least}) is above the most ({most})")
        if self.variant == "objects" and most != 1:
            raise ValueError(f"objects_per_image: variant 'objects' has one object an image, not {most}")
        return self


class ImageFolderParams(DatasetParams):
    """A folder, tar, tar.gz or zip laid out as `split/class/file`, local or at any fsspec URL."""

    source: Literal["imagefolder"]
    root: str
    sha256: Sha256 | None = None
    splits: dict[Literal["train", "val", "test"], str] = {}  # our split -> its folder; by default the same name


class Cifar10Params(DatasetParams):
    """CIFAR-10: torchvision's own download, or an image folder (any form `imagefolder` takes) at `root`."""

    source: Literal["cifar10"]
    root: str | None = None
    sha256: Sha256 | None = None


class ImageNetParams(DatasetParams):
    """ImageNet in its official folder layout (`train/<wnid>/*.JPEG`, `val/<wnid>/*.JPEG`); `val` is read as test."""

    source: Literal["imagenet"]
    root: str


class AnnotatedParams(DatasetParams):
    """What every data set has whose boxes are read from annotation files."""

    on_bad_box: Literal["raise", "skip"] = "raise"  # a box inverted, empty or outside its image: stop, or drop and count


class Voc2007Params(AnnotatedParams):
    """PASCAL VOC 2007: the official archives, or what lies at `root` in their layout (VOCdevkit/VOC2007)."""

    source: Literal["voc2007"]
    root: str | None = None  # a folder or archive, local or at any fsspec URL
    difficult: bool = True  # whether objects marked difficult count as objects


class Coco2014Params(AnnotatedParams):
    """COCO 2014: the official archives, or what lies at `root` in their layout; `val2014` is read as test."""

    source: Literal["coco2014"]
    root: str | None = None  # a folder or archive, local or at any fsspec URL
    crowd: Literal["label", "ignore", "box"] = "label"  # a crowd region gives its image a label, nothing, or label and box


class WaterbirdsParams(AnnotatedParams):
    """Waterbirds with the boxes of CUB-200-2011: the official archives, or what lies at `root` and `cub_root`."""

    source: Literal["waterbirds"]
    variant: Literal[95, 100] = 95  # share of training birds on their usual background, percent
    root: str | None = None  # of metadata.csv and the images; a folder or archive, local or at any fsspec URL
    sha256: Sha256 | None = None  # of the archive, the official one too: its publisher gives none
    cub_root: str | None = None  # of CUB's images.txt and bounding_boxes.txt, likewise


Dataset = Annotated[
    ScenesParams | ImageFolderParams | Cifar10Params | ImageNetParams | Voc2007Params | Coco2014Params | WaterbirdsParams,
    Field(discriminator="source"),
]


class DataParams(Strict):
    """How shards are read."""

    image_size: PositiveInt  # side of the square that the model sees, pixels
    eval_resize: PositiveInt | None = None  # shorter side before the centre crop; none: straight to image_size
    augment: Literal["none", "flip", "pad_crop_flip", "random_resized_crop_flip"] = "flip"
    crop_padding: Annotated[int, Field(ge=0)] = 4  # pixels, for pad_crop_flip
    rand_augment: Annotated[int, Field(ge=0, le=30)] | None = None  # magnitude of RandAugment, after crop and flip
    loader_workers: Annotated[int, Field(ge=0)] = 0  # decoding processes a training worker
    shuffle_buffer: PositiveInt = 10_000  # samples
    on_error: Literal["raise", "skip"] = "raise"  # an image that does not decode: stop, or skip and count
    verify: bool = False  # check each shard's sha256 before reading it


# Models and training --------------------------------------------------------------------------------------------------


class ModelParams(Strict):
    """Which network, and which weights to start from."""

    name: str  # `resnet20` (CIFAR), a torchvision name, a timm name, or `torchvision:name`, `timm:name`
    weights: str = "none"  # `none`, a library tag such as IMAGENET1K_V2, or a local file or URL
    sha256: Sha256 | None = None  # of the file that `weights` names
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    options: dict[str, Any] = {}  # further keyword arguments of the architecture's own constructor


class StorageParams(Strict):
    """Where training leaves what must survive it, and finds what its workers read."""

    root: Annotated[str, Field(min_length=1)] = "runs"  # folder or fsspec URL


class TrainingParams(Strict):
    """The one loop and its launch: what does not depend on the method."""

    workers: Annotated[int, Field(ge=0)] | tuple[PositiveInt, PositiveInt] = 1  # 0: this process; N; [MIN, MAX]: elastic
    gpus_per_worker: NonNegativeFloat = 0.0
    cpus_per_worker: PositiveFloat = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: PositiveInt = 1  # parts of a worker's batch whose gradients make one step; more where workers are missing
    channels_last: bool = False  # memory format of images and convolutions; compiled they have it anyway
    compile: bool = False  # the objective by torch.compile
    checkpoint_activations: bool = False  # blocks keep their input alone and compute the rest again in the backward pass
    checkpoint_every: PositiveInt = 100  # steps
    keep_last: PositiveInt = 2  # checkpoints, beside the best one
    max_failures: Annotated[int, Field(ge=-1)] = 3  # restarts of the worker group; -1: without end
    log_every: PositiveInt = 20  # steps

    @property
    def most_workers(self) -> int:
        """How many workers there may be, this process counted as one."""
        return max(1, self.workers) if isinstance(self.workers, int) else self.workers[1]

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and convolutions. The compiler's convolutions have channels last, and copy what comes otherwise."""
        return torch.channels_last if self.channels_last or self.compile else torch.contiguous_format

    @model_validator(mode="after")
    def _least_and_most(self) -> TrainingParams:
        if not isinstance(self.workers, int) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers: the least ({self.workers[0]}) is above the most ({self.workers[1]})")
        return self

    @model_validator(mode="after")
    def _compiled_or_checkpointed(self) -> TrainingParams:
        if self.compile and self.checkpoint_activations:
            raise ValueError("compile and checkpoint_activations: choose one, the compiler decides itself what is kept")
        return self


class OptimiserParams(Strict):
    """Optimiser, learning-rate schedule and clipping of one training run."""

    epochs: Annotated[int, Field(ge=0)]
    batch_size: PositiveInt  # effective: over all workers
    optimiser: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Literal["none", "agc", "norm"] = "none"
    clip_value: PositiveFloat = 0.01
    mixup: NonNegativeFloat = 0.0  # alpha of the Beta distribution of the mixing share; 0: no mixing
    select: str = "val/accuracy"  # the metric whose best epoch is kept
    patience: PositiveInt | None = None  # epochs without a better `select` before stopping
    validate_every: PositiveInt = 1  # epochs; the last one is validated in any case

    @property
    def settled(self) -> int:
        """Epochs after which the network is the one that is wanted: none before counts as the best."""
        return 0

    @property
    def objectives(self) -> tuple[str, ...]:
        """The metrics that decide which epochs are kept: one has a best epoch, several a Pareto front."""
        return (self.select,)

    @property
    def floors(self) -> dict[str, float]:
        """Metrics that must not fall below a value: training stops there, and such an epoch is not the best."""
        return {}


class PretrainParams(OptimiserParams):
    """The conventional model. `epochs: 0` takes the pretrained weights as they come."""

    label_smoothing: Fraction = 0.0


class BcosificationParams(OptimiserParams):
    """The design choices of Arya et al. 2024 (methods of `bcosify`), and the fine-tuning after them."""

    b: Exponent = 2.0  # in the end
    b_mode: Literal["fixed", "scheduled", "learned"] = "fixed"
    b_start: Exponent = 1.0  # where a schedule or learning starts
    b_epochs: PositiveInt = 1  # over which a schedule goes from b_start to b, in equal parts a step
    b_decay: NonNegativeFloat = 0.0  # weight decay that pulls a learned B towards 2
    bias: Literal["remove", "decay", "keep"] = "remove"
    bias_decay: NonNegativeFloat = 0.0  # weight decay on biases (the norms' too), where they decay
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
            raise ValueError(f"b: a learned B is pulled towards 2, not {self.b:g}; b_start says where it starts")
        if self.b_mode == "scheduled" and self.b_epochs > self.epochs:
            raise ValueError(f"b_epochs: a schedule over {self.b_epochs} epochs does not reach b in {self.epochs} epochs")
        return self

    @model_validator(mode="after")
    def _biases_decay(self) -> BcosificationParams:
        if self.bias == "decay" and self.bias_decay == 0:
            raise ValueError("bias_decay: biases that decay need a decay above 0; bias: keep leaves them as they are")
        return self

    @property
    def settled(self) -> int:
        """Epochs until B has its final value."""
        return self.b_epochs if self.b_mode == "scheduled" else 0

    def design(self) -> dict[str, Any]:
        """The keyword arguments of `bcosify` for the network as training starts."""
        names = ("b_mode", "bias", "norm", "stem_pool", "gap_reorder", "activation", "logit_bias", "temperature")
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
            raise ValueError(f"pretrained.max_out: {self.pretrained.max_out} units are all drawn at random: for scratch alone")
        return self


class DistillationParams(OptimiserParams):
    """The loss of Parchami-Araghi et al. 2024, and its training; an `explanation_weight` of 0 is plain distillation."""

    temperature: PositiveFloat = 1.0  # τ
    explanation_weight: NonNegativeFloat = 0.0  # λ
    label_weight: NonNegativeFloat = 0.0  # α
    explain_every: PositiveInt = 1  # explanations are matched on every so many-th step alone
    explanations: Literal["live", "frozen"] = "live"  # the teacher's: of each view, or stored once, of the fixed one

    @model_validator(mode="after")
    def _maps_follow(self) -> DistillationParams:
        if self.explanations == "frozen" and self.mixup > 0:
            raise ValueError("mixup: frozen explanations are of single images, which cannot be mixed: set it to 0")
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
    student: StudentParams
    shots: PositiveInt | None = None  # training images a class; none: all of them
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
    localisation_weight: NonNegativeFloat = 1e-3  # λ, of the sum of the loss over the images of an effective batch
    attribution: Literal["bcos", "input_x_gradient", "integrated_gradients", "gradcam"] = "bcos"
    layer: str | None = None  # name of a module whose output is explained; none: the input, for gradcam the last features
    annotated: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # share of the training images whose boxes are used
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
    splits: Annotated[list[Literal["train", "val", "test"]], Field(min_length=1)]  # that both classifiers are evaluated on
    classify: OptimiserParams
    guided: GuidanceParams


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
    grid_count: PositiveInt = 500
    grid_batch: PositiveInt = 16  # grids at once
    smooth: Annotated[int, Field(ge=1), AfterValidator(_odd)] = 3  # side of the mean filter of maps, pixels
    posthoc: tuple[Literal["gradcam", "input_x_gradient", "integrated_gradients"], ...] = ("gradcam", "input_x_gradient")
    pictures: Annotated[int, Field(ge=0)] = 16
    published: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], PublishedParams] = {}  # evaluated too, by a name for reports
    seed: int = 0


Scalar = bool | int | float | str | None


class SearchedParams(Strict):
    """One dimension of a search space: a param by its path, and what it is drawn from."""

    key: str  # such as bcosify.pretrained.lr
    choice: Annotated[list[Scalar], Field(min_length=1)] | None = None
    uniform: tuple[float, float] | None = None  # least, most
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    when: dict[str, Scalar] = {}  # keys before this one -> value: drawn where they have these, otherwise left as it is

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}

    @property
    def extremes(self) -> list[Scalar]:
        """Every value of a choice, the least and the most of a range."""
        return list(self.choice or self.uniform or self.loguniform or ())

    @model_validator(mode="after")
    def _drawn_from_one(self) -> SearchedParams:
        if sum(given is not None for given in (self.choice, self.uniform, self.loguniform)) != 1:
            raise ValueError(f"{self.key}: exactly one of choice, uniform and loguniform is wanted")
        bounds = self.uniform or self.loguniform
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"{self.key}: the least ({bounds[0]:g}) must be below the most ({bounds[1]:g})")
        return self


class AshaParams(Strict):
    """Asynchronous successive halving (Li et al., MLSys 2020) by the first metric: weak trials end early."""

    grace: PositiveInt = 1  # epochs that every trial gets
    reduction: Annotated[float, Field(gt=1.0)] = 2.0  # of so many trials that come to a rung, one goes on


class SearchParams(Strict):
    """A search by Ray Tune and Optuna: the work of a stage, many times over, with some params replaced."""

    stage: Literal["bcosify@pretrained", "bcosify@scratch", "distill@kd", "distill@e2kd", "guide"]
    space: Annotated[list[SearchedParams], Field(min_length=1)]
    metrics: Annotated[list[Annotated[str, Field(pattern="^val/")]], Field(min_length=1, max_length=3)]  # the higher, the better
    trials: PositiveInt
    epochs: PositiveInt  # of a trial
    asha: AshaParams | None = None  # none: every trial runs to its end
    concurrency: PositiveInt = 1  # trials at once
    workers: Annotated[int, Field(ge=0)] = 0  # of a trial; 0: in the trial's own process
    seed: int = 0

    @model_validator(mode="after")
    def _halved_in_their_own_process(self) -> SearchParams:
        if self.asha is not None and self.workers > 0:  # Ray Train's workers would hold their cores after the trial's end
            raise ValueError("asha: trials that train on Ray workers run to their end: set asha to null, or workers to 0")
        return self

    @property
    def section(self) -> str:
        """The key of the searched stage's own params."""
        return "guide.guided" if self.stage == "guide" else self.stage.replace("@", ".")

    @property
    def searchable(self) -> tuple[str, ...]:
        """Where the keys of the space may be: in what the searched stage depends on, but not the stages before it."""
        if self.stage == "guide":
            return (self.section, "guide.data", "seed")
        return (self.section, *(("distill.student",) if self.stage.startswith("distill") else ()), "data", "seed")

    @model_validator(mode="after")
    def _space_fits(self) -> SearchParams:
        seen: list[str] = []
        for dimension in self.space:
            key = dimension.key
            if not any(key == place or key.startswith(f"{place}.") for place in self.searchable):
                places = ", ".join(self.searchable)
                raise ValueError(f"space: {key!r} does not change what {self.stage} computes; that is in {places}")
            if key in seen:
                raise ValueError(f"space: {key!r} is there twice")
            if unknown := set(dimension.when) - set(seen):
                raise ValueError(f"space: {key}: when names {sorted(unknown)[0]!r}, which is not drawn before it")
            seen.append(key)
        if f"{self.section}.epochs" in seen:
            raise ValueError(f"space: {self.section}.epochs: all trials have search.epochs")
        return self


class TrackingParams(Strict):
    """MLflow: the server is named by MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db."""

    experiment: str
    model_name: str  # in the registry
    alias: str = "candidate"


class Params(Strict):
    """The whole of `params.yaml`."""

    seed: int
    recipe: str
    dataset: str
    datasets: dict[str, Dataset]
    data: DataParams
    model: ModelParams
    storage: StorageParams = StorageParams()
    training: TrainingParams
    pretrain: PretrainParams
    bcosify: BcosifyParams
    distill: DistillParams
    guide: GuideParams
    evaluate: EvaluateParams
    search: SearchParams
    tracking: TrackingParams

    def for_guide(self) -> Params:
        """These params with the data of `guide` in the place of the run's."""
        return self.model_copy(update={"dataset": self.guide.dataset, "data": self.guide.data})

    @model_validator(mode="after")
    def _stored_maps_follow(self) -> Params:
        frozen = [run for run in self.distill.runs if getattr(self.distill, run).explanations == "frozen"]
        if frozen and self.data.rand_augment is not None:
            raise ValueError(f"distill.{frozen[0]}.explanations: frozen ones do not follow data.rand_augment: set it to null")
        return self

    @model_validator(mode="after")
    def _dataset_exists(self) -> Params:
        for key, name in (("dataset", self.dataset), ("guide.dataset", self.guide.dataset)):
            if name not in self.datasets:
                raise ValueError(f"{key}: {name!r} is not in datasets (it has {', '.join(sorted(self.datasets))})")
        return self


def load(path: str | Path = "params.yaml") -> Params:
    """The validated params at `path`.

    Raises:
        ParamsError: the file is not YAML, or a key, type or value is wrong; one line for each.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ParamsError(f"{path}: {error}") from None
    return validate(content, source=str(path))


def validate(content: Any, source: str = "params") -> Params:
    """`content` (nested dicts, as YAML gives them) as `Params`; raises `ParamsError`.

    Each value of the search space alone must be one that its param may have.
    """
    params = _validated(content, source)
    epochs = {f"{params.search.section}.epochs": params.search.epochs}
    for dimension in params.search.space:
        for value in dimension.extremes:
            replaced(params, {**epochs, **dimension.when, dimension.key: value}, f"{source}: search.space")
    return params


def replaced(params: Params, values: Mapping[str, Any], source: str = "params") -> Params:
    """`params` with other `values` by their keys, such as `bcosify.pretrained.lr`.

    Raises:
        ParamsError: a key is not there, or a value is not one that it may have.
    """
    content = params.model_dump(mode="json")
    for key, value in values.items():
        *path, last = key.split(".")
        group: Any = content
        for name in path:
            group = group.get(name) if isinstance(group, dict) else None
        if not isinstance(group, dict) or last not in group:
            near = difflib.get_close_matches(last, group or (), n=3)
            raise ParamsError(f"{source}: {key!r} is not in the params" + (f"; near it: {', '.join(near)}" if near else ""))
        group[last] = value
    return _validated(content, source)


def param(params: Params, key: str) -> Any:
    """The value of a key such as `bcosify.pretrained.lr`."""
    return reduce(getattr, key.split("."), params)


def leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested `content` by keys such as `bcosify.pretrained.lr`."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def _validated(content: Any, source: str) -> Params:
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        lines = {_key(item): _explain(source, item) for item in reversed(error.errors())}  # one a key
        raise ParamsError("\n".join(reversed(lines.values()))) from None


def _key(item: Any) -> str:
    """The key of one pydantic error, without pydantic's own names of the branches of a union."""
    sources = {"scenes", "imagefolder", "cifar10", "imagenet", "voc2007", "coco2014", "waterbirds"}
    parts = [str(part) for part in item["loc"] if not re.search(r"\W", str(part)) and part != "int"]
    if parts[:1] == ["datasets"] and len(parts) > 2 and parts[2] in sources:
        parts.pop(2)
    return ".".join(parts) or "the file"


def _explain(source: str, item: Any) -> str:
    """One line for one pydantic error: the key, the value, what is allowed."""
    key = _key(item)
    if item["type"] == "extra_forbidden":
        return f"{source}: {key}: unknown key (value {item['input']!r})"
    if item["type"] == "missing":
        return f"{source}: {key}: missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{source}: {key}: {message}" + ("" if isinstance(item["input"], dict) else f" (got {item['input']!r})")
