"""Batches: samples are decoded, transformed and collated.

N samples, K classes, C channels of a stored map, H x W pixels, n boxes in the batch. A `Batch` is a dict of

    key      list of N str
    image    (N, 3, H, W), float32 in [0, 1] or uint8
    skipped  int, number of images of this batch that did not decode
    label    int64 (N,), in task `multiclass`
    labels   float32 (N, K), multi-hot, in task `multilabel`

If at least one sample of the split has them, it also holds

    boxes    float32 (n, 6) of rows [image, class, xmin, ymin, xmax, ymax], sorted by image, an index into the
             batch; corners half-open, in pixels of the transformed image
    mask     int64 (N, H, W), instance ids: 0 is background, i >= 1 the i-th box of the image; 0 everywhere
             for samples without a mask
    group    int64 (N,), -1 for samples without a group
    caption  list of N str, "" for samples without a caption; of several captions, training draws one by
             (seed, epoch, key), and evaluation takes the first
    captions list of N lists of str, all captions; only if this field is requested by name

With stored explanations it also holds `teacher_logits` (N, K) and `teacher_maps` (N, C, H, W), both float32.
A batch without a decoded image holds `key` and `skipped` alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from pipelines.data.formats.encoded_image import mask_ids
from pipelines.data.loading.decode import decode_image
from pipelines.data.loading.transforms import STORED_MAP, Step, Views
from pipelines.data.shards.manifest import Manifest, ShardError
from pipelines.data.shards.reader import IMAGES, RawSample
from pipelines.data.shards.sample import captions_of
from pipelines.data.shards.stored_explanations import StoredExplanations

Batch = dict[str, Any]
NO_GROUP = -1
FIELDS = frozenset(("boxes", "mask", "group", "caption", "captions"))  # optional in a sample


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """A decoded and transformed sample."""

    key: str
    annotation: dict[str, Any]  # content of the sample's json
    image: Tensor  # uint8 (3, H, W)
    boxes: Tensor  # (n, 5): class, xmin, ymin, xmax, ymax
    mask: Tensor | None  # (H, W)
    stored: tuple[Tensor, Tensor] | None  # the teacher's logits (K,) and map (C, H, W)


@dataclass(frozen=True)
class Decoder:
    """Decodes, transforms and collates samples as the reader returns them. Picklable.

    Attributes:
        manifest: manifest of the shards.
        fields: the members of `FIELDS` to read.
        transform: applied to each sample with a generator seeded by (seed, epoch, key).
        seed: seed of the run.
        epoch: counted from 0.
        train: draw one of several captions; otherwise take the first.
        explanations: stored explanations to read, or `None`.
    """

    manifest: Manifest
    fields: frozenset[str]
    transform: Step
    seed: int
    epoch: int
    train: bool
    explanations: StoredExplanations | None

    def decode(self, raw: RawSample) -> DecodedSample:
        """Decodes and transforms one sample.

        Raises:
            DecodeError: the image does not decode.
            ShardError: the json does not fit the task, a label is out of range, or no explanation is stored.
        """
        annotation = self._annotation(raw)
        encoded = next(raw.files[suffix] for suffix in IMAGES if suffix in raw.files)
        boxes, encoded_mask = annotation["boxes"], raw.files.get("mask.png")
        image = decode_image(encoded, apply_exif=not boxes and encoded_mask is None)
        # A mask needs the boxes, too, because `keep_boxes` renumbers its ids by them.
        boxes = boxes if self.fields & {"boxes", "mask"} else []
        views: Views = {"image": image}
        if boxes:
            corners = torch.tensor([box[1:] for box in boxes], dtype=torch.float32)
            views["boxes"] = tv_tensors.BoundingBoxes(
                corners, format="XYXY", canvas_size=tuple(image.shape[-2:])
            )
        if encoded_mask is not None and "mask" in self.fields:
            views["mask"] = tv_tensors.Mask(mask_ids(encoded_mask))
        if self.explanations is not None:
            teacher_logits, views[STORED_MAP] = self.explanations.read(raw.shard, raw.key)
            if raw.last:
                self.explanations.close(raw.shard)
        views = self.transform(views, random.Random(f"{self.seed}/{self.epoch}/{raw.key}"))
        stored = None if self.explanations is None else (teacher_logits, views[STORED_MAP])
        mask = views["mask"].as_subclass(Tensor) if "mask" in views else None
        kept = torch.zeros(0, 5)
        if boxes:
            classes = torch.tensor([float(box[0]) for box in boxes])
            kept, mask = keep_boxes(classes, views["boxes"].as_subclass(Tensor), mask)
        return DecodedSample(raw.key, annotation, views["image"], kept, mask, stored)

    def close(self) -> None:
        """Closes the shards of stored explanations at the end of a pass."""
        if self.explanations is not None:
            self.explanations.close()

    def _annotation(self, raw: RawSample) -> dict[str, Any]:
        """Parses the sample's json and checks its labels."""
        classes, task = len(self.manifest.classes), self.manifest.task
        try:
            annotation: dict[str, Any] = {"boxes": [], **json.loads(raw.files["json"])}
            match task:
                case "multiclass":
                    labels = [annotation["label"]]
                case "multilabel":
                    labels = annotation["labels"]
                case "caption" | "unlabelled":
                    labels = []
            for label in labels:
                if not 0 <= label < classes:
                    raise ShardError(
                        f"{raw.shard}: {raw.key}: label {label} is out of range; there are {classes} classes"
                    )
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ShardError(
                f"{raw.shard}: {raw.key}: its json is not that of task {task}: {error!r}"
            ) from None
        return annotation

    def collate(self, samples: Sequence[DecodedSample], skipped: int) -> Batch:
        """Collates `samples` into a batch with uint8 images.

        Each tensor is sent from the loader process separately, so the batch has few.
        """
        batch: Batch = {"key": [sample.key for sample in samples], "skipped": skipped}
        if not samples:
            return batch
        batch["image"] = torch.stack([sample.image for sample in samples])
        if self.manifest.task == "multiclass":
            batch["label"] = torch.tensor([sample.annotation["label"] for sample in samples])
        if self.manifest.task == "multilabel":
            batch["labels"] = torch.zeros(len(samples), len(self.manifest.classes))
            for row, sample in zip(batch["labels"], samples, strict=True):
                row[sample.annotation["labels"]] = 1.0
        if "boxes" in self.fields:
            counts = torch.tensor([len(sample.boxes) for sample in samples])
            image_of_box = torch.arange(len(samples)).repeat_interleave(counts)
            batch["boxes"] = torch.cat(
                [image_of_box[:, None].float(), torch.cat([sample.boxes for sample in samples])], dim=1
            )
        if "mask" in self.fields:
            empty = torch.zeros(samples[0].image.shape[-2:], dtype=torch.int64)
            batch["mask"] = torch.stack([empty if sample.mask is None else sample.mask for sample in samples])
        if "group" in self.fields:
            batch["group"] = torch.tensor([sample.annotation.get("group", NO_GROUP) for sample in samples])
        if "caption" in self.fields:
            batch["caption"] = [self._caption(sample) for sample in samples]
        if "captions" in self.fields:
            batch["captions"] = [list(captions_of(sample.annotation)) for sample in samples]
        if self.explanations is not None:
            logits, maps = zip(
                *(sample.stored for sample in samples if sample.stored is not None), strict=True
            )
            batch["teacher_logits"], batch["teacher_maps"] = torch.stack(logits), torch.stack(maps)
        return batch

    def _caption(self, sample: DecodedSample) -> str:
        """One caption of a sample, or "" if it has no caption."""
        captions = captions_of(sample.annotation)
        if self.train and len(captions) > 1:
            return random.Random(f"caption/{self.seed}/{self.epoch}/{sample.key}").choice(captions)
        return captions[0] if captions else ""


def keep_boxes(classes: Tensor, corners: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Removes the boxes that a crop left empty, and renumbers the mask to match; returns both.

    Args:
        classes: (m,), classes of m boxes.
        corners: (m, 4), XYXY, clipped to the image.
        mask: int64 (H, W), ids 0 to m, or `None`.

    Returns:
        The kept boxes (n, 5) of rows [class, xmin, ymin, xmax, ymax], and the mask with ids 0 to n.
    """
    boxes = torch.cat([classes[:, None], corners], dim=1)
    kept = (corners[:, 2:] > corners[:, :2]).all(dim=1)
    if kept.all():
        return boxes, mask
    if mask is not None:
        mask = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0) * kept])[mask]
    return boxes[kept], mask
