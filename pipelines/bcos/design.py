"""The design choices of Arya et al., B-cosification, NeurIPS 2024: `bcosify` makes them on a converted network.

A choice changes modules and parameters. It cannot change functions in a `forward` (`x.mean((2, 3))`, `F.relu(x)`): a choice that
was asked for and finds nothing to act on is an error, a default that finds nothing is logged. The `design` of the network says
what took effect.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import fx, nn

from pipelines.bcos.activations import BcosAvgPool2d, Gate
from pipelines.bcos.convert import Conversion, NormMode, convert
from pipelines.bcos.errors import ConversionError
from pipelines.bcos.explanation import Explainable, Holdable
from pipelines.bcos.layers import BcosConv2d, BcosLinear, ExponentMode
from pipelines.bcos.network import IMAGENET_MEAN, IMAGENET_STD, BcosNetwork, EmbeddingTower, LocationsToBatch
from pipelines.bcos.norms import BcosBatchNorm

log = logging.getLogger(__name__)

CLASSIFIERS = {
    "fc",
    "classifier",
    "head",
    "heads",
    "head_dist",
    "linear",
    "last_linear",
    "logits",
}  # usual names of a classifier
CLASS_TOKENS = {"class_embedding", "class_token", "cls_token", "dist_token", "reg_token"}  # their usual names
KNOWN = {"pipelines", "timm", "torch", "torchvision"}  # packages of modules whose pools are known
FUNCTIONS = {"relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "mish", "tanh"}

P = ParamSpec("P")
T = TypeVar("T")


def _noting_what_is_asked(function: Callable[P, T]) -> Callable[P, T]:
    """Adds the names of the keyword arguments that the caller gives as the argument `asked`; parameters can be trained."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False):
            return function(*args, **{"asked": frozenset(kwargs), **kwargs})  # type: ignore[arg-type]

    return called


@_noting_what_is_asked
def bcosify(
    model: nn.Module,
    *,
    b: float = 2.0,
    b_mode: ExponentMode = "fixed",
    bias: Literal["remove", "decay", "keep"] = "remove",
    norm: NormMode = "uncentered",
    stem_pool: Literal["average", "keep"] = "average",
    gap_reorder: bool = True,
    activation: Literal["keep", "remove"] = "keep",
    position_embedding: Literal["keep", "remove"] = "keep",
    projection: Literal["linear", "bcos"] = "linear",
    logit_bias: float | None = None,
    temperature: float = 1.0,
    normalize_weight: bool = False,
    max_out: int = 1,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    asked: frozenset[str] = frozenset(),
) -> BcosNetwork:
    """The B-cos network made from `model`, ready for fine-tuning; `model` itself is left untouched.

    Args:
        model: takes normalised images (N, 3, H, W), gives logits (N, K), or features if it has no classifier.
        b: exponent of every B-cos layer, >= 1.
        b_mode: `fixed`; `scheduled`: `set_b` moves it; `learned`: a parameter of each layer, kept at 1 or above.
        bias: `remove` takes every bias away, the norms' included; `decay` and `keep` keep them (the optimiser decays, or not).
        norm: of BatchNorm: `uncentered`, `uncentered_unshifted` or `centered`, as in `convert`.
        stem_pool: `average` replaces a 3×3 max pool of stride 2 after the stem by an average pool, zeros counted.
        gap_reorder: classify every location, then average, where the classifier follows a global average pool.
        activation: `remove` takes the ReLUs and gated activations away, but for those that compute a factor (squeeze-excitation).
        position_embedding: `remove` takes position embeddings and class tokens away: parameters that add to the tokens a constant
            that no pixel carries.
        projection: of an embedding tower: `bcos` makes its last linear layer a B-cos layer; `linear` leaves it at B = 1.
        logit_bias: added to every logit; `None`: -log(K - 1), so that each class starts at probability 1/K, and 0 for a network
            without a classifier.
        temperature: T, by which logits are divided.
        normalize_weight: rows of norm 1, for training from scratch.
        max_out: units of which each output of a B-cos layer is the maximum. More than one are drawn at random, all of them:
            for training from scratch too.
        mean, std: as in `convert`.
        asked: names of the choices that must find something to act on; by default those that the caller gives.

    Returns:
        (N, 6, H, W) in [0, 1] -> logits (N, K), with the training modes of `model`. Its `design` has these arguments as they
        took effect: a choice that found nothing to act on is there as not chosen.

    Raises:
        ConversionError: see `convert`; or a choice that is `asked` for finds nothing to act on.

    Source: Arya et al., B-cosification, NeurIPS 2024, section 3.
    """
    network = convert(model, mean=mean, std=std, norm=norm)
    classes = class_count(model, network, logit_bias)
    found = {name: choice.find(network, classes) for name, choice in CHOICES.items()}
    design = {
        **{
            "b": b,
            "b_mode": b_mode,
            "bias": bias,
            "norm": norm,
            "stem_pool": stem_pool,
            "gap_reorder": gap_reorder,
        },
        **{"activation": activation, "position_embedding": position_embedding, "projection": projection},
        **{
            "logit_bias": logit_bias,
            "temperature": temperature,
            "normalize_weight": normalize_weight,
            "max_out": max_out,
        },
    }
    idle = [name for name, choice in CHOICES.items() if design[name] != choice.off and not found[name]]
    _say(type(model).__name__, {name: design[name] for name in idle}, asked)
    if activation == "remove" and "activation" in asked:
        _check_no_functions(network)
    for name, choice in CHOICES.items():
        if design[name] != choice.off:
            choice.act(network, found[name], design[name])
    drawn: dict[torch.Tensor, nn.Parameter] = {}
    for layer in network.modules():
        if isinstance(layer, BcosConv2d | BcosLinear):
            layer._configure(b, max_out, normalize_weight, b_mode)
            if max_out > 1:
                layer.weight = drawn.setdefault(layer.weight, _drawn(layer.weight, max_out))
    network.design = {**design, **{name: CHOICES[name].off for name in idle if CHOICES[name].off is not None}}
    network.logit_bias = (
        (0.0 if classes is None else -math.log(classes - 1)) if logit_bias is None else logit_bias
    )
    network.temperature = temperature
    return network


