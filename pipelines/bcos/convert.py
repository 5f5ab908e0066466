"""Conversion of an ordinary network to a B-cos network, by module type.

`convert` preserves the function: every layer becomes its B-cos counterpart at B = 1 with the same weights. A
rule converts the modules of one type. `register_conversion` adds a rule:

    @register_conversion(MyBlock)
    def _(module, conversion):
        return MyBcosBlock(conversion.child(module.conv, "conv"), ...)

A rule returns the module that replaces the original in the converted network. It converts the children that
it keeps with `conversion.child` (one) or `conversion.children` (several or all). A parameter whose value does
not change remains the same object, so tied parameters stay tied and frozen ones stay frozen.
`conversion.derived` replaces a parameter whose value changes.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

import torch
from torch import nn

from pipelines.bcos.activations import (
    BcosAvgPool2d,
    BcosReLU,
    GatedGELU,
    GatedHardswish,
    GatedMish,
    GatedReLU6,
    GatedSiLU,
    GatedTanh,
)
from pipelines.bcos.errors import ConversionError
from pipelines.bcos.explanation import Explainable, HoldState
from pipelines.bcos.layers import BcosConv2d, BcosLinear
from pipelines.bcos.network import IMAGENET_MEAN, IMAGENET_STD, BcosNetwork, LocationsToBatch
from pipelines.bcos.norms import BcosBatchNorm, BcosGroupNorm, BcosLayerNorm
from pipelines.bcos.originals import plain_copy

NormMode = Literal["uncentered", "uncentered_unshifted", "centered"]

# Methods that do not change what a module computes. A subclass that overrides only these keeps the rule.
NEUTRAL = {"__init__", "__repr__", "extra_repr", "reset_parameters"}
# Library -> module with its rules, which is imported when the first module of that library is converted.
RULES = {
    "torchvision": "pipelines.models.rules",
    "timm": "pipelines.models.rules",
    "open_clip": "pipelines.models.rules.open_clip",
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The state of a conversion, as the rule for the module at `path` sees it.

    Attributes:
        path: dotted name of the module that the rule converts; empty for the whole network.
        norm: treatment of BatchNorm, as in `convert`.
        image_layer: the layer that takes the image; its weight is doubled to six channels.
        done: original -> converted module, so that shared modules stay shared.
        replaced: original parameter -> its replacement and the path of the module that replaced it, see
            `derived`.
    """

    path: str = ""
    norm: NormMode = "uncentered"
    image_layer: nn.Module | None = None
    done: dict[nn.Module, nn.Module] = dataclasses.field(default_factory=dict)
    replaced: dict[torch.Tensor, tuple[nn.Parameter, str]] = dataclasses.field(default_factory=dict)

    def child(self, module: nn.Module, name: str) -> nn.Module:
        """Converts `module`, the child `name` of the module that the rule converts."""
        return _convert(module, dataclasses.replace(self, path=f"{self.path}.{name}".lstrip(".")))

    def children(self, module: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
        """Converts children of `module` in place and returns `module`.

        `names` are dotted names of descendants, by default those of all children; names that do not exist are
        skipped.
        """
        # `named_children` would omit the second name of a shared child
        for name in list(module._modules) if names is None else names:
            path, _, attribute = name.rpartition(".")
            parent = module.get_submodule(path)
            child = getattr(parent, attribute, None)
            if child is not None:
                setattr(parent, attribute, self.child(child, name))
        return module

    def by_rule_of(self, base: type[nn.Module], module: nn.Module) -> nn.Module:
        """Converts `module` by the rule of `base`, which its type only renames or extends."""
        return _convert(self.recast(module, base), self)

    def leave(self, module: nn.Module) -> None:
        """Excludes `module`, a descendant of the module that the rule converts, from the conversion."""
        self.done[module] = module

    def recast(self, module: nn.Module, to: type[nn.Module]) -> nn.Module:
        """Makes `module` an instance of `to`, a type with the same attributes, and returns it."""
        module.__class__ = to
        if issubclass(to, Explainable):
            module.__dict__["hold_state"] = HoldState()
        return module

    def derived(self, source: torch.Tensor, value: torch.Tensor) -> nn.Parameter:
        """The parameter with this `value` that replaces the parameter `source`; frozen if `source` is frozen.

        Raises:
            ConversionError: `source` is tied, and another rule has replaced it by another value.
        """
        if source not in self.replaced:
            self.replaced[source] = (
                nn.Parameter(value.detach().to(source.dtype), source.requires_grad),
                self.path,
            )
            return self.replaced[source][0]
        known, path = self.replaced[source]
        if known.shape != value.shape or not torch.equal(known, value.to(known.dtype)):
            raise _tied(path, self.path)
        return known


def _tied(path: str, other: str) -> ConversionError:
    return ConversionError(
        f"{path!r} and {other!r} share a parameter, which a conversion would make two: "
        "untie them (give one of them a copy)"
    )


Rule = Callable[[nn.Module, Conversion], nn.Module]
RuleT = TypeVar("RuleT", bound=Callable[..., nn.Module])
_RULES: dict[type[nn.Module], Rule] = {}


def register_conversion(*types: type[nn.Module]) -> Callable[[RuleT], RuleT]:
    """Decorator that makes a function (module, conversion) -> module the rule of these types.

    Subclasses inherit the rule if they override no methods or properties of the type except those in
    `NEUTRAL`.
    """

    def register(rule: RuleT) -> RuleT:
        for module_type in types:
            _RULES[module_type] = rule
        return rule

    return register


def keep(module: nn.Module, conversion: Conversion) -> nn.Module:
    """Rule of modules that stay as they are, because they are (piecewise) linear or already explainable."""
    return module


def convert_children(module: nn.Module, conversion: Conversion) -> nn.Module:
    """Rule of modules whose own forward pass is linear, so that converting the children is enough."""
    return conversion.children(module)


def recast_to(to: type[nn.Module]) -> Rule:
    """Rule of modules that become instances of `to`, see `Conversion.recast`."""
    return lambda module, conversion: conversion.recast(module, to)


def _convert(module: nn.Module, conversion: Conversion) -> nn.Module:
    if module not in conversion.done:
        training = module.training
        converted = _rule_of(type(module))(module, conversion)
        converted.training = training
        conversion.done[module] = converted
    return conversion.done[module]


def _rule_of(kind: type[nn.Module]) -> Rule:
    """The rule of a type: its own, or that of a base of which it overrides nothing but `NEUTRAL` methods."""
    for library in RULES.keys() & {base.__module__.partition(".")[0] for base in kind.__mro__}:
        try:
            importlib.import_module(RULES[library])
        except ImportError as error:
            raise ConversionError(
                f"the rules that convert a {kind.__name__} cannot be imported: {error}"
            ) from None
    overridden: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if base in _RULES and not any(hasattr(base, name) for name in overridden):
            return _RULES[base]
        overridden |= {
            name for name, value in vars(base).items() if callable(value) or isinstance(value, property)
        } - NEUTRAL
    return _walk


def _walk(module: nn.Module, conversion: Conversion) -> nn.Module:
    """Fallback for types without a rule: converts the children of a container, and refuses other modules.

    A container is a module outside torch that has children and no parameters or buffers of its own.
    """
    of_torch = type(module).__module__.startswith(("torch.nn.", "torch.ao."))
    owns = [
        name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    leaf = next(module.children(), None) is None
    if of_torch or owns or leaf:
        reason = (
            f"it owns {', '.join(owns)}"
            if owns and not of_torch
            else "its output may depend on the input non-linearly"
        )
        raise ConversionError(
            f"no conversion rule for {type(module).__name__} at {conversion.path or 'the top'!r} ({reason}): "
            f"write one with @register_conversion({type(module).__name__})"
        )
    return conversion.children(module)


# Rules of torch's own modules -------------------------------------------------------------------------------


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
    if of_image and module.groups > 1:
        raise ConversionError(
            f"{conversion.path!r} takes the image in {module.groups} groups: give its weight with groups=1"
        )
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
    weight: torch.Tensor = module.weight
    if of_image:  # [W, -W]/2 · [z, -z] = W·z
        weight = conversion.derived(weight, torch.cat([weight, -weight], dim=1) / 2)
    return _with_parameters(layer, weight, module.bias)


@register_conversion(nn.Linear)
def _linear(module: nn.Linear, conversion: Conversion) -> nn.Module:
    layer = BcosLinear(module.in_features, module.out_features, module.bias is not None, b=1.0)
    return _with_parameters(layer, module.weight, module.bias)


@register_conversion(nn.BatchNorm2d, nn.BatchNorm1d)
def _batch_norm(module: nn.BatchNorm2d, conversion: Conversion) -> nn.Module:
    if module.running_mean is None or module.running_var is None:
        raise ConversionError(
            f"{conversion.path!r}: a BatchNorm without running statistics cannot be converted"
        )
    centered = conversion.norm == "centered"
    weight: nn.Parameter | None = module.weight
    bias: nn.Parameter | None = module.bias
    mean, var = module.running_mean, module.running_var
    layer = BcosBatchNorm(
        module.num_features,
        module.eps,
        module.momentum if module.track_running_stats else 0.0,
        affine=weight is not None,
        bias=bias is not None or not centered,
        centered=centered,
    ).to(var)
    if conversion.norm == "uncentered":  # β' = β - γ·mean/sqrt(var + ε)
        shift = -mean * torch.rsqrt(var + module.eps)
        shift = shift if weight is None else weight * shift
        bias = (
            nn.Parameter(shift, weight is None or weight.requires_grad)
            if bias is None
            else conversion.derived(bias, bias + shift)
        )
    _with_parameters(layer, weight, bias)
    layer.running_var = var
    if centered:
        layer.running_mean = mean
    if module.num_batches_tracked is not None:
        layer.num_batches_tracked = module.num_batches_tracked
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


def _with_parameters(layer: LayerT, weight: torch.Tensor | None, bias: torch.Tensor | None) -> LayerT:
    """Gives `layer` these parameters, as the same objects; plain tensors become frozen parameters."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(
                layer, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), False)
            )
    return layer


# The verb ---------------------------------------------------------------------------------------------------


def convert(
    model: nn.Module,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    norm: NormMode = "uncentered",
) -> BcosNetwork:
    """Converts `model` to a B-cos network at B = 1 that computes the same logits.

    Args:
        model: maps normalised images (N, 3, H, W) to logits (N, K). It is left untouched. Tied parameters
            stay tied, frozen ones stay frozen, and modules keep their training mode, device and precision.
        mean, std: of RGB images in [0, 1], as `model` was trained with.
        norm: `uncentered` moves a BatchNorm's running mean into its bias, `centered` goes on subtracting it,
            and `uncentered_unshifted` drops it, which changes the function.

    Returns:
        A network that maps images (N, 6, H, W) in [0, 1] (see `add_inverse`) to logits (N, K). In evaluation
        mode they equal, up to rounding, those of `model` on the normalised images.

    Raises:
        ConversionError: a module has no rule, no layer takes three channels, or the conversion would lose
            something (see `originals.plain_copy`).
    """
    # parameters that are made in inference mode can never be trained
    with torch.inference_mode(False), torch.no_grad():
        body = plain_copy(model)
        conversion = Conversion(norm=norm, image_layer=_image_layer(body))
        before = set(body.modules())
        network = BcosNetwork(_convert(body, conversion), mean, std)
    network.training = model.training
    _train_as_parents(network, before.union(conversion.done.values()))
    for parameter in network.parameters():
        if parameter in conversion.replaced:
            _, path = conversion.replaced[parameter]
            raise _tied(
                path, next(name for name, other in network.body.named_parameters() if other is parameter)
            )
    return _like_its_weights(network)


def _train_as_parents(module: nn.Module, known: set[nn.Module]) -> None:
    """Gives the modules inside `module` that are not `known` the training mode of their parents."""
    for child in module.children():
        if child not in known:
            child.training = module.training
        _train_as_parents(child, known)


def _like_its_weights(network: BcosNetwork) -> BcosNetwork:
    """Moves `mean` and `std` to the device of the weights, and to their dtype if that is half precision."""
    weight = next(network.body.parameters())
    low = weight.is_floating_point() and weight.dtype.itemsize < 4
    for name in ("mean", "std"):
        buffer = getattr(network, name)
        setattr(network, name, buffer.to(weight.device, weight.dtype if low else buffer.dtype))
    return network


def _image_layer(model: nn.Module) -> nn.Module:
    """The first layer, in the order of definition, that takes three channels.

    It is a convolution, or a linear layer that embeds patches: a subclass of `nn.Linear` with the attribute
    `in_channels`, whose own rule doubles its weight.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "in_channels", None) == 3:
            return module
    raise ConversionError(
        "no layer of this network takes three channels, so where the image enters is unknown"
    )
