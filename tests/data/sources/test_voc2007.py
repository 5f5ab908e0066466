"""PASCAL VOC 2007."""

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.data.formats.encoded_image import DecodeError
from pipelines.data.formats.roots import Official
from pipelines.data.loading.loader import loader
from pipelines.data.shards.sample import DataError
from pipelines.data.shards.writer import write_shards
from pipelines.data.sources import voc2007
from pipelines.params import DataParams, Voc2007Params
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

VOC = SHARED / "data/voc2007-sample"
VOC_2012 = SHARED / "data/voc2012-animals.tar.gz"
WIDTH, HEIGHT = 40, 30


def xml(*objects: str, width=WIDTH, height=HEIGHT) -> str:
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height></size>"
        f"{''.join(objects)}</annotation>"
    )


def thing(name: str, xmin, ymin, xmax, ymax, difficult: int = 0, more: str = "") -> str:
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{corners}</bndbox>{more}</object>"
    )


def segmentation(*regions: tuple[int, int, int, int, int], shape=(HEIGHT, WIDTH)) -> bytes:
    """A palette PNG of regions (id, top, left, bottom, right), where id is that of an object or class."""
    ids = np.zeros(shape, np.uint8)
    for number, top, left, bottom, right in regions:
        ids[top:bottom, left:right] = number
    image = Image.fromarray(ids).convert("P")
    image.putdata(ids.ravel().tolist())
    output = io.BytesIO()
    image.save(output, "png")
    return output.getvalue()


@pytest.fixture
def voc(tmp_path) -> Path:
    """The folder VOC2007 with three images, one per split."""
    top = tmp_path / "voc/VOCdevkit/VOC2007"
    names = {"train": "000001", "val": "000002", "test": "000003"}
    for number, (split, name) in enumerate(names.items()):
        write_files(
            top,
            {
                f"ImageSets/Main/{split}.txt": f"{name}\n",
                f"JPEGImages/{name}.jpg": jpeg(WIDTH, HEIGHT, number),
                f"Annotations/{name}.xml": xml(thing("cat", 1, 1, WIDTH, HEIGHT)),
            },
        )
    return top


def params(root: Path, **changes) -> Voc2007Params:
    return Voc2007Params(**{"source": "voc2007", "root": str(root), **changes})


def annotate(voc: Path, *objects: str, **size) -> None:
    """Gives the training image other objects."""
    (voc / "Annotations/000001.xml").write_text(xml(*objects, **size))


def first(voc: Path, tmp_path: Path, **changes):
    return by_key(params(voc, **changes), tmp_path)["000001"]


def test_pixels_counted_from_1_become_half_open_boxes(voc, tmp_path):
    annotate(voc, thing("cat", 1, 1, WIDTH, HEIGHT), thing("person", 5, 7, 5, 9))
    assert first(voc, tmp_path).boxes == ((7, 0, 0, WIDTH, HEIGHT), (14, 4, 6, 5, 9))


def test_labels_are_the_classes_of_the_objects(voc, tmp_path):
    annotate(voc, thing("person", 1, 1, 9, 9), thing("aeroplane", 1, 1, 9, 9), thing("person", 2, 2, 9, 9))
    assert first(voc, tmp_path).labels == (0, 14)


def test_an_image_without_objects_stays_with_no_label(voc, tmp_path):
    annotate(voc)
    sample = first(voc, tmp_path)
    assert (sample.labels, sample.boxes, sample.mask) == ((), (), None)
    assert sample.image == (voc / "JPEGImages/000001.jpg").read_bytes()


