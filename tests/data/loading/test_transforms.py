"""Transforms: image, boxes, mask and maps move together, by the sample's own random numbers."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from pipelines.data.loading import rand_augment as ra
from pipelines.data.loading.batch import keep_boxes
from pipelines.data.loading.transforms import eval_transform, resize_square, train_transform
from pipelines.params import DataParams

AUGMENTS = ("none", "flip", "pad_crop_flip", "random_resized_crop_flip")
OBJECT = 250


def params(**changes) -> DataParams:
    return DataParams(**{"image_size": 32, "augment": "none", **changes})


def scene(height: int, width: int, box: tuple[int, int, int, int]) -> dict[str, torch.Tensor]:
    """A black image with one bright rectangle, which is also its box, its mask and a map."""
    xmin, ymin, xmax, ymax = box
    mask = torch.zeros(height, width, dtype=torch.int64)
    mask[ymin:ymax, xmin:xmax] = 1
    return {
        "image": (mask * OBJECT).to(torch.uint8).expand(3, -1, -1).contiguous(),
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor([box]).float(), format="XYXY", canvas_size=(height, width)
        ),
        "mask": tv_tensors.Mask(mask),
        "map": tv_tensors.Image(mask.float()[None]),
    }


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("eval_resize", [None, 40])
@pytest.mark.parametrize("size", [(32, 32), (45, 60), (70, 50)])
def test_image_box_mask_and_map_move_together(augment, eval_resize, size):
    transform = train_transform(params(augment=augment, eval_resize=eval_resize))
    height, width = size
    seen = 0
    for seed in range(25):
        views = transform(
            scene(height, width, (width // 4, height // 3, width // 4 + 14, height // 3 + 12)),
            random.Random(seed),
        )
        image, mask, heat = views["image"], views["mask"], views["map"]
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.uint8
        assert mask.shape == (32, 32)
        assert mask.dtype == torch.int64
        assert heat.shape == (1, 32, 32)
        bright = image[0] > OBJECT // 2
        # Resizing mixes pixels at the border, so that half a pixel may differ on each side.
        xmin, ymin, xmax, ymax = views["boxes"][0].tolist()
        border = 2 * (xmax - xmin + ymax - ymin) + 4 if bright.any() else 32
        assert (bright ^ (mask == 1)).sum() <= border / 2
        assert (bright ^ (heat[0] > 0.5)).sum() <= border / 2
        if bright.sum() < 9:
            continue
        seen += 1
        rows, columns = bright.nonzero(as_tuple=True)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert all(abs(float(a) - b) <= 1.0 for a, b in zip(found, (xmin, ymin, xmax, ymax), strict=True))
    assert seen >= 10


@pytest.mark.parametrize("augment", ["flip", "pad_crop_flip"])
def test_exact_agreement_where_nothing_is_resized(augment):
    transform = train_transform(params(augment=augment))
    for seed in range(40):
        views = transform(scene(32, 32, (1, 3, 9, 31)), random.Random(seed))
        xmin, ymin, xmax, ymax = (int(value) for value in views["boxes"][0])
        expected = torch.zeros(32, 32, dtype=torch.int64)
        expected[ymin:ymax, xmin:xmax] = 1
        assert torch.equal(views["mask"].as_subclass(torch.Tensor), expected)
        assert torch.equal(views["image"][0] > 0, expected == 1)


@pytest.mark.parametrize("augment", AUGMENTS[1:])
def test_drawn_from_the_given_generator_alone(augment):
    transform = train_transform(params(augment=augment))
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    random_before = random.getstate()
    outcomes = [transform({"image": image}, random.Random(seed))["image"] for seed in range(20)]
    again = [transform({"image": image}, random.Random(seed))["image"] for seed in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(outcomes, again, strict=True))
    assert any(not torch.equal(outcomes[0], other) for other in outcomes)
    assert torch.equal(before, torch.get_rng_state())
    assert random.getstate() == random_before


def test_crops_of_the_whole_area_are_the_whole_image():
    transform = train_transform(params(augment="random_resized_crop_flip", crop_scale=1.0))
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        view = transform({"image": image}, random.Random(seed))["image"]
        assert torch.equal(view, image) or torch.equal(view, image.flip(-1))


def test_flip_mirrors_about_half():
    transform = train_transform(params(augment="flip"))
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, 0] = 255
    left = sum(bool(transform({"image": image}, random.Random(f"{i}"))["image"][0, 0, 0]) for i in range(400))
    assert 150 < left < 250


def test_pad_crop_reaches_every_offset_and_no_further():
    transform = train_transform(params(augment="pad_crop_flip", crop_padding=2))
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 16, 16] = 255
    seen = set()
    for seed in range(600):
        place = transform({"image": image}, random.Random(seed))["image"][0].nonzero()[0].tolist()
        seen.add(tuple(place))
    rows = {row for row, _ in seen}
    columns = {column for _, column in seen}
    assert rows == set(range(14, 19))
    assert columns == set(range(13, 19))  # 14 to 18, and these mirrored (31 - x)


@pytest.mark.parametrize("size", [(64, 64), (20, 200), (200, 20), (5, 3)])
@pytest.mark.parametrize("smallest", [0.08, 0.7])
def test_random_crops_cover_areas_and_shapes_of_the_range(size, smallest):
    from pipelines.data.loading.transforms import _crop_size

    height, width = size
    shares = []
    for seed in range(300):
        crop_height, crop_width = _crop_size(height, width, smallest, random.Random(seed))
        assert 1 <= crop_height <= height
        assert 1 <= crop_width <= width
        shares.append(crop_height * crop_width / (height * width))
        if min(size) >= 20:
            assert 0.7 < crop_width / crop_height < 1.42
    if size == (64, 64):
        assert smallest - 0.03 < min(shares) < smallest + 0.04
        assert max(shares) > 0.9
        assert abs(sum(shares) / len(shares) - (smallest + 1) / 2) < 0.1


@pytest.mark.parametrize("size", [(45, 60), (71, 50), (40, 40), (20, 90)])
def test_evaluation_view_is_torchvisions(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = eval_transform(params(eval_resize=40))({"image": image}, random.Random(0))["image"]
    assert torch.equal(ours, v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(32)])(image))
    straight = eval_transform(params())({"image": image}, random.Random(0))["image"]
    assert torch.equal(straight, v2.Resize((32, 32), antialias=True)(image))


def test_no_resize_at_the_right_size():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    views = {"image": image}
    assert resize_square(views, random.Random(0), size=32) is views
    assert eval_transform(params())(views, random.Random(0))["image"] is image


@pytest.mark.parametrize("augment", AUGMENTS)
def test_transforms_pickle(augment):
    transform = train_transform(params(augment=augment))
    copy = pickle.loads(pickle.dumps(transform))
    views = scene(40, 50, (5, 5, 20, 20))
    one, other = transform(views, random.Random(3)), copy(views, random.Random(3))
    assert all(torch.equal(one[name], other[name]) for name in views)


def test_boxes_that_a_crop_left_empty_are_dropped_and_ids_follow():
    corners = torch.tensor([[0.0, 0, 2, 2], [3, 1, 3, 4], [1, 1, 4, 4]])
    mask = torch.tensor([[0, 1, 3], [3, 2, 0]])
    boxes, renamed = keep_boxes(torch.tensor([5.0, 6.0, 7.0]), corners, mask)
    assert boxes.tolist() == [[5, 0, 0, 2, 2], [7, 1, 1, 4, 4]]
    assert renamed.tolist() == [[0, 1, 2], [2, 0, 0]]
    untouched, same = keep_boxes(torch.tensor([5.0]), corners[:1], mask)
    assert untouched.tolist() == [[5, 0, 0, 2, 2]]
    assert same is mask


@pytest.mark.parametrize("magnitude", [0, 10, 30])
def test_operations_of_rand_augment_are_torchvisions(magnitude):
    theirs = v2.RandAugment(interpolation=InterpolationMode.BILINEAR)
    ours = ra._MOVES | ra._COLOURS
    assert ours.keys() == theirs._AUGMENTATION_SPACE.keys()
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, (strengths, signed) in theirs._AUGMENTATION_SPACE.items():
        values = strengths(31, 20, 30)
        for sign in (1, -1) if signed else (1,):
            value = 0.0 if values is None else sign * float(values[magnitude])
            wanted = theirs._apply_image_or_video_transform(
                image, name, value, theirs.interpolation, theirs._fill
            )
            found = ours[name](image, sign * magnitude / 30)
            assert (wanted.int() - found.int()).abs().max() <= 1, (
                name
            )  # torchvision rounds the value to float32


def test_rand_augment_draws_every_operation_from_the_samples_generator_and_moves_all_views():
    transform = train_transform(params(rand_augment=15))
    before = torch.get_rng_state()
    original = scene(32, 32, (8, 10, 22, 20))
    moved, lost = 0, []
    for seed in range(150):
        views, again = (transform(dict(original), random.Random(seed)) for _ in range(2))
        assert all(torch.equal(views[name], again[name]) for name in views)
        assert all(view.shape == original[name].shape for name, view in views.items())
        shown, mask = views["map"][0] > 0.5, views["mask"] == 1
        moved += not torch.equal(views["mask"], original["mask"])
        lost.append(int((shown ^ mask).sum()))
        rows, columns = mask.nonzero(as_tuple=True)
        xmin, ymin, xmax, ymax = views["boxes"][0].tolist()
        assert xmin - 1 <= columns.min()
        assert ymin - 1 <= rows.min()
        assert columns.max() <= xmax + 1
        assert rows.max() <= ymax + 1
    assert max(lost) <= 24  # of 140 pixels, by interpolation at the border
    assert 60 < moved < 120  # 1 - (9/14)^2 of 150 are 88
    assert torch.equal(before, torch.get_rng_state())
    seen = {
        name
        for seed in range(150)
        for name in random.Random(seed).choices(list(ra._MOVES | ra._COLOURS), k=2)
    }
    assert seen == ra._MOVES.keys() | ra._COLOURS.keys()
