"""`coco2014`: COCO 2014 (Lin et al. 2014), multi-label; train and val of `train2014`, test of `val2014`."""

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

# COCO publishes no sums; these are torchvision's (its prototype data sets), which others found as well.
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
    """The 80 categories by ascending id; an image's labels are the classes of its annotations.

    A crowd region (`iscrowd`) covers a group of objects that are not annotated one by one. COCO's evaluation neither expects it
    to be found nor counts detections in it as errors. It gives no box and no instance of the mask, but its class stays a label
    of the image. `crowd: ignore` removes the label too, and `crowd: box` takes the region for an object, as the code published
    with model guidance does.

    Boxes with a side below one pixel are known in COCO; they are left out and counted. An image has a mask if every one of its
    boxes has a segmentation, because a mask without an object would call it background.

    The test split is `val2014`, the one that papers report. `val_count` images are held out of `train2014`, drawn by
    `split_seed` uniformly: with several of 80 classes in an image, there are no strata to draw from.
    """

    params: Coco2014Params

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Reads both files of instances at `root`, or in the official archives.

        Raises:
            DataError: a file is missing or not whole, an annotation has no image, or a box makes no sense.
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
        del train  # gigabytes
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
        """The PNG of instance ids; None if a box of the image has no segmentation."""
        return (
            None
            if annotation.mask is None
            else coco_masks.draw(annotation.mask, annotation.height, annotation.width)
        )


SOURCE = Coco2014


@dataclass(frozen=True)
class _Files:
    """The images and annotations of the data set, in archives of their own if they were downloaded."""

    raw: Path
    images: Contents
    notes_at: Path  # what the places in `notes` are relative to
    notes: Contents
    top: str
    source: str
    checksum: str

    @classmethod
    def of(cls, root: str | None, raw: Path, cache: Path, progress: bool, source: str) -> _Files:
        """The files at `root`, or those of the official archives."""
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
        """A new count of what is left out, with the unusable entries of all files in it."""
        return replace(self.images, unusable=tuple({*self.images.unusable, *self.notes.unusable})).left_out()

    def instances(self, year: str, left_out: LeftOut) -> Instances:
        """The annotations of `train2014` or `val2014`; counts in `left_out` the images that they do not list."""
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
