"""Encoded images as tensors."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as decode_with_torchvision

from pipelines.data.formats.encoded_image import decoded, open_image, to_rgb


def decode_image(encoded: bytes, *, apply_exif: bool = True) -> torch.Tensor:
    """8-bit RGB of an encoded image of any mode: uint8 (3, H, W), in any memory layout.

    Grey is repeated, palettes are looked up, CMYK is converted, 16 bits are cut to the upper 8, and transparent pixels are laid
    on white. RGB and grey JPEG is decoded by torchvision's libjpeg-turbo, half as fast again as Pillow and the copy to a tensor;
    every other image by Pillow, as `formats.encoded_image` says.

    Args:
        encoded: a file in any format that Pillow reads.
        apply_exif: turn the image as its EXIF orientation says; False if boxes or masks are in stored pixels.

    Raises:
        DecodeError: not an image, truncated, larger than Pillow's limit on pixels, or of floating-point pixels. Damaged metadata
            is ignored.
    """

    def decode(content: bytes) -> torch.Tensor:
        header = Image.open(io.BytesIO(content))  # which does not decode yet
        if header.format == "JPEG" and header.mode in ("RGB", "L"):
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return decode_with_torchvision(buffer, ImageReadMode.RGB, apply_exif_orientation=apply_exif)
        pixels = np.array(to_rgb(open_image(content, apply_exif=apply_exif)))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    return decoded(encoded, decode)
