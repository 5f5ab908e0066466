"""Decoding any common format to 8-bit RGB, and errors in one line."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipelines.data.formats.encoded_image import DecodeError, image_size, mask_ids
from pipelines.data.loading.decode import decode_image
from tests.support.toy_source import encoded, noise

SMOOTH = np.asarray(Image.fromarray(noise(0, 6, 9)).resize((45, 30), Image.Resampling.BICUBIC))


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def channels_last(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8
    return image.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 75, "subsampling": 2, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"quality": 80}),
    ],
)
def test_same_pixels_as_pillow(kind, options):
    file = encoded(SMOOTH, kind, **options)
    reference = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
    assert np.abs(channels_last(decode_image(file)) - reference).max() <= 2
    assert image_size(file) == (30, 45)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_is_repeated(kind):
    grey = Image.fromarray(SMOOTH).convert("L")
    file = file_of(grey, kind)
    reference = np.asarray(Image.open(io.BytesIO(file)))
    assert (channels_last(decode_image(file)) == reference[..., None]).all()


def test_one_bit_is_black_and_white():
    image = Image.fromarray(np.indices((4, 4)).sum(0) % 2 == 0)
    decoded = channels_last(decode_image(file_of(image)))
    assert (decoded == 255 * (np.indices((4, 4)).sum(0) % 2 == 0)[..., None]).all()


def test_sixteen_bits_keep_the_upper_eight():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    decoded = channels_last(decode_image(file_of(Image.fromarray(ramp))))
    assert (decoded == (ramp >> 8)[..., None]).all()


def test_palette_is_looked_up():
    image = Image.fromarray(SMOOTH).quantize(16)
    assert (channels_last(decode_image(file_of(image))) == np.asarray(image.convert("RGB"))).all()


def test_cmyk_jpeg_is_converted():
    file = file_of(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(channels_last(decode_image(file)) - SMOOTH).mean() < 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_laid_on_white(mode):
    alpha = np.full((4, 4), 255, np.uint8)
    alpha[0] = 0
    if mode == "P":
        image = Image.fromarray((alpha // 255).astype(np.uint8), "P")
        image.putpalette([9, 9, 9, 10, 10, 10])
        file = file_of(image, transparency=0)
    else:
        image = Image.new("RGB", (4, 4), (10, 10, 10)).convert(mode)
        image.putalpha(Image.fromarray(alpha))
        file = file_of(image)
    decoded = channels_last(decode_image(file))
    assert (decoded[0] == 255).all()
    assert (decoded[1:] == 10).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_only_when_asked(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    file = file_of(Image.fromarray(SMOOTH), kind, exif=exif, **options)
    stored = Image.open(io.BytesIO(file))
    turned = np.asarray(ImageOps.exif_transpose(stored)).astype(int)
    assert np.abs(channels_last(decode_image(file, apply_exif=True)) - turned).max() <= 2
    assert np.abs(channels_last(decode_image(file, apply_exif=False)) - np.asarray(stored)).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_image_is_an_error_in_one_line(kind):
    file = encoded(noise(0, 40, 40), kind)
    with pytest.raises(DecodeError) as caught:
        decode_image(file[: len(file) // 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [b"", b"not an image", b"\x80\x04cposix\nsystem\n."])
def test_what_is_no_image_is_an_error(file):
    with pytest.raises(DecodeError, match="not an image in a known format"):
        decode_image(file)
    with pytest.raises(DecodeError, match="not an image in a known format"):
        image_size(file)


def test_corrupt_bytes_give_an_image_or_a_decode_error():
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        file = np.frombuffer(encoded(noise(1, 16, 16), kind), np.uint8)
        for _ in range(100):
            broken = file.copy()
            places = random.integers(0, len(file), 4)
            broken[places] = random.integers(0, 256, 4)
            with suppress(DecodeError):
                assert decode_image(broken.tobytes()).shape[0] == 3


def test_floating_point_pixels_are_refused():
    with pytest.raises(DecodeError, match="floating-point"):
        decode_image(file_of(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_mask_keeps_its_ids(dtype):
    ids = np.arange(12, dtype=dtype).reshape(3, 4) * (1 if dtype == np.uint8 else 500)
    mask = mask_ids(encoded(ids))
    assert mask.dtype == np.int64
    assert (mask == ids).all()


def test_palette_mask_keeps_its_indices():
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    assert mask_ids(file_of(image)).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("file", "says"), [(encoded(noise(0)), "mode RGB"), (b"", "not an image")])
def test_mask_in_colours_or_none_is_refused(file, says):
    with pytest.raises(DecodeError, match=f"mask: {says}"):
        mask_ids(file)
