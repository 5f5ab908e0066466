"""COCO 2014."""

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as pycoco_mask
from pycocotools.coco import COCO

from pipelines.data.formats.roots import Official
from pipelines.data.shards.sample import DataError
from pipelines.data.sources import coco2014
from pipelines.params import Coco2014Params
from tests.support.fetching import (
    SHARED,
    SPLITS,
    boxes_at,
    by_key,
    fetched,
    ids_of,
    jpeg,
    left_out,
    samples,
    sharded,
    write_files,
)

PHOTOS = SHARED / "data/coco2014-sample"
WIDTH, HEIGHT = 40, 30
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]
YEARS = {"train2014": (1, 2, 3), "val2014": (4,)}  # ids of the images
IMAGE = 1  # id of the image that the tests annotate
KEY = "COCO_train2014_000000000001"


def name_of(year: str, number: int) -> str:
    return f"COCO_{year}_{number:012d}.jpg"


def write_json(root: Path, year: str, annotations: Sequence[dict], **changes) -> None:
    images = [
        {"id": number, "file_name": name_of(year, number), "width": WIDTH, "height": HEIGHT}
        for number in reversed(YEARS[year])
    ]
    content = {"images": images, "annotations": list(annotations), "categories": CATEGORIES, **changes}
    write_files(root, {f"annotations/instances_{year}.json": json.dumps(content)})


@pytest.fixture
def coco(tmp_path) -> Path:
    root = tmp_path / "coco"
    for year, numbers in YEARS.items():
        write_files(
            root, {f"{year}/{name_of(year, number)}": jpeg(WIDTH, HEIGHT, number) for number in numbers}
        )
        write_json(root, year, [thing(90, 0, 0, 10, 10, id=7, image_id=numbers[0])])
    return root


def params(root: Path, **changes) -> Coco2014Params:
    return Coco2014Params(**{"source": "coco2014", "root": str(root), "val_count": 1, **changes})


def annotate(coco: Path, *annotations: dict, **changes) -> None:
    """Gives the training split these annotations; without an `image_id` they belong to `IMAGE`."""
    entries = [
        {"id": 100 + number, "image_id": IMAGE, "iscrowd": 0, **entry}
        for number, entry in enumerate(annotations)
    ]
    write_json(coco, "train2014", entries, **changes)


def first(coco: Path, tmp_path: Path, **changes):
    return by_key(params(coco, **changes), tmp_path)[KEY]


def rectangle(left: int, top: int, right: int, bottom: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def thing(category: int, left: int, top: int, right: int, bottom: int, **more) -> dict:
    """An annotation whose polygon fills its box."""
    box = [left, top, right - left, bottom - top]
    return {
        "category_id": category,
        "bbox": box,
        "segmentation": [rectangle(left, top, right, bottom)],
        **more,
    }


def runs(left: int, top: int, right: int, bottom: int) -> dict:
    """The uncompressed run lengths of a rectangle, the form that COCO has for crowds."""
    shape = np.zeros((HEIGHT, WIDTH), np.uint8)
    shape[top:bottom, left:right] = 1
    flat = shape.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts if not flat[0] else [0, *counts]}


def test_labels_are_the_categories_by_ascending_id(coco, tmp_path):
    annotate(coco, thing(90, 0, 0, 9, 9), thing(1, 1, 1, 9, 9), thing(90, 2, 2, 9, 9))
    source, raw = fetched(params(coco), tmp_path)
    assert source.describe(raw).classes == ("person", "stop sign", "toothbrush")
    sample = first(coco, tmp_path)
    assert sample.labels == (0, 2)
    assert [box[0] for box in sample.boxes] == [2, 0, 2]


