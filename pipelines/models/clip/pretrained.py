"""Weights of CLIP towers from a file or an open_clip tag, and the preprocessing published with a tag."""

from __future__ import annotations

import difflib
import logging
from typing import Any

from pipelines.models.clip.config import PREFIX, is_config_file, open_clip, tower_config
from pipelines.models.errors import WeightsError
from pipelines.models.weights import StateDict, names_a_file, read_state_dict
from pipelines.storage.errors import one_line
from pipelines.storage.files import read_json
from pipelines.storage.paths import users_path

log = logging.getLogger(__name__)


def state_dict_of(plain: str, weights: str, sha256: str | None, quick_gelu: bool) -> tuple[StateDict, str]:
    """Returns the state dict of a file or tag, and its name in error messages.

    Raises:
        WeightsError: the tag is unknown or cannot be downloaded, or the file is missing, altered or unsafe.
    """
    if names_a_file(weights):
        return read_state_dict(weights, sha256), weights
    if sha256 is not None:
        raise WeightsError(f"weights {weights!r}: a sha256 is that of a file or URL")
    published = tag_config(plain, weights)
    if published.get("quick_gelu", False) != quick_gelu:
        log.warning(
            "weights %r of %s%s were trained with quick_gelu=%s: say so in the options, "
            "or take the name that ends on -quickgelu",
            weights,
            PREFIX,
            plain,
            not quick_gelu,
        )
    try:
        path = open_clip().download_pretrained(published)
    except Exception as error:  # from huggingface_hub, requests or urllib
        place = published.get("hf_hub", "").rstrip("/") or published.get("url", "")
        raise WeightsError(
            f"weights {weights!r} of {PREFIX}{plain} cannot be downloaded ({one_line(error)}): "
            f"fetch them elsewhere from {place} (open_clip_model.safetensors or open_clip_pytorch_model.bin) "
            "and give that file"
        ) from None
    return read_state_dict(str(path)), f"{weights!r} of {PREFIX}{plain}"


def tag_config(plain: str, tag: str) -> dict[str, Any]:
    """Returns open_clip's record of a tag's weights: URL or hub name, `mean`, `std`, `interpolation`.

    Raises:
        WeightsError: open_clip has no such tag for `plain`.
    """
    found = open_clip().get_pretrained_cfg(plain, tag)
    if not found:
        known = tags_of(plain)
        near = ", ".join(difflib.get_close_matches(tag, known, 5, 0.3) or known) or "none: give a file or URL"
        raise WeightsError(
            f"weights {tag!r} of {PREFIX}{plain}: no such tag, and no file here; its tags: {near}"
        )
    return found


def tags_of(plain: str) -> list[str]:
    """Tags of the weights that open_clip has for a plain name."""
    return open_clip().list_pretrained_tags_by_model(plain)


def preprocess_config(plain: str, weights: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the tower's `image_size` and, if known, how images are prepared for its weights.

    The latter are `mean`, `std`, `interpolation` and `resize_mode`. They come from open_clip's record of the
    tag, or from `preprocess_cfg` in an `open_clip_config.json`.

    Raises:
        ModelError: the name is unknown.
        WeightsError: the tag is unknown.
    """
    said: dict[str, Any] = {}
    if weights != "none" and not names_a_file(weights):
        said = tag_config(plain, weights)
    elif is_config_file(plain):
        said = read_json(users_path(plain)).get("preprocess_cfg", {})
    size = tower_config(plain, "vision_cfg", options)["vision_cfg"].get("image_size", 224)
    return {**said, "image_size": size if isinstance(size, int) else size[-1]}
