"""Scenes drawn again without some of their elements."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.data.drawing import scene as drawing
from pipelines.data.drawing.scene import Element, draw, key_of, place_of, render
from pipelines.data.drawing.shapes import coverage
from pipelines.params import ScenesParams

COUNTS = {"train": 25, "val": 10, "test": 10}
OBJECTS = ScenesParams(source="scenes", counts=COUNTS, image_size=48)
SEVERAL = ScenesParams(
    source="scenes", variant="scenes", counts=COUNTS, image_size=48, objects_per_image=(1, 3)
)
CROWDED = SEVERAL.model_copy(update={"objects_per_image": (4, 6), "correlation": {"test": 0.9}})


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def opacities(params: ScenesParams, index: int) -> np.ndarray:
    """Share of each pixel that each object covers, whatever hides it: (objects, S, S)."""
    rng = drawing._generator(params.seed, "test", index)
    placed = drawing._layout(drawing._labels(params, "test", index, rng), params.image_size, rng)
    return np.stack([coverage(item.outline, params.image_size) for item in placed])


@pytest.mark.parametrize("params", [OBJECTS, SEVERAL, CROWDED])
def test_with_nothing_removed_a_scene_is_the_stored_image_to_the_bit(params):
    for index in range(8):
        sample, scene = draw(params, "test", index), render(params, *place_of(f"test-{index:07d}"))
        assert (pixels(sample.image) == scene.pixels).all()
        assert (pixels(sample.mask) == scene.mask).all()
        assert [box[0] for box in sample.boxes] == list(scene.labels)
        assert len(scene.elements) == len(sample.boxes) + scene.clutter


@pytest.mark.parametrize("params", [OBJECTS, SEVERAL, CROWDED])
def test_a_removed_object_changes_only_pixels_that_it_covers_and_no_later_object_hides(params):
    for index in range(8):
        scene, covered = render(params, "test", index), opacities(params, index)
        for number in range(1, len(scene.labels) + 1):
            without = render(params, "test", index, [Element("object", number)])
            changed = (without.pixels != scene.pixels).any(-1)
            hidden = np.max(covered[number:], axis=0, initial=0) == 1
            assert not changed[(covered[number - 1] == 0) | hidden].any()
            assert changed[scene.mask == number].mean() > 0.8  # other pixels have the same colour as before
            assert not (without.mask == number).any()
            elsewhere = scene.mask != number
            assert (without.mask == scene.mask)[elsewhere].all()
            assert (without.labels, without.group) == (scene.labels, scene.group)


def test_a_removed_object_shows_the_one_behind_it():
    seen = 0
    for index in range(10):
        scene, covered = render(CROWDED, "test", index), opacities(CROWDED, index)
        top = len(scene.labels)
        below = render(CROWDED, "test", index, [Element("object", top)]).mask
        for number in range(1, top):
            behind = (scene.mask == top) & (covered[number - 1] == 1) & (below == number)
            alone = [Element("object", other) for other in range(1, top + 1) if other != number]
            only = render(CROWDED, "test", index, alone).pixels
            without = render(CROWDED, "test", index, [Element("object", top)]).pixels
            inner = behind & (np.max(covered[number:-1], axis=0, initial=0) == 0)
            assert (without[inner] == only[inner]).all()
            seen += int(inner.sum())
    assert seen > 50


def test_removed_clutter_changes_little_and_never_what_an_object_hides():
    for index in range(8):
        scene, covered = render(SEVERAL, "test", index), opacities(SEVERAL, index)
        solid = np.max(covered, axis=0) == 1
        for number in range(1, scene.clutter + 1):
            without = render(SEVERAL, "test", index, [Element("clutter", number)])
            changed = (without.pixels != scene.pixels).any(-1)
            assert changed.mean() < 0.04
            assert not changed[solid].any()
            assert (without.mask == scene.mask).all()


def test_removals_add_up():
    for index in range(8):
        scene = render(SEVERAL, "test", index)
        bare = render(SEVERAL, "test", index, scene.elements)
        only_last = render(SEVERAL, "test", index, scene.elements[1:])
        outside = opacities(SEVERAL, index)[0] == 0
        assert (bare.pixels == only_last.pixels)[outside].all()
        assert not bare.mask.any()


def test_only_what_is_there_can_be_removed():
    with pytest.raises(ValueError, match="test-0000000: no object 2 to remove; there are 1 objects"):
        render(OBJECTS, "test", 0, [Element("object", 2)])
    with pytest.raises(ValueError, match="no clutter 0"):
        render(OBJECTS, "test", 0, [Element("clutter", 0)])


def test_a_key_says_which_image_it_is():
    assert place_of(key_of("val", 12)) == ("val", 12)
    assert key_of("train", 3) == draw(OBJECTS, "train", 3).key
    for wrong in ("test-12", "tests-0000012", "0000012", "test-0000012.png"):
        with pytest.raises(ValueError, match="test-0000012"):
            place_of(wrong)
