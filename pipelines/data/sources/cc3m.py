"""`cc3m`: image-text tars in the format of img2dataset, such as Conceptual Captions 3M, read in place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.data.formats.archive import UNKNOWN, Contents, Ref, top_names
from pipelines.data.formats.download import download
from pipelines.data.formats.folders import list_folder
from pipelines.data.formats.img2dataset import CAPTION, FEWER, Pair, missing_images, read_pairs, stats_name
from pipelines.data.formats.left_out import LeftOut
from pipelines.data.raw import listing
from pipelines.data.raw.captioned import SPLITS, CaptionedImages, CaptionedRef
from pipelines.data.raw.holdout import shuffled
from pipelines.data.raw.keys import keys_of
from pipelines.data.shards.manifest import Shard
from pipelines.data.shards.sample import DataError, Description, caption_entry
from pipelines.data.shards.tar import Entry
from pipelines.errors import redacted
from pipelines.params import Cc3mParams
from pipelines.process import cpu_count, mapped
from pipelines.progress import bar
from pipelines.storage import files
from pipelines.storage.paths import users_path
from pipelines.storage.publish import check_name
from pipelines.storage.retry import is_remote

WORTH_A_PROCESS = 100 * 2**20  # bytes: reading fewer takes less time than starting a new interpreter


class TarRef(NamedTuple):
    """A reference to an image in its tar, with its caption, and (offset, bytes) of the `.txt`."""

    image: Ref
    captions: tuple[str, ...]
    text: tuple[int, int]


class Tar(NamedTuple):
    """A tar: its name below the root, its path or URL, its bytes, and the path or URL of its stats file."""

    name: str
    place: str
    size: int
    stats: str


@dataclass(frozen=True)
class Cc3m(CaptionedImages):
    """Image-text pairs in tars that `shard` does not copy: the index beside the manifest points into them.

    `fetch` reads every tar once, for its sha256, the locations of its samples, and their faults. A tar at a
    URL is downloaded for that, and deleted afterwards.
    """

    params: Cc3mParams

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Lists the samples of every tar. Tars that an interrupted call has read are not read again.

        Samples without an image, a readable image header or a caption are left out and counted, like empty
        tars.

        Raises:
            DataError: there is no tar, a tar is cut short, or neither `splits` nor `val_count` gives
                validation images.
        """
        params = self.params
        root = users_path(params.root)
        if not is_remote(root) and not os.path.isdir(root):
            raise DataError(f"{params.root}: no such folder: cc3m reads a folder of tars")
        if is_remote(root) and redacted(root) != root:
            raise DataError(
                f"{params.root}: contains a secret, which the manifest would show: "
                "use the environment instead"
            )
        source = f"cc3m: {params.root}"
        contents = list_folder(root)
        left_out = contents.left_out()
        tars = _tars(contents, left_out, source)
        split_of = _splits(tars, params, left_out, source)
        tars = [tar for tar in tars if tar.name in split_of]
        records = cache / "tars"
        found: dict[str, dict[str, Any]] = {}
        small = UNKNOWN not in [tar.size for tar in tars] and sum(tar.size for tar in tars) < WORTH_A_PROCESS
        processes = 1 if small else cpu_count()
        with bar("tars", len(tars), show=progress) as shown:
            for tar, record in zip(tars, mapped(partial(_read, records), tars, processes), strict=True):
                found[tar.name] = record
                shown.update(1)
                for reason, name in record["left_out"]:
                    left_out.add(reason, name)
        refs = _references(tars, found, split_of)
        if not refs["val"]:
            if params.val_count is None:
                raise DataError(
                    f"{source}: has no validation images: "
                    "set val_count, how many to hold out of train, or name splits"
                )
            refs["train"], refs["val"] = _split_off(refs["train"], params.val_count, params.split_seed)
        if not refs["train"]:
            raise DataError(f"{source}: train has no image with a caption")
        raw.mkdir(parents=True, exist_ok=True)
        for split, listed in refs.items():
            listing.write_references(raw, split, listed)
        shards = {tar.place: asdict(_shard(tar.name, found[tar.name])) for tar in tars}
        checksum = files.combined_sha256({shard["name"]: shard["sha256"] for shard in shards.values()})
        counts = {split: len(listed) for split, listed in refs.items()}
        description = Description((), "caption", source, checksum, counts)
        listing.write_raw_manifest(raw, description, left_out, tars={"root": root, "shards": shards})
        shutil.rmtree(records, ignore_errors=True)

    def references(self, raw: Path, split: str) -> list[CaptionedRef]:
        """References in the order of the tars; raises `DataError` if the split or the manifest is missing."""
        return [CaptionedRef(ref.image, ref.captions) for ref in self._in_tars(raw, split)]

    def tars(self, raw: Path) -> str:
        """The absolute path or URL of the folder that contains all tars."""
        root: str = listing.read_raw_manifest(raw)["tars"]["root"]
        return root

    def parts(
        self, raw: Path, split: str
    ) -> Iterator[tuple[Shard, Sequence[Entry], dict[str, dict[str, Any]]]]:
        """Yields each tar of `split` with its samples; see `shards.in_place.InPlace`."""
        shards = listing.read_raw_manifest(raw)["tars"]["shards"]
        for place, group in groupby(self._in_tars(raw, split), key=lambda ref: ref.image.name):
            refs = list(group)
            entries = [Entry(ref.image.key, (_place(ref.image), (CAPTION, *ref.text))) for ref in refs]
            known = {ref.image.key: caption_entry(ref.captions) for ref in refs}
            yield Shard(**{**shards[place], "count": len(refs)}), entries, known

    def _in_tars(self, raw: Path, split: str) -> list[TarRef]:
        lines = listing.read_lines(raw, split)
        return [TarRef(Ref(*image), tuple(captions), (text[0], text[1])) for image, captions, text in lines]


