"""B-cosification: `bcosify` converts a network and applies the design choices of the paper.

A choice changes modules and parameters of the converted network. It cannot change functions that a `forward`
calls (`x.mean((2, 3))`, `F.relu(x)`), so it may find nothing to act on. This is an error if the caller gave
the choice as an argument; if it is a default, it is logged. The network's attribute `design` records the
choices that took effect.

Source: Arya et al., B-cosification, NeurIPS 2024, section 3.
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

# Usual names of classifiers, and of class tokens.
CLASSIFIERS = {"fc", "classifier", "head", "heads", "head_dist", "linear", "last_linear", "logits"}
CLASS_TOKENS = {"class_embedding", "class_token", "cls_token", "dist_token", "reg_token"}
KNOWN = {"pipelines", "timm", "torch", "torchvision"}  # packages whose global pools need no tracing
FUNCTIONS = {"relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "mish", "tanh"}

P = ParamSpec("P")
T = TypeVar("T")


def _noting_what_is_asked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator that passes the names of the caller's keyword arguments as `asked`, unless it is given.

    Leaves inference mode, in which new parameters could never be trained.
    """

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
    bias: Literal["remove", "fade", "decay", "keep"] = "remove",
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
    """Converts `model` to a B-cos network that is ready for fine-tuning. `model` is left untouched.

    Args:
        model: maps normalised images (N, 3, H, W) to logits (N, K), or to features if it has no classifier.
        b: exponent B >= 1 of every B-cos layer.
        b_mode: `fixed`; `scheduled`, so that `set_b` can change it; or `learned`, a parameter per layer that
            is kept at 1 or above (`clamp_b`).
        bias: `remove` removes every bias, including those of norms. `fade` keeps them until `fade_biases`
            scales them to zero. `decay` and `keep` keep them; for `decay`, the optimiser applies weight decay
            to them.
        norm: treatment of BatchNorm: `uncentered`, `uncentered_unshifted` or `centered`, see `convert`.
        stem_pool: `average` replaces the first 3×3 max pool of stride 2 by an average pool that counts padded
            zeros.
        gap_reorder: if a global average pool precedes the classifier, classify every location and average the
            logits.
        activation: `remove` removes ReLUs and gated activations, except those that compute a factor
            (squeeze-excitation).
        position_embedding: `remove` removes position embeddings and class tokens, which add constants that no
            pixel carries.
        projection: `bcos` makes the last linear layer of an embedding tower a B-cos layer, `linear` leaves it
            at B = 1.
        logit_bias: added to every logit. `None` is -log(K - 1), so that each class starts at probability 1/K,
            or 0 if the network has no classifier.
        temperature: T, by which logits are divided.
        normalize_weight: divide weight rows by their norms, for training from scratch.
        max_out: units per output of a B-cos layer, see `BcosLinear`. Above 1, all weights are drawn anew, for
            training from scratch.
        mean, std: as in `convert`.
        asked: names of the choices that must find something to act on; by default, those that the caller
            gives.

    Returns:
        A network that maps images (N, 6, H, W) in [0, 1] to logits (N, K), in the training modes of `model`.
        Its `design` holds these arguments; a choice that found nothing to act on has the value that leaves a
        network unchanged.

    Raises:
        ConversionError: see `convert` and `class_count`; or a choice in `asked` finds nothing to act on; or
            `activation="remove"` is asked for and a `forward` calls activations as functions.

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
    """Returns True if the parameter of this dotted name is a bias, which `bcosify(bias="remove")` removes."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


@torch.no_grad()
def fade_biases(network: nn.Module, share: float) -> None:
    """Scales the biases of a network with `bias="fade"`, so that `share` in [0, 1] of them is left.

    Shares may only fall. Training changes the biases in between; at a share of 0 they are set to zero, which
    makes contributions complete. The buffer `bias_share` holds the last share.

    Raises:
        ValueError: the network's biases do not fade.
    """
    left = getattr(network, "bias_share", None)
    if left is None:
        raise ValueError("the biases of this network do not fade: bcosify it with bias='fade'")
    factor = share / left if share > 0 else torch.zeros_like(left)
    for name, parameter in network.named_parameters():
        if is_bias(name):
            parameter.mul_(factor)
    left.fill_(share)


def is_embedding(name: str) -> bool:
    """Returns True if the parameter of this dotted name is a position embedding or a class token."""
    last = name.rpartition(".")[2]
    return last in CLASS_TOKENS or last.startswith(("pos_embed", "positional_embedding"))


def _say(network: str, idle: dict[str, Any], asked: frozenset[str]) -> None:
    """Raises ConversionError if an idle choice (one without effect) is in `asked`; logs other idle ones."""
    refused = [name for name in idle if name in asked]
    told = ", ".join(f"{name}={idle[name]!r} ({CHOICES[name].wanted})" for name in refused or idle)
    if refused:
        raise ConversionError(
            f"nothing in {network} for {told} to act on: functions in a forward cannot be changed; "
            "make them modules, or leave the choice out"
        )
    if idle:
        log.info("nothing in %s for the default %s to act on", network, told)


def _drawn(weight: torch.Tensor, max_out: int) -> nn.Parameter:
    """Random weights, `max_out` rows per row of `weight`, initialised as in torch's own layers."""
    units = nn.Parameter(weight.new_empty(max_out * len(weight), *weight.shape[1:]), weight.requires_grad)
    nn.init.kaiming_uniform_(units, a=math.sqrt(5))
    return units


