"""Assembles models from their specs, and saves and loads them.

On disk, a model is `model.safetensors` (its state dict) beside `model.json` (its `ModelSpec`: how to build
the network). Nothing is unpickled. A model takes images (N, 6, H, W) in [0, 1] and returns logits (N, K) or
embeddings (N, D).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from pipelines.bcos import IMAGENET_MEAN, IMAGENET_STD, BcosLinear, BcosNetwork, bcosify, is_bias
from pipelines.bcos.network import check_six_channels, six_channel_statistics
from pipelines.models.clip import resolved_name
from pipelines.models.weights import load_strictly, read_state_dict
from pipelines.models.zero_shot import ZeroShotNetwork
from pipelines.models.zoo import build
from pipelines.storage.errors import DamagedFileError, one_line
from pipelines.storage.files import file_digest, read_json, staged, write_json
from pipelines.storage.model_folder import CONFIG, WEIGHTS, local_folder, model_file_names


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a model of this project, except its weights.

    Attributes:
        name: the network's name, see `build`.
        classes: names of the K classes; empty for an image tower.
        image_size: side of the square training images, pixels.
        kind: `bcos` for a B-cos network, `conventional` for an ordinary one.
        task: `embedding` for an image tower; otherwise that of the classifier.
        mean, std: normalisation of RGB in [0, 1], or of all six channels.
        options: arguments of the network's constructor.
        design: keyword arguments of `bcosify`; on disk with the values that took effect.
        weights_view: `Preprocessing.view` of the weights that training began with.
        zero_shot: `scale` and `width` (D) of a zero-shot classifier; empty for all other models.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    kind: Literal["conventional", "bcos"]
    task: Literal["multiclass", "multilabel", "embedding"] = "multiclass"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    design: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights_view: dict[str, Any] = dataclasses.field(default_factory=dict)
    zero_shot: dict[str, Any] = dataclasses.field(default_factory=dict)


class ConventionalNetwork(nn.Module):
    """Wraps an ordinary network to take (N, 6, H, W) in [0, 1]; it gets the normalised RGB channels."""

    mean: Tensor
    std: Tensor
    logit_bias = 0.0

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.network = network
        mean_6, std_6 = six_channel_statistics(mean, std)
        self.register_buffer("mean", mean_6, persistent=False)
        self.register_buffer("std", std_6, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 6, H, W) in [0, 1] -> logits (N, K)."""
        check_six_channels(images)
        return self.network((images[:, :3] - self.mean[:3, None, None]) / self.std[:3, None, None])


def build_network(spec: ModelSpec) -> nn.Module:
    """Builds the network of `spec` with random weights; an image tower gets no classifier."""
    embeds = spec.task == "embedding" or spec.zero_shot
    return build(spec.name, num_classes=None if embeds else len(spec.classes), options=spec.options)


def assemble(spec: ModelSpec, network: nn.Module | None = None, *, check: bool = True) -> nn.Module:
    """Returns the model that `spec` describes, made from `network`.

    For a B-cosified image tower, `logit_bias` is 0 and `gap_reorder` is False unless the design sets them.
    The text embeddings of a zero-shot classifier are placeholders (ones) until its weights are loaded.

    Args:
        spec: the model to make.
        network: a network from `build`; by default one with random weights.
        check: raise if a design choice other than the default finds nothing to act on. Off for saved models,
            whose design is known to have taken effect.

    Raises:
        ConversionError: see `bcosify` and `check`.
    """
    if spec.zero_shot:
        tower = assemble(tower_spec(spec), network, check=check)
        texts = torch.ones(len(spec.classes), spec.zero_shot["width"])  # (K, D)
        return ZeroShotNetwork(tower, texts, spec.zero_shot["scale"])
    network = network or build_network(spec)
    if spec.kind == "conventional":
        return ConventionalNetwork(network, spec.mean, spec.std)
    defaults = inspect.signature(bcosify).parameters
    asked = frozenset(name for name, value in spec.design.items() if value != defaults[name].default)
    of_task = {"logit_bias": 0.0, "gap_reorder": False} if spec.task == "embedding" else {}
    design = {**of_task, **spec.design}
    return bcosify(network, mean=spec.mean, std=spec.std, **design, asked=asked if check else frozenset())


def tower_spec(spec: ModelSpec) -> ModelSpec:
    """Returns the spec of the image tower in a zero-shot classifier."""
    return dataclasses.replace(spec, task="embedding", classes=(), zero_shot={})


