"""CLIP's image and text towers, which embed images and texts in one space.

N images, H × W pixels, T texts, L tokens, D features of an embedding.

A tower's architecture is named by open_clip (`RN50`) or described by a JSON file in open_clip's format. Its
weights are a tag of open_clip (`openai`) or a file. A *plain* name is one without the prefix `open_clip:`.

open_clip is imported when it is first needed, so that other networks do not depend on it.
"""

from __future__ import annotations

import difflib
import importlib
import json
import logging
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.models.errors import ModelError, WeightsError
from pipelines.models.folder import TEXT_CONFIG, TEXT_WEIGHTS, has_text_tower, local_folder
from pipelines.models.weights import (
    StateDict,
    few,
    fitted,
    load_strictly,
    names_a_file,
    paired,
    read_state_dict,
)
from pipelines.storage.errors import DamagedFileError, one_line
from pipelines.storage.files import read_json, staged, write_json
from pipelines.storage.paths import users_path

log = logging.getLogger(__name__)

PREFIX, CUSTOM = "open_clip:", "custom"  # `open_clip:custom` takes its whole config from the options
TEXT_PARTS = {  # top-level children of open_clip's `CLIP` that belong to its text tower
    "positional_embedding",
    "text_projection",
    "token_embedding",
    "transformer",
    "ln_final",
}
_told_of_length: set[int] = set()  # context lengths for which the log has warned that texts are cut


def open_clip(module: str = "") -> Any:
    """Imports open_clip, or its module `module` (`.tokenizer`); raises ModelError if it is not installed."""
    try:
        return importlib.import_module(f"open_clip{module}")
    except ImportError as error:
        raise ModelError(f"towers of open_clip need the package open_clip_torch ({error})") from None


# Configs ----------------------------------------------------------------------------------------------------


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
    return f"{PREFIX}{CUSTOM}", _tower_config(name.removeprefix(PREFIX), part, options)


def embedding_width(name: str, options: dict[str, Any]) -> int:
    """D, the width of the embeddings of the image tower `build(name, options=options)`."""
    return _tower_config(name.removeprefix(PREFIX), "vision_cfg", options)["embed_dim"]


def _tower_config(plain: str, part: str, options: dict[str, Any]) -> dict[str, Any]:
    """`embed_dim`, `quick_gelu` and `part` of the config, overridden by `options`.

    `part` is `vision_cfg` or `text_cfg`. Options other than these three override entries inside `part`.
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


# The image tower --------------------------------------------------------------------------------------------


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
    config = _tower_config(plain, "vision_cfg", options or {})
    vision = {**config["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
    try:
        tower = open_clip(".model")._build_vision_tower(config["embed_dim"], vision, config["quick_gelu"])
    except Exception as error:  # open_clip and timm raise assertions, divisions by zero and others
        raise ModelError(
            f"{PREFIX}{plain} cannot be built with vision_cfg {vision}: {one_line(error)}"
        ) from None
    if weights != "none":
        state, source = _weights(plain, weights, sha256, config["quick_gelu"])
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


# Weights ----------------------------------------------------------------------------------------------------


def _weights(plain: str, weights: str, sha256: str | None, quick_gelu: bool) -> tuple[StateDict, str]:
    """The state dict of a file or tag, and its name in error messages."""
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
    size = _tower_config(plain, "vision_cfg", options)["vision_cfg"].get("image_size", 224)
    return {**said, "image_size": size if isinstance(size, int) else size[-1]}


# The text tower ---------------------------------------------------------------------------------------------


class TextTower(nn.Module):
    """Text tower of a CLIP: texts -> embeddings (T, D).

    Its state dict has the keys that the text tower has in open_clip's `CustomTextCLIP`, all below `text.`.

    Attributes:
        config: `embed_dim`, `text_cfg`, `quick_gelu`, as in a config of open_clip; JSON-serialisable.
        width: D.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.width = config, int(config["embed_dim"])
        inner = {**config["text_cfg"], "hf_model_pretrained": False, "output_tokens": False}
        try:
            self.text = open_clip(".model")._build_text_tower(
                self.width, inner, config.get("quick_gelu", False)
            )
        except Exception as error:  # open_clip raises assertions, divisions by zero and others
            raise ModelError(
                f"a text tower cannot be built with text_cfg {inner}: {one_line(error)}"
            ) from None
        self._tokenizer: Any = None

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids (T, L) int64, padded to the context length L.

        Longer texts are cut. The log warns of that once per context length.

        Raises:
            ModelError: a text is empty, or the tokenizer's files are not on this machine.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if empty := [index for index, text in enumerate(texts) if not text.strip()]:
            raise ModelError(f"text {empty[0]} of {len(texts)} is empty")
        self._tokenizer = self._tokenizer or _tokenizer(self.config["text_cfg"])
        length = self.config["text_cfg"].get("context_length", 77)
        if not texts:
            return torch.zeros(0, length, dtype=torch.int64)
        tokens = self._tokenizer(texts, context_length=length)
        self._tell_of_cuts(texts, tokens)
        return tokens

    def _tell_of_cuts(self, texts: list[str], tokens: Tensor) -> None:
        length = tokens.shape[1]
        if length in _told_of_length:
            return
        padding = self._tokenizer(["a"], context_length=length)[0, -1]
        full = [text for text, last in zip(texts, tokens[:, -1], strict=True) if last != padding]
        for text in full:
            if self._tokenizer([text], context_length=length + 1)[0, -1] != padding:
                _told_of_length.add(length)
                log.warning("texts of more than %d tokens are cut, the first is %.60r...", length, text)
                return

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (T, L) -> embeddings (T, D), not normalised."""
        return self.text(tokens)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embeddings (T, D) of `texts`, float32, norm 1; computed `batch_size` texts at a time."""
        device = next(self.parameters()).device
        found = [
            F.normalize(self(self.tokens(texts[start : start + batch_size]).to(device)).float(), dim=-1)
            for start in range(0, len(texts), batch_size)
        ]
        return torch.cat(found) if found else torch.zeros(0, self.width, device=device)


