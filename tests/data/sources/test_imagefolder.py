"""Image folders in all their forms, CIFAR-10 and ImageNet."""

import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipelines.data.raw.holdout import held_out
from pipelines.data.shards.sample import DataError
from pipelines.data.sources import get
from pipelines.params import Cifar10Params, ImageFolderParams, ImageNetParams
from tests.support.fetching import CLASSES, encoded, fetched, image_folder, photo_folder, samples


@pytest.fixture
def folder(tmp_path) -> Path:
    return photo_folder(tmp_path / "photos")


def pack(folder: Path, kind: str) -> Path:
    path = folder.with_name(f"photos.{kind}")
    # In an arbitrary but fixed order
    members = sorted(folder.rglob("*"), key=lambda path: hashlib.md5(path.name.encode()).digest())
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in members:
                archive.write(member, member.relative_to(folder))
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for member in members:
                archive.add(member, f"./{member.relative_to(folder)}", recursive=False)
    return path


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_every_form_gives_the_samples_of_the_folder(folder, tmp_path, kind):
    assert samples(image_folder(pack(folder, kind)), tmp_path) == samples(image_folder(folder), tmp_path)


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz"])
def test_a_remote_root_gives_the_samples_of_the_folder(folder, tmp_path, kind):
    memory = fsspec.filesystem("memory")
    local = folder if kind == "folder" else pack(folder, kind)
    address = f"memory://sources/{tmp_path.name}/{local.name}"
    memory.put(str(local), address, recursive=True)
    assert samples(image_folder(address), tmp_path) == samples(image_folder(folder), tmp_path)


def test_images_come_as_they_are_with_classes_in_order_of_their_names(folder, tmp_path):
    source, raw = fetched(image_folder(folder), tmp_path)
    description = source.describe(raw)
    assert description.classes == CLASSES
    assert description.counts == {"train": 18, "val": 6, "test": 6}
    sample = source.load(raw, source.index(raw, "test")[2])
    assert (sample.key, sample.label, sample.extension) == ("bee_00", 1, "png")
    assert sample.image == (folder / "test/bee/00.png").read_bytes()


def test_the_same_source_twice_leaves_the_same_bytes(folder, tmp_path):
    content = []
    for _ in range(2):
        _, raw = fetched(image_folder(pack(folder, "zip")), tmp_path)
        content.append({path.name: path.read_bytes() for path in raw.iterdir()})
    assert content[0] == content[1]


def test_the_checksum_changes_with_the_data(folder, tmp_path):
    source, raw = fetched(image_folder(folder), tmp_path)
    before = source.describe(raw).checksum
    (folder / "train/ant/99.png").write_bytes(encoded(99))
    source, raw = fetched(image_folder(folder), tmp_path)
    assert source.describe(raw).checksum != before


def test_validation_images_are_held_out_of_train_class_by_class(folder, tmp_path):
    images = {
        split: [s.image for s in listed] for split, listed in samples(image_folder(folder), tmp_path).items()
    }
    assert not set(images["train"]) & set(images["val"])
    assert len(set(images["train"]) | set(images["val"])) == 24
    labels = [sample.label for sample in samples(image_folder(folder), tmp_path)["val"]]
    assert Counter(labels) == {0: 2, 1: 2, 2: 2}
    other = samples(image_folder(folder, split_seed=1), tmp_path)["val"]
    assert [sample.image for sample in other] != images["val"]


def test_the_sources_own_validation_images_are_used(folder, tmp_path):
    shutil.copytree(folder / "test", folder / "valid")
    read = samples(image_folder(folder, splits={"val": "valid"}), tmp_path)
    assert {split: len(listed) for split, listed in read.items()} == {"train": 24, "val": 6, "test": 6}


@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_that_one_split_names_is_no_other_splits_by_default(folder, tmp_path, labelled):
    (folder / "test").rename(folder / "val")
    read = samples(image_folder(folder, splits={"test": "val"}, labelled=labelled), tmp_path)
    assert {split: len(listed) for split, listed in read.items()} == {"train": 18, "val": 6, "test": 6}
    assert not {sample.image for sample in read["val"]} & {sample.image for sample in read["test"]}


