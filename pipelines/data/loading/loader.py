"""The data loader: reads an epoch's samples once each, over any number of ranks and loader processes.

A batch is a function of (seed, epoch, rank). `sampling` fixes its samples before anything is read, and each
sample is augmented by a generator seeded by (seed, epoch, key). Therefore the number of loader processes
changes no batch, and a pass that starts at batch k yields what an uninterrupted pass yields from there. No
global random state is read or written.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from typing import Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipelines.data.formats.encoded_image import DecodeError
from pipelines.data.loading.batch import FIELDS, Batch, DecodedSample, Decoder
from pipelines.data.loading.prefetch import Prefetcher, first_needs
from pipelines.data.loading.sampling import Sampling, epoch_order, rank_batches, unread
from pipelines.data.loading.transforms import eval_transform, train_transform
from pipelines.data.shards.manifest import Shard, read_manifest
from pipelines.data.shards.reader import RawSample, read_samples
from pipelines.data.shards.sample import DataError
from pipelines.data.shards.stored_explanations import StoredExplanations
from pipelines.distributed import Context
from pipelines.params import DataParams
from pipelines.storage.retry import is_remote

log = logging.getLogger(__name__)
PREFETCH = 2  # batches that each loader process prepares ahead


def loader(
    root: str,
    split: str,
    data: DataParams,
    batch_size: int,
    *,
    context: Context | None = None,
    train: bool = False,
    seed: int = 0,
    epoch: int = 0,
    start_batch: int = 0,
    earlier: Sequence[tuple[int, int]] = (),
    subset: Sequence[int] | None = None,
    explanations: str | None = None,
    fields: Collection[str] | None = None,
    as_bytes: bool = False,
) -> Loader:
    """Returns an iterable of the batches (`batch.Batch`) of one rank in one epoch.

    In training, the ranks split each full batch (their shares differ by at most one sample). The samples of
    the last, incomplete batch are dropped, different ones each epoch. In evaluation, the ranks together read
    each sample once, and the last batch of a rank may be shorter.

    An image that does not decode ends the pass. With `data.on_error: skip` it is left out of its batch, which
    is then shorter, and the other batches stay the same. If no image of a batch is left, evaluation drops the
    batch, and training on one rank ends with an error. Training on several ranks yields `key` and `skipped`
    alone, because the other ranks hold the rest of the batch.

    Args:
        root: folder or fsspec URL of the shards.
        split: name of the split in the manifest.
        data: the transform, and how shards are read. `loader_workers` processes decode (0: this process).
            They start by Python's default method, use no GPU, and end with the pass, also in a Ray worker.
        batch_size: samples per batch, summed over all ranks in training, of this rank in evaluation.
        context: rank, number of ranks, and device of `image`; by default one rank on the CPU. Other tensors
            stay on the CPU. Images are moved to a GPU as uint8, from pinned memory with loader processes.
        train: shuffle, augment, and drop incomplete batches.
        seed: seed of the run.
        epoch: counted from 0; shuffling and augmentation differ by epoch.
        start_batch: first batch of the pass; earlier batches are not read.
        earlier: (world size, batches read per rank) of each part of the epoch that was read with another
            number of ranks, in order, with the same `batch_size`. This pass splits the remaining samples.
        subset: numbers of the samples to read, counted through the split's shards, ascending; by default all.
        explanations: root of stored explanations, read with training images and cropped and flipped with
            them.
        fields: which of `boxes`, `mask`, `group`, `caption` and `captions` to read, if the split has them; by
            default all but `captions`. Other fields are not decoded, and damage in them goes unnoticed.
        as_bytes: keep `image` as uint8; otherwise it is divided by 255 to float32.

    Raises:
        ShardError: the manifest or split is missing. While iterating: a shard is missing, truncated, or does
            not match the manifest, or a label is out of range. Names the shard.
        DecodeError: an image does not decode. Names key and shard.
        ValueError: an argument is out of its range.
    """
    context = context or Context()
    if batch_size < 1 or start_batch < 0 or not 0 <= context.rank < context.world_size:
        raise ValueError(
            f"batch_size {batch_size} must be at least 1, start_batch {start_batch} at least 0, "
            f"and rank {context.rank} "
            f"below world_size {context.world_size}"
        )
    if fields is not None and (unknown := set(fields) - FIELDS):
        raise ValueError(f"fields: {sorted(unknown)[0]!r} is none of {', '.join(sorted(FIELDS))}")
    if explanations is not None and not train:
        raise ValueError(
            "explanations come with training images alone: "
            "the fixed view of evaluation does not resize their maps"
        )
    manifest = read_manifest(root)
    shards, known = manifest.shards(split), manifest.fields.get(split, ())
    available = {*known, "captions"} if "caption" in known else set(known)
    sampling = Sampling(batch_size, context.rank, context.world_size, train, seed, epoch, data.shuffle_buffer)
    order: Sequence[int] = epoch_order(_counts(shards, subset), sampling)
    if subset is not None:
        order = [subset[place] for place in order]
    decoder = Decoder(
        manifest=manifest,
        fields=frozenset(known if fields is None else available.intersection(fields)),
        transform=train_transform(data, explanations is not None) if train else eval_transform(data),
        seed=seed,
        epoch=epoch,
        train=train,
        explanations=None if explanations is None else StoredExplanations(explanations),
    )
    numbers = rank_batches(unread(order, earlier, sampling), sampling)[start_batch:]
    empty = "refuse" if train and context.world_size == 1 else "give" if train else "drop"
    batches = RankBatches(str(root), split, manifest.tars, shards, numbers, decoder, data, empty)  # type: ignore[arg-type]
    return Loader(batches, data.loader_workers, context.device, as_bytes)


def _counts(shards: Sequence[Shard], subset: Sequence[int] | None) -> list[int]:
    """Number of samples per shard that belong to `subset`."""
    counts = [shard.count for shard in shards]
    if subset is None:
        return counts
    ends = [bisect_left(subset, end) for end in accumulate(counts)]
    return [end - start for start, end in pairwise([0, *ends])]


class Loader:
    """One pass of one rank over a split: an iterable of batches.

    Attributes:
        skipped: number of images that did not decode in this pass so far.
    """

    def __init__(self, batches: RankBatches, processes: int, device: torch.device, as_bytes: bool) -> None:
        self._batches, self._processes, self._device, self._as_bytes = batches, processes, device, as_bytes
        self.skipped = 0

    def __len__(self) -> int:
        """Number of batches from `start_batch` on; an upper bound in evaluation with `on_error: skip`."""
        return len(self._batches.numbers)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = 0
        for batch in self._decoded():
            if isinstance(batch, DataError):
                raise batch
            self.skipped += batch["skipped"]
            if not batch["key"]:
                if self._batches.empty == "give":
                    yield batch
            else:
                images = batch["image"].to(self._device, non_blocking=True)
                yield {**batch, "image": images if self._as_bytes else images.float().div_(255)}

    def _decoded(self) -> Iterable[Batch | DataError]:
        """Batches with uint8 images on the CPU, made in this process or by the loader processes."""
        if self._processes == 0:
            return self._batches
        return DataLoader(
            self._batches,
            batch_size=None,
            num_workers=self._processes,
            prefetch_factor=PREFETCH,
            # Without it, DataLoader draws its base seed from torch's global generator.
            generator=torch.Generator().manual_seed(0),
            pin_memory=self._device.type == "cuda",
        )


@dataclass(frozen=True, eq=False)
class RankBatches(IterableDataset[Batch | DataError]):
    """Batches of one rank. Of n loader processes, process w makes the batches w, w + n, ... Picklable.

    Attributes:
        root, split, tars, shards: as `read_samples` takes them.
        numbers: for each batch the numbers of its samples, counted through `shards`.
        decoder: makes the batches.
        data: how shards are read.
        empty: drop, yield or refuse a batch if none of its images decodes.
    """

    root: str
    split: str
    tars: str | None
    shards: Sequence[Shard]
    numbers: Sequence[Sequence[int]]
    decoder: Decoder
    data: DataParams
    empty: Literal["drop", "give", "refuse"]

    def __iter__(self) -> Iterator[Batch | DataError]:
        """Yields the batches of this process in order. A `DataError`, yielded last, ends the pass."""
        info = get_worker_info()
        process, processes = (0, 1) if info is None else (info.id, info.num_workers)
        mine = self.numbers[process::processes]
        where, numbers_of_all = {"split": self.split, "tars": self.tars}, list(chain.from_iterable(mine))
        samples = read_samples(self.root, self.shards, numbers_of_all, verify=self.data.verify, **where)
        try:
            with self._prefetched(process, processes) as reach, closing(samples), closing(self.decoder):
                for place, numbers in enumerate(mine):
                    reach(process + place * processes)
                    yield self._batch(islice(samples, len(numbers)))
        except DataError as error:  # yielded, because DataLoader would wrap its message in a traceback
            yield error

    @contextmanager
    def _prefetched(self, process: int, processes: int) -> Iterator[Callable[[int], None]]:
        """Context in which remote shards are prefetched; yields a function to call with each batch's number.

        The rank's first loader process prefetches for all of them, because the order of the epoch is known.
        """
        place = self.root if self.tars is None else self.tars
        if process > 0 or not is_remote(place):
            yield lambda batch: None
            return
        ahead = PREFETCH * processes if get_worker_info() else 0
        with closing(Prefetcher(place, list(first_needs(self.shards, self.numbers)), ahead)) as prefetcher:
            yield prefetcher.reach

    def _batch(self, raw_samples: Iterable[RawSample]) -> Batch:
        """Makes one batch; raises `DecodeError` for an image that does not decode, unless it is skipped."""
        samples: list[DecodedSample] = []
        errors: list[DecodeError] = []
        for raw in raw_samples:
            try:
                samples.append(self.decoder.decode(raw))
            except DecodeError as error:
                errors.append(DecodeError(f"{raw.shard}: {raw.key}: does not decode: {error}"))
                if self.data.on_error == "raise":
                    raise errors[-1] from None
                log.warning("left out: %s", errors[-1])
        if self.empty == "refuse" and not samples:
            raise errors[0]
        return self.decoder.collate(samples, skipped=len(errors))
