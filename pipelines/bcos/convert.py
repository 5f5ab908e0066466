"""Conversion of an ordinary network to a B-cos network, by module type.

`convert` preserves the function: every layer becomes its B-cos counterpart at B = 1, from the same weights. `bcosify` then makes
the design choices of Arya et al., B-cosification, NeurIPS 2024. Rules say what becomes of a module type; `register_conversion`
adds one:

    @register_conversion(MyBlock)
    def _(module, conversion):
        return MyBcosBlock(conversion.child(module.conv, "conv"), ...)

A rule returns the module that stands in the converted network. It converts those of the original's children that it keeps by
`conversion.child`, or several or all of them by `conversion.children`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

import torch
from torch import nn

from pipelines.bcos.activations import (
    BcosAvgPool2d,
    BcosReLU,
    Gate,
    GatedGELU,
    GatedHardswish,
    GatedMish,
    GatedReLU6,
    GatedSiLU,
    GatedTanh,
)
from pipelines.bcos.explanation import Explainable, Holdable, HoldState
from pipelines.bcos.layers import BcosConv2d, BcosLinear, ExponentMode
from pipelines.bcos.network import IMAGENET_MEAN, IMAGENET_STD, BcosNetwork, LocationsToBatch
from pipelines.bcos.norms import BcosBatchNorm, BcosGroupNorm, BcosLayerNorm
from pipelines.errors import UserError

NormMode = Literal["uncentered", "uncentered_unshifted", "centered"]


class ConversionError(UserError, ValueError):
    """A network that cannot be converted: one line that names the module and what to do."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The place in the network that a rule converts, and the choices that hold for the whole conversion."""

    path: str = ""
    norm: NormMode = "uncentered"
    image_layer: nn.Module | None = None  # the layer that takes the image
    done: dict[nn.Module, nn.Module] = dataclasses.field(default_factory=dict)  # shared modules stay shared

    def child(self, module: nn.Module, name: str) -> nn.Module:
        """The converted `module`, which is `name` in the module whose rule this is."""
        return _convert(module, dataclasses.replace(self, path=f"{self.path}.{name}".lstrip(".")))

    def children(self, module: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
        """`module` itself with its children converted in place; of `names` (dotted: of its descendants) those that exist."""
        for name in list(module._modules) if names is None else names:  # `named_children` would name a shared child once
            path, _, attribute = name.rpartition(".")
            parent = module.get_submodule(path)
            child = getattr(parent, attribute, None)
            if child is not None:
                setattr(parent, attribute, self.child(child, name))
        return module

    def by_rule_of(self, base: type[nn.Module], module: nn.Module) -> nn.Module:
        """`module`, whose type only renames or extends `base`, converted by the rule of `base`."""
        return _convert(self.recast(module, base), self)

    def recast(self, module: nn.Module, to: type[nn.Module]) -> nn.Module:
        """`module` itself as an instance of `to`, a subclass of its type that changes `forward` alone."""
        module.__class__ = to
        if issubclass(to, Explainable):
            module.__dict__["hold_state"] = HoldState()
        return module


Rule = Callable[[nn.Module, Conversion], nn.Module]
RuleT = TypeVar("RuleT", bound=Callable[..., nn.Module])
_RULES: dict[type[nn.Module], Rule] = {}


def register_conversion(*types: type[nn.Module]) -> Callable[[RuleT], RuleT]:
    """Makes the decorated function (module, conversion) -> module the rule of these types, but not of their subclasses."""

    def register(rule: RuleT) -> RuleT:
        for module_type in types:
            _RULES[module_type] = rule
        return rule

    return register


def keep(module: nn.Module, conversion: Conversion) -> nn.Module:
    """The rule of a module that is linear, or can be explained, as it is."""
    return module


def convert_children(module: nn.Module, conversion: Conversion) -> nn.Module:
    """The rule of a module whose forward pass is linear but for its children."""
    return conversion.children(module)


def recast_to(to: type[nn.Module]) -> Rule:
    """The rule of a module that becomes an instance of `to`, see `Conversion.recast`."""
    return lambda module, conversion: conversion.recast(module, to)


def _convert(module: nn.Module, conversion: Conversion) -> nn.Module:
    if module not in conversion.done:
        rule = _RULES.get(type(module), _walk)
        conversion.done[module] = rule(module, conversion)
    return conversion.done[module]


def _walk(module: nn.Module, conversion: Conversion) -> nn.Module:
    """The rule of everything without one: a container of torch's or another library's, whose children are converted."""
    of_torch = type(module).__module__.startswith("torch.nn.")
    owns = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    leaf = next(module.children(), None) is None
    if of_torch or owns or leaf:
        reason = f"it owns {', '.join(owns)}" if owns and not of_torch else "its output may depend on the input non-linearly"
        raise ConversionError(
            f"no conversion rule for {type(module).__name__} at {conversion.path or 'the top'!r} ({reason}): write one with "
            f"@register_conversion({type(module).__name__})"
        )
    return conversion.children(module)


# Rules of torch's own modules -----------------------------------------------------------------------------------------


register_conversion(
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Flatten, nn.Unflatten, nn.LeakyReLU, nn.PReLU,
    nn.AvgPool1d, nn.Unfold,
    nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.Upsample, nn.PixelShuffle,
    BcosConv2d, BcosLinear, BcosBatchNorm, BcosLayerNorm, BcosGroupNorm, GatedGELU, GatedSiLU, GatedHardswish,
    GatedMish, GatedTanh, GatedReLU6, BcosReLU, BcosAvgPool2d,
    LocationsToBatch,
)(keep)  # fmt: skip
register_conversion(nn.Sequential, nn.ModuleList, nn.ModuleDict)(convert_children)
register_conversion(nn.ReLU)(recast_to(BcosReLU))
register_conversion(nn.AvgPool2d)(recast_to(BcosAvgPool2d))
register_conversion(nn.LayerNorm)(recast_to(BcosLayerNorm))
register_conversion(nn.GroupNorm)(recast_to(BcosGroupNorm))


@register_conversion(nn.Conv2d)
def _conv(module: nn.Conv2d, conversion: Conversion) -> nn.Module:
    of_image = module is conversion.image_layer
    layer = BcosConv2d(
        module.in_channels * (2 if of_image else 1),
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        module.groups,
        module.bias is not None,
        b=1.0,
        padding_mode=module.padding_mode,
    )
    weight = module.weight.detach()
    if of_image:  # [z, -z] through [W, -W]/2 is W z
        weight = torch.cat([weight, -weight], dim=1) / 2
    return _with_parameters(layer, weight, module.bias)


@register_conversion(nn.Linear)
def _linear(module: nn.Linear, conversion: Conversion) -> nn.Module:
    layer = BcosLinear(module.in_features, module.out_features, module.bias is not None, b=1.0)
    return _with_parameters(layer, module.weight.detach(), module.bias)


@register_conversion(nn.BatchNorm2d, nn.BatchNorm1d)
def _batch_norm(module: nn.BatchNorm2d, conversion: Conversion) -> nn.Module:
    if module.running_mean is None or module.running_var is None:
        raise ConversionError(f"{conversion.path!r}: a BatchNorm without running statistics cannot be converted")
    centered = conversion.norm == "centered"
    layer = BcosBatchNorm(
        module.num_features,
        module.eps,
        module.momentum,
        module.affine,
        bias=module.affine or not centered,
        centered=centered,
    )
    weight: torch.Tensor | None = module.weight
    bias: torch.Tensor | None = module.bias
    mean, var = module.running_mean, module.running_var
    if conversion.norm == "uncentered":  # the mean's part moves into the bias
        shift = -mean * torch.rsqrt(var + module.eps)
        bias = shift if weight is None or bias is None else bias + weight * shift
    layer = _with_parameters(layer, weight, bias)
    layer.running_var.copy_(var)
    if layer.running_mean is not None:
        layer.running_mean.copy_(mean)
    return layer


@register_conversion(nn.GELU)
def _gelu(module: nn.GELU, conversion: Conversion) -> nn.Module:
    return GatedGELU(module.approximate)


for plain, gated in (
    (nn.SiLU, GatedSiLU),
    (nn.Hardswish, GatedHardswish),
    (nn.Mish, GatedMish),
    (nn.Tanh, GatedTanh),
    (nn.ReLU6, GatedReLU6),
):
    register_conversion(plain)(lambda module, conversion, gated=gated: gated())


LayerT = TypeVar("LayerT", bound=nn.Module)


@torch.no_grad()
def _with_parameters(layer: LayerT, weight: torch.Tensor | None, bias: torch.Tensor | None) -> LayerT:
    """`layer`, of the weight's type and device, with copies of these as its parameters."""
    if weight is not None:
        layer.to(weight)
        layer.weight.copy_(weight)  # type: ignore[operator]
    if bias is not None:
        layer.bias.copy_(bias)  # type: ignore[operator]
    return layer


# The two verbs --------------------------------------------------------------------------------------------------------


def convert(
    model: nn.Module,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    norm: NormMode = "uncentered",
) -> BcosNetwork:
    """The B-cos network at B = 1 that computes what `model` computes.

    Args:
        model: takes normalised images (N, 3, H, W), gives logits (N, K). It is left untouched.
        mean, std: of RGB, those that `model` was trained with, for images in [0, 1].
        norm: `uncentered` moves a BatchNorm's mean into its bias; `centered` keeps subtracting it; `uncentered_unshifted` neither
            subtracts nor moves it, which changes the function.

    Returns:
        A network that takes (N, 6, H, W) in [0, 1] (see `add_inverse`): in evaluation mode its logits are those of `model` on
        the normalised image, up to rounding.

    Raises:
        ConversionError: a module without a rule, or no layer that takes three channels.
    """
    body = copy.deepcopy(model)
    body = _convert(body, Conversion(norm=norm, image_layer=_image_layer(body)))
    return BcosNetwork(body, mean, std).train(model.training)


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
    logit_bias: float | None = None,
    temperature: float = 1.0,
    normalize_weight: bool = False,
    max_out: int = 1,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> BcosNetwork:
    """The B-cos network made from `model`, ready for fine-tuning; `model` itself is left untouched.

    Args:
        model: takes normalised images (N, 3, H, W), gives logits (N, K).
        b: exponent of every B-cos layer, >= 1.
        b_mode: `fixed`; `scheduled`: `set_b` moves it; `learned`: a parameter of each layer, kept at 1 or above.
        bias: `remove` takes every bias away, the norms' included; `decay` and `keep` keep them (the optimiser decays, or not).
        norm: of BatchNorm: `uncentered`, `uncentered_unshifted` or `centered`, as in `convert`.
        stem_pool: `average` replaces a 3×3 max pool of stride 2 after the stem by an average pool, zeros counted.
        gap_reorder: classify every location, then average, where the classifier follows a global average pool.
        activation: `remove` takes the ReLUs and gated activations away, but for those that compute a factor (squeeze-excitation).
        logit_bias: added to every logit; `None`: -log(K - 1), so that each class starts at probability 1/K.
        temperature: T, by which logits are divided.
        normalize_weight: rows of norm 1, for training from scratch.
        max_out: units of which each output of a B-cos layer is the maximum. More than one are drawn at random, all of them:
            for training from scratch too.
        mean, std: as in `convert`.

    Returns:
        (N, 6, H, W) in [0, 1] -> logits (N, K), in the training mode of `model`.

    Source: Arya et al., B-cosification, NeurIPS 2024, section 3.
    """
    network = convert(model, mean=mean, std=std, norm=norm)
    layers = [module for module in network.modules() if isinstance(module, BcosConv2d | BcosLinear)]
    for layer in layers:
        layer._configure(b, max_out, normalize_weight, b_mode)
        if max_out > 1:
            layer.weight = nn.Parameter(layer.weight.new_empty(max_out * len(layer.weight), *layer.weight.shape[1:]))
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))  # as torch's own layers start
    if bias == "remove":
        for module in network.modules():
            for name in [name for name in module._parameters if is_bias(name)]:
                module.register_parameter(name, None)
    if stem_pool == "average":
        _replace(network.body, _is_stem_pool, 0, BcosAvgPool2d(3, 2, 1, count_include_pad=True))
    if gap_reorder:
        _replace(network.body, _is_global_pool, -1, LocationsToBatch())
    if activation == "remove":
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.ReLU | Gate) and not _is_in_a_factor(network, name):
                network.set_submodule(name, nn.Identity())
    network.logit_bias = -math.log(_class_count(layers) - 1) if logit_bias is None else logit_bias
    network.temperature = temperature
    return network


