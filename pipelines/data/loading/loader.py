"""Batches out of shards: each sample of an epoch exactly once, over any number of ranks and processes.

Everything is a function of (seed, epoch, place): which samples a batch has is settled by `order` before anything is
read, and a sample's augmentation is drawn from a generator seeded by (seed, epoch, key). So a pass that starts at
batch k gives what an uninterrupted one gives from there, bit for bit, and no global random state is read or written.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise, product
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision import tv_tensors

from pipelines.data.loading.decode import DecodeError, decode_image, decode_mask
from pipelines.data.loading.sampling import batched, epoch_order, rank_share, shuffled, worker_share
from pipelines.data.loading.transforms import STORED_MAP, Step, Views
from pipelines.data.shards.manifest import Manifest, ShardError, read_manifest
from pipelines.data.shards.reader import IMAGES, RawSample, read_samples
from pipelines.data.shards.sample import DataError
from pipelines.data.shards.stored_explanations import StoredExplanations

Batch = dict[str, Any]
NO_GROUP = -1
FIELDS = frozenset(("boxes", "mask", "group", "caption"))  # that a sample need not have


@dataclass(frozen=True)
class Plan:
    """What one loader reads, and how: all that a process needs to make its batches. See `loader`."""

    root: str
    manifest: Manifest
    split: str
    batch_size: int
    transform: Step
    seed: int
    epoch: int
    train: bool
    rank: int
    world_size: int
    workers: int
    start_batch: int
    earlier: tuple[tuple[int, int], ...]
    shuffle_buffer: int
    on_error: Literal["raise", "skip"]
    verify: bool
    subset: tuple[int, ...] | None
    explanations: StoredExplanations | None
    fields: frozenset[str]  # those of FIELDS that are read
    device: torch.device  # where images are put

    def counts(self) -> list[int]:
        """Samples of each shard, of those that are wanted."""
        counts = [shard.count for shard in self.manifest.shards(self.split)]
        if self.subset is None:
            return counts
        ends = [bisect_left(self.subset, end) for end in accumulate(counts)]
        return [end - start for start, end in pairwise([0, *ends])]

    def share(self) -> range:
        """The places that this rank reads in the epoch's order, or in what earlier workers left of it."""
        read = sum(batches for _, batches in self.earlier) * self.batch_size * self.world_size
        return rank_share(
            sum(self.counts()) - read,
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            train=self.train,
        )


@dataclass(frozen=True, slots=True)
class Example:
    """A decoded, transformed sample. `boxes` (n, 5) and `mask` (H, W) are None where the sample has none."""

    key: str
    known: dict[str, Any]  # the sample's json
    image: torch.Tensor
    boxes: torch.Tensor | None
    mask: torch.Tensor | None
    taught: tuple[torch.Tensor, torch.Tensor] | None  # the teacher's logits (K,) and map (C, H, W)


