"""`imagefolder`: `<split>/<class>/<file>` or unlabelled images, in a folder or archive, also at a URL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.data.formats.roots import open_root
from pipelines.data.raw.image_folders import StoredImages, write_labelled, write_unlabelled
from pipelines.params import ImageFolderParams


@dataclass(frozen=True)
class ImageFolder(StoredImages):
    """Any data set of images in class folders, or of images without labels (`labelled: false`)."""

    params: ImageFolderParams

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Lists the files at `root`. Archives are unpacked to `raw`; folders and local tars stay in place."""
        params = self.params
        contents, checksum = open_root(params.root, params.sha256, raw, cache, progress)
        named = params.splits.values()  # folders named for one split are not the default of another
        folders = {"train": params.splits.get("train", "train")}
        folders |= {
            split: params.splits.get(split, split)
            for split in ("val", "test")
            if split in params.splits or split not in named
        }
        write = write_labelled if params.labelled else write_unlabelled
        write(contents, folders, raw, params, source=f"imagefolder: {params.root}", checksum=checksum)


SOURCE = ImageFolder
