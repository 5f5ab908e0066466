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
from torch import Tensor, nn

from pipelines import models
from pipelines.attribution import Attribution, explain
from pipelines.bcos import add_inverse, dynamic_weights, rgba
from pipelines.data.loading.loader import loader
from pipelines.errors import UserError
from pipelines.evaluation.batches import present
from pipelines.evaluation.pictures import Column, save_panels
from pipelines.models import ModelSpec
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
    folders = {"B-cosified": f"bcosify/{params.bcosify.starts[0]}", "GradCAM": "pretrain", "guided": "guide"}
    loaded = {name: models.load(model_folder(folder)) for name, folder in folders.items()}
    chosen = list(examples(params, [model for model, _ in loaded.values()], rows))
    if not chosen:
        raise UserError("no test image with two classes has one that all three networks find: train longer")
    images = torch.stack([image for image, _, _ in chosen])
    targets = torch.tensor([target for _, target, _ in chosen])
    classes = loaded["B-cosified"][1].classes
    columns = [
        explained(name, *network, images, targets, params.evaluate.smooth) for name, network in loaded.items()
    ]
    titles = [f"input\nwhy {classes[target]}?" for target in targets.tolist()]
    save_panels(path, images, columns, titles, [boxes for _, _, boxes in chosen])


def examples(
    params: Params, networks: Sequence[nn.Module], count: int
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yields `count` images (6, H, W), each with one of its classes and all its boxes (n, 4)."""
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


def explained(
    name: str, model: nn.Module, spec: ModelSpec, images: Tensor, targets: Tensor, smooth: int
) -> Column:
    """Explains the targets (N,): a B-cos network in colours, a conventional one by GradCAM."""
    if spec.kind == "bcos":
        logits, weights = dynamic_weights(model, images, targets)
        maps = rgba(images, weights, smooth)
    else:
        logits, maps = explain(model, images, targets, Attribution("gradcam"))
    chosen = logits.gather(1, targets[:, None])[:, 0].tolist()
    return Column(maps, [f"{name}\nlogit {value:+.2f}" for value in chosen])


if __name__ == "__main__":
    main()