class Loader:
    """One pass of one rank over a split: iterable of batches, `len()` of them.

    Attributes:
        skipped: images that did not decode, of the batches given so far in this pass.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.skipped = 0

    def __len__(self) -> int:
        """Batches from `start_batch` on; in evaluation with `on_error: skip` an upper bound."""
        batches = -(-len(self._plan.share()) // self._plan.batch_size)
        return max(0, batches - self._plan.start_batch)

    def __iter__(self) -> Iterator[Batch]:
        """The batches, see `loader`."""
        self.skipped = 0
        for packed in _packed_batches(self._plan):
            if isinstance(packed, DataError):
                raise packed
            self.skipped += packed["skipped"]
            if packed["key"]:
                yield unpack(packed, self._plan.device)


def loader(
    root: str,
    split: str,
    *,
    batch_size: int,
    transform: Step,
    seed: int = 0,
    epoch: int = 0,
    train: bool = False,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    start_batch: int = 0,
    earlier: Sequence[tuple[int, int]] = (),
    shuffle_buffer: int = 10_000,
    on_error: Literal["raise", "skip"] = "raise",
    verify: bool = False,
    subset: Sequence[int] | None = None,
    explanations: str | None = None,
    fields: Collection[str] | None = None,
    device: torch.device | str = "cpu",
) -> Loader:
    """The batches of one rank in one epoch.

    A batch is a dict: `key` list of str; `image` float32 (N, 3, H, W) in [0, 1]; by task `label` int64 (N,), or
    `labels` float32 (N, K) multi-hot; `skipped` int, the images of this batch that did not decode; and where any
    sample of the split has them `boxes`, a list of float32 (n_i, 5) [class, xmin, ymin, xmax, ymax] in pixels of the
    transformed image, `mask` int64 (N, H, W) of instance ids (0 for samples without; instance i is that of box i - 1),
    `group` int64 (N,) (-1 for samples without), `caption` list of str ("" for samples without).

    In training, all ranks have the same number of full batches, and the samples of the last incomplete batch are left
    out, other ones each epoch. In evaluation, the ranks together give each sample once, and the last batch of a rank is
    short. The number of `workers` changes which batch a sample is in, never what is done to it.

    An image that does not decode ends the pass, or with `on_error="skip"` is left out of its batch, which is then
    shorter; the other batches stay as they are. A batch of which nothing is left is not given in evaluation, and ends
    the pass in training, where other ranks would wait for it.

    Args:
        root: shards: a folder or any fsspec URL.
        split: its name in the manifest.
        batch_size: samples a batch, of this rank.
        transform: `transforms.train_transform` or `eval_transform`.
        seed: of the run.
        epoch: counted from 0; shuffling and augmentation differ by epoch.
        train: shuffle, and drop incomplete batches.
        rank: of this process, in [0, world_size).
        world_size: processes that share the pass.
        workers: decoding processes of this rank; 0 decodes in this one. They are forked where Python's default is to
            fork, touch no GPU, and end with the pass, also in a Ray worker.
        start_batch: batches to leave out at the beginning, without reading them.
        earlier: how the epoch began, where that was with other numbers of ranks: (world_size, batches of each rank), one after
            the other, of the same effective batch. This pass shares out what they left.
        shuffle_buffer: samples among which each next one is drawn, in training.
        on_error: `raise` or `skip`.
        verify: check the sha256 of each shard before reading it.
        subset: numbers of the samples to read, counted through the split's shards, in ascending order; none: all of them.
        explanations: root of stored explanations; a batch then has the teacher's too: `teacher_logits` float32 (N, K) and
            `teacher_maps` float32 (N, C, H, W), which `transform` (made with `stored_map`) keeps aligned with the images.
        fields: which of `boxes`, `mask`, `group` and `caption` are read, where the split has them; none: all of them. What
            nobody reads is not decoded: damage there goes unseen.
        device: where `image` is put; the rest of a batch stays on the CPU. Images travel as bytes, a quarter of their size here,
            to a GPU from pinned memory while it works, where there are decoding processes.

    Raises:
        ShardError: the manifest or split is missing; while iterating, a shard is missing, truncated, or not as the
            manifest says, or a label is out of range. Names the shard.
        DecodeError: an image does not decode. Names key and shard.
        ValueError: an argument is out of its range.
    """
    if batch_size < 1 or shuffle_buffer < 1 or workers < 0 or start_batch < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size {batch_size} and shuffle_buffer {shuffle_buffer} must be at least 1, workers {workers} and "
            f"start_batch {start_batch} at least 0, and rank {rank} below world_size {world_size}"
        )
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error {on_error!r} is neither 'raise' nor 'skip'")
    if fields is not None and (unknown := set(fields) - FIELDS):
        raise ValueError(f"fields: {sorted(unknown)[0]!r} is none of {', '.join(sorted(FIELDS))}")
    manifest = read_manifest(root)
    known = manifest.fields.get(split, ())  # a split that is not there is named below
    plan = Plan(
        root=str(root),
        manifest=manifest,
        split=split,
        batch_size=batch_size,
        transform=transform,
        seed=seed,
        epoch=epoch,
        train=train,
        rank=rank,
        world_size=world_size,
        workers=workers,
        start_batch=start_batch,
        earlier=tuple(earlier),
        shuffle_buffer=shuffle_buffer,
        on_error=on_error,
        verify=verify,
        subset=None if subset is None else tuple(subset),
        explanations=None if explanations is None else StoredExplanations(explanations),
        fields=frozenset(known if fields is None else set(fields).intersection(known)),
        device=torch.device(device),
    )
    plan.share()
    return Loader(plan)


def _packed_batches(plan: Plan) -> Iterable[Batch | DataError]:
    """The packed batches of a rank in their order, made here or by `plan.workers` processes that take turns."""
    if plan.workers == 0:
        return worker_batches(plan, worker=0, workers=1)
    return DataLoader(
        _WorkerBatches(plan),
        batch_size=None,
        num_workers=plan.workers,
        generator=torch.Generator().manual_seed(0),  # by default it draws its base seed from torch's global one
        pin_memory=plan.device.type == "cuda",
    )


class _WorkerBatches(IterableDataset):
    """The batches of the loader process that iterates over it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[Batch | DataError]:
        info = get_worker_info()
        process, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # DataLoader asks its process 0 first, and batch `start_batch` is that of worker `start_batch % workers`.
        worker = (process + self._plan.start_batch) % workers
        try:
            yield from worker_batches(self._plan, worker=worker, workers=workers)
        except DataError as error:  # sent as it is: DataLoader would wrap its message in a traceback
            yield error


