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
    """Images held out of train as val, if the source has no val."""
    split_seed: int = 0
    """Seed of the draw of these images."""


class ScenesParams(DatasetParams):
    """Drawn shapes on textured backgrounds, by a seeded generator."""

    source: Literal["scenes"]
    variant: Literal["objects", "scenes"] = "objects"
    """One object per image, or several. Multi-class or multi-label."""
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    """Side of the images, pixels."""
    counts: dict[Split, PositiveInt]
    """Images per split."""
    objects_per_image: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Least and most objects in an image."""
    correlation: dict[Split, Fraction] = {}
    """Correlation of class and background per split; 0 if not named."""
    seed: int = 0
    """Seed of the generator."""
    captions: bool = False
    """One to three sentences per image. They name its objects, colours and background."""
    caption_detail: Fraction = 0.5
    """Probability that a sentence names the colours, and that it names the background."""

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
    """Our split -> its folder. By default the folder of the same name."""
    labelled: bool = True
    """False: images anywhere below the folder of a split, without classes. For students of a teacher."""


class Cifar10Params(DatasetParams):
    """CIFAR-10."""

    source: Literal["cifar10"]
    root: str | None = None
    """An image folder or archive, as for imagefolder; null: torchvision downloads it."""
    sha256: Sha256 | None = None
    """Checksum of the archive."""


class ImageNetParams(DatasetParams):
    """ImageNet in its official layout (`train/<wnid>/*.JPEG` and `val`). Its val is our test split."""

    source: Literal["imagenet"]
    root: str
    """Folder or archive, local or at any fsspec URL."""


class AnnotatedParams(DatasetParams):
    """Params of data sets with boxes from annotation files."""

    on_bad_box: Literal["raise", "skip"] = "raise"
    """A box that is inverted, empty or outside its image: stop, or drop and count it."""


class Voc2007Params(AnnotatedParams):
    """PASCAL VOC 2007, or another year in its layout."""

    source: Literal["voc2007"]
    root: str | None = None
    """Folder or archive with VOCdevkit, at any fsspec URL; null: downloads the official archives (0.9 GB)."""
    splits: dict[Split, str] = {}
    """Our split -> its list in ImageSets/Main of the root. By default the list of the same name."""
    difficult: bool = True
    """Objects marked difficult count. False: they give neither box nor label."""
    masks: Literal["instances", "classes"] = "instances"
    """Source of masks; classes: class masks for images without instance masks."""

    @model_validator(mode="after")
    def _splits_of_a_root(self) -> Voc2007Params:
        if self.splits and self.root is None:
            raise ValueError(
                "splits: the official archives have their own; give the root whose lists these are"
            )
        return self


class Coco2014Params(AnnotatedParams):
    """COCO 2014, multi-label, with boxes and masks. `val2014` is our test split."""

    source: Literal["coco2014"]
    root: str | None = None
    """Folder or archive, local or at any fsspec URL; null: downloads the official archives (20 GB)."""
    crowd: Literal["label", "ignore", "box"] = "label"
    """A crowd region gives its image a label, nothing, or label and box."""


class WaterbirdsParams(AnnotatedParams):
    """Waterbirds, with the boxes of CUB-200-2011."""

    source: Literal["waterbirds"]
    variant: Literal[95, 100] = 95
    """Training birds on their usual background, percent."""
    root: str | None = None
    """Folder or archive with metadata.csv and images, at any fsspec URL; null: downloads them (1.6 GB)."""
    sha256: Sha256 | None = None
    """Checksum of the archive, the official one, too. Its publisher gives none."""
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
    """File of all rows, in root; null: found by its name."""
    tables: dict[Split, str] = {}
    """Or a file per split."""
    images: str | None = None
    """Folder of the images; null: the root, or one like Images/."""
    image_column: str = "image"
    """Column of image names."""
    caption_column: str = "caption"
    """Column of captions."""
    split_column: str = "split"
    """Column of splits, optional."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """A row without image or text: stop, or drop and count it."""

    @model_validator(mode="after")
    def _one_kind_of_table(self) -> CaptionsParams:
        if self.table is not None and self.tables:
            raise ValueError("table: is the file of all splits; give it or tables, not both")
        return self


class Cc3mParams(DatasetParams):
    """Image-text tars of img2dataset, such as Conceptual Captions 3M. They are read where they are."""

    source: Literal["cc3m"]
    root: str
    """Folder of tars, local or at any fsspec URL."""
    splits: dict[Split, str] = {}
    """Our split -> pattern of its tars, such as `val/*.tar`. The others are train."""


class MixtureParams(DatasetParams):
    """The images of several data sets as one, without labels. Each part has all params of its source."""

    source: Literal["mixture"]
    of: tuple[SingleDataset, ...]
    """The data sets, of any source but mixture."""

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
    """Side of the square that the network sees, pixels."""
    eval_resize: PositiveInt | None = None
    """Shorter side before the centre crop, pixels; null: resized to the square."""
    augment: Literal["none", "flip", "pad_crop_flip", "random_resized_crop_flip"] = "flip"
    """Augmentation of training images."""
    crop_padding: Count = 4
    """Padding of pad_crop_flip, pixels."""
    rand_augment: Annotated[int, Field(ge=0, le=30)] | None = None
    """Magnitude of RandAugment, after crop and flip; null: none."""
    loader_workers: Count = 0
    """Loader processes per worker."""
    shuffle_buffer: PositiveInt = 10_000
    """Samples in the shuffle buffer."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image that does not decode: stop, or skip and count it."""
    verify: bool = False
    """Checks the sha256 of each shard before reading it."""
