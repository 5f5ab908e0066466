"""Models on disk: `model.safetensors` beside `model.json`, which says how to build the network. Nothing is unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from pipelines.bcos import IMAGENET_MEAN, IMAGENET_STD, BcosLinear, BcosNetwork, bcosify
from pipelines.bcos.network import check_six_channels, six_channel_statistics
from pipelines.models.clip import resolved_name
from pipelines.models.folder import CONFIG, WEIGHTS, local_folder, model_file_names
from pipelines.models.weights import load_strictly, read_state_dict
from pipelines.models.zero_shot import ZeroShotNetwork
from pipelines.models.zoo import build
from pipelines.storage.errors import DamagedFileError, one_line
from pipelines.storage.files import file_digest, read_json, staged, write_json


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """All that it takes to build a model of this project, except its weights."""

    name: str  # as `build` takes it
    classes: tuple[str, ...]  # none for an image tower
    image_size: int  # side of the square it was trained on, pixels
    kind: Literal["conventional", "bcos"]
    task: Literal["multiclass", "multilabel", "embedding"] = (
        "multiclass"  # an embedding is what an image tower gives
    )
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the architecture's constructor
    design: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # keyword arguments of `bcosify`; on disk as they took effect
    weights_view: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # of the weights it began with: `Preprocessing.view`
    zero_shot: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # `scale`, `width`: an image tower with texts as classes


class ConventionalNetwork(nn.Module):
    """An ordinary network as a model of this project: (N, 6, H, W) in [0, 1] -> (N, K), from the first three channels."""

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
    """The network of `spec`, with random weights: without classes for an image tower."""
    embeds = spec.task == "embedding" or spec.zero_shot
    return build(spec.name, num_classes=None if embeds else len(spec.classes), options=spec.options)


def assemble(spec: ModelSpec, network: nn.Module | None = None, *, check: bool = True) -> nn.Module:
    """The model that `spec` describes, from `network` (as `build` gives it; by default one with random weights).

    An image tower that becomes a B-cos network has no logit bias, and its projection stays behind its pooling, unless the design
    says otherwise. A zero-shot classifier has no texts yet: its weights bring them.

    Raises:
        ConversionError: see `bcosify`; a design choice that is not the default finds nothing to act on, if `check` is set. For
            models that were made before, it is not: their design is what they have.
    """
    if spec.zero_shot:
        tower = assemble(tower_spec(spec), network, check=check)
        texts = torch.ones(
            len(spec.classes), spec.zero_shot["width"]
        )  # in the place of those that the weights bring
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
    """The spec of the image tower in a zero-shot classifier."""
    return dataclasses.replace(spec, task="embedding", classes=(), zero_shot={})


def save(directory: str | Path, model: nn.Module, spec: ModelSpec) -> None:
    """Writes `model` (as `assemble` makes it from `spec`) to `directory`, with the design choices as they took effect.

    A config file in the name of an image tower goes into its options, so that the model loads where that file is not.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state, stored = {}, set()
    for key, value in model.state_dict().items():
        place = value.untyped_storage().data_ptr()
        shared = place in stored  # a tied parameter is written under each of its names
        stored.add(place)
        state[key] = value.detach().cpu().clone() if shared else value.detach().cpu().contiguous()
    with staged(directory / WEIGHTS) as path:
        safetensors.torch.save_file(state, path)
    converted = model.tower if isinstance(model, ZeroShotNetwork) else model
    if isinstance(converted, BcosNetwork):
        spec = dataclasses.replace(spec, design={**spec.design, **converted.design})
    name, options = resolved_name(spec.name, spec.options)
    spec = dataclasses.replace(spec, name=name, options=options)
    write_json(directory / CONFIG, dataclasses.asdict(spec))


@torch.inference_mode(False)  # parameters made in inference mode could not be explained
def load(directory: str | Path) -> tuple[nn.Module, ModelSpec]:
    """The model in `directory` (or at any fsspec URL), in evaluation mode, and its spec.

    Raises:
        FileNotFoundError: no model there.
        WeightsError: the weights are not of the model that its spec describes.
    """
    with local_folder(directory) as folder:
        spec = read_spec(folder)
        model = assemble(spec, check=False)
        load_strictly(model, read_state_dict(str(folder / WEIGHTS)), str(directory))
    return model.eval(), spec


def load_backbone(directory: str | Path, spec: ModelSpec) -> nn.Module:
    """The model that `spec` describes, with the weights of the model in `directory` (or at a URL) for all but its classifier.

    The classifier, the last linear layer, keeps the random weights that it is made with.

    Raises:
        FileNotFoundError: no model there.
        WeightsError: the weights are not of such a model.
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
    """The spec of the model in `directory`; raises FileNotFoundError."""
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
    """The sha256 of the model in `directory`: of its weights and its spec, and of the text tower beside it."""
    content = hashlib.sha256()
    for name in reversed(model_file_names(directory)):
        content.update(bytes.fromhex(file_digest(Path(directory) / name)))
    return content.hexdigest()