def worker_batches(plan: Plan, *, worker: int, workers: int) -> Iterator[Batch]:
    """The packed batches of one of a rank's `workers` processes, in their order."""
    shards = plan.manifest.shards(plan.split)
    numbers = worker_numbers(plan, worker=worker, workers=workers)
    decode = partial(decode_sample, plan=plan, classes=len(plan.manifest.classes))
    samples = read_samples(plan.root, shards, numbers, verify=plan.verify)
    for results in batched(map(decode, samples), plan.batch_size):
        examples = [result for result in results if isinstance(result, Example)]
        if plan.train and not examples:
            raise next(result for result in results if isinstance(result, DecodeError))
        yield pack(examples, len(results) - len(examples), plan)


def worker_numbers(plan: Plan, *, worker: int, workers: int) -> list[int]:
    """Numbers of the samples of one of a rank's `workers` processes, from `start_batch` on, in their order."""
    order = epoch_order(plan.counts(), seed=plan.seed, epoch=plan.epoch, train=plan.train)
    if plan.subset is not None:
        order = [plan.subset[place] for place in order]
    for world_size, batches in plan.earlier:
        size = plan.batch_size * plan.world_size // world_size
        ranks = [replace(plan, rank=rank, world_size=world_size, batch_size=size, earlier=()) for rank in range(world_size)]
        read = {
            number for each, process in product(ranks, range(workers)) for number in first(batches, each, order, process, workers)
        }
        order = [number for number in order if number not in read]
    numbers = dealt(plan, order, worker, workers)
    return numbers[len(first(plan.start_batch, plan, order, worker, workers)) :]


def first(batches: int, plan: Plan, order: list[int], worker: int, workers: int) -> list[int]:
    """What one of a rank's `workers` processes, which take turns, has read of `order` after so many batches of the rank."""
    done = -(-max(0, batches - worker) // workers)  # of this process's batches worker, worker + workers, ...
    return dealt(plan, order, worker, workers)[: done * plan.batch_size]


def dealt(plan: Plan, order: list[int], worker: int, workers: int) -> list[int]:
    """What one of a rank's `workers` processes reads of `order`."""
    size = plan.batch_size
    share = rank_share(len(order), batch_size=size, rank=plan.rank, world_size=plan.world_size, train=plan.train)
    share = worker_share(share, batch_size=size, worker=worker, workers=workers)
    numbers = order[share.start : share.stop]
    if not plan.train:
        return numbers
    rng = random.Random(f"buffer/{plan.seed}/{plan.epoch}/{plan.rank * workers + worker}")
    return list(shuffled(numbers, plan.shuffle_buffer, rng))


def decode_sample(raw: RawSample, plan: Plan, classes: int) -> Example | DecodeError:
    """The sample decoded and transformed, or with `on_error: skip` the error that its image gives."""
    try:
        return _decode(raw, plan, classes)
    except DecodeError as error:
        named = DecodeError(f"{raw.shard}: {raw.key}: does not decode: {error}")
        if plan.on_error == "raise":
            raise named from None
        return named


def _decode(raw: RawSample, plan: Plan, classes: int) -> Example:
    """The sample decoded and transformed."""
    known = _known(raw, plan.manifest, classes)
    encoded = next(raw.files[suffix] for suffix in IMAGES if suffix in raw.files)
    boxes, encoded_mask = known["boxes"], raw.files.get("mask.png")
    image = decode_image(encoded, apply_exif=not boxes and encoded_mask is None)
    boxes = boxes if plan.fields & {"boxes", "mask"} else []  # a mask's ids are counted anew where boxes are left out
    encoded_mask = encoded_mask if "mask" in plan.fields else None
    size = (image.shape[-2], image.shape[-1])
    views: Views = {"image": image}
    if boxes:
        corners = torch.tensor([box[1:] for box in boxes], dtype=torch.float32)
        views["boxes"] = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)
    if encoded_mask is not None:
        views["mask"] = tv_tensors.Mask(decode_mask(encoded_mask))
    if plan.explanations is not None:
        teacher_logits, views[STORED_MAP] = plan.explanations.read(raw.shard, raw.key)
    views = plan.transform(views, random.Random(f"{plan.seed}/{plan.epoch}/{raw.key}"))
    mask = views["mask"].as_subclass(torch.Tensor) if encoded_mask is not None else None
    taught = None if plan.explanations is None else (teacher_logits, views[STORED_MAP])
    if not boxes:
        return Example(raw.key, known, views["image"], None, mask, taught)
    corners = views["boxes"].as_subclass(torch.Tensor)
    kept, mask = keep_boxes(torch.tensor([float(box[0]) for box in boxes]), corners, mask)
    return Example(raw.key, known, views["image"], kept, mask, taught)


