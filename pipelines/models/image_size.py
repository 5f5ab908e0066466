"""Whether a network takes images of the data's size: found out on grey images, before anything is launched."""

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
    """Two grey images of `size` pixels through a model of this project in evaluation mode; raises what the model raises."""
    training = model.training
    model.eval()(torch.full((2, 6, size, size), 0.5))
    model.train(training)


@contextmanager
def image_size_errors(spec: ModelSpec, size: int) -> Iterator[None]:
    """Turns an error in the block into a `ModelError` of one line if it is because the network takes no images of `size` pixels.

    All other errors stay as they are.
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
    """Sides of the images that the network was made for, as timm's and torchvision's networks say it."""
    for module in network.modules():
        for size in (getattr(module, "img_size", None), getattr(module, "image_size", None)):
            if isinstance(size, int | tuple | list):
                yield size if isinstance(size, int) else size[-1]
    config = getattr(network, "default_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        yield config["input_size"][-1]


@torch.no_grad()
def _takes(network: nn.Module, size: int) -> bool:
    """Whether the network, as `build` gives it, takes an image of `size` pixels."""
    try:
        network(torch.zeros(1, 3, size, size))
    except Exception:
        return False
    return True
