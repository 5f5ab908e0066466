"""`scenes`: drawn images of coloured shapes on textured backgrounds, with boxes, masks and captions."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipelines.data.drawing.scene import CLASSES, SPLITS, Split, draw
from pipelines.data.formats import archive
from pipelines.data.formats.archive import Ref
from pipelines.data.raw import listing
from pipelines.data.raw.listing import ListedImages
from pipelines.data.shards.sample import DataError, Description, Sample, caption_entry, captions_of
from pipelines.params import ScenesParams
from pipelines.process import cpu_count, mapped
from pipelines.progress import bar
from pipelines.storage.files import combined_sha256, file_digest, staged

_CHUNK = 500  # images per chunk; an interrupted `fetch` resumes at a chunk
_END = bytes(2 * tarfile.BLOCKSIZE)  # end of a tar
_SAMPLE = TypeAdapter(Sample)


@dataclass(frozen=True)
class Scenes(ListedImages):
    """Draws scenes into one tar per split, with `<key>.png`, `<key>.json` and `<key>.mask.png` per image."""

    params: ScenesParams

    def fetch(self, raw: Path, cache: Path, progress: bool = True, processes: int | None = None) -> None:
        """Draws every split. Chunks that an interrupted call has drawn are taken from `cache`.

        `processes` (by default one per core) affects the speed only.
        """
        chunks = cache / f"scenes-{self._identity()[:16]}"
        chunks.mkdir(parents=True, exist_ok=True)
        raw.mkdir(parents=True, exist_ok=True)
        _draw_chunks(self.params, chunks, processes or cpu_count(), progress)
        checksums: dict[str, str] = {}
        for split in SPLITS:
            refs = _join(chunks, raw, split, self.params.counts.get(split, 0))
            listing.write_references(raw, split, refs)
            checksums[split] = file_digest(raw / f"{split}.tar")
        listing.write_raw_manifest(raw, self._description(combined_sha256(checksums)))
        shutil.rmtree(chunks)

    def index(self, raw: Path, split: str) -> list[Ref]:
        """References in the order of drawing, which balances the classes already (see `drawing.scene`)."""
        return self.references(raw, split)

    def load(self, raw: Path, reference: Ref) -> Sample:
        """The sample at `reference`; raises `DataError` if its tar has changed or was cut short."""
        content = archive.read(raw, reference)
        with tarfile.open(fileobj=io.BytesIO(content + _END)) as tar:
            parts = {
                member.name.partition(".")[2]: file.read()
                for member in tar
                if (file := tar.extractfile(member))
            }
        details = json.loads(parts["json"])
        captions = captions_of(details)
        known = {name: value for name, value in details.items() if name not in ("caption", "captions")}
        files = {"image": parts["png"], "mask": parts["mask.png"], "extension": "png"}
        return _SAMPLE.validate_python({**known, **files, "key": reference.key, "captions": captions})

    def _description(self, checksum: str) -> Description:
        """The description of the data set with these params."""
        params = self.params
        return Description(
            classes=CLASSES,
            task="multiclass" if params.variant == "objects" else "multilabel",
            source=f"scenes: {params.variant}, {params.image_size} px, seed {params.seed}"
            + (", captions" if params.captions else ""),
            checksum=checksum,
            counts={split: params.counts.get(split, 0) for split in SPLITS},
        )

    def _identity(self) -> str:
        """A hash of the params and the code of `pipelines.data`; chunks of other code are not reused."""
        digest = hashlib.sha256(self.params.model_dump_json(exclude={"counts", "shard_size"}).encode())
        for path in sorted(Path(__file__).parents[1].rglob("*.py")):
            digest.update(path.read_bytes())
        return digest.hexdigest()


SOURCE = Scenes


def _chunk_path(chunks: Path, split: Split, start: int, count: int) -> Path:
    """Path of the chunk with the images [start, start + count) of a split."""
    return chunks / f"{split}-{start:07d}-{count}.tar"


def _spans(count: int) -> Iterator[tuple[int, int]]:
    """(start, count) of each chunk of a split."""
    return ((start, min(_CHUNK, count - start)) for start in range(0, count, _CHUNK))


def _draw_chunks(params: ScenesParams, chunks: Path, processes: int, progress: bool) -> None:
    """Draws the chunks that are missing in the folder `chunks`."""
    wanted = [(split, *span) for split, count in params.counts.items() for span in _spans(count)]
    missing = [item for item in wanted if not _chunk_path(chunks, *item).exists()]
    total, to_do = (sum(count for *_, count in items) for items in (wanted, missing))
    with bar("drawing", total, done=total - to_do, show=progress) as shown:
        for count in mapped(partial(_draw_chunk, params, chunks), missing, processes):
            shown.update(count)


def _draw_chunk(params: ScenesParams, chunks: Path, chunk: tuple[Split, int, int]) -> int:
    """Draws one chunk into its file, atomically; returns its number of images."""
    split, start, count = chunk
    with staged(_chunk_path(chunks, *chunk)) as unfinished, unfinished.open("wb") as file:
        for index in range(start, start + count):
            file.write(_members(draw(params, split, index)))
    return count


def _members(sample: Sample) -> bytes:
    """The tar members of one sample as bytes, without the end of a tar."""
    details: dict[str, Any] = {"boxes": sample.boxes, "group": sample.group, **caption_entry(sample.captions)}
    details |= {"label": sample.label} if sample.labels is None else {"labels": sample.labels}
    assert sample.mask is not None
    parts = {
        "png": sample.image,
        "json": json.dumps(details, sort_keys=True).encode(),
        "mask.png": sample.mask,
    }
    blocks = []
    for suffix, content in parts.items():
        member = tarfile.TarInfo(f"{sample.key}.{suffix}")
        member.size = len(content)
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        blocks += [member.tobuf(tarfile.USTAR_FORMAT), content, padding]
    return b"".join(blocks)


def _join(chunks: Path, raw: Path, split: Split, count: int) -> list[Ref]:
    """Joins the chunks of a split to `raw/<split>.tar`, atomically; returns references to its samples."""
    name = f"{split}.tar"
    refs: list[Ref] = []
    with staged(raw / name) as path, path.open("wb") as file:
        for span in _spans(count):
            content = _chunk_path(chunks, split, *span).read_bytes()
            refs += _locate(content, name, file.tell())
            file.write(content)
        file.write(_END)
    if len(refs) != count:
        raise DataError(
            f"{raw / name}: {len(refs)} samples where {count} were drawn; delete {chunks} and fetch again"
        )
    return refs


def _locate(content: bytes, name: str, offset: int) -> list[Ref]:
    """References to the samples of the chunk `content` that starts at byte `offset` of the tar `name`."""
    starts: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(content + _END)) as tar:
        for member in tar:
            starts.setdefault(member.name.partition(".")[0], member.offset)
    ends = [*list(starts.values())[1:], len(content)]
    return [
        Ref(key, name, offset + start, end - start)
        for (key, start), end in zip(starts.items(), ends, strict=True)
    ]