def is_bias(name: str) -> bool:
    """Whether a parameter of this (dotted) name is a bias, which `bcosify(bias="remove")` takes away."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def is_embedding(name: str) -> bool:
    """Whether a parameter of this (dotted) name is a position embedding or a class token."""
    last = name.rpartition(".")[2]
    return last in CLASS_TOKENS or last.startswith(("pos_embed", "positional_embedding"))


def _say(network: str, idle: dict[str, Any], asked: frozenset[str]) -> None:
    """Raises ConversionError where choices that are `asked` for are `idle`: found nothing to act on; logs the other idle ones."""
    refused = [name for name in idle if name in asked]
    told = ", ".join(f"{name}={idle[name]!r} ({CHOICES[name].wanted})" for name in refused or idle)
    if refused:
        raise ConversionError(
            f"nothing in {network} for {told} to act on: functions in a forward cannot be changed; make them modules, or leave "
            "the choice out"
        )
    if idle:
        log.info("nothing in %s for the default %s to act on", network, told)


def _drawn(weight: torch.Tensor, max_out: int) -> nn.Parameter:
    """Weights of `max_out` units for each row of `weight`, as torch's own layers start."""
    units = nn.Parameter(weight.new_empty(max_out * len(weight), *weight.shape[1:]), weight.requires_grad)
    nn.init.kaiming_uniform_(units, a=math.sqrt(5))
    return units


def class_count(model: nn.Module, network: BcosNetwork, logit_bias: float | None = None) -> int | None:
    """K, from the last B-cos layer of the converted `network`; `None` if `model` gives features, not logits.

    An `EmbeddingTower` gives features. The last layer of another network is no classifier where a norm or a gate follows it, or a
    ReLU (unless the layer is a convolution of single places, as in SqueezeNet), or `nn.Identity` stands in the place of a
    classifier.

    Raises:
        ConversionError: a single class, for which there is no default `logit_bias`.
    """
    if isinstance(network.body, EmbeddingTower):
        return None
    layer: Any = _last_as_defined(network) or _last_as_run(network)
    if layer is None or getattr(model, "num_classes", None) == 0:  # of timm's networks without a classifier
        return None
    classes = layer.out_channels if isinstance(layer, BcosConv2d) else layer.out_features
    if classes < 2 and logit_bias is None:
        raise ConversionError(
            f"the default logit bias needs two classes or more, the last layer has {classes}: give logit_bias"
        )
    return classes