def save(directory: str | Path, model: nn.Module, spec: ModelSpec) -> None:
    """Writes `model`, which `assemble` made from `spec`, to `directory`.

    The written spec has the design choices that took effect. Schedules leave no trace: B is fixed at its
    present value, and biases that have faded are removed. If the spec names an image tower by a config
    file, the written spec holds that config in its options, so that the model loads without the file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state, stored = {}, set()
    for key, value in model.state_dict().items():
        place = value.untyped_storage().data_ptr()
        # safetensors refuses shared memory, so a tied parameter is written once per name
        shared = place in stored
        stored.add(place)
        state[key] = value.detach().cpu().clone() if shared else value.detach().cpu().contiguous()
    converted = model.tower if isinstance(model, ZeroShotNetwork) else model
    if isinstance(converted, BcosNetwork):
        settled, gone = _settled(model, converted)
        state = {key: value for key, value in state.items() if key not in gone}
        spec = dataclasses.replace(spec, design={**spec.design, **converted.design, **settled})
    with staged(directory / WEIGHTS) as path:
        safetensors.torch.save_file(state, path)
    name, options = resolved_name(spec.name, spec.options)
    spec = dataclasses.replace(spec, name=name, options=options)
    write_json(directory / CONFIG, dataclasses.asdict(spec))


def _settled(model: nn.Module, network: BcosNetwork) -> tuple[dict[str, Any], set[str]]:
    """Design choices of `network` without its schedules, and the keys of `model` that these alone have."""
    design: dict[str, Any] = {}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    gone = {key for key in buffers if key.endswith(".b_value")}
    if gone:
        design = {"b": float(buffers[min(gone)]), "b_mode": "fixed"}
    if network.bias_share is not None and network.bias_share == 0:
        design["bias"] = "remove"
        gone |= {key for key, _ in model.named_parameters(remove_duplicate=False) if is_bias(key)}
        gone |= {key for key in buffers if key.rpartition(".")[2] == "bias_share"}
    return design, gone


@torch.inference_mode(False)  # autograd, and so explanations, cannot use parameters made in inference mode
def load(directory: str | Path) -> tuple[nn.Module, ModelSpec]:
    """Loads the model in `directory` (or at an fsspec URL), in evaluation mode; returns it with its spec.

    Raises:
        FileNotFoundError: there is no model.
        DamagedFileError: `model.json` is not a spec.
        WeightsError: the weights do not fit the model that the spec describes.
    """
    with local_folder(directory) as folder:
        spec = read_spec(folder)
        model = assemble(spec, check=False)
        load_strictly(model, read_state_dict(str(folder / WEIGHTS)), str(directory))
    return model.eval(), spec


def load_backbone(directory: str | Path, spec: ModelSpec) -> nn.Module:
    """Returns the model of `spec` with the weights in `directory` (or at a URL), except the classifier's.

    The classifier, the last linear layer in the order of definition, keeps its random initial weights.

    Raises:
        FileNotFoundError: there is no model.
        DamagedFileError: `model.json` is not a spec.
        WeightsError: the weights do not fit such a model.
    """
    with local_folder(directory) as folder:
        read_spec(folder)
        state = read_state_dict(str(folder / WEIGHTS))
    model = assemble(spec, check=False)
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | BcosLinear)][-1]
    own = {key: value for key, value in model.state_dict().items() if key.startswith(f"{head}.")}
    kept = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    load_strictly(model, kept | own, str(directory))
    return model


def read_spec(directory: str | Path) -> ModelSpec:
    """Reads the spec of the model in `directory`.

    Raises:
        FileNotFoundError: there is no model.
        DamagedFileError: `model.json` is not a spec.
    """
    content = read_json(Path(directory) / CONFIG)
    if content is None:
        raise FileNotFoundError(f"no model in {directory}: {CONFIG} and {WEIGHTS} are wanted there")
    try:
        return ModelSpec(**{**content, **{key: tuple(content[key]) for key in ("classes", "mean", "std")}})
    except (KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{directory}/{CONFIG}: not what `save` writes ({one_line(error)}): save it again"
        ) from None


def digest(directory: str | Path) -> str:
    """Returns a sha256 over the model's files: its weights, its spec and, if any, its text tower."""
    content = hashlib.sha256()
    for name in reversed(model_file_names(directory)):
        content.update(bytes.fromhex(file_digest(Path(directory) / name)))
    return content.hexdigest()
