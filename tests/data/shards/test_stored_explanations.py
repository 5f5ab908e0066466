"""Stored explanations follow their images' crops and flips, and faults end in one line."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.data.loading.loader import loader
from pipelines.data.loading.transforms import train_transform
from pipelines.data.shards.manifest import ShardError
from pipelines.data.shards.stored_explanations import (
    Origin,
    StoredExplanations,
    check_origin,
    write_index,
    write_shard,
)
from pipelines.data.shards.writer import write_shards
from pipelines.params import DataParams
from tests.support.toy_source import ToySource, encoded, plain

SIDE, COUNT, CELLS = 32, 5, 8
ORIGIN = Origin("a teacher", "some shards", "dynamic_weights", SIDE, None, CELLS, "float32")


def coordinates(side: int) -> torch.Tensor:
    """Row and column of each pixel's centre: (2, side, side)."""
    places = torch.arange(side) + 0.5
    return torch.stack([places[:, None].expand(side, side), places.expand(side, side)])


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images whose red and green are row and column times 4, and explanations with both on a coarser grid."""
    folder = tmp_path_factory.mktemp("stored")
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[..., :2] = (4 * coordinates(SIDE)).permute(1, 2, 0).numpy().round().astype(np.uint8)
    samples = [plain(number, image=encoded(pixels)) for number in range(COUNT)]
    write_shards(ToySource({"train": samples}), Path("raw"), folder / "shards", shard_size=3, progress=False)
    stored = torch.nn.functional.avg_pool2d(coordinates(SIDE)[None], SIDE // CELLS)[0]
    shards = [
        write_shard(
            str(make(folder / "stored")),
            name,
            [(f"k{n:04d}", torch.full((3,), float(n)), stored) for n in numbers],
        )
        for name, numbers in (("train-000000.tar", (0, 1, 2)), ("train-000001.tar", (3, 4)))
    ]
    assert [shard.count for shard in shards] == [3, 2]
    write_index(str(folder / "stored"), ORIGIN, shards)
    return {"shards": str(folder / "shards"), "stored": str(folder / "stored")}


def make(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def batches(roots: dict[str, str], params: DataParams, **options: Any) -> Any:
    asked = {"batch_size": 2, "explanations": roots["stored"], "train": True}
    return loader(roots["shards"], "train", params, **{**asked, **options})


@pytest.mark.parametrize("augment", ["none", "flip", "pad_crop_flip", "random_resized_crop_flip"])
@pytest.mark.parametrize("view", [(SIDE, None), (24, 28)])
def test_every_cell_names_the_pixels_that_are_beside_it(
    roots: dict[str, str], augment: Any, view: tuple[int, Any]
) -> None:
    size, resized = view
    params = DataParams(image_size=size, eval_resize=resized, augment=augment, crop_padding=5)
    shift = 0.0 if resized is None else (resized - size) / 2  # offset of the fixed view in the resized image
    scale = 1.0 if resized is None else SIDE / resized
    seen = set()
    for epoch in range(6):
        for batch in batches(roots, params, epoch=epoch):
            assert batch["teacher_maps"].shape == (2, 2, size, size)
            for image, stored in zip(batch["image"], batch["teacher_maps"], strict=True):
                source = image[:2] * 255 / 4  # coordinates in the stored image, pixels
                named = (stored * size / SIDE + shift) * scale  # the map has coordinates in the fixed view
                inside = (stored > 0).all(0) & (source > 0).all(0)  # padding is 0 in both
                assert torch.equal((stored > 0).all(0), (image[:2] > 0).all(0))
                half_a_cell = size / CELLS / 2 * scale
                assert ((named - source).abs().amax(0)[inside] <= half_a_cell + 0.3).all()
                seen.add(tuple(image[:2, 0, 0].tolist()))
    assert len(seen) > 1 or augment == "none"


def test_logits_and_maps_come_with_their_key_from_any_number_of_processes(roots: dict[str, str]) -> None:
    for workers in (0, 2):
        params = DataParams(image_size=SIDE, augment="none", loader_workers=workers)
        for batch in batches(roots, params):
            assert batch["teacher_logits"][:, 0].tolist() == [int(key[1:]) for key in batch["key"]]
    reader = StoredExplanations(roots["stored"])
    reader.read("train-000000.tar", "k0000")
    copied = pickle.loads(pickle.dumps(reader))
    assert torch.equal(copied.read("train-000001.tar", "k0004")[0], torch.full((3,), 4.0))


def test_the_map_of_an_image_that_changes_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match="rand_augment"):
        train_transform(DataParams(image_size=SIDE, rand_augment=5), stored_map=True)


@pytest.mark.parametrize(
    ("key", "values", "told"),
    [
        (
            "k0001",
            torch.ones(2, 8, 8),
            r"train-000000.tar: no logits.npy of k0000: store the explanations of all images again",
        ),
        (
            "k0000",
            torch.full((2, 8, 8), torch.nan),
            r"train-000000.tar: map.npy of k0000 has values that are not finite",
        ),
    ],
)
def test_a_missing_or_broken_explanation_is_one_line(
    roots: dict[str, str], tmp_path: Path, key: str, values: torch.Tensor, told: str
) -> None:
    write_shard(str(tmp_path), "train-000000.tar", [(key, torch.ones(3), values)])
    params = DataParams(image_size=SIDE, augment="none")
    with pytest.raises(ShardError, match=told):
        list(batches({**roots, "stored": str(tmp_path)}, params, subset=(0,)))
    with pytest.raises(ValueError, match="explanations come with training images alone"):
        batches(roots, params, train=False)
    with pytest.raises(ShardError, match=r"train-000007.tar: not read"):
        StoredExplanations(str(tmp_path)).read("train-000007.tar", "k0000")


def test_damaged_explanations_are_one_line(tmp_path: Path) -> None:
    write_shard(str(tmp_path), "train-000000.tar", [("k0000", torch.ones(3), torch.ones(2, 8, 8))])
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"NUMPY", b"NUMPI"))
    with pytest.raises(ShardError, match=r"train-000000.tar: logits.npy of k0000 is damaged[^\n]*$"):
        StoredExplanations(str(tmp_path)).read("train-000000.tar", "k0000")
    (tmp_path / "explanations.json").write_text("{")
    with pytest.raises(ShardError, match=r"explanations.json: not read[^\n]*$"):
        check_origin(str(tmp_path), ORIGIN)


def test_explanations_of_another_origin_are_refused(roots: dict[str, str], tmp_path: Path) -> None:
    check_origin(roots["stored"], ORIGIN)
    for name, value in (("teacher", "another"), ("images", "others"), ("resolution", 4), ("maps", "gradcam")):
        with pytest.raises(
            ShardError,
            match=rf"its explanations are of another {name} \([^\n]*, not {value}\): store them again$",
        ):
            check_origin(roots["stored"], replace(ORIGIN, **{name: value}))
    with pytest.raises(ShardError, match=r"no explanations.json"):
        check_origin(str(tmp_path), ORIGIN)
