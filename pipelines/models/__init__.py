"""Networks by name, their weights, and models on disk.

Importing this package registers the conversion rules for torchvision and timm.
"""

from pipelines.models import rules  # registers the conversion rules
from pipelines.models.clip import (
    TextTower,
    build_text_tower,
    clip_config,
    load_text_tower,
    resolved_name,
    save_text_tower,
)
from pipelines.models.errors import ModelError, WeightsError
from pipelines.models.preprocessing import Preprocessing, chosen_preprocessing, preprocessing_of
from pipelines.models.published import load_published
from pipelines.models.store import (
    ConventionalNetwork,
    ModelSpec,
    assemble,
    digest,
    load,
    load_backbone,
    read_spec,
    save,
)
from pipelines.models.zero_shot import ZeroShotNetwork, templates_of, zero_shot_classifier, zero_shot_weights
from pipelines.models.zoo import build
from pipelines.storage.model_folder import has_text_tower, model_file_names
