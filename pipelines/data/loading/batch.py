"""What a batch holds, and how samples become one: decoded, transformed, collated.

A `Batch` is a dict of

    key      list of str
    image    (N, 3, H, W), float32 in [0, 1] or uint8
    skipped  int, the images of this batch that did not decode
    label    int64 (N,), in task `multiclass`
    labels   float32 (N, K), multi-hot, in task `multilabel`

and, if any sample of the split has them, of

    boxes    float32 (n, 6) [image, class, xmin, ymin, xmax, ymax], ascending by image, a row of the batch; corners half-open, in
             pixels of the transformed image
    mask     int64 (N, H, W) of instance ids: 0 is background, i the i-th box of the image; all 0 for samples without
    group    int64 (N,), -1 for samples without
    caption  list of str: of several captions one, in training drawn by (seed, epoch, key), in evaluation the first; "" for
             samples without
    captions list of lists of str, all captions of each sample; only if this field is asked for by name

and, with stored explanations, of `teacher_logits` float32 (N, K) and `teacher_maps` float32 (N, C, H, W).
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
FIELDS = frozenset(("boxes", "mask", "group", "caption", "captions"))  # that a sample need not have


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """A decoded, transformed sample."""

    key: str
    annotation: dict[str, Any]  # the sample's json
    image: Tensor  # uint8 (3, H, W)
    boxes: Tensor  # (n, 5): class, xmin, ymin, xmax, ymax
    mask: Tensor | None  # (H, W)
    stored: tuple[Tensor, Tensor] | None  # the teacher's logits (K,) and map (C, H, W)


@dataclass(frozen=True)
class Decoder:
    """Makes batches of samples as they lie in shards. Picklable.

    Attributes:
        manifest: of the shards.
        fields: those of FIELDS that are read.
        transform: applied to each sample, with a generator seeded by (seed, epoch, key).
        seed: of the run.
        epoch: counted from 0.
        train: whether one of several captions is drawn; otherwise the first one is taken.
        explanations: stored ones that come with the samples, or None.
    """

    manifest: Manifest
    fields: frozenset[str]
    transform: Step
    seed: int
    epoch: int
    train: bool
    explanations: StoredExplanations | None

    def decode(self, raw: RawSample) -> DecodedSample:
        """The sample decoded and transformed.

        Raises:
            DecodeError: its image does not decode.
            ShardError: its json is not that of the task.
        """
        annotation = self._annotation(raw)
        encoded = next(raw.files[suffix] for suffix in IMAGES if suffix in raw.files)
        boxes, encoded_mask = annotation["boxes"], raw.files.get("mask.png")
        image = decode_image(encoded, apply_exif=not boxes and encoded_mask is None)
        boxes = (
            boxes if self.fields & {"boxes", "mask"} else []
        )  # `keep_boxes` renumbers the ids of a mask by its boxes
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
        """Ends a pass: closes the shards of stored explanations that are open."""
        if self.explanations is not None:
            self.explanations.close()

    def _annotation(self, raw: RawSample) -> dict[str, Any]:
        """The sample's json, its labels checked."""
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
        """The batch of `samples`, in few tensors because it may go from process to process: images uint8."""
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
        """One caption of a sample; empty if it has none."""
        captions = captions_of(sample.annotation)
        if self.train and len(captions) > 1:
            return random.Random(f"caption/{self.seed}/{self.epoch}/{sample.key}").choice(captions)
        return captions[0] if captions else ""


def keep_boxes(classes: Tensor, corners: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Boxes (n, 5) without those that a crop left empty, and the mask with its ids renumbered to match.

    Args:
        classes: (m,).
        corners: (m, 4), XYXY, clipped to the image.
        mask: int64 (H, W), ids 0 to m.
    """
    boxes = torch.cat([classes[:, None], corners], dim=1)
    kept = (corners[:, 2:] > corners[:, :2]).all(dim=1)
    if kept.all():
        return boxes, mask
    if mask is not None:
        mask = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0) * kept])[mask]
    return boxes[kept], mask
