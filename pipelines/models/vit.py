"""SimpleViT and ViT-C as ordinary networks, as the B-cos papers use them, and their conversion rules.

Layouts in names: N images, h × w patches, L tokens, D features. Modules are called what they are called in the published
checkpoints, so that those of the ordinary networks load as they are.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pipelines.bcos import Conversion, Holdable, register_conversion
from pipelines.bcos.attention import attend
from pipelines.bcos.convert import keep

HEAD_FEATURES = 64
SIZES = {  # features, blocks
    "ti": (192, 12),
    "s": (384, 12),
    "b": (768, 12),
    "l": (1024, 14),
}
STEMS = {  # channels of the convolutions before a ViT-C; where their number grows, the stride is 2
    "ti": (24, 48, 96, 192),
    "s": (48, 96, 192, 384),
    "b": (64, 128, 128, 256, 256, 512),
    "l": (64, 128, 128, 256, 256, 512),
}
SIMPLE_VITS = tuple(f"simple_vit_{size}" for size in SIZES)
VITCS = tuple(f"vitc_{size}" for size in SIZES)


class Patches(nn.Module):
    """The pixels of each patch in a row, channels last: (N, C, h·p, w·p) -> (N, h, w, p·p·C)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, h·p, w·p) -> (N, h, w, p·p·C); raises ValueError where a side is no multiple of p."""
        if images.shape[-2] % self.size or images.shape[-1] % self.size:
            height, width = images.shape[-2:]
            raise ValueError(
                f"sides of images must be multiples of the patch, {self.size}: not {height} × {width}"
            )
        patches = images.unflatten(3, (-1, self.size)).unflatten(2, (-1, self.size))  # (N, C, h, p, w, p)
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3)


class PatchLinear(nn.Linear):
    """A linear layer on patches of `in_channels` channels, as `Patches` gives them."""

    def __init__(self, in_channels: int, patch_size: int, out_features: int) -> None:
        super().__init__(in_channels * patch_size**2, out_features)
        self.in_channels = in_channels


class SineCosinePositions(nn.Module):
    """The positions of patches, added to them: sines and cosines of both coordinates, no parameters, any grid.

    Source: Beyer et al., Better plain ViT baselines for ImageNet-1k, 2022.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """(N, h, w, D) -> the same, plus (h, w, D): the quarters of D are sin x, cos x, sin y, cos y."""
        height, width, features = patches.shape[-3:]
        steps = torch.arange(features // 4, device=patches.device) / (features // 4 - 1)
        frequencies = 10_000.0**-steps
        x = (torch.arange(width, device=patches.device)[:, None] * frequencies).expand(height, -1, -1)
        y = (torch.arange(height, device=patches.device)[:, None, None] * frequencies).expand(-1, width, -1)
        return patches + torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], -1).to(patches.dtype)


