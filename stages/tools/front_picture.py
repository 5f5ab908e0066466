"""Draws the picture of the README from a finished default run: `python -m stages.tools.front_picture`.

A row per image: the input with its boxes, the explanation of the B-cosified network, GradCAM of the
conventional network that it was made from, and the explanation of the classifier that guidance trained. All
of them explain one class, which the title names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipelines import models
from pipelines.attribution import Attribution, explain
from pipelines.bcos import add_inverse, dynamic_weights, rgba
from pipelines.data.loading.loader import loader
from pipelines.errors import UserError
from pipelines.evaluation.batches import present
from pipelines.evaluation.pictures import Column, save_panels
from pipelines.params import Params
from pipelines.workflow.places import model_folder, shards_of
from pipelines.workflow.running import stage

PATH = Path("docs/images/front.png")


def main() -> None:
    """Draws the first test images with two classes or more of which all three networks find one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=3)
    rows = parser.parse_args().rows
    with stage() as params:
        draw(params, rows)
    print(f"wrote {PATH}")


def draw(params: Params, rows: int, path: Path = PATH) -> None:
    """Writes the picture with `rows` rows, or fewer if fewer images are found, to `path`."""
    folders = [f"bcosify/{params.bcosify.starts[0]}", "pretrain", "guide"]
    bcosified, conventional, guided = loaded = [models.load(model_folder(folder)) for folder in folders]
    chosen = list(examples(params, [model for model, _ in loaded], rows))
    if not chosen:
        raise UserError("no test image with two classes has one that all three networks find: train longer")
    images = torch.stack([image for image, _, _ in chosen])
    targets = torch.tensor([target for _, target, _ in chosen])
    classes = bcosified[1].classes
    _, gradcam = explain(conventional[0], images, targets, Attribution("gradcam"))
    columns = [
        explained("B-cosified", bcosified[0], images, targets, params.evaluate.smooth),
        Column(
            gradcam, [f"GradCAM\nlogit {value:+.2f}" for value in of_target(conventional[0], images, targets)]
        ),
        explained("guided", guided[0], images, targets, params.evaluate.smooth),
    ]
    titles = [f"input\nwhy {classes[target]}?" for target in targets.tolist()]
    save_panels(path, images, columns, titles, [boxes for _, _, boxes in chosen])


def examples(
    params: Params, networks: Sequence[torch.nn.Module], count: int
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yields an image (6, H, W), a class of it, and all its boxes (n, 4), for `count` images."""
    settings = params.for_guide()
    for batch in loader(shards_of(settings.dataset), "test", settings.data, 64, fields=("boxes",)):
        images = add_inverse(batch["image"])
        with torch.no_grad():
            guesses = torch.stack([network(images).argmax(1) for network in networks])
        labels = present(batch, len(batch["labels"][0]))
        for row, guess in enumerate(guesses.T):
            target = int(guess[0])
            if labels[row].sum() > 1 and labels[row, target] and (guess == target).all():
                yield images[row], target, batch["boxes"][batch["boxes"][:, 0] == row, 2:]
                count -= 1
                if count == 0:
                    return


def explained(name: str, model: torch.nn.Module, images: Tensor, targets: Tensor, smooth: int) -> Column:
    """The colour explanations of a B-cos network, with its logits."""
    logits, weights = dynamic_weights(model, images, targets)
    chosen = logits.gather(1, targets[:, None])[:, 0].tolist()
    return Column(rgba(images, weights, smooth), [f"{name}\nlogit {value:+.2f}" for value in chosen])


@torch.no_grad()
def of_target(model: torch.nn.Module, images: Tensor, targets: Tensor) -> list[float]:
    """The logits of the targets."""
    return model(images).gather(1, targets[:, None])[:, 0].tolist()


if __name__ == "__main__":
    main()
