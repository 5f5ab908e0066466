"""Waterbirds, with the boxes of CUB-200-2011."""

import hashlib
import shutil
import tarfile
from pathlib import Path

import pytest

from pipelines.data.formats import cub
from pipelines.data.formats.encoded_image import DecodeError
from pipelines.data.formats.roots import Official
from pipelines.data.loading.loader import loader
from pipelines.data.shards.sample import DataError
from pipelines.data.sources import waterbirds
from pipelines.params import DataParams, WaterbirdsParams
from tests.support.fetching import SPLITS, by_key, fetched, jpeg, left_out, samples, sharded, write_files

WIDTH, HEIGHT = 40, 30
# (species, class, split, place): train has all four groups, val and test have two each
BIRDS = [
    ("001.Albatross", 1, 0, 1),
    ("001.Albatross", 1, 0, 0),
    ("001.Albatross", 1, 1, 1),
    ("001.Albatross", 1, 2, 0),
    ("002.Wren", 0, 0, 0),
    ("002.Wren", 0, 0, 1),
    ("002.Wren", 0, 1, 1),
    ("002.Wren", 0, 2, 0),
]
CROW = {"boxes of images that metadata.csv does not name": 1}  # an image in CUB only
HEADER = "img_id,img_filename,y,split,place,place_filename"


def name_of(number: int) -> str:
    species = BIRDS[number][0]
    return f"{species}/{species[4:]}_{number:04d}_55.jpg"


@pytest.fixture
def birds(tmp_path) -> Path:
    """The folder of the images and, beside it, CUB's lists, in another order and with one more image."""
    root = tmp_path / "waterbird_complete95_forest2water2"
    rows = [
        f"{n + 1},{name_of(n)},{y},{split},{place},/x/y.jpg" for n, (_, y, split, place) in enumerate(BIRDS)
    ]
    write_files(root, {"metadata.csv": "\n".join([HEADER, *rows]) + "\n"})
    write_files(root, {name_of(number): jpeg(WIDTH, HEIGHT, number) for number in range(len(BIRDS))})
    ids = {100 - number: name_of(number) for number in range(len(BIRDS))} | {1: "003.Crow/Crow_0001_1.jpg"}
    boxes = [f"{key} {100.0 - key} 2.0 20.0 10.0" for key in sorted(ids)]
    write_files(
        tmp_path / "CUB_200_2011",
        {
            "images.txt": "".join(f"{key} {name}\n" for key, name in ids.items()),
            "bounding_boxes.txt": "\n".join(boxes) + "\n",
        },
    )
    return root


def params(root: Path, **changes) -> WaterbirdsParams:
    known = {"source": "waterbirds", "root": str(root), "cub_root": str(root.parent / "CUB_200_2011")}
    return WaterbirdsParams(**{**known, **changes})


def test_each_image_has_its_birds_box_and_its_group(birds, tmp_path):
    source, raw = fetched(params(birds), tmp_path)
    description = source.describe(raw)
    assert description.classes == ("landbird", "waterbird")
    assert (description.task, description.counts) == ("multiclass", {"train": 4, "val": 2, "test": 2})
    read = by_key(params(birds), tmp_path)
    assert len(read) == len(BIRDS)
    for number, (_, y, _, place) in enumerate(BIRDS):
        sample = read[Path(name_of(number)).stem]
        assert sample.image == (birds / name_of(number)).read_bytes()
        assert (sample.label, sample.group) == (y, 2 * y + place)
        assert sample.boxes == ((y, number, 2, number + 20, 12),)


def test_splits_are_those_of_the_metadata(birds, tmp_path):
    for split, listed in samples(params(birds), tmp_path).items():
        found = {sample.key for sample in listed}
        assert found == {Path(name_of(n)).stem for n, bird in enumerate(BIRDS) if SPLITS[bird[2]] == split}


def test_variant_100_has_no_training_bird_on_unusual_ground(birds, tmp_path):
    read = samples(params(birds, variant=100), tmp_path)
    assert sorted(sample.group for sample in read["train"]) == [0, 3]
    assert left_out(tmp_path) == {"training images of the smaller groups": 2, **CROW}
    whole = samples(params(birds), tmp_path)
    assert (read["val"], read["test"]) == (whole["val"], whole["test"])


def test_groups_and_boxes_pass_through_the_shards_and_the_loader(birds, tmp_path):
    root = sharded(params(birds), tmp_path)
    (batch,) = loader(root, "test", DataParams(image_size=60), 2)
    assert batch["group"].tolist() == [2, 0]
    assert batch["label"].tolist() == [1, 0]
    assert batch["boxes"][0].tolist() == [0, 1, 3 * 1.5, 2 * 2, 23 * 1.5, 12 * 2]


def test_the_folder_above_and_an_archive_give_the_same_samples(birds, tmp_path):
    expected = samples(params(birds), tmp_path)
    archive = tmp_path / "birds.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(birds, birds.name)
    cub_lists = shutil.make_archive(str(tmp_path / "cub"), "zip", tmp_path, "CUB_200_2011")
    assert samples(params(archive, cub_root=cub_lists), tmp_path) == expected
    above = tmp_path / "above"
    above.mkdir()
    birds.rename(above / birds.name)
    assert samples(params(above), tmp_path) == expected


