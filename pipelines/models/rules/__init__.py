"""Conversion rules for the block types of torchvision and timm; importing this registers them."""

from pipelines.models.rules import timm as _timm  # noqa: F401
from pipelines.models.rules import torchvision as _torchvision  # noqa: F401