def _last_as_defined(network: BcosNetwork) -> nn.Module | None:
    """The last B-cos layer in the order of definition, if what is defined after it may follow a classifier."""
    leaves = [
        (name, module) for name, module in network.named_modules() if next(module.children(), None) is None
    ]
    last = max(
        index for index, (_, module) in enumerate(leaves) if isinstance(module, BcosConv2d | BcosLinear)
    )
    layer = leaves[last][1]
    for name, module in leaves[last + 1 :]:
        removed = isinstance(module, nn.Identity) and name.rpartition(".")[2] in CLASSIFIERS
        if (
            removed
            or isinstance(module, Holdable)
            or (isinstance(module, nn.ReLU) and not _sees_single_places(layer))
        ):
            return None
    return layer


def _last_as_run(network: BcosNetwork) -> nn.Module | None:
    """The B-cos layer that gives the output, but for pools and reshaping, as far as `torch.fx` can trace the network."""
    graph = _traced(network)
    if graph is None:
        return None
    node = next(reversed(graph.nodes))
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        module = network.body.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, BcosConv2d | BcosLinear):
            return module
        if node.op in ("placeholder", "get_attr") or isinstance(module, Holdable | nn.ReLU):
            return None
    return None


def _sees_single_places(layer: nn.Module) -> bool:
    return isinstance(layer, BcosConv2d) and math.prod(layer.kernel_size) == 1


def _check_no_functions(network: BcosNetwork) -> None:
    """Raises ConversionError where activations are functions in a forward pass, as far as `torch.fx` can trace the network."""
    graph = _traced(network)
    for node in graph.nodes if graph else ():
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op in ("call_function", "call_method") and name in FUNCTIONS:
            path = node.meta["path"]
            raise ConversionError(
                f"activation='remove' cannot take {name} away, a function in the forward of "
                f"{type(network.body.get_submodule(path)).__name__} at {path or 'the top'!r}: make it a module"
            )


def _classifies(network: BcosNetwork, pool: str) -> bool:
    """Whether what follows the global pool of this name follows from it alone, unlike in a squeeze-excitation.

    Modules of torchvision, timm and this project are known; others are traced, and trusted if they cannot be.
    """
    parent = network.get_submodule(pool.rpartition(".")[0])
    if parent is network.body or type(parent).__module__.partition(".")[0] in KNOWN:
        return True
    graph = _traced(network)
    after: set[fx.Node] = set()
    for node in graph.nodes if graph else ():
        if node.op == "call_module" and f"body.{node.target}" == pool:
            after.add(node)
        elif after.intersection(node.all_input_nodes):
            if not after.issuperset(each for each in node.all_input_nodes if each.op != "get_attr"):
                return False
            after.add(node)
    return True


def _traced(network: BcosNetwork) -> fx.Graph | None:
    """The graph of the body, whose nodes have the `path` of the module around them in `meta`; `None` if it cannot be traced."""
    tracer = _Tracer()
    try:
        graph = tracer.trace(network.body)
    except Exception:  # control flow that depends on the input
        return None
    for node in graph.nodes:
        node.meta["path"] = tracer.node_name_to_scope[node.name][0]
    return graph


class _Tracer(fx.Tracer):
    """Follows the forward pass of everything but torch's modules and those that explanation mode knows."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one call in the graph."""
        return isinstance(m, Explainable) or super().is_leaf_module(m, module_qualified_name)


def _put(network: nn.Module, name: str, new: nn.Module) -> None:
    """Replaces the module of this name by `new`, in the same training mode."""
    network.set_submodule(name, new.train(network.get_submodule(name).training))


def _places(network: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """Names of the `wanted` modules, in the order of definition; a shared module has several."""
    return [name for name, module in network.named_modules(remove_duplicate=False) if wanted(module)]


def _is_in_a_factor(network: nn.Module, name: str) -> bool:
    """Whether the module of this name only helps to compute the factor of a layer around it, as in a squeeze-excitation."""
    places = name.split(".")
    return any(
        isinstance(network.get_submodule(".".join(places[:end])), Holdable) for end in range(1, len(places))
    )


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, nn.ReLU | Gate)