class Attention(Holdable):
    """Multi-head attention after a norm, without biases: (N, L, D) -> (N, L, D). Its matrix can be held."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(features)
        self.to_qkv = nn.Linear(features, 3 * features, bias=False)
        self.to_out = nn.Linear(features, features, bias=False)

    def forward(self, tokens_NLD: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        qkv = self.to_qkv(self.norm(tokens_NLD)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (N, heads, L, D/heads) each
        return self.to_out(attend(self, q, k, v).transpose(1, 2).flatten(2))


def _feed_forward(features: int, hidden: int) -> nn.Sequential:
    """Two linear layers around a GELU, after a norm: (N, L, D) -> (N, L, D)."""
    layers = OrderedDict(
        norm=nn.LayerNorm(features),
        linear1=nn.Linear(features, hidden),
        act=nn.GELU(),
        linear2=nn.Linear(hidden, features),
    )
    return nn.Sequential(OrderedDict(net=nn.Sequential(layers)))


class Encoder(nn.Module):
    """A block: attention and feed-forward, each beside a shortcut."""

    def __init__(self, features: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(features, heads)
        self.ff = _feed_forward(features, hidden)

    def forward(self, tokens_NLD: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        tokens_NLD = tokens_NLD + self.attn(tokens_NLD)
        return tokens_NLD + self.ff(tokens_NLD)


class SimpleViT(nn.Module):
    """A plain vision transformer: patches, sine-cosine positions, blocks, the mean of the tokens, one linear layer.

    It takes images of any size whose sides are multiples of the patch (with a stem: of any size).

    Args:
        dim: features of a token, D; a multiple of 4 and of `heads`.
        depth: blocks.
        heads: of each attention.
        num_classes: K.
        patch_size: side of a patch, pixels (with a stem: places of its output).
        conv_stem: channels of the 3×3 convolutions before the patches, each with a GroupNorm of one group and a GELU; stride 2
            where channels get more. This makes it a ViT-C.

    Source: Beyer et al., 2022; Xiao et al., Early Convolutions Help Transformers See Better, 2021; Böhle et al., TPAMI 2024.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        num_classes: int = 1000,
        patch_size: int = 16,
        conv_stem: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if dim % 4 or dim < 8 or dim % heads:
            raise ValueError(f"dim must be a multiple of 4, above 4, and of the {heads} heads, not {dim}")
        channels = conv_stem[-1] if conv_stem else 3
        embedding: OrderedDict[str, nn.Module] = OrderedDict()
        if conv_stem:
            embedding["conv_stem"] = _stem(conv_stem)
        embedding["patches"] = Patches(patch_size)
        embedding["linear"] = PatchLinear(channels, patch_size, dim)
        self.to_patch_embedding = nn.Sequential(embedding)
        self.positional_embedding = SineCosinePositions()
        blocks: OrderedDict[str, nn.Module] = OrderedDict(
            (f"encoder_{index}", Encoder(dim, heads, 4 * dim)) for index in range(depth)
        )
        self.transformer = nn.Sequential(blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear_head = nn.Sequential(
            OrderedDict(norm=nn.LayerNorm(dim), linear=nn.Linear(dim, num_classes))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> logits (N, K)."""
        patches = self.positional_embedding(self.to_patch_embedding(images))
        grid = patches.shape[1:3]
        tokens_NLD = self.transformer(patches.flatten(1, 2))
        features = tokens_NLD.transpose(1, 2).unflatten(
            2, grid
        )  # as a pool of places takes them: (N, D, h, w)
        return self.linear_head(self.pool(features).flatten(1))


def _stem(channels: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((3, *channels), channels, strict=False):
        layers += [
            nn.Conv2d(before, after, 3, 2 if after > before else 1, 1),
            nn.GroupNorm(1, after),
            nn.GELU(),
        ]
    return nn.Sequential(*layers)


def simple_vit(name: str, num_classes: int = 1000, **options: object) -> SimpleViT:
    """`simple_vit_SIZE` (patches of 16 pixels) or `vitc_SIZE` (stem, patches of one place, a block less), SIZE ti, s, b or l.

    `options` are further arguments of `SimpleViT`, which override those of the name.
    """
    kind, size = name.rsplit("_", 1)
    dim, depth = SIZES[size]
    arguments: dict[str, object] = {"dim": dim, "depth": depth, "heads": dim // HEAD_FEATURES}
    if kind == "vitc":
        arguments |= {"depth": depth - 1, "patch_size": 1, "conv_stem": STEMS[size]}
    return SimpleViT(**{**arguments, "num_classes": num_classes, **options})  # type: ignore[arg-type]


# Conversion -----------------------------------------------------------------------------------------------------------


register_conversion(Patches, SineCosinePositions)(keep)
register_conversion(Attention)(lambda module, conversion: conversion.children(module, ["norm", "to_out"]))


@register_conversion(PatchLinear)
def _patch_linear(module: PatchLinear, conversion: Conversion) -> nn.Module:
    weight = module.weight
    if module is conversion.image_layer:  # channels come last: [W, -W]/2 for each pixel of the patch
        of_pixel = weight.unflatten(1, (-1, module.in_channels))
        weight = conversion.derived(weight, torch.cat([of_pixel, -of_pixel], dim=2).flatten(1) / 2)
    plain = nn.Linear(weight.shape[1], len(weight), module.bias is not None)
    plain.weight, plain.bias = weight, module.bias
    return conversion.child(plain, "linear")
