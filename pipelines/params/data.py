"""Params of data sets, and of how their shards are read."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt, model_validator

from pipelines.params.base import Count, Fraction, Sha256, Strict

Split = Literal["train", "val", "test"]


class DatasetParams(Strict):
    """Params that every data set has."""

    shard_size: PositiveInt = 500
    """Samples per shard."""
    val_count: PositiveInt | None = None
    """Training images held out for validation, if the source has no val split."""
    split_seed: int = 0
    """Seed for the random choice of these images."""


class ScenesParams(DatasetParams):
    """Images of shapes on textured backgrounds, drawn by a seeded generator."""

    source: Literal["scenes"]
    variant: Literal["objects", "scenes"] = "objects"
    """One object per image, or several. The task is multi-class or multi-label."""
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    """Height and width of the images, pixels."""
    counts: dict[Split, PositiveInt]
    """Number of images per split."""
    objects_per_image: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Smallest and largest number of objects in an image."""
    correlation: dict[Split, Fraction] = {}
    """Probability per split that the background is the one of the class; 0 for a split that is not named."""
    seed: int = 0
    """Seed of the generator that draws the images."""
    captions: bool = False
    """Adds one to three sentences per image. They name its objects, colours and background."""
    caption_detail: Fraction = 0.5
    """Probability that a sentence names the colours, and the same, drawn separately, for the background."""

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
    """Your own images: a folder, tar, tar.gz or zip laid out as split/class/file."""

    source: Literal["imagefolder"]
    root: str
    """Folder or archive, local or at any fsspec URL."""
    sha256: Sha256 | None = None
    """Checksum of the archive."""
    splits: dict[Split, str] = {}
    """Split -> its folder. By default the folder has the name of the split."""
    labelled: bool = True
    """Images lie in a folder per class. If false, they lie anywhere below the folder of their split and have
    no labels, which students of a teacher do not need."""


class Cifar10Params(DatasetParams):
    """CIFAR-10."""

    source: Literal["cifar10"]
    root: str | None = None
    """Folder or archive of images, as for imagefolder; null: torchvision downloads the data set."""
    sha256: Sha256 | None = None
    """Checksum of the archive."""


class ImageNetParams(DatasetParams):
    """ImageNet in its official layout (`train/<wnid>/*.JPEG` and `val`). Its `val` becomes the test split."""

    source: Literal["imagenet"]
    root: str
    """Folder or archive, local or at any fsspec URL."""


class AnnotatedParams(DatasetParams):
    """Params of data sets with boxes from annotation files."""

    on_bad_box: Literal["raise", "skip"] = "raise"
    """Stops at a box that is inverted, empty or outside its image, or drops and counts it."""


class Voc2007Params(AnnotatedParams):
    """PASCAL VOC 2007, or another year in its layout."""

    source: Literal["voc2007"]
    root: str | None = None
    """Folder or archive with VOCdevkit, at any fsspec URL; null: downloads the official archives (0.9 GB)."""
    splits: dict[Split, str] = {}
    """Split -> its list in ImageSets/Main. By default the list has the name of the split."""
    difficult: bool = True
    """Keeps objects that are marked as difficult. If false, they give neither box nor label."""
    masks: Literal["instances", "classes"] = "instances"
    """Masks come from instance segmentations, or also from class segmentations. With `classes`, the latter
    serve images without an instance segmentation."""

    @model_validator(mode="after")
    def _splits_of_a_root(self) -> Voc2007Params:
        if self.splits and self.root is None:
            raise ValueError(
                "splits: the official archives have their own; give the root whose lists these are"
            )
        return self


class Coco2014Params(AnnotatedParams):
    """COCO 2014, multi-label, with boxes and masks. `val2014` becomes the test split."""

    source: Literal["coco2014"]
    root: str | None = None
    """Folder or archive, local or at any fsspec URL; null: downloads the official archives (20 GB)."""
    crowd: Literal["label", "ignore", "box"] = "label"
    """A crowd region (`iscrowd`) gives its image a label, nothing, or a label and a box."""