def test_held_out_shares_follow_class_sizes_and_the_seed():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    chosen = held_out(labels, 11, seed=3)
    # Exact shares are 5.5, 3.3 and 2.2; the remaining image comes from the class with the largest remainder.
    assert Counter(labels[i] for i in chosen) == {0: 6, 1: 3, 2: 2}
    assert chosen == held_out(labels, 11, seed=3)
    assert chosen != held_out(labels, 11, seed=4)


@pytest.mark.parametrize("count", [4, 9])
def test_a_holdout_that_leaves_a_class_without_training_images_is_refused(count):
    with pytest.raises(DataError, match="val_count"):
        held_out([0, 0, 1, 1], count, seed=0)


def test_no_validation_images_and_no_count_is_an_error(folder, tmp_path):
    with pytest.raises(DataError, match="val_count"):
        fetched(image_folder(folder, val_count=None), tmp_path)


@pytest.mark.parametrize("kind", ["folder", "tar.gz", "zip"])
def test_an_empty_class_folder_is_named(folder, tmp_path, kind):
    (folder / "train/dog").mkdir()
    with pytest.raises(DataError, match="train/dog"):
        fetched(image_folder(folder if kind == "folder" else pack(folder, kind)), tmp_path)


def test_a_class_that_train_does_not_have_is_named(folder, tmp_path):
    shutil.copytree(folder / "test/ant", folder / "test/dog")
    with pytest.raises(DataError, match="class dog is in test but not in train"):
        fetched(image_folder(folder), tmp_path)


def test_a_missing_split_is_named_beside_what_is_there(folder, tmp_path):
    (folder / "test").rename(folder / "evaluation")
    with pytest.raises(DataError, match=r"test/<class>/; there is: evaluation, train"):
        fetched(image_folder(folder), tmp_path)
    assert len(samples(image_folder(folder, splits={"test": "evaluation"}), tmp_path)["test"]) == 6


def test_images_outside_of_class_folders_are_named(folder, tmp_path):
    (folder / "test/loose.png").write_bytes(encoded(0))
    with pytest.raises(DataError, match=r"test/loose\.png"):
        fetched(image_folder(folder), tmp_path)


def test_a_missing_root_and_a_file_of_no_known_kind_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        fetched(image_folder(tmp_path / "nowhere"), tmp_path)
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(DataError, match=r"notes\.txt: not a tar, tar\.gz or zip"):
        fetched(image_folder(tmp_path / "notes.txt"), tmp_path)


def test_a_gzip_that_holds_no_tar_is_named(tmp_path):
    path = tmp_path / "notes.tar.gz"
    path.write_bytes(gzip.compress(b"no tar " * 500))
    with pytest.raises(DataError, match=r"notes\.tar\.gz: not a whole tar"):
        fetched(image_folder(path), tmp_path)


def test_sha256_is_checked(folder, tmp_path):
    path = pack(folder, "tar.gz")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    source, raw = fetched(image_folder(path, sha256=right), tmp_path)
    assert source.describe(raw).checksum == right
    with pytest.raises(DataError, match=f"{right}.*{'0' * 64}"):
        fetched(image_folder(path, sha256="0" * 64), tmp_path)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_cut_archive_is_never_taken_for_whole(folder, tmp_path, kind, share):
    path = pack(folder, kind)
    content = path.read_bytes()
    # Cut the part of the tar that holds members, not the zeros at its end.
    end = content.rstrip(b"\0") if kind == "tar" else content
    path.write_bytes(end[: int(share * len(end))])
    with pytest.raises(DataError, match="photos"):
        fetched(image_folder(path), tmp_path)
    assert not (tmp_path / "raw/manifest.json").exists()


def test_a_tar_cut_between_two_members_is_noticed(folder, tmp_path):
    path = pack(folder, "tar")
    with tarfile.open(path) as archive:
        boundary = archive.getmembers()[-3].offset
    path.write_bytes(path.read_bytes()[:boundary])
    with pytest.raises(DataError, match="cut short"):
        fetched(image_folder(path), tmp_path)


