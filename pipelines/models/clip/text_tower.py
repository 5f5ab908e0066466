"""The text tower of a CLIP: texts -> embeddings. It is built, saved and loaded here.

T texts, L tokens, D features of an embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.models.clip.config import PREFIX, open_clip, tower_config
from pipelines.models.clip.pretrained import state_dict_of
from pipelines.models.errors import ModelError, WeightsError
from pipelines.models.weights import StateDict, few, load_strictly, read_state_dict
from pipelines.storage.errors import DamagedFileError, one_line
from pipelines.storage.files import read_json, staged, write_json
from pipelines.storage.model_folder import TEXT_CONFIG, TEXT_WEIGHTS, has_text_tower, local_folder

log = logging.getLogger(__name__)

TEXT_PARTS = {  # top-level children of open_clip's `CLIP` that belong to its text tower
    "positional_embedding",
    "text_projection",
    "token_embedding",
    "transformer",
    "ln_final",
}
_told_of_length: set[int] = set()  # context lengths for which the log has warned that texts are cut


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
    config = tower_config(plain, "text_cfg", options or {})
    tower = TextTower(config)
    if weights != "none":
        state, source = state_dict_of(plain, weights, sha256, config["quick_gelu"])
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
