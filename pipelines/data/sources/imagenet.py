"""`imagenet`: `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`; the official `val` is our test split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.data.formats.roots import open_root
from pipelines.data.raw.image_folders import StoredImages, write_labelled
from pipelines.data.shards.sample import DataError
from pipelines.params import ImageNetParams


@dataclass(frozen=True)
class ImageNet(StoredImages):
    """ImageNet, or a subset. A root with only `val` suffices for evaluation, without `val_count`."""

    params: ImageNetParams

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Lists the images below `root`. The classes are the sorted WordNet ids."""
        params = self.params
        contents, checksum = open_root(params.root, None, raw, cache, progress)
        has_train = any(name.startswith("train/") for name in contents.files)
        if params.val_count is not None and not has_train:
            raise DataError(
                f"imagenet: {params.root} has no train/<wnid>/ to hold {params.val_count} validation images "
                "out of: add it, or leave val_count out to evaluate alone"
            )
        source = f"imagenet: {params.root}"
        folders = {"train": "train", "test": "val"}
        write_labelled(
            contents, folders, raw, params, source=source, checksum=checksum, train_optional=not has_train
        )


SOURCE = ImageNet