def test_boxes_are_half_open_and_end_where_the_image_does(coco, tmp_path):
    annotate(
        coco,
        {"category_id": 1, "bbox": [1.08, 2.5, 3.1, 4.2]},
        {"category_id": 1, "bbox": [30, 20, 10.02, 10.4]},
    )
    assert first(coco, tmp_path).boxes == ((0, 1.08, 2.5, 1.08 + 3.1, 2.5 + 4.2), (0, 30, 20, WIDTH, HEIGHT))


def test_an_image_without_annotation_stays_with_no_label(coco, tmp_path):
    annotate(coco)
    sample = first(coco, tmp_path)
    assert (sample.labels, sample.boxes, sample.mask) == ((), (), None)
    assert sample.image == (coco / "train2014" / name_of("train2014", IMAGE)).read_bytes()


@pytest.mark.parametrize("segmentation", [runs(20, 0, 40, 30), None])
def test_a_crowd_region_is_no_object(coco, tmp_path, segmentation):
    crowd = thing(1, 20, 0, 40, 30, iscrowd=1) | {"segmentation": segmentation}
    annotate(coco, thing(13, 0, 0, 9, 9), crowd)
    sample = first(coco, tmp_path)
    assert (sample.labels, sample.boxes) == ((0, 1), ((1, 0, 0, 9, 9),))
    assert set(np.unique(ids_of(sample))) == {0, 1}
    assert left_out(tmp_path) == {"crowd regions": 1}
    sample = first(coco, tmp_path, crowd="ignore")
    assert (sample.labels, sample.boxes) == ((1,), ((1, 0, 0, 9, 9),))


def test_a_crowd_region_is_an_object_on_demand(coco, tmp_path):
    crowd = thing(1, 20, 0, 40, 30, iscrowd=1) | {"segmentation": runs(20, 0, 40, 30)}
    annotate(coco, thing(13, 0, 0, 9, 9), crowd)
    sample = first(coco, tmp_path, crowd="box")
    assert sample.boxes == ((1, 0, 0, 9, 9), (0, 20, 0, 40, 30))
    assert (ids_of(sample)[:, 20:] == 2).all()
    assert left_out(tmp_path) == {}


def test_the_smaller_object_lies_on_top_in_the_mask(coco, tmp_path):
    annotate(coco, thing(1, 10, 10, 15, 15), thing(13, 0, 0, 40, 30), thing(90, 10, 10, 20, 20))
    ids = ids_of(first(coco, tmp_path))
    assert [np.count_nonzero(ids == number) for number in (1, 2, 3)] == [25, 1200 - 100, 75]
    assert (ids[10:15, 10:15] == 1).all()


def compressed(segmentation: dict) -> dict:
    encoded = pycoco_mask.frPyObjects(segmentation, HEIGHT, WIDTH)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


@pytest.mark.parametrize(
    "form", [runs, lambda *corners: compressed(runs(*corners)), lambda *corners: [rectangle(*corners)]]
)
@pytest.mark.parametrize("corners", [(3, 4, 20, 11), (0, 0, 40, 30), (0, 0, 1, 1), (39, 29, 40, 30)])
def test_polygons_and_run_lengths_give_the_same_mask(coco, tmp_path, form, corners):
    left, top, right, bottom = corners
    annotate(coco, thing(1, *corners) | {"segmentation": form(*corners)})
    ids = ids_of(first(coco, tmp_path))
    assert (ids[top:bottom, left:right] == 1).all()
    assert np.count_nonzero(ids) == (right - left) * (bottom - top)


def test_an_object_of_several_polygons_is_one_instance(coco, tmp_path):
    annotate(
        coco,
        thing(1, 0, 0, 20, 20)
        | {"segmentation": [rectangle(0, 0, 5, 5), rectangle(10, 10, 20, 20), [1, 2, 3, 4]]},
    )
    assert np.count_nonzero(ids_of(first(coco, tmp_path)) == 1) == 25 + 100


