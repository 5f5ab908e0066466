"""`cifar10`: the official archive, read by torchvision and stored as PNG, or a folder of images."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.data.formats.download import download
from pipelines.data.formats.png import encode_png
from pipelines.data.formats.roots import open_root
from pipelines.data.formats.tars import list_tar
from pipelines.data.raw.image_folders import StoredImages, write_labelled
from pipelines.data.shards.sample import DataError
from pipelines.params import Cifar10Params
from pipelines.progress import bar
from pipelines.storage.files import file_digest, staged

_FOLDERS = {"train": "train", "val": "val", "test": "test"}
_IMAGES = "images.tar"


@dataclass(frozen=True)
class Cifar10(StoredImages):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in ten classes."""

    params: Cifar10Params

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Lists the image folder or archive at `root`; downloads the data set if `root` is `None`."""
        params = self.params
        if params.root is not None:
            contents, checksum = open_root(params.root, params.sha256, raw, cache, progress)
            write_labelled(
                contents, _FOLDERS, raw, params, source=f"cifar10: {params.root}", checksum=checksum
            )
            return
        from torchvision.datasets import CIFAR10

        raw.mkdir(parents=True, exist_ok=True)
        packed = cache / CIFAR10.filename
        digest = f"sha256:{params.sha256}" if params.sha256 else f"md5:{CIFAR10.tgz_md5}"
        download(CIFAR10.url, packed, digest=digest, progress=progress)
        _write_images(cache, raw / _IMAGES, progress)
        contents = list_tar(raw / _IMAGES, _IMAGES, CIFAR10.url, raw)
        checksum = file_digest(packed)
        write_labelled(contents, _FOLDERS, raw, params, source=f"cifar10: {CIFAR10.url}", checksum=checksum)


SOURCE = Cifar10


def _write_images(cache: Path, destination: Path, progress: bool) -> None:
    """Writes the downloaded images in `cache` as a tar of `<split>/<class>/<number>.png`.

    torchvision unpacks the archive and checks its files.
    """
    from torchvision.datasets import CIFAR10

    with staged(destination) as path, tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as tar:
        for split in ("train", "test"):
            try:
                batch = CIFAR10(str(cache), train=split == "train", download=True)
            except RuntimeError as error:
                raise DataError(f"{cache}: {error}; delete it and fetch again") from None
            seen: Counter[str] = Counter()
            with bar(split, len(batch.data), show=progress) as shown:
                for pixels, label in zip(np.asarray(batch.data), batch.targets, strict=True):
                    name = batch.classes[label]
                    content = encode_png(pixels)
                    member = tarfile.TarInfo(f"{split}/{name}/{seen[name]:04d}.png")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    seen[name] += 1
                    shown.update(1)
