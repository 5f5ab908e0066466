"""`voc2007`: PASCAL VOC 2007 (Everingham et al. 2010) or VOC 2012 in the same layout; multi-label."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.formats import archive, voc_masks
from pipelines.data.formats.archive import Contents, Ref, as_text
from pipelines.data.formats.boxes import Annotation, BoxCheck
from pipelines.data.formats.roots import Official, download_archives, open_root
from pipelines.data.formats.voc_xml import CLASSES, VocAnnotation, parse
from pipelines.data.raw import annotated
from pipelines.data.raw.annotated import AnnotatedImages
from pipelines.data.raw.keys import keys_of
from pipelines.data.shards.sample import Box, DataError, Description
from pipelines.params import Voc2007Params
from pipelines.progress import bar

# The publisher's address since 2025; the old one, host.robots.ox.ac.uk, redirects to it. MD5 sums are
# torchvision's.
ARCHIVES = {
    "trainval": Official(
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar",
        "md5:c52e279531787c972589f7e41ab4ae64",
    ),
    "test": Official(
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar",
        "md5:b6e924de25625d8de591ea690078ad9f",
    ),
}
# Value of the param `masks` -> folders of segmentations and the function that reads each. The first folder
# that has the image is used.
INSTANCES = {"SegmentationObject": voc_masks.plan}
MASKS = {
    "instances": INSTANCES,
    "classes": INSTANCES
    | {"SegmentationClassAug": voc_masks.plan_classes, "SegmentationClass": voc_masks.plan_classes},
}


@dataclass(frozen=True)
class Voc2007(AnnotatedImages):
    """VOC's 20 classes in alphabetical order. An image's labels are the classes of its objects.

    Objects marked as difficult are kept, as in the published work on model guidance. If `difficult` is false,
    they give neither box nor label.

    The mask of an image is its instance segmentation; void borders become background. If `masks` is
    `classes`, an image without an instance segmentation gets its mask from its class segmentation
    (`SegmentationClassAug`, else `SegmentationClass`): a pixel of class c belongs to the smallest box of
    class c that contains it. Void pixels, pixels in no box of their class, and pixels of objects left out
    become background.

    VOC 2012 is read from its root with `splits`, because the labels of its test images are not public.
    """

    params: Voc2007Params

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Reads every annotation of the three splits at `root`, or in the official archives.

        Raises:
            DataError: a split, an annotation or an image is missing, two splits list the same image, an
                annotation is incomplete, or a box is invalid.
        """
        root = self.params.root
        if root is None:
            contents, checksum = download_archives(ARCHIVES, raw, cache, progress)
        else:
            contents, checksum = open_root(root, None, raw, cache, progress)
        source = f"voc2007: {root or ARCHIVES['trainval'].url}"
        names = self.params.splits
        lists = {split: f"ImageSets/Main/{names.get(split, split)}.txt" for split in ("train", "val", "test")}
        reader = _Reader(
            raw, contents, archive.folder_with(contents, lists["train"], source), source, self.params
        )
        sizes = {
            split: annotated.write_split(raw, split, reader.read(path, progress))
            for split, path in lists.items()
        }
        reader.count_unlisted()
        annotated.write_description(
            raw, Description(CLASSES, "multilabel", source, checksum, sizes), reader.check
        )

    def draw_mask(self, raw: Path, annotation: Annotation) -> bytes | None:
        """The PNG of instance ids; `None` if the image has no box, or no segmentation that fits."""
        return None if annotation.mask is None else voc_masks.draw(raw, annotation)


SOURCE = Voc2007


class _Reader:
    """Reads the annotations below the folder `top` of `contents`."""

    def __init__(self, raw: Path, contents: Contents, top: str, source: str, params: Voc2007Params) -> None:
        self._raw, self._contents, self._top, self._source = raw, contents, top, source
        self._params = params
        self.left_out = contents.left_out()
        self.check = BoxCheck(params.on_bad_box, self.left_out)
        self._listed: set[str] = set()

    def read(self, split_list: str, progress: bool) -> Iterator[tuple[Ref, Annotation]]:
        """Yields the images that the file `split_list` names, in its order, with their annotations."""
        path = f"{self._top}{split_list}"
        lines = (
            archive.read_file(self._raw, self._contents, path, self._source)
            .decode(errors="replace")
            .splitlines()
        )
        names = [as_text(line.split()[0]) for line in lines if line.strip()]
        keys = keys_of({name: name for name in names})
        if len(keys) < len(names):
            raise DataError(
                f"{path}: names {Counter(names).most_common(1)[0][0]} more than once: an image is one sample"
            )
        if twice := self._listed.intersection(names):
            raise DataError(
                f"{path}: names {min(twice)}, which another split has: an image belongs to one split"
            )
        self._listed.update(names)
        with bar(f"annotations of {split_list}", len(names), show=progress) as shown:
            for name in names:
                image = archive.reference_to(
                    self._contents, f"{self._top}JPEGImages/{name}.jpg", keys[name], self._source
                )
                yield image, self._annotation(name)
                shown.update(1)

    def count_unlisted(self) -> None:
        """Counts the images and annotations that no split read so far lists."""
        for folder, kind in (("JPEGImages", "images"), ("Annotations", "annotations of images")):
            prefix = f"{self._top}{folder}/"
            for path in sorted(self._contents.files):
                if (
                    path.startswith(prefix)
                    and posixpath.splitext(path.removeprefix(prefix))[0] not in self._listed
                ):
                    self.left_out.add(f"{kind} that no split lists", path)

    def _annotation(self, name: str) -> Annotation:
        path = f"{self._top}Annotations/{name}.xml"
        read = parse(archive.read_file(self._raw, self._contents, path, self._source), path)
        labels: set[int] = set()
        boxes: list[Box] = []
        kept: list[bool] = []
        for number, item in enumerate(read.objects, 1):
            corners = None
            if item.difficult and not self._params.difficult:
                self.left_out.add("difficult objects", f"{path}: object {number}")
            else:
                labels.add(item.label)
                corners = self.check(item.corners, read.width, read.height, f"{path}: object {number}")
            kept.append(corners is not None)
            if corners is not None:
                boxes.append((item.label, *corners))
        mask = self._mask(name, read, kept) if boxes else None
        return Annotation(read.width, read.height, tuple(boxes), labels=tuple(sorted(labels)), mask=mask)

    def _mask(self, name: str, read: VocAnnotation, kept: list[bool]) -> dict[str, object] | None:
        """The plan from which `voc_masks.draw` draws the mask; `None` if no segmentation fits."""
        for folder, plan in MASKS[self._params.masks].items():
            path = f"{self._top}{folder}/{name}.png"
            if path in self._contents.files:
                mask = plan(
                    self._raw, archive.reference_to(self._contents, path, name, self._source), read, kept
                )
                if mask is None:
                    self.left_out.add("masks that do not fit their objects", path)
                return mask
        return None