def test_boxes_of_parts_are_no_objects(voc, tmp_path):
    part = (
        "<part><name>head</name>"
        "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    )
    annotate(voc, thing("person", 1, 1, 9, 9, more=part))
    assert first(voc, tmp_path).boxes == ((14, 0, 0, 9, 9),)


@pytest.mark.parametrize("form", ["VOC2007", "VOCdevkit", "its parent", "tar"])
def test_every_form_of_the_root_gives_the_same_samples(voc, tmp_path, form):
    root = {
        "VOC2007": voc,
        "VOCdevkit": voc.parent,
        "its parent": voc.parents[1],
        "tar": tmp_path / "voc.tar",
    }[form]
    with tarfile.open(tmp_path / "voc.tar", "w") as archive:
        archive.add(voc.parent, "VOCdevkit")
    assert samples(params(root), tmp_path) == samples(params(voc), tmp_path)


@pytest.fixture
def published(voc, tmp_path, monkeypatch) -> None:
    """Small archives in the official format, each with its own URL."""
    archives = {}
    for name in ("trainval", "test"):
        path = tmp_path / f"{name}-official.tar"
        with tarfile.open(path, "w") as archive:
            for file in sorted(voc.rglob("*.*")):
                if ("000003" in file.name or file.name == "test.txt") == (name == "test"):
                    archive.add(file, f"VOCdevkit/VOC2007/{file.relative_to(voc)}")
        archives[name] = Official(f"file://{path}", f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}")
    monkeypatch.setattr(voc2007, "ARCHIVES", archives)


def test_the_official_archives_give_the_samples_of_the_folder(voc, published, tmp_path):
    assert samples(Voc2007Params(source="voc2007"), tmp_path) == samples(params(voc), tmp_path)


def test_official_archives_that_are_others_are_refused(published, tmp_path, monkeypatch):
    wrong = {name: official._replace(digest=f"md5:{'0' * 32}") for name, official in voc2007.ARCHIVES.items()}
    monkeypatch.setattr(voc2007, "ARCHIVES", wrong)
    with pytest.raises(DataError, match=r"trainval-official\.tar: the content has md5:"):
        fetched(Voc2007Params(source="voc2007"), tmp_path)


def test_difficult_objects_are_kept_or_give_neither_box_nor_label(voc, tmp_path):
    annotate(voc, thing("person", 1, 1, 9, 9, difficult=1), thing("dog", 3, 3, 9, 9))
    assert first(voc, tmp_path).labels == (11, 14)
    assert left_out(tmp_path) == {}
    sample = first(voc, tmp_path, difficult=False)
    assert (sample.labels, sample.boxes) == ((11,), ((11, 2, 2, 9, 9),))
    assert left_out(tmp_path) == {"difficult objects": 1}


def test_instance_i_of_the_mask_is_box_i_minus_1_and_void_is_background(voc, tmp_path):
    annotate(
        voc,
        thing("person", 1, 1, 10, 10, difficult=1),
        thing("dog", 11, 11, 20, 20),
        thing("cat", 21, 1, 30, 10),
    )
    content = segmentation((1, 0, 0, 10, 10), (255, 9, 0, 10, 10), (2, 10, 10, 20, 20), (3, 0, 20, 10, 30))
    write_files(voc, {"SegmentationObject/000001.png": content})
    ids = ids_of(first(voc, tmp_path))
    assert [np.count_nonzero(ids == number) for number in (1, 2, 3)] == [90, 100, 100]
    assert set(np.unique(ids)) == {0, 1, 2, 3}
    sample = first(voc, tmp_path, difficult=False)
    ids = ids_of(sample)
    assert (ids[10:20, 10:20] == 1).all()
    assert (ids[0:10, 20:30] == 2).all()
    assert np.count_nonzero(ids) == 200
    assert len(sample.boxes) == 2


def test_masks_pass_through_the_shards_and_the_loader(voc, tmp_path):
    annotate(voc, thing("dog", 11, 11, 20, 20), thing("cat", 21, 1, 30, 10))
    write_files(voc, {"SegmentationObject/000001.png": segmentation((1, 10, 10, 20, 20), (2, 0, 20, 10, 30))})
    (batch,) = loader(sharded(params(voc), tmp_path), "train", DataParams(image_size=120), 1)
    xmin, ymin, xmax, ymax = (int(corner) for corner in batch["boxes"][1, 2:])
    assert (batch["mask"][0, ymin:ymax, xmin:xmax] == 2).all()
    assert (batch["mask"] == 2).sum() == (xmax - xmin) * (ymax - ymin)


@pytest.mark.parametrize(
    "content",
    [
        segmentation((2, 10, 10, 20, 20)),  # an object that the annotation does not have
        segmentation((1, 20, 25, 30, 40)),  # not where the object is
        segmentation((1, 10, 10, 20, 20), shape=(HEIGHT, WIDTH + 1)),
    ],
)
def test_a_segmentation_that_is_not_of_these_objects_gives_no_mask(voc, tmp_path, content):
    annotate(voc, thing("dog", 11, 11, 20, 20))
    write_files(voc, {"SegmentationObject/000001.png": content})
    assert first(voc, tmp_path).mask is None
    assert left_out(tmp_path) == {"masks that do not fit their objects": 1}


def test_a_segmentation_that_does_not_decode_is_named(voc, tmp_path):
    write_files(voc, {"SegmentationObject/000001.png": b"no png"})
    with pytest.raises(DataError, match=r"SegmentationObject/000001\.png: mask: not an image"):
        fetched(params(voc), tmp_path)


CAT, DOG = 8, 12  # numbers of the classes in class masks, counted from 1


def class_mask(voc: Path, *regions, name="000001", folder="SegmentationClassAug", **shape) -> None:
    """Gives an image a class segmentation of regions (class, top, left, bottom, right)."""
    write_files(voc, {f"{folder}/{name}.png": segmentation(*regions, **shape)})


def test_a_pixel_of_a_class_is_the_instance_of_the_smallest_box_of_that_class_around_it(voc, tmp_path):
    annotate(voc, thing("cat", 1, 1, 30, 20), thing("dog", 11, 6, 14, 9), thing("cat", 11, 6, 20, 10))
    class_mask(voc, (CAT, 0, 0, HEIGHT, WIDTH), (DOG, 5, 12, 9, 14))
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[0:20, 0:30] = 1
    expected[5:10, 10:20] = 3  # within the first cat's box
    expected[5:9, 12:14] = 2  # a dog's pixels are no cat's, and a cat's pixels in a dog's box no dog's
    np.testing.assert_array_equal(ids_of(first(voc, tmp_path, masks="classes")), expected)
    assert left_out(tmp_path) == {}


def test_of_two_equal_boxes_the_first_has_the_pixels(voc, tmp_path):
    annotate(voc, thing("cat", 1, 1, 10, 10), thing("cat", 6, 1, 15, 10))
    class_mask(voc, (CAT, 0, 0, 10, 15))
    ids = ids_of(first(voc, tmp_path, masks="classes"))
    assert [np.count_nonzero(ids == number) for number in (1, 2)] == [100, 50]


def test_void_and_pixels_in_no_box_of_their_class_are_background(voc, tmp_path):
    annotate(voc, thing("cat", 1, 1, 10, 10))
    class_mask(voc, (CAT, 0, 0, 20, 20), (255, 0, 0, 1, 20), (DOG, 8, 0, 10, 10))
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[1:8, 0:10] = 1
    np.testing.assert_array_equal(ids_of(first(voc, tmp_path, masks="classes")), expected)


def test_objects_left_out_keep_their_pixels_from_the_others(voc, tmp_path):
    annotate(voc, thing("cat", 11, 11, 20, 20, difficult=1), thing("cat", 1, 1, 30, 30))
    class_mask(voc, (CAT, 10, 10, 20, 21))
    assert np.unique(ids_of(first(voc, tmp_path, masks="classes"))).tolist() == [0, 1, 2]
    ids = ids_of(first(voc, tmp_path, masks="classes", difficult=False))
    assert np.count_nonzero(ids == 1) == np.count_nonzero(ids) == 10


def test_class_masks_are_read_on_demand_and_after_instances_of_the_image(voc, tmp_path):
    class_mask(voc, (CAT, 0, 0, 9, 9))
    class_mask(voc, (CAT, 0, 0, 1, 1), folder="SegmentationClass")
    class_mask(voc, (CAT, 0, 0, 2, 2), folder="SegmentationClass", name="000002")
    class_mask(voc, (CAT, 0, 0, 3, 3), name="000003")
    class_mask(voc, (1, 0, 0, 4, 4), folder="SegmentationObject", name="000003")
    found = by_key(params(voc, masks="classes"), tmp_path)
    assert {key: np.count_nonzero(ids_of(sample)) for key, sample in found.items()} == {
        "000001": 81,
        "000002": 4,
        "000003": 16,
    }
    instances = by_key(params(voc), tmp_path)
    assert [key for key, sample in instances.items() if sample.mask is not None] == ["000003"]


@pytest.mark.parametrize(
    "content",
    [
        segmentation((CAT, 0, 0, 9, 9), shape=(HEIGHT, WIDTH + 1)),
        segmentation((21, 0, 0, 9, 9)),  # no class
    ],
)
def test_a_class_segmentation_that_does_not_fit_gives_no_mask(voc, tmp_path, content):
    write_files(voc, {"SegmentationClassAug/000001.png": content})
    assert first(voc, tmp_path, masks="classes").mask is None
    assert left_out(tmp_path) == {"masks that do not fit their objects": 1}


def test_splits_name_the_lists_of_a_root(voc, tmp_path):
    lists = voc / "ImageSets/Main"
    (lists / "val.txt").rename(lists / "valA.txt")
    (lists / "test.txt").rename(lists / "valB.txt")
    found = samples(params(voc, splits={"val": "valA", "test": "valB"}), tmp_path)
    assert {split: [sample.key for sample in listed] for split, listed in found.items()} == {
        "train": ["000001"],
        "val": ["000002"],
        "test": ["000003"],
    }
    with pytest.raises(DataError, match=r"ImageSets/Main/valC\.txt is missing"):
        fetched(params(voc, splits={"val": "valC", "test": "valB"}), tmp_path)


def test_an_image_in_two_splits_is_named(voc, tmp_path):
    with pytest.raises(DataError, match=r"ImageSets/Main/val\.txt: names 000002, which another split has"):
        fetched(params(voc, splits={"test": "val"}), tmp_path)


def test_the_official_archives_have_splits_of_their_own():
    with pytest.raises(ValueError, match="splits: the official archives have their own"):
        Voc2007Params(source="voc2007", splits={"test": "val"})


def test_a_bad_box_stops_the_fetch_or_leaves_its_label_alone(voc, tmp_path):
    annotate(voc, thing("dog", 11, 11, 20, 20), thing("cat", 30, 1, WIDTH + 5, 10), thing("cow", 9, 9, 3, 10))
    with pytest.raises(
        DataError, match=r"Annotations/000001\.xml: object 2: box .* outside its image of 40 x 30 pixels"
    ):
        fetched(params(voc), tmp_path)
    sample = first(voc, tmp_path, on_bad_box="skip")
    assert (sample.labels, sample.boxes) == ((7, 9, 11), ((11, 10, 10, 20, 20),))
    assert left_out(tmp_path) == {"inverted boxes": 1, "outside boxes": 1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (xml(thing("unicorn", 1, 1, 9, 9)), r"class 'unicorn' is not one of VOC's: aeroplane, "),
        (xml(thing("cat", 1, 1, 9, 9))[:-30], r"not whole XML"),
        (xml(thing("cat", 1, "one", 9, 9)), r"bndbox/ymin 'one'.* not a number"),
        (xml(thing("cat", 1, 1, "inf", 9)), r"bndbox/xmax 'inf'.* not a number"),
        (xml(thing("cat", 1, 1, 9, 9), width="nan"), r"size/width 'nan'.* not a number"),
        (xml(thing("", 1, 1, 9, 9)), r"<object> has no name"),
        ("<annotation/>", r"<annotation> has no size/width"),
    ],
)
def test_an_annotation_that_cannot_be_read_is_named_in_one_line(voc, tmp_path, content, told):
    (voc / "Annotations/000001.xml").write_text(content)
    with pytest.raises(DataError, match=rf"^Annotations/000001\.xml: [^\n]*{told}[^\n]*$"):
        fetched(params(voc), tmp_path)


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("Annotations/000002.xml", r"Annotations/000002\.xml is missing"),
        ("JPEGImages/000002.jpg", r"JPEGImages/000002\.jpg is missing"),
        ("ImageSets/Main/test.txt", r"ImageSets/Main/test\.txt is missing"),
        (
            "ImageSets/Main/train.txt",
            r"ImageSets/Main/train\.txt is missing; there is: Annotations, ImageSets, JPEGImages",
        ),
    ],
)
def test_what_is_missing_is_named(voc, tmp_path, gone, told):
    (voc / gone).unlink()
    with pytest.raises(DataError, match=rf"^voc2007: [^\n]*{told}[^\n]*$"):
        fetched(params(voc), tmp_path)
    assert not (tmp_path / "raw/manifest.json").exists()


