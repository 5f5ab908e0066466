"""The images of an archive: by class, as references with unique keys, and read as samples."""

from __future__ import annotations

import hashlib
import io
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image, ImageOps

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Contents, Ref
from pipelines.data.raw.holdout import held_out
from pipelines.data.shards.sample import DataError, Sample

log = logging.getLogger(__name__)

_KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}  # stored as they are
_ENCODED_ANEW = {".bmp", ".gif", ".pgm", ".pnm", ".ppm", ".tif", ".tiff"}  # stored as PNG
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}  # what PNG holds without loss

Classes = dict[str, list[str]]  # class -> paths of its images in the archive


def classes_of(contents: Contents, folder: str, where: str) -> Classes:
    """The images below `folder/<class>/`, by class, sorted; empty if there is no such folder.

    Raises:
        DataError: a class folder is empty, or images lie outside of class folders.
    """
    prefix = posixpath.normpath(folder) + "/"
    classes: Classes = {
        name.removeprefix(prefix): []
        for name in archive.visible(sorted(contents.folders))
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    }
    loose, others = [], []
    for name in archive.visible(sorted(contents.files)):
        if not name.startswith(prefix):
            continue
        suffix = posixpath.splitext(name)[1].lower()
        class_name, slash, _ = name.removeprefix(prefix).partition("/")
        if suffix not in _KEPT and suffix not in _ENCODED_ANEW:
            others.append(name)
            if slash:
                classes.setdefault(class_name, [])
        elif not slash:
            loose.append(name)
        else:
            classes.setdefault(class_name, []).append(name)
    if others:
        log.warning("%s: %d files are not images by their names and are left out, such as %s", where, len(others), others[0])
    if loose:
        raise DataError(f"{where}: {len(loose)} images lie in {folder}/ itself, such as {loose[0]}: sort by {folder}/<class>/")
    for class_name, images in classes.items():
        if not images:
            raise DataError(f"{where}: class folder {prefix}{class_name} has no image: fill it, or remove it everywhere")
    return classes


def references(contents: Contents, images: Mapping[str, Iterable[str]], classes: tuple[str, ...]) -> list[Ref]:
    """A reference for each image, class by class in label order, with unique keys safe in file names."""
    listed = [(path, name, label) for label, name in enumerate(classes) for path in images.get(name, ())]
    keys = unique_keys({path: f"{name}_{_stem(path, name)}" for path, name, _ in listed})
    refs = []
    for path, _, label in listed:
        member = contents.files[path]
        refs.append(Ref(keys[path], member.place, member.offset, member.size, label, path))
    return refs


def unlabelled(contents: Contents, folder: str) -> list[Ref]:
    """A reference for each image anywhere below `folder`, in the order of their paths."""
    prefix = posixpath.normpath(folder) + "/"
    below = [name for name in archive.visible(sorted(contents.files)) if name.startswith(prefix)]
    paths = [name for name in below if posixpath.splitext(name)[1].lower() in {*_KEPT, *_ENCODED_ANEW}]
    keys = unique_keys({path: posixpath.splitext(path.removeprefix(prefix))[0] for path in paths})
    members = [(path, contents.files[path]) for path in paths]
    return [Ref(keys[path], member.place, member.offset, member.size, None, path) for path, member in members]


def unique_keys(names: Mapping[str, str]) -> dict[str, str]:
    """Keys by path: `names` made safe in file names, with a hash of the path where two would be equal."""
    safe = {path: re.sub(r"[^A-Za-z0-9_-]", "_", name) for path, name in names.items()}
    taken = Counter(safe.values())
    return {
        path: key if taken[key] == 1 else f"{key}-{hashlib.sha256(path.encode()).hexdigest()[:12]}" for path, key in safe.items()
    }


def _stem(path: str, class_name: str) -> str:
    """The path of an image below its class folder, without suffix."""
    return posixpath.splitext(path.partition(f"/{class_name}/")[2])[0]


def split_off(refs: list[Ref], count: int, seed: int) -> tuple[list[Ref], list[Ref]]:
    """(training references, `count` held-out ones), stratified by label, both in their order."""
    chosen = held_out([ref.label or 0 for ref in refs], count, seed)
    return [ref for i, ref in enumerate(refs) if i not in chosen], [ref for i, ref in enumerate(refs) if i in chosen]


def load_image(raw: Path, ref: Ref) -> Sample:
    """The sample at `ref`: the bytes of JPEG, PNG and WebP, the PNG of the pixels of other formats.

    Raises:
        DataError: the file is gone or changed, or is of another format and does not decode.
    """
    content = archive.read(raw, ref)
    suffix = posixpath.splitext(ref.path)[1].lower()
    if suffix in _KEPT:
        return Sample(ref.key, content, _KEPT[suffix], label=ref.label)
    return Sample(ref.key, _as_png(content, ref.path), "png", label=ref.label)


def _as_png(content: bytes, path: str) -> bytes:
    """The PNG of an encoded image's first frame, pixel for pixel, turned upright as EXIF says."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: does not decode ({error}): repair or remove it") from None
    if upright.mode not in _PNG_MODES:
        raise DataError(f"{path}: PNG cannot hold its pixels (mode {upright.mode}): convert it to 8-bit RGB first")
    output = io.BytesIO()
    upright.save(output, "png", compress_level=6)
    return output.getvalue()