class WaterbirdsParams(AnnotatedParams):
    """Waterbirds, with the boxes of CUB-200-2011."""

    source: Literal["waterbirds"]
    variant: Literal[95, 100] = 95
    """Percentage of training birds that are on the usual background of their class."""
    root: str | None = None
    """Folder or archive with metadata.csv and images, at any fsspec URL; null: downloads them (1.6 GB)."""
    sha256: Sha256 | None = None
    """Checksum of the archive, at `root` or downloaded. The publisher gives none for the official archive."""
    cub_root: str | None = None
    """Folder or archive with CUB's images.txt and bounding_boxes.txt; null: downloads them."""


class CaptionsParams(DatasetParams):
    """Images with captions: a folder or archive with a CSV or TSV, or Flickr8k in its own layout."""

    source: Literal["captions"]
    root: str
    """Folder or archive, local or at any fsspec URL."""
    sha256: Sha256 | None = None
    """Checksum of the archive."""
    table: str | None = None
    """File with the rows of all splits, below root; null: found by its name."""
    tables: dict[Split, str] = {}
    """Split -> file with its rows, in place of `table`."""
    images: str | None = None
    """Folder of the images, below root; null: root itself, or a folder such as Images in it."""
    image_column: str = "image"
    """Column with the names of the images."""
    caption_column: str = "caption"
    """Column with the captions."""
    split_column: str = "split"
    """Column with the splits. Rows without a split are training data."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Stops at a row without image or caption, or drops and counts it."""

    @model_validator(mode="after")
    def _one_kind_of_table(self) -> CaptionsParams:
        if self.table is not None and self.tables:
            raise ValueError("table: is the file of all splits; give it or tables, not both")
        return self


class Cc3mParams(DatasetParams):
    """Image-text tars of img2dataset, such as Conceptual Captions 3M. Training reads them directly; `shard`
    does not copy them."""

    source: Literal["cc3m"]
    root: str
    """Folder of tars, local or at any fsspec URL."""
    splits: dict[Split, str] = {}
    """Split -> pattern of its tars, such as `val/*.tar`. Tars that match no pattern are training data."""


class MixtureParams(DatasetParams):
    """The images of several data sets as one data set, without labels."""

    source: Literal["mixture"]
    of: tuple[SingleDataset, ...]
    """The data sets, each with all params of its source. Any source but mixture will do."""

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
SOURCES: dict[str, type[DatasetParams]] = {
    get_args(kind.model_fields["source"].annotation)[0]: kind for kind in (*get_args(Single), MixtureParams)
}


class DataParams(Strict):
    """How images are read from shards."""

    image_size: PositiveInt
    """Height and width of the network's input, pixels."""
    eval_resize: PositiveInt | None = None
    """Shorter side after resizing, before a centre crop, pixels; null: no crop. Without a crop, images are
    resized to the square."""
    augment: Literal["none", "flip", "pad_crop_flip", "random_resized_crop_flip"] = "flip"
    """Augmentation of training images."""
    crop_padding: Count = 4
    """Padding on each side in pad_crop_flip, pixels."""
    crop_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest area of a crop in random_resized_crop_flip, as a share of the image's; the largest is 1."""
    rand_augment: Annotated[int, Field(ge=0, le=30)] | None = None
    """Magnitude of RandAugment, which follows crop and flip; null: none."""
    loader_workers: Count = 0
    """Data-loading processes per worker; 0: the worker loads its data itself."""
    shuffle_buffer: PositiveInt = 10_000
    """Number of samples in the shuffle buffer."""
    on_error: Literal["raise", "skip"] = "raise"
    """Stops at an image that does not decode, or skips it. Skipped images are counted."""
    verify: bool = False
    """Checks the sha256 of each shard before reading it."""
