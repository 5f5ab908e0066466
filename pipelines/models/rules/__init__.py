"""Conversion rules for the block types of torchvision and timm; importing this registers them."""

import warnings

from timm import __version__ as timm_version
from torch.torch_version import TorchVersion

from pipelines.models.rules import torchvision as _torchvision

if TorchVersion(timm_version) >= "1.0.31":
    from pipelines.models.rules import timm as _timm
else:  # its module types come and go from version to version
    warnings.warn(
        f"networks of timm {timm_version} do not convert: the rules here are for 1.0.31 or newer",
        stacklevel=2,
    )