def _tokenizer(text_cfg: dict[str, Any]) -> Any:
    """Returns open_clip's tokenizer for a text tower; raises ModelError if its files are missing here."""
    more, name = text_cfg.get("tokenizer_kwargs") or {}, text_cfg.get("hf_tokenizer_name")
    module = open_clip(".tokenizer")
    if not name:
        return module.SimpleTokenizer(**more)
    try:
        return module.HFTokenizer(name, tokenizer_mode=text_cfg.get("tokenizer_mode"), **more)
    except Exception as error:  # from transformers, huggingface_hub or requests
        raise ModelError(
            f"the tokenizer {name!r} of the text tower is not here ({one_line(error)}): "
            "it needs the package transformers, "
            f"and the files tokenizer.json and tokenizer_config.json of huggingface.co/{name}; "
            "give their folder as text_cfg.hf_tokenizer_name"
        ) from None


def build_text_tower(
    name: str, weights: str = "none", sha256: str | None = None, options: dict[str, Any] | None = None
) -> TextTower:
    """Builds the text tower of a CLIP.

    Args:
        name: a name or file, see `clip_config`; or `open_clip:custom`, with `embed_dim` and `text_cfg` in
            `options`.
        weights: `none`, a tag of open_clip, or a file or URL with a CLIP or a text tower.
        sha256: digest that the weights file must have.
        options: entries of `text_cfg` to override, and `embed_dim`.

    Raises:
        ModelError, WeightsError: see `build`.
    """
    plain = name.removeprefix(PREFIX)
    config = _tower_config(plain, "text_cfg", options or {})
    tower = TextTower(config)
    if weights != "none":
        state, source = _weights(plain, weights, sha256, config["quick_gelu"])
        _load_text_tower(tower, state, source)
    return tower


def _load_text_tower(tower: TextTower, state: StateDict, source: str) -> None:
    """Loads the text tower's part of `state`: keys below `text.`, or those of `TEXT_PARTS` if it has none."""
    text = {
        key: value
        for key, value in state.items()
        if key.startswith("text.") and not key.endswith(".position_ids")
    }
    if not text:
        text = {f"text.{key}": value for key, value in state.items() if key.partition(".")[0] in TEXT_PARTS}
    if not text:
        raise WeightsError(f"weights {source}: no text tower among {few(sorted(state))}")
    open_clip(".model").resize_text_pos_embed(text, tower)
    load_strictly(tower, text, source)


def save_text_tower(directory: str | Path, tower: TextTower) -> None:
    """Writes the text tower to `text.safetensors` and `text.json` in `directory`, beside the image tower."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in tower.state_dict().items()}
    with staged(directory / TEXT_WEIGHTS) as path:
        safetensors.torch.save_file(state, path)
    write_json(directory / TEXT_CONFIG, tower.config)


@torch.inference_mode(False)
def load_text_tower(directory: str | Path) -> TextTower:
    """Loads the text tower in a folder or at a URL, in evaluation mode.

    Raises:
        FileNotFoundError: the folder has no text tower.
        DamagedFileError: `text.json` is not a text tower's config.
        WeightsError: the weights do not fit the config.
    """
    if not has_text_tower(directory):
        raise FileNotFoundError(
            f"no text tower in {directory}: {TEXT_CONFIG} and {TEXT_WEIGHTS} are wanted there"
        )
    with local_folder(directory, (TEXT_CONFIG, TEXT_WEIGHTS)) as folder:
        config = read_json(folder / TEXT_CONFIG)
        if not isinstance(config, dict) or not {"embed_dim", "text_cfg"} <= config.keys():
            raise DamagedFileError(
                f"{directory}/{TEXT_CONFIG}: not what `save_text_tower` writes: save it again"
            )
        tower = TextTower(config)
        load_strictly(tower, read_state_dict(str(folder / TEXT_WEIGHTS)), str(directory))
    return tower.eval()