def keep_boxes(
    classes: torch.Tensor, corners: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Boxes (n, 5) without those that a crop left empty, and the mask with its ids counted anew to match.

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


def _known(raw: RawSample, manifest: Manifest, classes: int) -> dict[str, Any]:
    """The sample's json, its labels checked."""
    try:
        known: dict[str, Any] = {"boxes": [], **json.loads(raw.files["json"])}
        match manifest.task:
            case "multiclass":
                labels = [known["label"]]
            case "multilabel":
                labels = known["labels"]
            case "caption" | "unlabelled":
                labels = []
        for label in labels:
            if not 0 <= label < classes:
                raise ShardError(f"{raw.shard}: {raw.key}: label {label} is out of range; there are {classes} classes")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ShardError(f"{raw.shard}: {raw.key}: its json is not that of task {manifest.task}: {error!r}") from None
    return known


def pack(examples: list[Example], skipped: int, plan: Plan) -> Batch:
    """A batch in few tensors, as it goes from process to process: images in bytes, boxes of all samples in one."""
    task, fields = plan.manifest.task, plan.fields
    batch: Batch = {"key": [example.key for example in examples], "skipped": skipped}
    if not examples:
        return batch
    batch["image"] = torch.stack([example.image for example in examples])
    if task == "multiclass":
        batch["label"] = torch.tensor([example.known["label"] for example in examples])
    if task == "multilabel":
        batch["labels"] = torch.zeros(len(examples), len(plan.manifest.classes))
        for row, example in zip(batch["labels"], examples, strict=True):
            row[example.known["labels"]] = 1.0
    if "boxes" in fields:
        boxes = [torch.zeros(0, 5) if example.boxes is None else example.boxes for example in examples]
        batch["boxes"] = torch.cat(boxes)
        batch["box_counts"] = [len(each) for each in boxes]
    if "mask" in fields:
        empty = torch.zeros(examples[0].image.shape[-2:], dtype=torch.int64)
        batch["mask"] = torch.stack([empty if example.mask is None else example.mask for example in examples])
    if "group" in fields:
        batch["group"] = torch.tensor([example.known.get("group", NO_GROUP) for example in examples])
    if plan.explanations is not None:
        taught = [example.taught for example in examples if example.taught is not None]
        batch["teacher_logits"] = torch.stack([logits for logits, _ in taught])
        batch["teacher_maps"] = torch.stack([stored for _, stored in taught])
    if "caption" in fields:
        batch["caption"] = [example.known.get("caption", "") for example in examples]
    return batch


def unpack(packed: Batch, device: torch.device) -> Batch:
    """The batch that a user sees, its images on `device`."""
    batch = {**packed, "image": packed["image"].to(device, non_blocking=True).float().div_(255)}
    if "boxes" in packed:
        batch["boxes"] = list(packed["boxes"].split(batch.pop("box_counts")))
    return batch