@pytest.mark.parametrize("segmentation", [None, [], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]]])
def test_an_image_with_an_object_that_has_no_segmentation_has_no_mask(coco, tmp_path, segmentation):
    annotate(
        coco, thing(13, 0, 0, 9, 9), {"category_id": 1, "bbox": [0, 0, 9, 9], "segmentation": segmentation}
    )
    sample = first(coco, tmp_path)
    assert len(sample.boxes) == 2
    assert sample.mask is None
    assert left_out(tmp_path) == {"masks that would lack an object": 1}


def test_empty_boxes_are_left_out_with_their_instances_and_counted(coco, tmp_path):
    empty = thing(1, 5, 5, 5, 20) | {"segmentation": [rectangle(5, 5, 6, 20)]}
    annotate(coco, empty, {"category_id": 1, "bbox": [5, 5, 0.7, 20]}, thing(13, 10, 10, 20, 20))
    sample = first(coco, tmp_path)
    assert (sample.labels, sample.boxes) == ((0, 1), ((1, 10, 10, 20, 20),))
    assert (ids_of(sample)[10:20, 10:20] == 1).all()
    assert left_out(tmp_path)["empty boxes"] == 2


def test_more_objects_than_8_bits_number_are_told_apart(coco, tmp_path):
    places = [(left, top) for top in range(HEIGHT) for left in range(WIDTH)][:300]
    annotate(coco, *(thing(1, left, top, left + 1, top + 1) for left, top in places))
    sample = first(coco, tmp_path)
    assert len(sample.boxes) == 300
    assert np.array_equal(ids_of(sample).ravel()[:300], np.arange(1, 301))
    assert sharded(params(coco), tmp_path)


def test_val_is_held_out_of_train_and_val2014_is_test(coco, tmp_path):
    keys = {
        split: {sample.key for sample in listed} for split, listed in samples(params(coco), tmp_path).items()
    }
    assert [len(keys[split]) for split in SPLITS] == [2, 1, 1]
    assert len(keys["train"] | keys["val"]) == 3
    assert keys["test"] == {"COCO_val2014_000000000004"}
    with pytest.raises(DataError, match="set val_count"):
        fetched(params(coco, val_count=None), tmp_path)


def zipped(path: Path, folder: Path, names: str) -> Official:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.glob(names)):
            archive.write(file, file.relative_to(folder))
    return Official(f"file://{path}", f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")


def test_the_official_archives_give_the_samples_of_the_folder(coco, tmp_path, monkeypatch):
    annotate(coco, thing(1, 5, 5, 20, 20))
    monkeypatch.setattr(
        coco2014, "IMAGES", {year: zipped(tmp_path / f"{year}.zip", coco, f"{year}/*") for year in YEARS}
    )
    notes = zipped(tmp_path / "notes.zip", coco, "annotations/*")
    monkeypatch.setattr(coco2014, "ANNOTATIONS", {"annotations": notes})
    official = Coco2014Params(source="coco2014", val_count=1)
    assert samples(official, tmp_path) == samples(params(coco), tmp_path)
    wrong = notes._replace(digest=f"sha256:{'0' * 64}")
    monkeypatch.setattr(coco2014, "ANNOTATIONS", {"annotations": wrong})
    with pytest.raises(DataError, match=r"notes\.zip: the content has sha256:"):
        fetched(official, tmp_path)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"category_id": 2, "bbox": [0, 0, 9, 9]}, "is of category 2, which is not in categories"),
        ({"category_id": 1, "bbox": [0, 0, 9, 9], "image_id": 99}, "is of image 99, which is not in images"),
        ({"category_id": 1, "bbox": [0, 0, 9]}, r"bbox \[0, 0, 9\] is not \[x, y, width, height\]"),
        ({"category_id": 1}, "bbox None is not"),
        ({"category_id": 1, "bbox": [0, 0, 45, 9]}, "outside its image of 40 x 30 pixels"),
        ({"category_id": 1, "bbox": [9, 9, -4, 9]}, "is inverted"),
        (
            thing(1, 0, 0, 9, 9) | {"segmentation": {"size": [30, 41], "counts": [1230]}},
            "neither polygons nor run lengths",
        ),
        (
            thing(1, 0, 0, 9, 9) | {"segmentation": {"size": [30, 40], "counts": [1199]}},
            "runs of 1199 pixels",
        ),
        (
            thing(1, 0, 0, 9, 9) | {"segmentation": {"size": [30, 40], "counts": "zzz"}},
            "neither polygons nor run lengths",
        ),
        (thing(1, 0, 0, 9, 9) | {"segmentation": [[0, 0, 1e12, 0, 0, 9]]}, "a corner far outside"),
        (thing(1, 0, 0, 9, 9) | {"segmentation": [1, 2, 3, 4, 5, 6]}, "neither polygons nor run lengths"),
    ],
)
def test_an_annotation_that_makes_no_sense_is_named_in_one_line(coco, tmp_path, entry, told):
    annotate(coco, entry)
    with pytest.raises(
        DataError, match=rf"^annotations/instances_train2014\.json: annotation 100 [^\n]*{told}[^\n]*$"
    ):
        fetched(params(coco), tmp_path)