def test_an_image_that_changed_after_fetch_is_named(folder, tmp_path):
    source, raw = fetched(image_folder(folder), tmp_path)
    ref = source.index(raw, "test")[0]
    (folder / "test/ant/00.png").write_bytes(b"short")
    with pytest.raises(DataError, match=r"00\.png.*changed"):
        source.load(raw, ref)
    (folder / "test/ant/00.png").unlink()
    with pytest.raises(DataError, match=r"00\.png: cannot be read"):
        source.load(raw, ref)


def test_keys_are_unique_and_safe(folder, tmp_path):
    (folder / "train/ant/sub").mkdir()
    for name in ("a b.c.png", "a_b_c.png", "a_b_c.jpg", "sub/é.png"):
        (folder / "train/ant" / name).write_bytes(
            encoded(len(name), "jpeg" if name.endswith("jpg") else "png")
        )
    source, raw = fetched(image_folder(folder), tmp_path)
    keys = [ref.key for split in ("train", "val") for ref in source.index(raw, split)]
    assert len(set(keys)) == len(keys) == 28
    assert all(key.replace("_", "").replace("-", "").isalnum() and key.isascii() for key in keys)
    again, raw = fetched(image_folder(pack(folder, "zip")), tmp_path)
    assert keys == [ref.key for split in ("train", "val") for ref in again.index(raw, split)]


@pytest.mark.parametrize(
    ("name", "kind", "extension"), [("x.JPEG", "jpeg", "jpg"), ("x.webp", "webp", "webp")]
)
def test_jpeg_and_webp_keep_their_bytes(folder, tmp_path, name, kind, extension):
    content = encoded(7, kind)
    (folder / "test/ant" / name).write_bytes(content)
    read = {sample.key: sample for sample in samples(image_folder(folder), tmp_path)["test"]}["ant_x"]
    assert (read.image, read.extension) == (content, extension)


@pytest.mark.parametrize("name", ["x.bmp", "x.tiff", "x.ppm", "x.gif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_other_formats_become_png_with_the_same_pixels(folder, tmp_path, name, mode):
    kind = {"bmp": "bmp", "tiff": "tiff", "ppm": "ppm", "gif": "gif"}[name[2:]]
    content = encoded(7, kind, mode)
    (folder / "test/ant" / name).write_bytes(content)
    read = {sample.key: sample for sample in samples(image_folder(folder), tmp_path)["test"]}["ant_x"]
    assert read.extension == "png"
    expected, found = (Image.open(io.BytesIO(data)).convert("RGB") for data in (content, read.image))
    assert Image.open(io.BytesIO(read.image)).format == "PNG"
    assert np.array_equal(np.asarray(expected), np.asarray(found))


def test_sixteen_bits_stay_sixteen_bits(folder, tmp_path):
    array = np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000
    Image.fromarray(array).save(folder / "test/ant/x.tiff")
    read = {sample.key: sample for sample in samples(image_folder(folder), tmp_path)["test"]}["ant_x"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(read.image))), array)


def test_an_unfinished_fetch_is_not_read(tmp_path):
    with pytest.raises(DataError, match="run fetch"):
        get(image_folder(tmp_path)).describe(tmp_path / "raw")


def test_imagenet_reads_the_official_val_as_test(folder, tmp_path):
    (folder / "test").rename(folder / "val")
    some = ImageNetParams(source="imagenet", root=str(folder), val_count=6)
    source, raw = fetched(some, tmp_path)
    assert source.describe(raw).counts == {"train": 18, "val": 6, "test": 6}
    assert all("/val/" in ref.name for ref in source.index(raw, "test"))


def test_imagenet_without_train_can_only_be_evaluated_on(folder, tmp_path):
    (folder / "test").rename(folder / "val")
    shutil.rmtree(folder / "train")
    with pytest.raises(DataError, match=r"train/<wnid>/"):
        fetched(ImageNetParams(source="imagenet", root=str(folder), val_count=6), tmp_path)
    source, raw = fetched(ImageNetParams(source="imagenet", root=str(folder)), tmp_path)
    assert source.describe(raw).counts == {"train": 0, "val": 0, "test": 6}
    assert source.describe(raw).classes == CLASSES


