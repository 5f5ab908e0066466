"""Conversion rules for the block types of torchvision and timm; importing this registers them."""

import warnings

import timm

from pipelines.models.rules import torchvision as _torchvision  # noqa: F401

try:
    from pipelines.models.rules import timm as _timm  # noqa: F401
except (AttributeError, ImportError) as error:  # module types come and go between its versions
    warnings.warn(f"timm {timm.__version__} has no rules here, so its networks do not convert: {error}", stacklevel=2)
