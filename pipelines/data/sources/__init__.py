"""Where data sets come from: one file a data set, behind one small protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from pipelines.data.shards.sample import Description, Sample
from pipelines.data.sources.cifar10 import Cifar10
from pipelines.data.sources.coco2014 import Coco2014
from pipelines.data.sources.imagefolder import ImageFolder
from pipelines.data.sources.imagenet import ImageNet
from pipelines.data.sources.scenes import Scenes
from pipelines.data.sources.voc2007 import Voc2007
from pipelines.data.sources.waterbirds import Waterbirds
from pipelines.params import (
    Cifar10Params,
    Coco2014Params,
    Dataset,
    ImageFolderParams,
    ImageNetParams,
    ScenesParams,
    Voc2007Params,
    WaterbirdsParams,
)


class Source(Protocol):
    """A data set that can be brought here and read sample by sample. Sources pickle, and so do their references."""

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Download or generate, verify, and leave the data, or where it lies, in the folder `raw`.

        What is incomplete lives in the folder `cache`, from which a later call goes on; `raw/manifest.json` is
        written last.

        Raises:
            DataError: the data is not what the params say, or cannot be had.
        """

    def describe(self, raw: Path) -> Description:
        """The data set that `fetch` left in `raw`."""

    def index(self, raw: Path, split: str) -> list[Any]:
        """A small picklable reference for each sample of `split` (train, val, test), in a fixed order."""

    def load(self, raw: Path, reference: Any) -> Sample:
        """The sample of one reference. May be called in any order and from any number of processes."""


def get(params: Dataset) -> Source:
    """The source that `params` describes."""
    match params:
        case ScenesParams():
            return Scenes(params)
        case ImageFolderParams():
            return ImageFolder(params)
        case Cifar10Params():
            return Cifar10(params)
        case ImageNetParams():
            return ImageNet(params)
        case Voc2007Params():
            return Voc2007(params)
        case Coco2014Params():
            return Coco2014(params)
        case WaterbirdsParams():
            return Waterbirds(params)
