"""The ordinary SimpleViT and ViT-C that the B-cos papers start from, and their conversion rules.

N images, C channels, H × W pixels, p pixels per side of a patch, h × w patches, L = h·w tokens, D features of
a token, K classes.

Modules have the names of the published checkpoints, so that those of the ordinary networks load without
translation.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pipelines.bcos import Conversion, Holdable, register_conversion
from pipelines.bcos.attention import attend
from pipelines.bcos.convert import keep

HEAD_FEATURES = 64
SIZES = {  # D, number of blocks
    "ti": (192, 12),
    "s": (384, 12),
    "b": (768, 12),
    "l": (1024, 14),
}
STEMS = {  # output channels of each convolution in a ViT-C's stem
    "ti": (24, 48, 96, 192),
    "s": (48, 96, 192, 384),
    "b": (64, 128, 128, 256, 256, 512),
    "l": (64, 128, 128, 256, 256, 512),
}
SIMPLE_VITS = tuple(f"simple_vit_{size}" for size in SIZES)
VITCS = tuple(f"vitc_{size}" for size in SIZES)


class Patches(nn.Module):
    """Flattens each patch, channels last: (N, C, h·p, w·p) -> (N, h, w, p·p·C)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, h·p, w·p) -> (N, h, w, p·p·C); raises ValueError if a side is not a multiple of p."""
        if images.shape[-2] % self.size or images.shape[-1] % self.size:
            height, width = images.shape[-2:]
            raise ValueError(
                f"sides of images must be multiples of the patch, {self.size}: not {height} × {width}"
            )
        patches = images.unflatten(3, (-1, self.size)).unflatten(2, (-1, self.size))  # (N, C, h, p, w, p)
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3)


class PatchLinear(nn.Linear):
    """A linear layer on the output of `Patches`; `in_channels` is C, which conversion needs."""

    def __init__(self, in_channels: int, patch_size: int, out_features: int) -> None:
        super().__init__(in_channels * patch_size**2, out_features)
        self.in_channels = in_channels


class SineCosinePositions(nn.Module):
    """Adds sine-cosine position embeddings to patches on a grid of any size; it has no parameters.

    Source: Beyer et al., Better plain ViT baselines for ImageNet-1k, 2022.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """(N, h, w, D) -> (N, h, w, D); the quarters of an embedding are sin x, cos x, sin y, cos y."""
        height, width, features = patches.shape[-3:]
        steps = torch.arange(features // 4, device=patches.device) / (features // 4 - 1)
        frequencies = 10_000.0**-steps
        x = (torch.arange(width, device=patches.device)[:, None] * frequencies).expand(height, -1, -1)
        y = (torch.arange(height, device=patches.device)[:, None, None] * frequencies).expand(-1, width, -1)
        return patches + torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], -1).to(patches.dtype)


class Attention(Holdable):
    """Norm, then multi-head attention without biases; the attention matrix can be held."""

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
    """Norm, linear layer, GELU, linear layer: (N, L, D) -> (N, L, D)."""
    layers = OrderedDict(
        norm=nn.LayerNorm(features),
        linear1=nn.Linear(features, hidden),
        act=nn.GELU(),
        linear2=nn.Linear(hidden, features),
    )
    return nn.Sequential(OrderedDict(net=nn.Sequential(layers)))


class Encoder(nn.Module):
    """One block: attention and feed-forward network, each with a residual connection."""

    def __init__(self, features: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(features, heads)
        self.ff = _feed_forward(features, hidden)

    def forward(self, tokens_NLD: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        tokens_NLD = tokens_NLD + self.attn(tokens_NLD)
        return tokens_NLD + self.ff(tokens_NLD)


class SimpleViT(nn.Module):
    """A plain vision transformer that averages its tokens; with `conv_stem`, a ViT-C.

    Patches, sine-cosine positions, blocks, the mean of the tokens, a norm and a linear layer. The sides of
    images must be multiples of the patch size. A ViT-C with `patch_size=1` takes images of any size.

    Args:
        dim: D; at least 8, and a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads per block.
        num_classes: K.
        patch_size: side of a patch: pixels or, after a stem, places of the stem's output.
        conv_stem: output channels of the stem's 3×3 convolutions. Each is followed by a GroupNorm of one
            group and a GELU, and has stride 2 if it has more output than input channels.

    Raises:
        ValueError: `dim` does not fit.

    Source: Beyer et al., 2022; Xiao et al., Early Convolutions Help Transformers See Better, 2021; Böhle et
    al., TPAMI 2024.
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
        features = tokens_NLD.transpose(1, 2).unflatten(2, grid)  # (N, D, h, w), for a spatial pool
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
    """Builds `simple_vit_SIZE` or `vitc_SIZE`, SIZE being ti, s, b or l.

    A `simple_vit` has patches of 16 pixels. A `vitc` has a stem, patches of one place, and one block less.
    `options` are arguments of `SimpleViT` that override those of the name.
    """
    kind, size = name.rsplit("_", 1)
    dim, depth = SIZES[size]
    arguments: dict[str, object] = {"dim": dim, "depth": depth, "heads": dim // HEAD_FEATURES}
    if kind == "vitc":
        arguments |= {"depth": depth - 1, "patch_size": 1, "conv_stem": STEMS[size]}
    return SimpleViT(**{**arguments, "num_classes": num_classes, **options})  # type: ignore[arg-type]


# Conversion -------------------------------------------------------------------------------------------------


register_conversion(Patches, SineCosinePositions)(keep)
register_conversion(Attention)(lambda module, conversion: conversion.children(module, ["norm", "to_out"]))


@register_conversion(PatchLinear)
def _patch_linear(module: PatchLinear, conversion: Conversion) -> nn.Module:
    weight = module.weight
    if module is conversion.image_layer:  # channels are last: each pixel's weight W becomes [W, -W]/2
        of_pixel = weight.unflatten(1, (-1, module.in_channels))
        weight = conversion.derived(weight, torch.cat([of_pixel, -of_pixel], dim=2).flatten(1) / 2)
    plain = nn.Linear(weight.shape[1], len(weight), module.bias is not None)
    plain.weight, plain.bias = weight, module.bias
    return conversion.child(plain, "linear")
