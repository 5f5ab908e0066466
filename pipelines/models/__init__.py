"""Networks by name, their weights, and models on disk. Importing this registers the conversion rules of torchvision and timm."""

from pipelines.models import rules as _rules  # noqa: F401  (registers)
from pipelines.models.errors import ModelError, WeightsError
from pipelines.models.published import load_published
from pipelines.models.store import ConventionalNetwork, ModelSpec, assemble, digest, load, load_backbone, read_spec, save
from pipelines.models.zoo import build

__all__ = [
    "ConventionalNetwork",
    "ModelError",
    "ModelSpec",
    "WeightsError",
    "assemble",
    "build",
    "digest",
    "load",
    "load_backbone",
    "load_published",
    "read_spec",
    "save",
]
