"""Each item of a broken data set is used, counted, or refused in one line that names it.

The tests draw 760 broken images, archives, annotation files and shards by seeds. They may only write to one
folder.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.formats.encoded_image import DecodeError
from pipelines.data.loading.decode import decode_image
from pipelines.data.loading.loader import loader
from pipelines.data.shards.check import check_sample
from pipelines.data.shards.writer import write_shards
from pipelines.data.sources import get
from pipelines.params import Coco2014Params, DataParams, Voc2007Params, WaterbirdsParams
from tests.support.broken import OK, altered, broken, outcome
from tests.support.fetching import SPLITS, image_folder, jpeg, photo_folder, write_files
from tests.support.guard import own_project
from tests.support.loading import write
from tests.support.toy_source import rich


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch) -> Iterator[Path]:
    """The only folder that a test may write to; Pillow refuses images above a million pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    with own_project(tmp_path, monkeypatch) as folder:
        yield folder


# Images -----------------------------------------------------------------------------------------------------


def images(draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of broken images in many formats, with metadata."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).resize((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    formats = {
        "jpg": "JPEG",
        "png": "PNG",
        "webp": "WEBP",
        "tif": "TIFF",
        "gif": "GIF",
        "bmp": "BMP",
        "ppm": "PPM",
    }
    for number in range(count):
        suffix, kind = draw.choice(list(formats.items()))
        mode = draw.choice(
            {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGBA", "P", "I;16"], "TIFF": ["CMYK", "I;16"]}.get(
                kind, ["RGB"]
            )
        )
        known = {"exif": exif, "icc_profile": b"icc" * 50} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
        file = io.BytesIO()
        (photo.convert("L").convert(mode) if mode == "I;16" else photo.convert(mode)).save(
            file, kind, **known
        )
        yield f"{number}.{suffix}", broken(file.getvalue(), draw)


def test_images(project):
    draw = random.Random(0)
    files = dict(images(draw, 200))
    decoded = 0
    for content in files.values():
        decoded += outcome(lambda content=content: decode_image(content)) == OK
    root = photo_folder(project / "photos")
    write_files(root / "test/ant", files)
    source = get(image_folder(root))
    source.fetch(project / "raw", project / "cache", progress=False)
    write_shards(source, project / "raw", project / "shards", shard_size=50, progress=False)
    batches = loader(str(project / "shards"), "test", DataParams(image_size=8, on_error="skip"), 16)
    read = sum(len(batch["key"]) for batch in batches)
    assert read + batches.skipped == len(files) + 6
    assert read == decoded + 6
    with pytest.raises(DecodeError, match=r"^test-0000.*: ant_\d+: does not decode: [^\n]*$"):
        list(loader(str(project / "shards"), "test", DataParams(image_size=8), 16))


# Archives ---------------------------------------------------------------------------------------------------


def packed(root: Path, kind: str) -> bytes:
    """A folder as an archive."""
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(root.rglob("*.png")):
                archive.write(path, path.relative_to(root))
    else:
        with tarfile.open(
            fileobj=file, mode="w:gz" if kind == "gz" else "w", format=tarfile.PAX_FORMAT
        ) as tar:
            tar.add(root, ".")
            link = tarfile.TarInfo("./train/ant/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "../bee/00.png"
            tar.addfile(link)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["tar", "gz", "zip"])
def test_archives(project, kind):
    draw = random.Random(kind)
    whole = packed(photo_folder(project / "photos"), kind)
    for number in range(60):
        path = write_files(project, {f"{number}.bin": broken(whole, draw)}) / f"{number}.bin"
        said = outcome(lambda path=path: everything(image_folder(path), project))
        assert said == OK or path.name in said or "val_count" in said or said.startswith("images.tar"), said


def test_hostile_tars(project):
    """Names, types, sizes and links that no tar program writes."""
    draw = random.Random(0)
    names = [
        "/etc/x.png",
        "../../x.png",
        "train/ant/../../../x.png",
        "train",
        "train/ant",
        "a" * 300,
        "train/\xff/\n.png",
        ".",
        "",
    ]
    targets = [*names, "train/ant/0.png", "/", "..", "train/ant/link"]
    good = jpeg(4, 4)
    for number in range(60):
        path = project / f"{number}.tar"
        with tarfile.open(path, "w", format=draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
            for name in [
                *(f"{split}/ant/{i}.png" for split in SPLITS for i in range(2)),
                *draw.choices(names, k=4),
            ]:
                member = tarfile.TarInfo(name)
                member.size = len(good)
                tar.addfile(member, io.BytesIO(good))
            for i in range(4):
                member = tarfile.TarInfo(draw.choice([*names, f"train/ant/link{i}", "train/ant/link"]))
                member.type, member.linkname = (
                    draw.choice([b"1", b"2", b"3", b"6", b"7", b"S", b"V", b"x"]),
                    draw.choice(targets),
                )
                tar.addfile(member)
        outcome(lambda path=path: everything(image_folder(path), project))


def everything(params: Any, project: Path) -> None:
    """Fetches a data set and reads each of its samples; a sample may fail, with an error of one line."""
    source = get(params)
    shutil.rmtree(project / "raw", ignore_errors=True)
    source.fetch(project / "raw", project / "cache", progress=False)
    description = source.describe(project / "raw")
    for split in SPLITS:
        references = source.index(project / "raw", split)
        assert len(references) == description.counts[split]
        for reference in references:
            outcome(
                lambda reference=reference: check_sample(source.load(project / "raw", reference), description)
            )


# Annotations ------------------------------------------------------------------------------------------------


def coco() -> dict[str, Any]:
    """The files of a small COCO data set; JSON as values."""
    files: dict[str, Any] = {}
    for year, numbers in (("train2014", (1, 2)), ("val2014", (3,))):
        images = [{"id": n, "file_name": f"{n}.jpg", "width": 12, "height": 9} for n in numbers]
        things = [
            {
                "id": 10 * n,
                "image_id": n,
                "category_id": 5,
                "bbox": [1, 1, 6, 5],
                "iscrowd": n == 2,
                "segmentation": {"size": [9, 12], "counts": [20, 30, 58]}
                if n == 2
                else [[1, 1, 7, 1, 7, 6, 1, 6]],
            }
            for n in numbers
        ]
        categories = [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}]
        files[f"annotations/instances_{year}.json"] = {
            "images": images,
            "annotations": things,
            "categories": categories,
        }
        files |= {f"{year}/{n}.jpg": jpeg(12, 9) for n in numbers}
    return files


