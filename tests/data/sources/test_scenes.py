"""The generator of `scenes`."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.drawing.backgrounds import BACKGROUNDS
from pipelines.data.drawing.captions import SURFACES
from pipelines.data.drawing.scene import CLASSES, COLOURS, draw
from pipelines.data.drawing.shapes import SHAPES, coverage
from pipelines.data.formats.png import encode_png
from pipelines.data.shards.sample import DataError, Sample
from pipelines.data.sources import get
from pipelines.data.sources import scenes as scenes_module
from pipelines.params import ScenesParams


def objects(**changes) -> ScenesParams:
    return ScenesParams(**{"source": "scenes", "counts": {"train": 25, "val": 10, "test": 10}, **changes})


def several(**changes) -> ScenesParams:
    return objects(**{"variant": "scenes", "objects_per_image": (1, 3), **changes})


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def drawn(params: ScenesParams, count: int) -> list[Sample]:
    return [draw(params, "train", index) for index in range(count)]


def fetched(params: ScenesParams, folder: Path, **options) -> Path:
    raw = folder / "raw"
    get(params).fetch(raw, folder / "cache", progress=False, **options)
    return raw


def content(raw: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in raw.iterdir()}


def test_an_image_depends_on_seed_split_and_index_alone():
    params = several()
    forwards = [draw(params, "train", index) for index in range(8)]
    backwards = [draw(params, "train", index) for index in reversed(range(8))]
    assert forwards == backwards[::-1]
    assert draw(several(counts={"train": 3, "val": 3, "test": 3}), "train", 5) == forwards[5]
    others = [draw(params, "val", 5), draw(params, "train", 6), draw(several(seed=1), "train", 5)]
    assert len({sample.image for sample in [forwards[5], *others]}) == 4


def test_files_do_not_depend_on_processes_or_chunks(tmp_path, monkeypatch):
    once = content(fetched(objects(), tmp_path / "a", processes=1))
    monkeypatch.setattr(scenes_module, "_CHUNK", 7)
    assert content(fetched(objects(), tmp_path / "b", processes=2)) == once


def test_an_interrupted_fetch_goes_on_with_what_it_has_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_module, "_CHUNK", 5)
    whole = content(fetched(objects(), tmp_path / "whole", processes=1))
    drawings = []

    def interrupted(params, split, index):
        if len(drawings) == 12:
            raise KeyboardInterrupt
        drawings.append(index)
        return draw(params, split, index)

    def counted(params, split, index):
        drawings.append(index)
        return draw(params, split, index)

    monkeypatch.setattr(scenes_module, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetched(objects(), tmp_path, processes=1)
    with pytest.raises(DataError, match="run fetch"):
        get(objects()).index(tmp_path / "raw", "train")
    drawings.clear()
    monkeypatch.setattr(scenes_module, "draw", counted)
    assert content(fetched(objects(), tmp_path, processes=1)) == whole
    assert len(drawings) == 45 - 10  # two chunks of five images were complete


def test_what_is_read_is_what_was_drawn(tmp_path):
    params = several(counts={"train": 12, "val": 2, "test": 3})
    source, raw = get(params), fetched(params, tmp_path)
    read = [source.load(raw, ref) for ref in source.index(raw, "train")]
    assert read == drawn(params, 12)
    description = source.describe(raw)
    assert description.counts == {"train": 12, "val": 2, "test": 3}
    assert description.task == "multilabel"
    assert description.classes == CLASSES
    assert [ref.key for ref in source.index(raw, "val")] == ["val-0000000", "val-0000001"]


def test_a_cut_tar_is_noticed(tmp_path):
    raw = fetched(objects(), tmp_path)
    path = raw / "test.tar"
    path.write_bytes(path.read_bytes()[:-5000])
    source = get(objects())
    with pytest.raises(DataError, match=r"test\.tar.*test-0000009"):
        source.load(raw, source.index(raw, "test")[-1])


@pytest.mark.parametrize("params", [objects(), several(), several(image_size=33, objects_per_image=(4, 6))])
def test_each_box_is_the_tight_box_of_its_instance(params):
    for sample in drawn(params, 30):
        mask = pixels(sample.mask)
        assert mask.shape == pixels(sample.image).shape[:2] == (params.image_size, params.image_size)
        assert np.unique(mask).tolist() == list(range(len(sample.boxes) + 1))
        for instance, (_, xmin, ymin, xmax, ymax) in enumerate(sample.boxes, start=1):
            rows, columns = np.nonzero(mask == instance)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (xmin, ymin, xmax, ymax)


def test_labels_follow_the_boxes_and_their_number_the_params():
    numbers = set()
    for sample in drawn(several(), 40):
        assert sample.label is None
        assert sample.labels == tuple(sorted({box[0] for box in sample.boxes}))
        numbers.add(len(sample.boxes))
    assert numbers == {1, 2, 3}
    for sample in drawn(objects(), 40):
        assert sample.labels is None
        assert [box[0] for box in sample.boxes] == [sample.label]


def test_each_ten_images_hold_each_class_once():
    labels = [sample.label for sample in drawn(objects(), 30)]
    assert [sorted(labels[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert labels[:10] != labels[10:20]


@pytest.mark.parametrize(("correlation", "expected"), [(0.0, 0.1), (0.5, 0.55), (1.0, 1.0)])
def test_class_and_background_agree_as_often_as_the_correlation_says(correlation, expected):
    # With probability c the class's own background, else one of ten: c + (1 - c) / 10.
    count = 400
    same = np.mean(
        [sample.label == sample.group for sample in drawn(objects(correlation={"train": correlation}), count)]
    )
    assert abs(same - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)


def test_with_several_objects_the_background_follows_the_largest():
    for sample in drawn(several(correlation={"train": 1.0}), 20):
        assert sample.group == sample.boxes[0][0]


def test_correlation_holds_for_its_split_alone():
    params = objects(correlation={"train": 1.0})
    assert {
        draw(params, "test", index).group == draw(params, "test", index).label for index in range(40)
    } == {True, False}


def test_without_correlation_every_background_occurs_with_every_class():
    pairs = {(sample.label, sample.group) for sample in drawn(objects(image_size=16), 1500)}
    assert len(pairs) == len(CLASSES) * len(BACKGROUNDS)


def test_colour_does_not_tell_the_class():
    # A nearest-mean classifier on the object's mean colour, fitted on one half, performs at chance on the
    # other.
    samples = drawn(objects(), 800)
    colours = np.stack([pixels(s.image)[pixels(s.mask) > 0].mean(axis=0) for s in samples])
    labels = np.array([sample.label for sample in samples])
    means = np.stack([colours[:400][labels[:400] == label].mean(axis=0) for label in range(10)])
    distances = ((colours[400:, None] - means[None]) ** 2).sum(axis=2)
    right = (distances.argmin(axis=1) == labels[400:]).mean()
    assert right <= 0.1 + 4 * np.sqrt(0.1 * 0.9 / 400)


def test_captions_name_objects_colours_and_background():
    for sample in drawn(several(), 30):
        [caption] = sample.captions
        nouns, _, background = caption.partition(" on ")
        phrases = nouns.split(" and ")
        assert background == list(BACKGROUNDS)[sample.group]
        for phrase, (label, *_) in zip(phrases, sample.boxes, strict=True):
            article, colour, name = phrase.split()
            assert name == CLASSES[label]
            assert colour in COLOURS
            assert article == ("an" if colour == "orange" else "a")


def test_captioned_scenes_have_the_same_pixels_and_sentences_that_name_every_shape():
    plain, captioned = drawn(several(), 60), drawn(several(captions=True), 60)
    assert [replace(sample, captions=()) for sample in plain] == [
        replace(sample, captions=()) for sample in captioned
    ]
    assert {len(sample.captions) for sample in captioned} == {1, 2, 3}
    kinds = set()
    for before, sample in zip(plain, captioned, strict=True):
        assert len(set(sample.captions)) == len(sample.captions)
        nouns = [noun.split() for noun in before.captions[0].partition(" on ")[0].split(" and ")]
        for caption in sample.captions:
            surface = SURFACES[list(BACKGROUNDS)[sample.group]]
            placed, words = surface in caption, caption.replace(surface, "").split()
            assert Counter(shape for _, _, shape in nouns) == Counter(
                word for word in words if word in CLASSES
            )
            told = Counter(colour for _, colour, _ in nouns) & Counter(words)
            assert told.total() in (0, len(nouns))
            assert not any(other in caption for other in SURFACES.values() if other != surface)
            kinds.add((told.total() > 0, placed))
    assert len(kinds) == 4
    assert drawn(several(captions=True), 60) == captioned
    assert SURFACES.keys() == BACKGROUNDS.keys()


@pytest.mark.parametrize(("detail", "wanted"), [(0.0, {False}), (1.0, {True})])
def test_the_detail_of_captions_is_how_often_they_name_colours_and_backgrounds(detail, wanted):
    captions = [c for s in drawn(several(captions=True, caption_detail=detail), 20) for c in s.captions]
    assert {any(colour in caption for colour in COLOURS) for caption in captions} == wanted
    assert {any(surface in caption for surface in SURFACES.values()) for caption in captions} == wanted


def test_captions_come_through_the_raw_files(tmp_path):
    params = several(captions=True)
    source, raw = get(params), fetched(params, tmp_path)
    read = [source.load(raw, ref) for ref in source.index(raw, "train")]
    assert read == drawn(params, 25)
    assert source.describe(raw).task == "multilabel"


def test_coverage_is_the_area_of_a_polygon():
    # The shoelace formula, for each shape without a hole; a ring is the difference of two.
    for contours in SHAPES.values():
        scaled = tuple(contour * 10.0 + np.array([16.3, 15.8]) for contour in contours)
        x_y = [(contour, np.roll(contour, -1, axis=0)) for contour in scaled]
        area = abs(sum((a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]).sum() / 2 for a, b in x_y))
        assert coverage(scaled, 32).sum() == pytest.approx(area, rel=0.01)


def test_a_png_holds_its_pixels_exactly():
    rng = np.random.default_rng(0)
    for shape in ((7, 5), (7, 5, 3), (200, 130, 3)):  # the last needs more than one deflate block
        array = rng.integers(0, 256, shape, np.uint8)
        assert np.array_equal(pixels(encode_png(array)), array)
        assert np.array_equal(pixels(encode_png(array, deflate=True)), array)
    deep = rng.integers(0, 1 << 16, (7, 5), np.uint16)
    assert np.array_equal(pixels(encode_png(deep)), deep)
