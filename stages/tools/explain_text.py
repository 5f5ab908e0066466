"""`python -m stages.tools.explain_text MODEL IMAGE "text" ["text" ...]`: a picture of what in an image speaks for each text.

MODEL is the folder of a B-cosified image tower or `models:/name@alias`; its text tower lies beside it, or in the folder `--text`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines import tracking
from pipelines.bcos import add_inverse, contribution_map, dynamic_weights, rgba
from pipelines.data.formats.encoded_image import DecodeError
from pipelines.data.loading.decode import decode_image
from pipelines.data.loading.transforms import eval_transform
from pipelines.data.shards.sample import DataError
from pipelines.errors import UserError, redacted
from pipelines.evaluation.pictures import save_texts
from pipelines.evaluation.towers import check_width, image_tower, read_text_tower
from pipelines.models import ModelError
from pipelines.models.zero_shot import ZeroShotNetwork
from pipelines.params import DataParams
from pipelines.storage.errors import one_line


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the picture, and prints each cosine and how much of it the pixels' contributions make up."""
    asked = parser().parse_args(arguments)
    with one_line_errors():
        model, spec = tracking.load(asked.model)
        tower = image_tower(asked.model, model, spec)
        if spec.kind != "bcos":
            raise ModelError(f"{asked.model}: a conventional tower, which does not explain itself: B-cosify it first")
        text_tower = read_text_tower(text_folder(asked.model, asked.text))
        check_width(asked.model, tower, spec, text_tower)
        images = add_inverse(read_image(asked.image, spec.image_size)[None])
        texts = asked.texts if asked.against is None else [*asked.texts, asked.against]
        cosines, weights = explain_texts(tower, images, text_tower.encode(texts), hold_norm=not asked.published)
        titles = [f"{text}\ncosine {cosine:.4f}" for text, cosine in zip(texts, cosines.tolist(), strict=True)]
        if asked.against is not None:
            titles += [f"{text}\nagainst: {asked.against}\n{cosines[i] - cosines[-1]:+.4f}" for i, text in enumerate(asked.texts)]
            weights = torch.cat([weights, weights[:-1] - weights[-1]])
        repeated = images.expand(len(weights), -1, -1, -1)
        maps = contribution_map(repeated, weights)
        save_texts(asked.out, images[0], titles, rgba(repeated, weights, asked.smooth), maps)
    for text, cosine, of_pixels in zip(texts, cosines.tolist(), maps.double().sum((1, 2)).tolist(), strict=False):
        print(f"{text}: cosine {cosine:.4f} = {of_pixels:.4f} of the pixels + {cosine - of_pixels:.4f} of no pixel")
    print(asked.out)


def parser() -> argparse.ArgumentParser:
    """The tool's arguments."""
    parser = argparse.ArgumentParser(prog="python -m stages.tools.explain_text", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of an image tower, or models:/name@alias")
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument("texts", metavar="text", nargs="+", help="what the image is explained for")
    parser.add_argument("--text", metavar="FOLDER", help="folder of the text tower, if it is not beside the image tower")
    parser.add_argument("--against", metavar="TEXT", help="also what speaks for each text against this one")
    parser.add_argument("--published", action="store_true", help="differentiate the embedding's norm, as published, not hold it")
    parser.add_argument("--smooth", type=int, default=15, help="side of the mean filter of the opacity, pixels, odd")
    parser.add_argument("--out", type=Path, default=Path("explained.png"), help="the picture (default: %(default)s)")
    return parser


@contextmanager
def one_line_errors() -> Iterator[None]:
    """In the block, an error that the user can mend ends the process with one line, not a traceback."""
    try:
        yield
    except (UserError, FileNotFoundError) as error:
        sys.exit(redacted(str(error)))


def explain_texts(tower: nn.Module, images: Tensor, texts: Tensor, hold_norm: bool = True) -> tuple[Tensor, Tensor]:
    """Cosines (T,) of an image with texts, and the W(x) of each, from one forward pass of the tower.

    Args:
        tower: a B-cosified image tower.
        images: (1, 6, H, W) in [0, 1].
        texts: embeddings (T, D).
        hold_norm: the embedding's norm is held; otherwise it is differentiated, as published.

    Returns:
        cosines (T,), weights (T, 6, H, W): with the norm held, and without biases, Σ weights·(images - mean) is the cosine.
    """
    network = ZeroShotNetwork(tower, texts, hold_norm=hold_norm).eval()
    cosines_NT, weights_NTCHW = dynamic_weights(network, images, torch.arange(len(texts), device=images.device)[None])
    return cosines_NT[0], weights_NTCHW[0]


def text_folder(model: str, text: str | None) -> str:
    """The folder of the text tower: `text`, or that of the model."""
    if text is None and model.startswith("models:/"):
        raise ModelError(f"{model}: name the folder of its text tower with --text")
    return text or model


def read_image(path: str, size: int) -> Tensor:
    """The central square of an image file, resized: (3, size, size) in [0, 1]; raises DataError, which names the file."""
    try:
        encoded = Path(path).read_bytes()
        pixels = decode_image(encoded)
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None
    except DecodeError as error:
        raise DataError(f"{path}: does not decode: {error}") from None
    view = eval_transform(DataParams(image_size=size, eval_resize=size))
    return view({"image": pixels}, random.Random(0))["image"] / 255


if __name__ == "__main__":
    main()