def class_count(model: nn.Module, network: BcosNetwork, logit_bias: float | None = None) -> int | None:
    """K, the outputs of the last B-cos layer of `network`; `None` if `model` gives features, not logits.

    `network` is the converted `model`. An `EmbeddingTower` gives features. In other networks the last layer
    is no classifier if it is followed by a norm, a gate or a ReLU (except a ReLU after a 1×1 convolution, as
    in SqueezeNet), or if an `nn.Identity` has replaced the classifier.

    Raises:
        ConversionError: K is 1 and `logit_bias` is `None`: the default bias needs two classes.
    """
    if isinstance(network.body, EmbeddingTower):
        return None
    layer: Any = _last_as_defined(network) or _last_as_run(network)
    if layer is None or getattr(model, "num_classes", None) == 0:  # 0: a timm network without a classifier
        return None
    classes = layer.out_channels if isinstance(layer, BcosConv2d) else layer.out_features
    if classes < 2 and logit_bias is None:
        raise ConversionError(
            f"the default logit bias needs two classes or more, the last layer has {classes}: give logit_bias"
        )
    return classes


def _last_as_defined(network: BcosNetwork) -> nn.Module | None:
    """The last B-cos layer by order of definition; `None` if a later module cannot follow a classifier."""
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
    """The B-cos layer that gives the output, except for pools and reshaping after it.

    `None` if there is none, or if `torch.fx` cannot trace the network.
    """
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
    """Raises ConversionError if a `forward` calls activations as functions, if `torch.fx` can trace it."""
    graph = _traced(network)
    for node in graph.nodes if graph else ():
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op in ("call_function", "call_method") and name in FUNCTIONS:
            path = node.meta["path"]
            raise ConversionError(
                f"activation='remove' cannot take {name} away, a function in the forward of "
                f"{type(network.body.get_submodule(path)).__name__} at {path or 'the top'!r}: "
                "make it a module"
            )


def _classifies(network: BcosNetwork, pool: str) -> bool:
    """Returns True if all that follows the global pool of this name depends on the image through it alone.

    The pool of a squeeze-excitation fails this test, because its output is multiplied with features. Pools in
    the body itself, and in modules of the `KNOWN` packages, pass without a test. Other modules are traced;
    they pass if they cannot be traced.
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
    """The `torch.fx` graph of the body, or `None` if the body cannot be traced.

    `meta["path"]` of a node is the dotted name of the module whose `forward` contains it.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(network.body)
    except Exception:  # such as control flow that depends on the input
        return None
    for node in graph.nodes:
        node.meta["path"] = tracer.node_name_to_scope[node.name][0]
    return graph


class _Tracer(fx.Tracer):
    """A tracer in whose graphs torch's modules and explainable modules are single nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Explainable) or super().is_leaf_module(m, module_qualified_name)


def _put(network: nn.Module, name: str, new: nn.Module) -> None:
    """Replaces the module of this dotted name by `new`, in the same training mode."""
    network.set_submodule(name, new.train(network.get_submodule(name).training))


def _places(network: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """Dotted names of the `wanted` modules, in the order of definition; shared modules have several."""
    return [name for name, module in network.named_modules(remove_duplicate=False) if wanted(module)]


def _is_in_a_factor(network: nn.Module, name: str) -> bool:
    """Returns True if the module is inside a `Holdable` and computes its factor (squeeze-excitation)."""
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


# The choices ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """A design choice that changes modules or parameters of the converted network.

    Attributes:
        wanted: description of what the choice acts on, for messages.
        off: the value that leaves the network unchanged; `None` if every value acts.
        find: (network, K) -> dotted names of the modules or parameters that the choice acts on.
        act: (network, these names, value) -> `None`; changes the network in place.
    """

    wanted: str
    off: Any
    find: Callable[[BcosNetwork, int | None], list[str]]
    act: Callable[[BcosNetwork, list[str], Any], None]


def _by(new: Callable[[Any], nn.Module]) -> Callable[[BcosNetwork, list[str], Any], None]:
    """An action that replaces each module that the choice finds by `new(module)`."""

    def act(network: BcosNetwork, names: list[str], value: Any) -> None:
        for name in names:
            _put(network, name, new(network.get_submodule(name)))

    return act


def _biases(network: BcosNetwork, classes: int | None) -> list[str]:
    return [name for name, _ in network.named_parameters() if is_bias(name)]


def _treat_biases(network: BcosNetwork, names: list[str], value: str) -> None:
    """Removes all biases if `value` is `remove`; the optimiser takes care of `decay`."""
    if value == "fade":
        network.register_buffer("bias_share", torch.ones((), device=network.mean.device))
    elif value == "remove":
        for module in network.modules():
            for name in [name for name in module._parameters if is_bias(name)]:
                module.register_parameter(name, None)


def _batch_norms(network: BcosNetwork, classes: int | None) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, BcosBatchNorm)]


def _already_converted(network: BcosNetwork, names: list[str], value: str) -> None:
    """Does nothing, because `convert` has already treated the norms as chosen."""


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
    """Replaces embeddings by buffers of zeros, because the libraries' forward passes still add them."""
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


CHOICES = {  # applied in this order
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
