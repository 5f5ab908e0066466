"""Encoded images as tensors. The one place where pixels are decoded."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as decode_with_torchvision

from pipelines.data.formats.encoded_image import DecodeError, decode_error

WHITE = (255, 255, 255, 255)
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


def decode_image(encoded: bytes, *, apply_exif: bool = True) -> torch.Tensor:
    """8-bit RGB of an encoded image of any mode: uint8 (3, H, W), in any memory layout.

    Grey is repeated, palettes are looked up, CMYK is converted, 16 bits are cut to the upper 8, and transparent pixels are laid
    on white. RGB and grey JPEG is decoded by torchvision's libjpeg-turbo, half as fast again as Pillow and the copy to a tensor;
    every other image by Pillow.

    Args:
        encoded: a file in any format that Pillow reads.
        apply_exif: turn the image as its EXIF orientation says; False if boxes or masks are in stored pixels.

    Raises:
        DecodeError: not an image, truncated, larger than Pillow's limit on pixels, or of floating-point pixels.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))  # reads the header alone
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
            return decode_with_torchvision(buffer, ImageReadMode.RGB, apply_exif_orientation=apply_exif)
        if apply_exif:
            image = ImageOps.exif_transpose(image)
        return torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1)
    except DecodeError:
        raise
    except Exception as error:  # decoders meet corrupt bytes with errors of any type
        raise decode_error(error) from None


def _rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB."""
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, WHITE)
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    if image.mode.startswith("I"):  # 16 bits a pixel, or 32 that hold 16: Pillow would clip them, not scale them
        return Image.fromarray((np.array(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no known range; store 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")