def test_images_and_annotations_that_no_split_lists_are_counted(voc, tmp_path):
    write_files(
        voc,
        {
            "JPEGImages/000009.jpg": jpeg(4, 4),
            "Annotations/000009.xml": xml(),
            "Annotations/000010.xml": "cut",
        },
    )
    fetched(params(voc), tmp_path)
    assert left_out(tmp_path) == {
        "images that no split lists": 1,
        "annotations of images that no split lists": 2,
    }


def test_an_image_that_a_split_lists_twice_is_named(voc, tmp_path):
    (voc / "ImageSets/Main/train.txt").write_text("000001\n000001\n")
    with pytest.raises(DataError, match=r"ImageSets/Main/train\.txt: names 000001 more than once"):
        fetched(params(voc), tmp_path)


def test_an_image_that_does_not_decode_is_left_to_the_loader(voc, tmp_path):
    (voc / "JPEGImages/000001.jpg").write_bytes(b"no photo")
    root = sharded(params(voc), tmp_path)
    with pytest.raises(DecodeError, match="000001: does not decode"):
        list(loader(root, "train", DataParams(image_size=60), 1))
    batches = loader(root, "train", DataParams(image_size=60, on_error="skip"), 1)
    assert (list(batches), batches.skipped) == ([], 1)


