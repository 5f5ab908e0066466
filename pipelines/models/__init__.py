"""Networks by name, their weights, and models on disk. Importing this registers the conversion rules of torchvision and timm."""

from pipelines.models import rules  # registers the conversion rules
from pipelines.models.errors import ModelError, WeightsError
from pipelines.models.preprocessing import Preprocessing, chosen_preprocessing, preprocessing_of
from pipelines.models.published import load_published
from pipelines.models.store import ConventionalNetwork, ModelSpec, assemble, digest, load, load_backbone, read_spec, save
from pipelines.models.zoo import build