def _is_stem_pool(module: nn.Module) -> bool:
    if not isinstance(module, nn.MaxPool2d) or module.dilation not in (1, (1, 1)):
        return False
    shape = zip((module.kernel_size, module.stride, module.padding), (3, 2, 1), strict=True)
    return all(value in (wanted, (wanted, wanted)) for value, wanted in shape)


def _is_global_pool(module: nn.Module) -> bool:
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))


# The choices ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """A design choice that changes modules or parameters of the converted network."""

    wanted: str  # what it acts on, in words
    off: Any  # the value that leaves the network as it is; `None`: every value acts
    find: Callable[
        [BcosNetwork, int | None], list[str]
    ]  # (network, K) -> dotted names of what the choice acts on
    act: Callable[
        [BcosNetwork, list[str], Any], None
    ]  # (network, these names, value) changes the network in place


def _by(new: Callable[[Any], nn.Module]) -> Callable[[BcosNetwork, list[str], Any], None]:
    """The action of a choice that replaces each module it finds by `new(module)`."""

    def act(network: BcosNetwork, names: list[str], value: Any) -> None:
        for name in names:
            _put(network, name, new(network.get_submodule(name)))

    return act


def _biases(network: BcosNetwork, classes: int | None) -> list[str]:
    return [name for name, _ in network.named_parameters() if is_bias(name)]


def _treat_biases(network: BcosNetwork, names: list[str], value: str) -> None:
    """Takes all biases away if `value` is `remove`. Biases that decay stay: the optimiser decays them."""
    if value == "remove":
        for module in network.modules():
            for name in [name for name in module._parameters if is_bias(name)]:
                module.register_parameter(name, None)


def _batch_norms(network: BcosNetwork, classes: int | None) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, BcosBatchNorm)]


def _already_converted(network: BcosNetwork, names: list[str], value: str) -> None:
    """Does nothing: `convert` has made the norms as the choice wants them."""


def _stem_pools(network: BcosNetwork, classes: int | None) -> list[str]:
    return _places(network, _is_stem_pool)[:1]


def _average_pool(pool: nn.MaxPool2d) -> nn.Module:
    return BcosAvgPool2d(3, 2, 1, ceil_mode=pool.ceil_mode, count_include_pad=True)


def _pools_before_a_classifier(network: BcosNetwork, classes: int | None) -> list[str]:
    return [name for name in _places(network, _is_global_pool) if classes and _classifies(network, name)][-1:]


def _activations(network: BcosNetwork, classes: int | None) -> list[str]:
    return [name for name in _places(network, _is_activation) if not _is_in_a_factor(network, name)]


def _embeddings(network: BcosNetwork, classes: int | None) -> list[str]:
    return [name for name, _ in network.named_parameters() if is_embedding(name)]


def _without_embeddings(network: BcosNetwork, names: list[str], value: str) -> None:
    """Puts buffers of zeros where the embeddings were, because the forward passes of the libraries go on adding them."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and is_embedding(name):
                delattr(module, name)
                module.register_buffer(name, torch.zeros_like(parameter), persistent=False)


def _projections(network: BcosNetwork, classes: int | None) -> list[str]:
    towers = [
        (path, module) for path, module in network.named_modules() if isinstance(module, EmbeddingTower)
    ]
    return [f"{path}.{tower.projection}" for path, tower in towers if tower.projection is not None]


CHOICES = {  # in the order in which they act
    "bias": Choice("a parameter that is a bias", "keep", _biases, _treat_biases),
    "norm": Choice("a BatchNorm", None, _batch_norms, _already_converted),
    "stem_pool": Choice(
        "an nn.MaxPool2d of 3×3, stride 2, padding 1", "keep", _stem_pools, _by(_average_pool)
    ),
    "gap_reorder": Choice(
        "an nn.AdaptiveAvgPool2d(1) and a classifier",
        False,
        _pools_before_a_classifier,
        _by(lambda _: LocationsToBatch()),
    ),
    "activation": Choice(
        "a ReLU or gated activation that is a module", "keep", _activations, _by(lambda _: nn.Identity())
    ),
    "position_embedding": Choice(
        "a parameter that is a position embedding or a class token", "keep", _embeddings, _without_embeddings
    ),
    "projection": Choice(
        "the last linear layer of an embedding tower",
        "linear",
        _projections,
        _by(lambda layer: Conversion().child(layer, "projection")),
    ),
}
