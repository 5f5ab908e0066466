"""The data sets: one module per source, behind the protocol `Source`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.data.shards.sample import Description, Sample

if TYPE_CHECKING:
    from pipelines.params import Dataset


class Source(Protocol):
    """A data set that is fetched first, then read sample by sample. Picklable, like its references."""

    def fetch(self, raw: Path, cache: Path, progress: bool = True) -> None:
        """Downloads or generates the data, verifies it, and writes it or references to it to `raw`.

        Incomplete data is kept in the folder `cache`, where a later call resumes. `raw/manifest.json` is
        written last.

        Raises:
            DataError: the data does not match the params, or cannot be read.
        """

    def describe(self, raw: Path) -> Description:
        """The description of the data set that `fetch` wrote to `raw`."""

    def index(self, raw: Path, split: str) -> list[Any]:
        """A small picklable reference for each sample of `split` (train, val, test), in a fixed order."""

    def load(self, raw: Path, reference: Any) -> Sample:
        """The sample of one reference. Calls may come in any order, and from several processes."""


def modules(params: Dataset) -> tuple[str, ...]:
    """Names of the modules that read the data set of `params`: its source and, for a mixture, its parts."""
    kinds = dict.fromkeys(each.source for each in (params, *getattr(params, "of", ())))
    return tuple(f"{__name__}.{kind}" for kind in kinds)


def get(params: Dataset) -> Source:
    """The source of `params`: `SOURCE` of the module that `params.source` names. Imports no other source."""
    source: Source = importlib.import_module(f"{__name__}.{params.source}").SOURCE(params)
    return source
