"""Builds the image tower of a CLIP: images -> embeddings.

N images, H × W pixels, D features of an embedding.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from torch import nn

from pipelines.models.clip.config import PREFIX, open_clip, tower_config
from pipelines.models.clip.pretrained import state_dict_of
from pipelines.models.errors import ModelError
from pipelines.models.weights import StateDict, few, fitted, load_strictly, paired
from pipelines.storage.errors import one_line

log = logging.getLogger(__name__)


def build_image_tower(
    plain: str, weights: str = "none", sha256: str | None = None, options: dict[str, Any] | None = None
) -> nn.Module:
    """Builds an image tower: normalised images (N, 3, H, W) -> embeddings (N, D), not normalised.

    Args:
        plain: a name or file, see `clip_config`; or `custom`, which takes the config from `options`.
        weights: `none`, a tag of open_clip, or a file or URL with a CLIP or an image tower. For a tower whose
            trunk is a timm network, the file may hold that network alone; the tower's projection then stays
            random.
        sha256: digest that the weights file must have.
        options: entries of `vision_cfg` to override, and `embed_dim`.

    Raises:
        ModelError, WeightsError: see `build`.
    """
    config = tower_config(plain, "vision_cfg", options or {})
    vision = {**config["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
    try:
        tower = open_clip(".model")._build_vision_tower(config["embed_dim"], vision, config["quick_gelu"])
    except Exception as error:  # open_clip and timm raise assertions, divisions by zero and others
        raise ModelError(
            f"{PREFIX}{plain} cannot be built with vision_cfg {vision}: {one_line(error)}"
        ) from None
    if weights != "none":
        state, source = state_dict_of(plain, weights, sha256, config["quick_gelu"])
        _load_image_tower(tower, state, source)
    return tower


def _load_image_tower(tower: nn.Module, state: StateDict, source: str) -> None:
    """Loads the image tower's part of `state`; a timm network's weights go into the tower's trunk alone."""
    visual = {key: value for key, value in state.items() if key.startswith("visual.")}
    if not visual:
        own = fitted(state, tower, source)
        if hasattr(tower, "trunk") and not any(key.startswith("trunk.") for key in own):
            _load_trunk(tower.get_submodule("trunk"), state, source)
            return
        visual = {f"visual.{key}": value for key, value in own.items()}
    open_clip(".model").resize_pos_embed(visual, SimpleNamespace(visual=tower))
    load_strictly(tower, {key.removeprefix("visual."): value for key, value in visual.items()}, source)


def _load_trunk(trunk: nn.Module, state: StateDict, source: str) -> None:
    """Loads a timm network's weights, except its classifier, into the trunk of a tower.

    If the keys are another library's, tensors are matched by their order and shapes (`paired`).
    """
    own = trunk.state_dict().keys()
    wanted = {key for key in own if not key.endswith("num_batches_tracked")}
    found = fitted(state, trunk, source)
    if not wanted <= found.keys():
        found = paired(state, trunk) or found
    elif classifier := sorted(found.keys() - own):
        log.info("weights %s: left out are %s", source, few(classifier))
        found = {key: value for key, value in found.items() if key in own}
    load_strictly(trunk, found, source)
    log.info("weights %s: of the network before the projection alone, which stays as it was drawn", source)
