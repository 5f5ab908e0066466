"""Conversion rules for the module types of torchvision, timm and open_clip.

Importing this package registers those of torchvision and timm. `pipelines.bcos.convert` imports `open_clip`
when it converts a module of open_clip.
"""

import warnings

from timm import __version__ as timm_version
from torch.torch_version import TorchVersion

from pipelines.models.rules import torchvision as _torchvision

if TorchVersion(timm_version) >= "1.0.31":
    from pipelines.models.rules import timm as _timm
else:  # timm's module types change between versions
    warnings.warn(
        f"networks of timm {timm_version} do not convert: the rules here are for 1.0.31 or newer",
        stacklevel=2,
    )
