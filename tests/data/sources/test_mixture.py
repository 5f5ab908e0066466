"""A mixture has every image once, in its original split, without labels, boxes and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.data.loading.loader import loader
from pipelines.data.shards.manifest import read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.params import CaptionsParams, Cc3mParams, DataParams, MixtureParams, ScenesParams
from tests.support.fetching import SPLITS, encoded, image_folder, photo_folder, samples, sharded, write_files
from tests.support.image_text_tars import numbered, write_tar


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """A mixture of the same image folder twice, captioned images, tars in place and drawn scenes."""
    monkeypatch.setattr("pipelines.data.sources.scenes.cpu_count", lambda: 1)
    photos = image_folder(photo_folder(tmp_path / "photos"))
    pairs = write_files(tmp_path / "pairs", {f"{n}.png": encoded(n + 100) for n in range(4)})
    write_files(pairs, {"captions.csv": "image,caption\n" + "".join(f"{n}.png,a dog\n" for n in range(4))})
    write_tar(tmp_path / "tars/00000.tar", numbered(0, 5))
    return (
        photos,
        photos,
        CaptionsParams(source="captions", root=str(pairs), val_count=1),
        Cc3mParams(source="cc3m", root=str(tmp_path / "tars"), val_count=2),
        ScenesParams(source="scenes", counts={"train": 3, "val": 2, "test": 1}, image_size=16),
    )


def test_every_image_once_in_its_split_without_labels(parts: tuple[Any, ...], tmp_path: Path) -> None:
    mixture = MixtureParams(source="mixture", of=parts)
    mixed, parts_own = samples(mixture, tmp_path), [samples(part, tmp_path / "own") for part in parts]
    for split in SPLITS:
        own = [sample.image for read in parts_own for sample in read[split]]
        assert sorted(sample.image for sample in mixed[split]) == sorted(own)
        keys = [sample.key for sample in mixed[split]]
        assert len(set(keys)) == len(keys)
    assert len({sample.key[0] for sample in mixed["train"][:20]}) >= 4  # shards mix the data sets
    sample = next(sample for sample in mixed["test"] if sample.key == "1_bee_00")
    assert (sample.label, sample.labels, sample.boxes, sample.captions, sample.mask) == (
        None,
        None,
        (),
        (),
        None,
    )


def test_shards_of_a_mixture_are_read_as_images_alone(parts: tuple[Any, ...], tmp_path: Path) -> None:
    root = sharded(MixtureParams(source="mixture", of=parts), tmp_path)
    manifest = read_manifest(root)
    assert (manifest.task, manifest.classes, manifest.tars) == ("unlabelled", (), None)
    assert {split: manifest.count(split) for split in SPLITS} == {"train": 45, "val": 17, "test": 13}
    [batch] = loader(root, "val", DataParams(image_size=8), 17)
    assert set(batch) == {"key", "image", "skipped"}


def test_a_mixture_without_validation_images_and_one_of_nothing_are_one_line(
    parts: tuple[Any, ...], tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="of: name at least one data set"):
        MixtureParams(source="mixture", of=())
    with pytest.raises(ValidationError, match="val_count: each data set of `of` holds out its own"):
        MixtureParams(source="mixture", of=parts, val_count=3)
    with pytest.raises(DataError, match="set val_count"):
        samples(
            MixtureParams(source="mixture", of=(image_folder(tmp_path / "photos", val_count=None),)), tmp_path
        )