def test_bad_boxes_are_skipped_on_demand_and_their_classes_stay(coco, tmp_path):
    annotate(coco, thing(1, 0, 0, 45, 9), thing(13, 9, 9, 5, 12), thing(90, 0, 0, 9, 9))
    sample = first(coco, tmp_path, on_bad_box="skip")
    assert (sample.labels, sample.boxes) == ((0, 1, 2), ((2, 0, 0, 9, 9),))
    assert left_out(tmp_path) | {"outside boxes": 1, "inverted boxes": 1} == left_out(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"images": [{"id": 1, "file_na', "not whole JSON"),
        ("[]", "has no list of images"),
        ('{"images": [], "annotations": []}', "has no list of categories"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            "an entry has not what COCO's have: KeyError",
        ),
        (
            '{"images": [], "annotations": [{"id": 1}], "categories": []}',
            "an entry has not what COCO's have: KeyError",
        ),
    ],
)
def test_a_file_that_is_not_whole_or_not_cocos_is_named_in_one_line(coco, tmp_path, content, told):
    write_files(coco, {"annotations/instances_val2014.json": content})
    with pytest.raises(DataError, match=rf"^annotations/instances_val2014\.json: [^\n]*{told}[^\n]*$"):
        fetched(params(coco), tmp_path)


def test_ids_that_come_twice_are_told(coco, tmp_path):
    annotate(coco, thing(1, 0, 0, 9, 9, id=5), thing(1, 0, 0, 9, 9, id=5))
    with pytest.raises(DataError, match="of 2 annotations only 1 have an id of their own"):
        fetched(params(coco), tmp_path)


def test_an_image_that_is_missing_is_named_and_one_that_is_not_listed_is_counted(coco, tmp_path):
    write_files(coco, {"train2014/COCO_train2014_000000000099.jpg": jpeg(4, 4)})
    fetched(params(coco), tmp_path)
    assert left_out(tmp_path)["images without an entry in annotations/instances_train2014.json"] == 1
    (coco / "train2014" / name_of("train2014", 2)).unlink()
    with pytest.raises(DataError, match=r"train2014/COCO_train2014_000000000002\.jpg is missing"):
        fetched(params(coco), tmp_path)


def test_an_image_with_two_entries_is_named(coco, tmp_path):
    images = [
        {"id": number, "file_name": name_of("train2014", 1), "width": WIDTH, "height": HEIGHT}
        for number in (1, 2)
    ]
    annotate(coco, images=images)
    with pytest.raises(DataError, match=r"images has COCO_train2014_000000000001\.jpg more than once"):
        fetched(params(coco), tmp_path)


def test_names_that_would_be_one_key_or_none_are_told_apart(coco, tmp_path):
    names = ["a b.jpg", "a_b.jpg", "x" * 100 + ".jpg"]
    images = [
        {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for number, name in enumerate(names, 1)
    ]
    write_files(coco, {f"train2014/{name}": jpeg(WIDTH, HEIGHT, number) for number, name in enumerate(names)})
    annotate(coco, images=images)
    assert sharded(params(coco), tmp_path)
    assert len(by_key(params(coco), tmp_path)) == 4


def test_missing_instances_are_named(coco, tmp_path):
    (coco / "annotations/instances_train2014.json").unlink()
    with pytest.raises(
        DataError, match=r"instances_train2014\.json is missing; there is: annotations, train2014, val2014"
    ):
        fetched(params(coco), tmp_path)


def test_other_categories_in_the_test_split_are_refused(coco, tmp_path):
    write_json(coco, "val2014", [], categories=CATEGORIES[:2])
    with pytest.raises(DataError, match="other categories"):
        fetched(params(coco), tmp_path)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Root of the shards of the real images, samples by key, and both files as pycocotools reads them."""
    if not PHOTOS.is_dir():
        pytest.skip("needs the photographs")
    tmp_path = tmp_path_factory.mktemp("photographs")
    some = params(PHOTOS, val_count=28)
    root = sharded(some, tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        read = [COCO(str(PHOTOS / f"annotations/instances_{year}.json")) for year in ("train2014", "val2014")]
    return root, by_key(some, tmp_path), read


def known(photographs):
    """Yields (sample, `COCO` of the file, entry of the image, its annotations) for each real image."""
    _, loaded, read = photographs
    count = 0
    for coco in read:
        for entry in coco.loadImgs(coco.getImgIds()):
            count += 1
            yield (
                loaded[Path(entry["file_name"]).stem],
                coco,
                entry,
                coco.loadAnns(coco.getAnnIds(imgIds=[entry["id"]])),
            )
    assert count == len(loaded) == 256


def test_every_box_of_the_photographs_is_the_annotation_files(photographs):
    scaled = {key: boxes for split in SPLITS for key, boxes in boxes_at(photographs[0], split, 224).items()}
    count = 0
    for sample, coco, entry, annotations in known(photographs):
        labels = [sorted(coco.getCatIds()).index(annotation["category_id"]) for annotation in annotations]
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float64).reshape(
            -1, 4
        )
        boxes[:, 2:] += boxes[:, :2]
        assert [box[0] for box in sample.boxes] == labels
        assert sample.labels == tuple(sorted(set(labels)))
        given = torch.tensor([box[1:] for box in sample.boxes], dtype=torch.float64).reshape(-1, 4)
        torch.testing.assert_close(given, boxes, atol=1e-9, rtol=0)
        factors = torch.tensor([224 / entry["width"], 224 / entry["height"]] * 2)
        torch.testing.assert_close(scaled[sample.key][:, 1:].double(), boxes * factors, atol=1e-3, rtol=0)
        count += len(boxes)
    assert count == 929 + 898


def test_every_mask_of_the_photographs_is_drawn_as_pycocotools_draws(photographs):
    masks = 0
    for sample, coco, _, annotations in known(photographs):
        assert (sample.mask is not None) == (
            bool(annotations) and all(entry.get("segmentation") for entry in annotations)
        )
        if sample.mask is None:
            continue
        masks += 1
        ids = ids_of(sample)
        drawn = np.stack([coco.annToMask(entry) for entry in annotations]).astype(bool)
        assert np.array_equal(ids > 0, drawn.any(axis=0))
        for number, shape in enumerate(drawn, 1):
            assert shape[ids == number].all()
            smaller = drawn[drawn.sum(axis=(1, 2)) < shape.sum()].any(axis=0)
            alone = shape & ~smaller & (drawn[drawn.sum(axis=(1, 2)) == shape.sum()].sum(axis=0) == 1)
            assert (ids[alone] == number).all()
    assert masks == 168
