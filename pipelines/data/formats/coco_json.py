"""COCO's `instances_*.json` (Lin et al. 2014), indexed by pycocotools and checked."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from typing import Any, Literal

from pipelines.data.formats import coco_masks
from pipelines.data.formats.archive import as_text
from pipelines.data.formats.boxes import Annotation, BoxCheck
from pipelines.data.shards.sample import Box, DataError
from pipelines.storage.errors import one_line

_LISTS = ("images", "annotations", "categories")


class Instances:
    """The annotations of one `instances_*.json`.

    Attributes:
        classes: names of the categories by ascending id. COCO's ids have gaps; the labels are 0, 1, ...
            without gaps.
        images: entries of the images by ascending id, with the fields `id`, `file_name`, `width` and
            `height`.
    """

    def __init__(self, content: bytes, path: str) -> None:
        """Reads `content`, the content of the file `path`.

        Raises:
            DataError: the content is not valid JSON, a field is missing, ids or file names repeat, or an
                annotation refers to an unknown image or category.
        """
        from pycocotools.coco import COCO

        self._path = path
        coco = COCO()
        coco.dataset = self._read(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # createIndex prints
                coco.createIndex()
            self.classes = tuple(str(coco.cats[number]["name"]) for number in sorted(coco.cats))
            self.images = [_image(coco.imgs[number]) for number in sorted(coco.imgs)]
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise DataError(f"{path}: an entry has not what COCO's have: {one_line(repr(error))}") from None
        self._labels = {number: label for label, number in enumerate(sorted(coco.cats))}
        self._of_image = coco.imgToAnns
        for name, entries in (("images", coco.imgs), ("annotations", coco.anns), ("categories", coco.cats)):
            if len(entries) != len(coco.dataset[name]):
                raise DataError(
                    f"{path}: of {len(coco.dataset[name])} {name} only {len(entries)} have an id of their own"
                )
        names = Counter(image["file_name"] for image in self.images)
        if len(names) < len(self.images):
            raise DataError(
                f"{path}: images has {names.most_common(1)[0][0]} more than once: an image has one entry"
            )
        for entry in coco.anns.values():
            if entry["image_id"] not in coco.imgs:
                raise DataError(
                    f"{path}: annotation {entry['id']} is of image {entry['image_id']}, "
                    "which is not in images"
                )
            if entry["category_id"] not in self._labels:
                raise DataError(
                    f"{path}: annotation {entry['id']} is of category {entry['category_id']}, "
                    "which is not in categories"
                )

    def annotation(
        self, image: dict[str, Any], check: BoxCheck, crowd: Literal["label", "ignore", "box"]
    ) -> Annotation:
        """The annotation of one entry of `images`; counts what it leaves out in `check.left_out`.

        `Coco2014` describes the choices for `crowd`.

        Raises:
            DataError: a box or a segmentation is invalid; the error names the annotation.
        """
        width, height = image["width"], image["height"]
        labels: set[int] = set()
        boxes: list[Box] = []
        shapes: list[str | None] = []
        for entry in self._of_image.get(image["id"], ()):
            where = f"{self._path}: annotation {entry['id']} of {image['file_name']}"
            is_crowd = bool(entry.get("iscrowd", 0))
            if not is_crowd or crowd != "ignore":
                labels.add(self._labels[entry["category_id"]])
            if is_crowd and crowd != "box":
                check.left_out.add("crowd regions", where)
                continue
            corners = check(_corners(entry, where), width, height, where)
            if corners is not None:
                boxes.append((self._labels[entry["category_id"]], *corners))
                shapes.append(coco_masks.encode(entry.get("segmentation"), height, width, where))
        whole = bool(shapes) and None not in shapes
        if shapes and not whole:
            check.left_out.add("masks that would lack an object", image["file_name"])
        return Annotation(
            width, height, tuple(boxes), labels=tuple(sorted(labels)), mask=shapes if whole else None
        )

    def _read(self, content: bytes) -> dict[str, Any]:
        """Parses the file and checks that it has its three lists."""
        try:
            dataset = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._path}: not whole JSON ({one_line(error)}): get it again") from None
        for name in _LISTS:
            if not isinstance(dataset, dict) or not isinstance(dataset.get(name), list):
                raise DataError(f"{self._path}: has no list of {name}: it is not a file of COCO instances")
        return dataset


def _image(entry: dict[str, Any]) -> dict[str, Any]:
    """The fields of an image's entry that this project uses."""
    return {
        "id": entry["id"],
        "file_name": as_text(str(entry["file_name"])),
        "width": int(entry["width"]),
        "height": int(entry["height"]),
    }


def _corners(entry: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    """The half-open corners (xmin, ymin, xmax, ymax), counted from 0, of COCO's [x, y, width, height]."""
    try:
        x, y, width, height = (float(value) for value in entry["bbox"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where}: bbox {entry.get('bbox')} is not [x, y, width, height]") from None
    return x, y, x + width, y + height