def test_cifar10_takes_an_image_folder(folder, tmp_path):
    some = Cifar10Params(source="cifar10", root=str(pack(folder, "tar.gz")), val_count=6)
    assert samples(some, tmp_path) == samples(image_folder(folder), tmp_path)


@pytest.fixture
def published(tmp_path, monkeypatch) -> np.ndarray:
    """A CIFAR-10 of 20 training and 10 test images in the published format, with a URL of its own."""
    from torchvision.datasets import CIFAR10

    data = np.random.default_rng(0).integers(0, 256, (30, 3072), np.uint8)
    names = [f"class{label}" for label in range(10)]
    files = {
        "data_batch_1": {"data": data[:20], "labels": [*range(10), *range(10)]},
        "test_batch": {"data": data[20:], "labels": list(range(10))},
        "batches.meta": {"label_names": names},
    }
    packed = tmp_path / "published.tar.gz"
    sums = {}
    with tarfile.open(packed, "w:gz") as archive:
        for name, content in files.items():
            pickled = pickle.dumps(content)
            sums[name] = hashlib.md5(pickled).hexdigest()
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))
    monkeypatch.setattr(CIFAR10, "url", f"file://{packed}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return data.reshape(30, 3, 32, 32).transpose(0, 2, 3, 1)


def test_cifar10_is_downloaded_verified_and_kept_pixel_for_pixel(published, tmp_path):
    read = samples(Cifar10Params(source="cifar10", val_count=10), tmp_path)
    assert {split: len(listed) for split, listed in read.items()} == {"train": 10, "val": 10, "test": 10}
    found = {
        split: np.stack([np.asarray(Image.open(io.BytesIO(s.image))) for s in read[split]]) for split in read
    }
    assert np.array_equal(found["test"], published[20:])
    trained = {image.tobytes() for split in ("train", "val") for image in found[split]}
    assert trained == {image.tobytes() for image in published[:20]}


def test_a_cifar10_with_another_checksum_is_refused(published, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.tgz_md5", "0" * 32)
    with pytest.raises(DataError, match="md5"):
        fetched(Cifar10Params(source="cifar10", val_count=10), tmp_path)


def test_training_images_come_in_shuffled_order_so_that_shards_mix_the_classes(tmp_path):
    root = tmp_path / "root"
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(20):
                Image.new("RGB", (4, 4), (number, 0, 0)).save(root / split / name / f"{number:02d}.png")
    source = get(ImageFolderParams(source="imagefolder", root=str(root)))
    source.fetch(tmp_path / "raw", tmp_path / "cache", progress=False)
    labels = [source.load(tmp_path / "raw", ref).label for ref in source.index(tmp_path / "raw", "train")]
    assert sorted(labels) == [0] * 20 + [1] * 20
    assert 5 <= sum(labels[:20]) <= 15
    assert source.index(tmp_path / "raw", "train") == source.index(tmp_path / "raw", "train")


def test_images_without_labels_lie_anywhere_below_their_split(tmp_path):
    for number, name in enumerate(
        ("train/a.png", "train/b/c.png", "train/b/a.png", "train/d e.png", "test/x.png")
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    params = image_folder(tmp_path / "photos", labelled=False, val_count=1)
    source, raw = fetched(params, tmp_path)
    description = source.describe(raw)
    assert (description.task, description.classes) == ("unlabelled", ())
    assert description.counts == {"train": 3, "val": 1, "test": 1}
    split = samples(params, tmp_path)
    found = [*split["train"], *split["val"]]
    assert {sample.key for sample in found} == {"a", "b_c", "b_a", "d_e"}
    assert all(sample.label is None for sample in found)
    empty = params.model_copy(update={"splits": {"train": "nothing"}})
    with pytest.raises(DataError, match=r"no images in nothing/"):
        fetched(empty, tmp_path / "other")