def test_an_empty_split_is_named(voc, tmp_path):
    (voc / "ImageSets/Main/val.txt").write_text("")
    with pytest.raises(DataError, match="val has no image"):
        fetched(params(voc), tmp_path)


def test_boxes_drawn_on_an_image_of_another_size_are_refused(voc, tmp_path):
    annotate(voc, thing("cat", 1, 1, 9, 9), width=WIDTH + 1)
    with pytest.raises(
        DataError, match=r"JPEGImages/000001\.jpg: has 40 x 30 pixels; its boxes were drawn on 41 x 30"
    ):
        samples(params(voc), tmp_path)


def test_the_checksum_covers_the_annotations(voc, tmp_path):
    source, raw = fetched(params(voc), tmp_path)
    before = source.describe(raw).checksum
    annotate(voc, thing("cat", 1, 1, WIDTH, HEIGHT - 1))  # the file keeps its size
    source, raw = fetched(params(voc), tmp_path)
    assert source.describe(raw).checksum != before


def expected(split: str) -> dict[str, tuple[torch.Tensor, int, int]]:
    """(n, 5) boxes, width and height of the real images by key, read by ElementTree alone."""
    top = VOC / "VOCdevkit/VOC2007"
    known = {}
    for name in (top / f"ImageSets/Main/{split}.txt").read_text().split():
        root = ElementTree.parse(top / f"Annotations/{name}.xml").getroot()
        boxes = []
        for item in root.iter("object"):
            xmin, ymin, xmax, ymax = (
                int(item.find("bndbox").find(side).text) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            boxes.append([voc2007.CLASSES.index(item.find("name").text), xmin - 1, ymin - 1, xmax, ymax])
        known[name] = (
            torch.tensor(boxes),
            int(root.find("size/width").text),
            int(root.find("size/height").text),
        )
    return known


@pytest.mark.skipif(not VOC.is_dir(), reason="needs the photographs")
def test_every_box_of_the_photographs_is_the_annotation_files(tmp_path):
    root = sharded(params(VOC), tmp_path)
    count = 0
    for split in SPLITS:
        known = expected(split)
        source, raw = fetched(params(VOC), tmp_path)
        loaded = {ref.image.key: source.load(raw, ref) for ref in source.index(raw, split)}
        scaled = boxes_at(root, split, 224)
        assert known.keys() == loaded.keys() == scaled.keys()
        for key, (boxes, width, height) in known.items():
            assert torch.equal(torch.tensor(loaded[key].boxes), boxes.float())
            assert loaded[key].labels == tuple(boxes[:, 0].unique().tolist())
            factors = torch.tensor([1, 224 / width, 224 / height, 224 / width, 224 / height])
            torch.testing.assert_close(scaled[key], boxes * factors, atol=1e-3, rtol=0)
            count += len(boxes)
    assert count > 197


@pytest.mark.skipif(not VOC_2012.is_file(), reason="needs the photographs")
def test_the_animals_of_voc_2012(tmp_path):
    some = params(VOC_2012, splits={"val": "valA", "test": "valB"}, masks="classes")
    source, raw = fetched(some, tmp_path)
    assert source.describe(raw).counts == {"train": 1697, "val": 865, "test": 864}
    assert left_out(tmp_path) == {
        "images that no split lists": 182,
        "annotations of images that no split lists": 182,
    }
    lines = [
        json.loads(line)
        for split in SPLITS
        for line in (raw / f"{split}.annotations.jsonl").read_text().splitlines()
    ]
    assert sum(len(line["boxes"]) for line in lines) == 7168  # 7,634 with the images that no split lists
    assert sum(line["mask"] is not None for line in lines) == 3394  # likewise 3,576

    top = "voc2012-animals/VOCdevkit/VOC2012/SegmentationClassAug"
    covered = labelled = 0
    with tarfile.open(raw / "images.tar") as archive:
        for ref in source.index(raw, "val")[::20]:
            sample = source.load(raw, ref)
            if sample.mask is None:
                continue
            ids = ids_of(sample)
            classes = np.asarray(Image.open(archive.extractfile(f"{top}/{sample.key}.png")))
            of_instances = np.array([0, *(1 + box[0] for box in sample.boxes)])
            assert ((ids == 0) | (of_instances[ids] == classes)).all()
            covered += np.count_nonzero(ids)
            labelled += np.count_nonzero((classes > 0) & (classes < 255))
    assert covered > 0.999 * labelled > 0


def test_shards_of_the_same_annotations_are_the_same_bytes(voc, tmp_path):
    write_files(voc, {"SegmentationObject/000001.png": segmentation((1, 10, 10, 20, 20))})
    source, raw = fetched(params(voc), tmp_path)
    manifests = [
        write_shards(source, raw, tmp_path / name, shard_size=2, progress=False) for name in ("one", "two")
    ]
    assert manifests[0] == manifests[1]


def test_sources_and_references_pickle(voc, tmp_path):
    source, raw = fetched(params(voc), tmp_path)
    ref = source.index(raw, "train")[0]
    again, same = pickle.loads(pickle.dumps((source, ref)))
    assert again.load(raw, same) == source.load(raw, ref)