def voc() -> dict[str, Any]:
    """The files of a small VOC data set."""
    files: dict[str, Any] = {}
    for number, split in enumerate(SPLITS):
        box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>6</xmax><ymax>7</ymax></bndbox>"
        thing = f"<object><name>cat</name><difficult>0</difficult>{box}</object>"
        files[f"VOC/ImageSets/Main/{split}.txt"] = f"{number}\n".encode()
        files[f"VOC/JPEGImages/{number}.jpg"] = jpeg(12, 9)
        size = "<size><width>12</width><height>9</height></size>"
        files[f"VOC/Annotations/{number}.xml"] = f"<annotation>{size}{thing}</annotation>".encode()
        mask = io.BytesIO()
        Image.fromarray(np.ones((9, 12), np.uint8)).save(mask, "png")
        files[f"VOC/SegmentationObject/{number}.png"] = mask.getvalue()
    return files


def birds() -> dict[str, Any]:
    """The files of a small Waterbirds data set and of CUB."""
    rows = [(f"a/{n}.jpg", y, split, y) for n, (y, split) in enumerate([(0, 0), (1, 0), (0, 1), (1, 2)], 1)]
    lines = [f"{n},{name},{y},{split},{place}" for n, (name, y, split, place) in enumerate(rows, 1)]
    files: dict[str, Any] = {
        "metadata.csv": "\n".join(["img_id,img_filename,y,split,place", *lines]).encode()
    }
    files["images.txt"] = "".join(f"{n} {name}\n" for n, (name, *_) in enumerate(rows, 1)).encode()
    files["bounding_boxes.txt"] = "".join(f"{n} 1.0 2.0 5.0 4.0\n" for n in range(1, 5)).encode()
    return files | {name: jpeg(12, 9) for name, *_ in rows}


SETS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[str, str], Any]]] = {
    "coco": (
        coco,
        lambda root, bad: Coco2014Params(source="coco2014", root=root, val_count=1, on_bad_box=bad),
    ),
    "voc": (voc, lambda root, bad: Voc2007Params(source="voc2007", root=root, on_bad_box=bad)),
    "birds": (
        birds,
        lambda root, bad: WaterbirdsParams(source="waterbirds", root=root, cub_root=root, on_bad_box=bad),
    ),
}


@pytest.mark.parametrize("kind", SETS)
def test_annotations(project, kind):
    draw = random.Random(kind)
    make, params = SETS[kind]
    for number in range(80):
        files = make()
        name = draw.choice(
            [name for name in files if not name.endswith((".jpg", ".png"))] * 3 + sorted(files)
        )
        if isinstance(files[name], dict) and draw.random() < 0.7:
            files[name] = altered(files[name], draw)
        elif draw.random() < 0.05:
            del files[name]
        else:
            files[name] = broken(as_bytes(files[name]), draw)
        root = write_files(
            project / f"{number}", {path: as_bytes(content) for path, content in files.items()}
        )
        outcome(lambda root=root: everything(params(str(root), draw.choice(["raise", "skip"])), project))
        shutil.rmtree(root)


def as_bytes(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


# Shards -----------------------------------------------------------------------------------------------------


def test_shards(project):
    draw = random.Random(0)
    data = DataParams(image_size=8, on_error="skip", loader_workers=0)
    whole = Path(write(project / "whole", [rich(number) for number in range(12)]))
    for number in range(80):
        root = project / f"{number}"
        shutil.copytree(whole, root)
        path = draw.choice(sorted(root.iterdir()))
        content = path.read_bytes()
        if path.suffix == ".json" and draw.random() < 0.7:
            path.write_text(json.dumps(altered(json.loads(content), draw)))
        else:
            path.write_bytes(broken(content, draw))
        outcome(lambda root=root: list(loader(str(root), "train", data, 5)))
