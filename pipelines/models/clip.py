"""CLIP's two towers by name, config file, tag or weights file: images and texts become embeddings of one space.

open_clip is imported when a tower is built: networks of other libraries need nothing of it.
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

PREFIX, CUSTOM = "open_clip:", "custom"  # of names; `open_clip:custom` has its whole config in the options
TEXT_PARTS = {
    "positional_embedding",
    "text_projection",
    "token_embedding",
    "transformer",
    "ln_final",
}  # at the top of a `CLIP`
_told_of_length: set[int] = set()  # contexts of which the log has said that texts are cut


def open_clip(module: str = "") -> Any:
    """The package open_clip, or one of its modules; raises ModelError where it is not installed."""
    try:
        return importlib.import_module(f"open_clip{module}")
    except ImportError as error:
        raise ModelError(f"towers of open_clip need the package open_clip_torch ({error})") from None


# Configs --------------------------------------------------------------------------------------------------------------


def clip_config(name: str) -> dict[str, Any]:
    """open_clip's model config: `embed_dim`, `vision_cfg`, `text_cfg`, and where given `quick_gelu` and others.

    Args:
        name: a built-in name (`RN50`, `ViT-B-32`, `ViT-B-16-SigLIP`), or a JSON file of one's own in open_clip's format, also
            an `open_clip_config.json`; with or without `open_clip:` before it.

    Raises:
        ModelError: an unknown name (the nearest ones are given), or a file that is no such config.
    """
    plain = name.removeprefix(PREFIX)
    if is_config_file(plain):
        return _config_of_file(plain)
    config = open_clip().get_model_config(plain)
    if config is None:
        known = open_clip().list_models()
        near = ", ".join(difflib.get_close_matches(plain, known, 5, 0.3)) or "see open_clip.list_models()"
        raise ModelError(
            f"unknown model {name!r} of open_clip; near it: {near}; or a .json file with a config of one's own"
        )
    return config


def is_config_file(plain: str) -> bool:
    """Whether a name of open_clip's, without its prefix, is that of a JSON file."""
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
    """`name` and `options` that `build` takes where the JSON file of `name` is not; others as they are.

    A file becomes `open_clip:custom` with `embed_dim`, `quick_gelu` and `part` as options: `vision_cfg` of the image tower,
    `text_cfg` of the text tower, for `build_text_tower`.
    """
    if not (name.startswith(PREFIX) and is_config_file(name)):
        return name, options
    return f"{PREFIX}{CUSTOM}", _tower_config(name.removeprefix(PREFIX), part, options)


def embedding_width(name: str, options: dict[str, Any]) -> int:
    """D, of the image tower that `build` gives for `name` and `options`."""
    return _tower_config(name.removeprefix(PREFIX), "vision_cfg", options)["embed_dim"]


def _tower_config(plain: str, part: str, options: dict[str, Any]) -> dict[str, Any]:
    """`embed_dim`, `quick_gelu` and `part` (`vision_cfg` or `text_cfg`) of a config, with the entries of `options`."""
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


# The image tower ------------------------------------------------------------------------------------------------------


def build_image_tower(
    plain: str, weights: str = "none", sha256: str | None = None, options: dict[str, Any] | None = None
) -> nn.Module:
    """The image tower (N, 3, H, W), normalised, -> embeddings (N, D); arguments and errors as of `build`.

    Args:
        plain: name or file as `clip_config` takes it, or `custom`, whose config is in the options.
        weights: `none`, a tag of open_clip, or a file or URL: of a CLIP, of an image tower, or, for the towers that open_clip
            takes from timm, of timm's network alone, whose projection then stays as it was drawn.
        sha256: of the file.
        options: entries of `vision_cfg` that differ, and `embed_dim`.
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
    """Loads what is of the image tower in `state`, or the weights of timm's network alone."""
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
    """Loads the weights of timm's network alone, without its classifier; keys of another library are paired in order."""
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


# Weights --------------------------------------------------------------------------------------------------------------


def _weights(plain: str, weights: str, sha256: str | None, quick_gelu: bool) -> tuple[StateDict, str]:
    """The state dict of a file or tag, and what errors call it."""
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
    except Exception as error:  # of the hub's client, of requests, of urllib
        place = published.get("hf_hub", "").rstrip("/") or published.get("url", "")
        raise WeightsError(
            f"weights {weights!r} of {PREFIX}{plain} cannot be downloaded ({one_line(error)}): fetch them elsewhere from "
            f"{place} (open_clip_model.safetensors or open_clip_pytorch_model.bin) and give that file"
        ) from None
    return read_state_dict(str(path)), f"{weights!r} of {PREFIX}{plain}"


