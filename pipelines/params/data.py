"""Params of data sets, and of how their shards are read."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt, model_validator

from pipelines.params.base import Fraction, Sha256, Strict

Split = Literal["train", "val", "test"]


class DatasetParams(Strict):
    """What every data set has, whatever its source."""

    shard_size: PositiveInt = 500  # samples a shard
    val_count: PositiveInt | None = (
        None  # images held out of `train` where the source has no `val` of its own
    )
    split_seed: int = 0  # draws which ones


class ScenesParams(DatasetParams):
    """Drawn by a seeded generator: `objects` (one object, multiclass) or `scenes` (several, multilabel)."""

    source: Literal["scenes"]
    variant: Literal["objects", "scenes"] = "objects"
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    counts: dict[Split, PositiveInt]
    objects_per_image: tuple[PositiveInt, PositiveInt] = (1, 1)  # least, most
    correlation: dict[Split, Fraction] = {}  # of class and background; 0 where not named
    seed: int = 0
    captions: bool = False  # one to three sentences an image that name its objects, colours and background; boxes and masks stay

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
    splits: dict[
        Split, str
    ] = {}  # our split -> its folder; by default the same name, where no other split names it
    labelled: bool = (
        True  # false: images anywhere below the folder of a split, without classes; for students of a teacher
    )


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

    on_bad_box: Literal["raise", "skip"] = (
        "raise"  # a box inverted, empty or outside its image: stop, or drop and count
    )


class Voc2007Params(AnnotatedParams):
    """PASCAL VOC 2007: the official archives, or what lies at `root` in their layout; VOC 2012 has the same layout."""

    source: Literal["voc2007"]
    root: str | None = None  # a folder or archive, local or at any fsspec URL
    splits: dict[
        Split, str
    ] = {}  # our split -> its list in ImageSets/Main, of the files at root; by default the same name
    difficult: bool = True  # whether objects marked difficult count as objects
    masks: Literal["instances", "classes"] = (
        "instances"  # classes: class masks where an image has no instances
    )

    @model_validator(mode="after")
    def _splits_of_a_root(self) -> Voc2007Params:
        if self.splits and self.root is None:
            raise ValueError(
                "splits: the official archives have their own; give the root whose lists these are"
            )
        return self


class Coco2014Params(AnnotatedParams):
    """COCO 2014: the official archives, or what lies at `root` in their layout; `val2014` is read as test."""

    source: Literal["coco2014"]
    root: str | None = None  # a folder or archive, local or at any fsspec URL
    crowd: Literal["label", "ignore", "box"] = (
        "label"  # a crowd region gives its image a label, nothing, or label and box
    )


class WaterbirdsParams(AnnotatedParams):
    """Waterbirds with the boxes of CUB-200-2011: the official archives, or what lies at `root` and `cub_root`."""

    source: Literal["waterbirds"]
    variant: Literal[95, 100] = 95  # share of training birds on their usual background, percent
    root: str | None = None  # of metadata.csv and the images; a folder or archive, local or at any fsspec URL
    sha256: Sha256 | None = None  # of the archive, the official one too: its publisher gives none
    cub_root: str | None = None  # of CUB's images.txt and bounding_boxes.txt, likewise


class CaptionsParams(DatasetParams):
    """Images with captions: a folder or archive with a CSV or TSV, or one in Flickr8k's own layout."""

    source: Literal["captions"]
    root: str  # a folder or archive, local or at any fsspec URL
    sha256: Sha256 | None = None  # of the archive
    table: str | None = None  # the file of all rows, in root; null: found by its name
    tables: dict[Split, str] = {}  # or a file a split
    images: str | None = None  # folder that the names of images begin in; null: the root or one like Images/
    image_column: str = "image"
    caption_column: str = "caption"
    split_column: str = "split"  # which the table need not have
    on_bad_row: Literal["raise", "skip"] = "raise"  # a row without image or text: stop, or drop and count

    @model_validator(mode="after")
    def _one_kind_of_table(self) -> CaptionsParams:
        if self.table is not None and self.tables:
            raise ValueError("table: is the file of all splits; give it or tables, not both")
        return self


class Cc3mParams(DatasetParams):
    """Image-text tars as img2dataset writes them (CC3M and its like), read where they are."""

    source: Literal["cc3m"]
    root: str  # a folder of tars, local or at any fsspec URL
    splits: dict[
        Split, str
    ] = {}  # our split -> pattern of its tars' names, such as `val/*.tar`; by default all are train


class MixtureParams(DatasetParams):
    """The images of several data sets as one data set without labels."""

    source: Literal["mixture"]
    of: tuple[SingleDataset, ...]

    @model_validator(mode="after")
    def _made_of_whole_data_sets(self) -> MixtureParams:
        if not self.of:
            raise ValueError("of: name at least one data set")
        if self.val_count is not None:
            raise ValueError("val_count: each data set of `of` holds out its own images: give it there")
        return self


Single = (
    ScenesParams
    | ImageFolderParams
    | Cifar10Params
    | ImageNetParams
    | Voc2007Params
    | Coco2014Params
    | WaterbirdsParams
    | CaptionsParams
    | Cc3mParams
)
SingleDataset = Annotated[Single, Field(discriminator="source")]
Dataset = Annotated[Single | MixtureParams, Field(discriminator="source")]
MixtureParams.model_rebuild()
SOURCES = frozenset(
    get_args(kind.model_fields["source"].annotation)[0] for kind in (*get_args(Single), MixtureParams)
)


class DataParams(Strict):
    """How shards are read."""

    image_size: PositiveInt  # side of the square that the model sees, pixels
    eval_resize: PositiveInt | None = (
        None  # shorter side before the centre crop; none: straight to image_size
    )
    augment: Literal["none", "flip", "pad_crop_flip", "random_resized_crop_flip"] = "flip"
    crop_padding: Annotated[int, Field(ge=0)] = 4  # pixels, for pad_crop_flip
    rand_augment: Annotated[int, Field(ge=0, le=30)] | None = (
        None  # magnitude of RandAugment, after crop and flip
    )
    loader_workers: Annotated[int, Field(ge=0)] = 0  # decoding processes a training worker
    shuffle_buffer: PositiveInt = 10_000  # samples
    on_error: Literal["raise", "skip"] = "raise"  # an image that does not decode: stop, or skip and count
    verify: bool = False  # check each shard's sha256 before reading it
