"""`mixture`: the images of several data sets as one unlabelled data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data import sources
from pipelines.data.raw import listing
from pipelines.data.raw.holdout import shuffled
from pipelines.data.raw.keys import in_part
from pipelines.data.shards.sample import DataError, Description, Sample
from pipelines.params import MixtureParams
from pipelines.storage.files import combined_sha256

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Mixture:
    """The concatenation, split by split, of the data sets in `of`.

    `train` is shuffled, so that each shard mixes the data sets. A sample has an image only. Its key is made
    of the number of its data set in `of` and its key there.
    """

    params: MixtureParams

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Fetches each data set into the subfolder of `raw` that is named by its number.

        Raises:
            DataError: a data set cannot be fetched, or `train` or `val` has no image in any data set.
        """
        counts: Counter[str] = Counter()
        checksums: dict[str, str] = {}
        names: list[str] = []
        for number, params in enumerate(self.params.of):
            folder, part = raw / str(number), sources.get(params)
            folder.mkdir(parents=True, exist_ok=True)
            part.fetch(folder, cache / str(number), progress)
            description = part.describe(folder)
            counts.update(description.counts)
            checksums[str(number)] = description.checksum
            names.append(description.source)
        for split in ("train", "val"):
            if not counts[split]:
                raise DataError(f"mixture of {', '.join(names)}: {split} has no image")
        description = Description(
            (),
            "unlabelled",
            f"mixture of {', '.join(names)}",
            combined_sha256(checksums),
            {split: counts[split] for split in SPLITS},
        )
        listing.write_raw_manifest(raw, description)

    def describe(self, raw: Path) -> Description:
        return listing.read_description(raw)

    def index(self, raw: Path, split: str) -> list[tuple[int, Any]]:
        """(number of the data set, its own reference) for each sample."""
        refs = [
            (number, ref)
            for number, params in enumerate(self.params.of)
            for ref in sources.get(params).index(raw / str(number), split)
        ]
        return shuffled(refs, self.params.split_seed) if split == "train" else refs

    def load(self, raw: Path, reference: tuple[int, Any]) -> Sample:
        number, ref = reference
        sample = sources.get(self.params.of[number]).load(raw / str(number), ref)
        return Sample(in_part(number, sample.key), sample.image, sample.extension)


SOURCE = Mixture
