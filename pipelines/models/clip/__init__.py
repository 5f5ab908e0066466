"""CLIP's image and text towers, which embed images and texts in one space.

A tower's architecture is named by open_clip (`RN50`) or described by a JSON file in open_clip's format. Its
weights are a tag of open_clip (`openai`) or a file.

open_clip is imported when it is first needed, so that other networks do not depend on it.
"""

from pipelines.models.clip.config import (
    CUSTOM,
    PREFIX,
    clip_config,
    embedding_width,
    open_clip,
    resolved_name,
)
from pipelines.models.clip.image_tower import build_image_tower
from pipelines.models.clip.pretrained import preprocess_config, tags_of
from pipelines.models.clip.text_tower import TextTower, build_text_tower, load_text_tower, save_text_tower
