"""`python -m stages.tools.explain_text MODEL IMAGE "text" ["text" ...]`: explains an image for texts.

The picture shows the pixels that speak for each text. MODEL is a B-cosified image tower or a zero-shot
classifier, given as a folder or as `models:/name@alias`. Its text tower is stored with it or named by
`--text`. All texts share one scale of opacity and one of the heat maps.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pipelines import models, tracking
from pipelines.bcos import add_inverse, contribution_map, rgba
from pipelines.data.formats.encoded_image import DecodeError
from pipelines.data.loading.decode import decode_image
from pipelines.data.loading.transforms import eval_transform
from pipelines.data.shards.sample import DataError
from pipelines.errors import UserError, redacted
from pipelines.evaluation.pictures import save_texts
from pipelines.evaluation.text_gallery import explain_texts
from pipelines.evaluation.towers import check_width, image_tower
from pipelines.models import ModelError
from pipelines.params import DataParams
from pipelines.storage.errors import one_line


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the picture and prints each text's cosine with the share that the pixels contribute."""
    asked = parser().parse_args(arguments)
    with one_line_errors():
        with tracking.model_folder(asked.model) as folder:
            model, spec = models.load(folder)
            tower = image_tower(asked.model, model, spec)
            if spec.kind != "bcos":
                raise ModelError(
                    f"{asked.model}: a conventional tower, which does not explain itself: B-cosify it first"
                )
            if asked.text is None and not models.has_text_tower(folder):
                raise ModelError(f"{asked.model}: no text tower with it: name the folder of one with --text")
            text_tower = tracking.load_text_tower(asked.text or folder)
        check_width(asked.model, tower, spec, text_tower)
        images = add_inverse(read_image(asked.image, spec.image_size)[None])
        texts = asked.texts if asked.against is None else [*asked.texts, asked.against]
        cosines, weights = explain_texts(
            tower, images, text_tower.encode(texts), hold_norm=not asked.published
        )
        titles = [
            f"{text}\ncosine {cosine:.4f}" for text, cosine in zip(texts, cosines.tolist(), strict=True)
        ]
        if asked.against is not None:
            titles += [
                f"{text}\nagainst: {asked.against}\n{cosines[i] - cosines[-1]:+.4f}"
                for i, text in enumerate(asked.texts)
            ]
            weights = torch.cat([weights, weights[:-1] - weights[-1]])
        repeated = images.expand(len(weights), -1, -1, -1)
        # An odd kernel size, 15 at 224 pixels as published.
        maps, smooth = contribution_map(repeated, weights), spec.image_size // 15 | 1
        save_texts(asked.out, images[0], titles, rgba(repeated, weights, smooth, one_scale=True), maps)
    for text, cosine, of_pixels in zip(
        texts, cosines.tolist(), maps.double().sum((1, 2)).tolist(), strict=False
    ):
        print(
            f"{text}: cosine {cosine:.4f} = {of_pixels:.4f} of the pixels "
            f"+ {cosine - of_pixels:.4f} of no pixel"
        )
    print(asked.out)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the tool's arguments."""
    parser = argparse.ArgumentParser(prog="python -m stages.tools.explain_text", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of an image tower, or models:/name@alias")
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument("texts", metavar="text", nargs="+", help="what the image is explained for")
    parser.add_argument(
        "--text", metavar="FOLDER", help="of the text tower, if none is with MODEL; or models:/..."
    )
    parser.add_argument("--against", metavar="TEXT", help="also what speaks for each text against this one")
    parser.add_argument(
        "--published",
        action="store_true",
        help="differentiate the embedding's norm, as published, not hold it",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("explained.png"), help="the picture (default: %(default)s)"
    )
    return parser


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with one line, not a traceback, on an error that the user can mend."""
    try:
        yield
    except (UserError, FileNotFoundError) as error:
        sys.exit(redacted(str(error)))


def read_image(path: str, size: int) -> Tensor:
    """Returns the central square of an image file, resized: (3, size, size) in [0, 1].

    Raises `DataError`, which names the file, if it cannot be read or decoded.
    """
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