def tag_config(plain: str, tag: str) -> dict[str, Any]:
    """open_clip's description of a tag's weights: places, `mean`, `std`, `interpolation`; raises WeightsError."""
    found = open_clip().get_pretrained_cfg(plain, tag)
    if not found:
        known = tags_of(plain)
        near = ", ".join(difflib.get_close_matches(tag, known, 5, 0.3) or known) or "none: give a file or URL"
        raise WeightsError(
            f"weights {tag!r} of {PREFIX}{plain}: no such tag, and no file here; its tags: {near}"
        )
    return found


def tags_of(plain: str) -> list[str]:
    """The tags of weights that open_clip has for a name."""
    return open_clip().list_pretrained_tags_by_model(plain)


def preprocess_config(plain: str, weights: str, options: dict[str, Any]) -> dict[str, Any]:
    """The image size of a tower, and `mean`, `std`, `interpolation`, `resize_mode` as far as they are said of its weights.

    A tag says them, or the `preprocess_cfg` of an `open_clip_config.json`.

    Raises:
        ModelError, WeightsError: an unknown name; an unknown tag.
    """
    said: dict[str, Any] = {}
    if weights != "none" and not names_a_file(weights):
        said = tag_config(plain, weights)
    elif is_config_file(plain):
        said = read_json(users_path(plain)).get("preprocess_cfg", {})
    size = _tower_config(plain, "vision_cfg", options)["vision_cfg"].get("image_size", 224)
    return {**said, "image_size": size if isinstance(size, int) else size[-1]}


# The text tower -------------------------------------------------------------------------------------------------------


class TextTower(nn.Module):
    """Texts -> embeddings (T, D); the keys of its state dict are those of the `text.` part of open_clip's `CustomTextCLIP`.

    Attributes:
        config: `embed_dim`, `text_cfg`, `quick_gelu`, as in a config of open_clip; JSON has it all.
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
        """Token ids (T, L) int64, padded; a longer text is cut to the context L, which the log says once.

        Raises:
            ModelError: an empty text; a tokenizer that is not on this machine.
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
        """Embeddings (T, D) float32 of norm 1, in the order of `texts`, computed `batch_size` texts at a time."""
        device = next(self.parameters()).device
        found = [
            F.normalize(self(self.tokens(texts[start : start + batch_size]).to(device)).float(), dim=-1)
            for start in range(0, len(texts), batch_size)
        ]
        return torch.cat(found) if found else torch.zeros(0, self.width, device=device)


def _tokenizer(text_cfg: dict[str, Any]) -> Any:
    """open_clip's tokenizer for a text tower; raises ModelError if its files are not on this machine."""
    more, name = text_cfg.get("tokenizer_kwargs") or {}, text_cfg.get("hf_tokenizer_name")
    module = open_clip(".tokenizer")
    if not name:
        return module.SimpleTokenizer(**more)
    try:
        return module.HFTokenizer(name, tokenizer_mode=text_cfg.get("tokenizer_mode"), **more)
    except Exception as error:  # of transformers, of the hub's client, of requests
        raise ModelError(
            f"the tokenizer {name!r} of the text tower is not here ({one_line(error)}): it needs the package transformers, and "
            f"the files tokenizer.json and tokenizer_config.json of huggingface.co/{name}; give their folder as "
            "text_cfg.hf_tokenizer_name"
        ) from None


def build_text_tower(
    name: str, weights: str = "none", sha256: str | None = None, options: dict[str, Any] | None = None
) -> TextTower:
    """The text tower of a CLIP.

    Args:
        name: as `clip_config` takes it, or `open_clip:custom` with `embed_dim` and `text_cfg` in the options.
        weights: `none`, a tag of open_clip, or a file or URL: of a CLIP or of a text tower.
        sha256: of the file.
        options: entries of `text_cfg` that differ, and `embed_dim`.

    Raises:
        ModelError, WeightsError: as of `build`.
    """
    plain = name.removeprefix(PREFIX)
    config = _tower_config(plain, "text_cfg", options or {})
    tower = TextTower(config)
    if weights != "none":
        state, source = _weights(plain, weights, sha256, config["quick_gelu"])
        _load_text_tower(tower, state, source)
    return tower


def _load_text_tower(tower: TextTower, state: StateDict, source: str) -> None:
    """Loads what is of the text tower in `state`: under `text.`, or at the top as in open_clip's plain `CLIP`."""
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
    """Writes `text.safetensors` and `text.json` to a folder, beside the model of the image tower."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in tower.state_dict().items()}
    with staged(directory / TEXT_WEIGHTS) as path:
        safetensors.torch.save_file(state, path)
    write_json(directory / TEXT_CONFIG, tower.config)


@torch.inference_mode(False)
def load_text_tower(directory: str | Path) -> TextTower:
    """The text tower in a folder or at a URL, in evaluation mode.

    Raises:
        FileNotFoundError: there is none.
        WeightsError: the weights are not of the tower that its config describes.
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