def is_bias(name: str) -> bool:
    """Whether a parameter of this (dotted) name is a bias, which `bcosify(bias="remove")` takes away."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def _image_layer(model: nn.Module) -> nn.Module:
    """The first layer, in the order of definition, that takes three channels: a convolution, or a linear layer of patches.

    The latter is a subclass of `nn.Linear` with the attribute `in_channels`, whose own rule doubles its weight.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "in_channels", None) == 3:
            return module
    raise ConversionError("no layer of this network takes three channels, so where the image enters is unknown")


def _class_count(layers: list[BcosConv2d | BcosLinear]) -> int:
    """K, from the last layer."""
    last = layers[-1]
    classes = last.out_channels if isinstance(last, BcosConv2d) else last.out_features
    if classes < 2:
        raise ConversionError(f"the default logit bias needs two classes or more, the last layer has {classes}: give logit_bias")
    return classes


def _is_in_a_factor(network: nn.Module, name: str) -> bool:
    """Whether the module of this name only helps to compute the factor of a layer around it, as in a squeeze-excitation."""
    places = name.split(".")
    return any(isinstance(network.get_submodule(".".join(places[:end])), Holdable) for end in range(1, len(places)))


def _is_stem_pool(module: nn.Module) -> bool:
    if not isinstance(module, nn.MaxPool2d):
        return False
    shape = zip((module.kernel_size, module.stride, module.padding), (3, 2, 1), strict=True)
    return all(value in (wanted, (wanted, wanted)) for value, wanted in shape)


def _is_global_pool(module: nn.Module) -> bool:
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))


def _replace(model: nn.Module, wanted: Callable[[nn.Module], bool], index: int, new: nn.Module) -> None:
    """Puts `new` in place of one of the `wanted` modules: the first (index 0) or the last (-1), in the order of definition."""
    names = [name for name, module in model.named_modules() if wanted(module)]
    if names:
        model.set_submodule(names[index], new)
