"""Checks with grey images, before a launch, that a network takes images of the data's size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipelines.errors import UserError
from pipelines.models.errors import ModelError
from pipelines.models.store import ModelSpec, build_network
from pipelines.storage.errors import one_line


@torch.no_grad()
def pass_grey_images(model: nn.Module, size: int) -> None:
    """Runs `model` in evaluation mode on grey images (2, 6, size, size); the model's errors pass through."""
    training = model.training
    model.eval()(torch.full((2, 6, size, size), 0.5))
    model.train(training)


@contextmanager
def image_size_errors(spec: ModelSpec, size: int) -> Iterator[None]:
    """Replaces an error in the block by a one-line `ModelError` if the image size is its cause.

    The size is the cause if the network of `spec` fails on an image of `size` × `size` pixels. The message
    names a size that the network takes, if one is known. All other errors pass through.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        network = build_network(spec).eval()
        if _takes(network, size):
            raise
        known = next((known for known in _sizes(network) if _takes(network, known)), None)
        if known is None:
            raise ModelError(
                f"model {spec.name} takes no images of {size} (data.image_size): {one_line(error)}"
            ) from error
        raise ModelError(f"model {spec.name} takes images of {known}, data.image_size is {size}") from error


def _sizes(network: nn.Module) -> Iterator[int]:
    """Image sides, in pixels, that modules of timm and torchvision store as the ones they were built for."""
    for module in network.modules():
        for size in (getattr(module, "img_size", None), getattr(module, "image_size", None)):
            if isinstance(size, int | tuple | list):
                yield size if isinstance(size, int) else size[-1]
    config = getattr(network, "default_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        yield config["input_size"][-1]


@torch.no_grad()
def _takes(network: nn.Module, size: int) -> bool:
    """Returns True if the network, as `build` returns it, takes an image (1, 3, size, size)."""
    try:
        network(torch.zeros(1, 3, size, size))
    except Exception:
        return False
    return True