SOURCE = Cc3m


def _place(image: Ref) -> tuple[str, int, int]:
    """(suffix, offset, bytes) of an image."""
    return image.path.rpartition(".")[2], image.offset, image.size


def _tars(contents: Contents, left_out: LeftOut, source: str) -> list[Tar]:
    """The tars of a folder, sorted by name.

    Counts in `left_out` the files that are neither tars nor written by img2dataset beside them.
    """
    names = [name for name in sorted(contents.files) if name.endswith(".tar")]
    if not names:
        raise DataError(f"{source}: has no tar; there is: {top_names(contents.files)}")
    for name in sorted(contents.files.keys() - set(names)):
        if not name.endswith(("_stats.json", ".parquet")):
            left_out.add("files that are neither tars nor their statistics", name)
    found = contents.files
    stats = {name: found[stats_name(name)].place if stats_name(name) in found else "" for name in names}
    return [Tar(check_name(name), found[name].place, found[name].size, stats[name]) for name in names]


def _splits(tars: Sequence[Tar], params: Cc3mParams, left_out: LeftOut, source: str) -> dict[str, str]:
    """Name of each tar to be read -> its split, by the patterns in `params.splits`.

    Tars that match no pattern belong to `train` if `train` has no pattern; otherwise they are left out.
    """
    split_of: dict[str, str] = {}
    patterns = params.splits
    for tar in tars:
        splits: list[str] = [split for split, pattern in patterns.items() if fnmatch(tar.name, pattern)]
        if len(splits) > 1:
            raise DataError(
                f"{source}: {tar.name} is in the splits {' and '.join(splits)}: a tar is in one split"
            )
        if splits or "train" not in patterns:
            split_of[tar.name] = splits[0] if splits else "train"
        else:
            left_out.add("tars of no split", tar.name)
    for split, pattern in patterns.items():
        if split not in split_of.values():
            raise DataError(
                f"{source}: no tar fits {pattern!r}, the pattern of {split}; there is: {tars[0].name}"
            )
    return split_of


def _read(records: Path, tar: Tar) -> dict[str, Any]:
    """The record of a tar: its bytes, sha256, pairs and items left out. Stored in the folder `records`."""
    stored = records / f"{hashlib.sha256(tar.place.encode()).hexdigest()[:24]}.json"
    record = files.read_record(stored, dict)
    if record is None:
        path = Path(tar.place)
        if is_remote(tar.place):
            path = stored.with_suffix(".tar")
            download(tar.place, path, progress=False)
        pairs, left_out = read_pairs(path, tar.name)
        stats = files.read_record(tar.stats, dict) if tar.stats else None
        left_out += [(FEWER, tar.name)] * missing_images(stats, pairs, left_out)
        record = {
            "bytes": path.stat().st_size,
            "sha256": files.file_digest(path),
            "pairs": [list(asdict(pair).values()) for pair in pairs],
            "left_out": left_out,
        }
        files.write_json(stored, record)
        if is_remote(tar.place):
            path.unlink()
    return record


def _shard(name: str, record: Mapping[str, Any]) -> Shard:
    """The entry of a tar in a manifest of shards."""
    return Shard(name, record["bytes"], record["sha256"], len(record["pairs"]))


def _references(
    tars: Sequence[Tar], found: Mapping[str, Mapping[str, Any]], split_of: Mapping[str, str]
) -> dict[str, list[TarRef]]:
    """References by split, in the order of the tars, with keys that are unique across all splits."""
    keys = keys_of({f"{tar.name}/{pair[0]}": pair[0] for tar in tars for pair in found[tar.name]["pairs"]})
    refs: dict[str, list[TarRef]] = {split: [] for split in SPLITS}
    for tar in tars:
        for pair in (Pair(*values) for values in found[tar.name]["pairs"]):
            path = f"{tar.name}/{pair.name}"
            image = Ref(keys[path], tar.place, *pair.image, path=f"{path}.{pair.extension}")
            refs[split_of[tar.name]].append(TarRef(image, (pair.caption,), pair.text))
    return refs


def _split_off(refs: Sequence[TarRef], count: int, seed: int) -> tuple[list[TarRef], list[TarRef]]:
    """(training references, `count` held-out references), each in the original order.

    The held-out references are drawn tar by tar, so that validation reads few tars.
    """
    if count >= len(refs):
        raise DataError(f"val_count: {count} images cannot be held out of {len(refs)} training images")
    of_tar = [list(group) for _, group in groupby(refs, key=lambda ref: ref.image.name)]
    drawn = [ref for group in shuffled(of_tar, seed) for ref in shuffled(group, seed)][:count]
    chosen = {ref.image.key for ref in drawn}
    return [ref for ref in refs if ref.image.key not in chosen], [
        ref for ref in refs if ref.image.key in chosen
    ]
