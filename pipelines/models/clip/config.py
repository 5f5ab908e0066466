"""open_clip's model configs: a CLIP by name or JSON file, and the part of one tower.

A *plain* name is one without the prefix `open_clip:`.
"""

from __future__ import annotations

import difflib
import importlib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from pipelines.models.errors import ModelError
from pipelines.storage.errors import one_line
from pipelines.storage.paths import users_path

PREFIX, CUSTOM = "open_clip:", "custom"  # `open_clip:custom` takes its whole config from the options


def open_clip(module: str = "") -> Any:
    """Imports open_clip, or its module `module` (`.tokenizer`); raises ModelError if it is not installed."""
    try:
        return importlib.import_module(f"open_clip{module}")
    except ImportError as error:
        raise ModelError(f"towers of open_clip need the package open_clip_torch ({error})") from None


def clip_config(name: str) -> dict[str, Any]:
    """Returns open_clip's config of a CLIP: `embed_dim`, `vision_cfg`, `text_cfg`, and optional keys.

    Args:
        name: a name of open_clip (`RN50`, `ViT-B-32`, `ViT-B-16-SigLIP`), or a JSON file in open_clip's
            format (an `open_clip_config.json` too). The prefix `open_clip:` is optional.

    Raises:
        ModelError: the name is unknown (the message gives the nearest ones), or the file is not such a
            config.
    """
    plain = name.removeprefix(PREFIX)
    if is_config_file(plain):
        return _config_of_file(plain)
    config = open_clip().get_model_config(plain)
    if config is None:
        known = open_clip().list_models()
        near = ", ".join(difflib.get_close_matches(plain, known, 5, 0.3)) or "see open_clip.list_models()"
        raise ModelError(
            f"unknown model {name!r} of open_clip; near it: {near}; "
            "or a .json file with a config of one's own"
        )
    return config


def is_config_file(plain: str) -> bool:
    """Returns True if the plain name is a JSON file's."""
    return plain.endswith(".json")


def _config_of_file(source: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(users_path(source)).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"config {source}: not a readable JSON file ({one_line(error)})") from None
    config = content.get("model_cfg", content) if isinstance(content, dict) else None
    parts = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    missing = [
        key
        for key, kind in parts.items()
        if not isinstance(config, dict) or not isinstance(config.get(key), kind)
    ]
    if config is None or missing:
        raise ModelError(
            f"config {source}: no config of open_clip: {', '.join(missing)} missing or of another type"
        )
    return config


def resolved_name(name: str, options: dict[str, Any], part: str = "vision_cfg") -> tuple[str, dict[str, Any]]:
    """Returns a name and options that build the same tower without the JSON file in `name`.

    The name becomes `open_clip:custom`, and the file's `embed_dim`, `quick_gelu` and `part` become options.
    `part` is `vision_cfg` for an image tower (`build`) and `text_cfg` for a text tower (`build_text_tower`).
    If `name` is not a JSON file, both are returned unchanged.
    """
    if not (name.startswith(PREFIX) and is_config_file(name)):
        return name, options
    return f"{PREFIX}{CUSTOM}", tower_config(name.removeprefix(PREFIX), part, options)


def embedding_width(name: str, options: dict[str, Any]) -> int:
    """D, the width of the embeddings of the image tower `build(name, options=options)`.

    Networks of other libraries become image towers through the option `num_classes`, which is then D: their
    last linear layer, the classifier, is drawn anew as the projection.

    Raises:
        ModelError: the network of another library lacks this option; see `tower_config`.
    """
    if not name.startswith(PREFIX):
        if "num_classes" not in options:
            raise ModelError(
                f"{name} becomes an image tower by the option num_classes, the embeddings' width"
            )
        return int(options["num_classes"])
    return tower_config(name.removeprefix(PREFIX), "vision_cfg", options)["embed_dim"]


def tower_config(plain: str, part: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns `embed_dim`, `quick_gelu` and `part` of the config, overridden by `options`.

    `part` is `vision_cfg` or `text_cfg`. Options other than these three override entries inside `part`.

    Raises:
        ModelError: see `clip_config`; or `custom` comes without an option that it needs.
    """
    config: dict[str, Any] = {} if plain == CUSTOM else clip_config(plain)
    top = {"embed_dim", "quick_gelu", part}
    found = {**config, **{key: value for key, value in options.items() if key in top}}
    own = {key: value for key, value in options.items() if key not in top}
    if missing := [key for key in ("embed_dim", part) if key not in found]:
        raise ModelError(f"{PREFIX}{CUSTOM} needs the options {', '.join(missing)}")
    inner = {**config.get(part, {}), **found[part], **own}
    return {
        "embed_dim": found["embed_dim"],
        "quick_gelu": found.get("quick_gelu", False),
        part: deepcopy(inner),
    }