def test_the_official_archives_give_the_samples_of_the_folder(birds, tmp_path, monkeypatch):
    packed = {}
    for name, folder in (("birds", birds), ("CUB_200_2011", tmp_path / "CUB_200_2011")):
        packed[name] = tmp_path / f"{name}.tgz"
        with tarfile.open(packed[name], "w:gz") as file:
            file.add(folder, folder.name)
    monkeypatch.setattr(waterbirds, "URL", f"file://{packed['birds']}")
    digest = hashlib.md5(packed["CUB_200_2011"].read_bytes()).hexdigest()
    monkeypatch.setattr(
        cub, "ARCHIVES", {"cub": Official(f"file://{packed['CUB_200_2011']}", f"md5:{digest}")}
    )
    assert samples(WaterbirdsParams(source="waterbirds"), tmp_path) == samples(params(birds), tmp_path)
    with pytest.raises(DataError, match=r"birds\.tgz: the content has sha256:"):
        fetched(WaterbirdsParams(source="waterbirds", sha256="0" * 64), tmp_path / "other")


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "split,place,",
            "part,where,",
            r"has no column split, place \(it has img_id, img_filename, y, part, where",
        ),
        (",1,0,1,/x", ",1,3,1,/x", r"line 2: split is '3', where 0 to 2 are allowed"),
        (",1,0,1,/x", ",waterbird,0,1,/x", r"line 2: y is 'waterbird', where 0 to 1 are allowed"),
        (",1,0,1,/x/y.jpg", "", r"line 2: y is None"),
        ("Albatross_0000", "Albatross_9999", r"Albatross_9999_55\.jpg is missing"),
    ],
)
def test_metadata_that_makes_no_sense_is_told_in_one_line(birds, tmp_path, old, new, told):
    edit(birds / "metadata.csv", old, new)
    with pytest.raises(DataError, match=rf"^waterbirds 95: [^\n]*{told}[^\n]*$"):
        fetched(params(birds), tmp_path)


def test_empty_metadata_is_told(birds, tmp_path):
    (birds / "metadata.csv").write_text("")
    with pytest.raises(
        DataError, match=r"metadata\.csv: has no column img_filename, y, split, place \(it has none\)"
    ):
        fetched(params(birds), tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("bounding_boxes.txt", "100 0.0 2.0 20.0 10.0", "", r"has not 5 columns"),
        (
            "bounding_boxes.txt",
            "100 0.0 2.0 20.0 10.0",
            "100 0.0 2.0 20.0 wide",
            r"'100 0.0 2.0 20.0 wide' is not an id",
        ),
        (
            "bounding_boxes.txt",
            "100 0.0 2.0 20.0 10.0",
            "500 0.0 2.0 20.0 10.0",
            r"'500 .*' is not an id of images\.txt",
        ),
        (
            "images.txt",
            "100 001.Albatross",
            "100 x.Albatross",
            r"001\.Albatross/Albatross_0000_55\.jpg has no box",
        ),
        (
            "bounding_boxes.txt",
            "100 0.0 2.0 20.0 10.0",
            "100 0.0 2.0 60.0 10.0",
            r"0000_55\.jpg: box .* outside its image of 40 x",
        ),
    ],
)
def test_boxes_that_make_no_sense_are_told_in_one_line(birds, tmp_path, file, old, new, told):
    edit(tmp_path / "CUB_200_2011" / file, old, new)
    with pytest.raises(DataError, match=rf"^[^\n]*{told}[^\n]*$"):
        fetched(params(birds), tmp_path)


def test_a_bad_box_is_left_out_on_demand(birds, tmp_path):
    edit(tmp_path / "CUB_200_2011/bounding_boxes.txt", "100 0.0 2.0 20.0 10.0", "100 0.0 2.0 60.0 10.0")
    assert by_key(params(birds, on_bad_box="skip"), tmp_path)["Albatross_0000_55"].boxes == ()
    assert left_out(tmp_path) == {"outside boxes": 1, **CROW}


@pytest.mark.parametrize(
    "file", ["metadata.csv", "../CUB_200_2011/images.txt", "../CUB_200_2011/bounding_boxes.txt"]
)
def test_a_missing_file_is_named(birds, tmp_path, file):
    (birds / file).unlink()
    with pytest.raises(DataError, match=rf"{Path(file).name} is missing"):
        fetched(params(birds), tmp_path)


def test_an_image_that_does_not_decode_is_counted_and_left_to_the_loader(birds, tmp_path, caplog):
    (birds / name_of(2)).write_bytes(b"no photo")
    root = sharded(params(birds), tmp_path)
    assert left_out(tmp_path) == {"boxes of images that do not decode": 1, **CROW}
    assert f"left out: 1 boxes of images that do not decode, such as {name_of(2)}" in caplog.text
    with pytest.raises(DecodeError, match="Albatross_0002_55: does not decode"):
        list(loader(root, "val", DataParams(image_size=60), 2))
    batches = loader(root, "val", DataParams(image_size=60, on_error="skip"), 2)
    assert [batch["label"].tolist() for batch in batches] == [[0]]
    assert batches.skipped == 1


def test_images_and_boxes_that_the_metadata_does_not_name_are_counted(birds, tmp_path):
    write_files(
        birds, {"004.New/New_1.jpg": jpeg(4, 4), "README.txt": "not an image", "004.New/.DS_Store": ""}
    )
    fetched(params(birds), tmp_path)
    hidden = {"hidden files and by-products of operating systems": 1}
    assert left_out(tmp_path) == {"images that metadata.csv does not name": 1, **CROW, **hidden}


def test_an_image_with_two_lines_is_named(birds, tmp_path):
    with open(birds / "metadata.csv", "a") as file:
        file.write(f"9,{name_of(2)},1,0,1,/x/y.jpg\n")
    with pytest.raises(DataError, match=rf"metadata\.csv: names {name_of(2)} more than once"):
        fetched(params(birds), tmp_path)
