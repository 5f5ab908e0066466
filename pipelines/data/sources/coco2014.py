"""`coco2014`: COCO 2014 (Lin et al. 2014), multi-label; train and val are `train2014`, test `val2014`."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.data.formats import archive, coco_masks
from pipelines.data.formats.archive import Contents, Ref
from pipelines.data.formats.boxes import Annotation, BoxCheck
from pipelines.data.formats.coco_json import Instances
from pipelines.data.formats.left_out import LeftOut
from pipelines.data.formats.roots import Official, download_archives, open_root
from pipelines.data.raw import annotated
from pipelines.data.raw.annotated import AnnotatedImages
from pipelines.data.raw.holdout import held_out
from pipelines.data.raw.keys import keys_of
from pipelines.data.shards.sample import DataError, Description
from pipelines.params import Coco2014Params
from pipelines.progress import bar
from pipelines.storage.files import combined_sha256

# COCO publishes no checksums. These are from torchvision's prototype data sets, and confirmed by others.
IMAGES = {
    "train2014": Official(
        "http://images.cocodataset.org/zips/train2014.zip",
        "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    ),
    "val2014": Official(
        "http://images.cocodataset.org/zips/val2014.zip",
        "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
    ),
}
ANNOTATIONS = {
    "annotations": Official(
        "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
    )
}


@dataclass(frozen=True)
class Coco2014(AnnotatedImages):
    """COCO's 80 categories by ascending id. An image's labels are the classes of its annotations.

    A crowd region (`iscrowd`) covers a group of objects that are not annotated one by one. COCO's evaluation
    neither expects detectors to find it nor counts detections in it as errors. By default (`crowd: label`) it
    gives no box and no mask instance, but its class is a label of the image. With `crowd: ignore` it gives no
    label either. With `crowd: box` it counts as an object, as in the code published with model guidance.

    COCO has boxes with a side below one pixel, which are left out and counted. An image has a mask only if
    each of its boxes has a segmentation; otherwise the mask would declare an object background.

    The test split is `val2014`, on which papers report. The validation split is `val_count` images of
    `train2014`, drawn uniformly by `split_seed`. It is not stratified, because an image has several classes.
    """

    params: Coco2014Params

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Reads both files `instances_*2014.json` at `root`, or in the official archives.

        Raises:
            DataError: a file is missing or incomplete, an annotation has no image, or a box is invalid.
        """
        params = self.params
        source = f"coco2014: {params.root or IMAGES['train2014'].url}"
        if params.val_count is None:
            raise DataError(
                f"{source}: has no validation images: set val_count, how many to hold out of train2014"
            )
        files = _Files.of(params.root, raw, cache, progress, source)
        check = BoxCheck(params.on_bad_box, files.left_out(), expected=("empty",))

        def read(part: Instances, year: str, places: Sequence[int]) -> Iterator[tuple[Ref, Annotation]]:
            keys = keys_of(
                {entry["file_name"]: posixpath.splitext(entry["file_name"])[0] for entry in part.images}
            )
            with bar(f"annotations of {year}", len(places), show=progress) as shown:
                for place in places:
                    entry = part.images[place]
                    name = entry["file_name"]
                    yield files.image(year, name, keys[name]), part.annotation(entry, check, params.crowd)
                    shown.update(1)

        train = files.instances("train2014", check.left_out)
        classes, count = train.classes, len(train.images)
        chosen = held_out([0] * count, params.val_count, params.split_seed)
        rest = [place for place in range(count) if place not in chosen]
        sizes = {"train": annotated.write_split(raw, "train", read(train, "train2014", rest))}
        sizes["val"] = annotated.write_split(raw, "val", read(train, "train2014", sorted(chosen)))
        del train  # frees gigabytes
        test = files.instances("val2014", check.left_out)
        if test.classes != classes:
            raise DataError(
                f"{source}: instances_val2014.json has other categories than instances_train2014.json"
            )
        sizes["test"] = annotated.write_split(raw, "test", read(test, "val2014", range(len(test.images))))
        annotated.write_description(
            raw, Description(classes, "multilabel", source, files.checksum, sizes), check
        )

    def draw_mask(self, raw: Path, annotation: Annotation) -> bytes | None:
        """The PNG of instance ids; `None` if the image has no box, or a box without a segmentation."""
        return (
            None
            if annotation.mask is None
            else coco_masks.draw(annotation.mask, annotation.height, annotation.width)
        )


SOURCE = Coco2014


@dataclass(frozen=True)
class _Files:
    """The images and annotations (`notes`) of the data set; in separate archives if they were downloaded."""

    raw: Path
    images: Contents
    notes_at: Path  # folder that the places in `notes` are relative to
    notes: Contents
    top: str  # folder of the data set in its archive
    source: str
    checksum: str

    @classmethod
    def of(cls, root: str | None, raw: Path, cache: Path, progress: bool, source: str) -> _Files:
        """The files at `root`, or in the official archives if `root` is `None`."""
        if root is None:
            notes, of_notes = download_archives(ANNOTATIONS, cache, cache, progress)
            contents, of_images = download_archives(IMAGES, raw, cache, progress)
            return cls(
                raw,
                contents,
                cache,
                notes,
                "",
                source,
                combined_sha256({"images": of_images, "notes": of_notes}),
            )
        contents, checksum = open_root(root, None, raw, cache, progress)
        top = archive.folder_with(contents, "annotations/instances_train2014.json", source)
        return cls(raw, contents, raw, contents, top, source, checksum)

    def left_out(self) -> LeftOut:
        """A new `LeftOut` that counts the unusable entries of all files."""
        return replace(self.images, unusable=tuple({*self.images.unusable, *self.notes.unusable})).left_out()

    def instances(self, year: str, left_out: LeftOut) -> Instances:
        """The annotations of `train2014` or `val2014`; counts in `left_out` the images without an entry."""
        path = f"{self.top}annotations/instances_{year}.json"
        found = Instances(archive.read_file(self.notes_at, self.notes, path, self.source), path)
        listed = {f"{self.top}{year}/{entry['file_name']}" for entry in found.images}
        for name in sorted(self.images.files.keys() - listed):
            if name.startswith(f"{self.top}{year}/"):
                left_out.add(f"images without an entry in {path}", name)
        return found

    def image(self, year: str, name: str, key: str) -> Ref:
        """A reference to one image."""
        return archive.reference_to(self.images, f"{self.top}{year}/{name}", key, self.source)
