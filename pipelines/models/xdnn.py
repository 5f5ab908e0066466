"""X-DNN ResNets: without norms, kept trainable by Fixup initialisation, and without biases.

Nothing in them but convolutions, ReLUs and pools, so f(c·z) = c·f(z) for c > 0. The gradient is then the same all along the line
from z = 0, the mean image: input × gradient equals integrated gradients, and sums to the logit.

Source: Zhang et al., Fixup Initialization, ICLR 2019; Hesse et al., Fast Axiomatic Attribution for Neural Networks, NeurIPS 2021.
Modules are called what they are called in the latter's public code, so that its checkpoint, `xfixup_resnet50_model_best.pth.tar`,
loads as it is. With the biases, its networks have lost Fixup's scalar multipliers too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEPTHS = {  # blocks of the four stages, whether they are bottlenecks
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
XFIXUPS = {f"xfixup_resnet{depth}": depth for depth in DEPTHS}
EXPANSION = 4  # of a bottleneck: its output channels over its inner ones


class FixupBlock(nn.Module):
    """A residual branch beside a shortcut: (N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        same = stride == 1 and in_channels == out_channels
        self.downsample = nn.Identity() if same else _conv(in_channels, out_channels, 1, stride)
        self.relu = nn.ReLU()

    def branch(self) -> list[nn.Conv2d]:
        """Its convolutions, in order."""
        return [module for name, module in self.named_children() if isinstance(module, nn.Conv2d) and name != "downsample"]

    def residual(self, x: Tensor) -> Tensor:
        """The output of the branch, which is added to the shortcut."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride)."""
        return self.relu(self.residual(x) + self.downsample(x))


class FixupBasicBlock(FixupBlock):
    """Two 3×3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(channels, channels, 3)

    def residual(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H/stride, W/stride)."""
        return self.conv2(self.relu1(self.conv1(x)))


class FixupBottleneck(FixupBlock):
    """A 1×1, a 3×3 and a 1×1 convolution; the last has four times as many channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, EXPANSION * channels, stride)
        self.conv1 = _conv(in_channels, channels, 1)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(channels, channels, 3, stride)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv(channels, EXPANSION * channels, 1)

    def residual(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 4·channels, H/stride, W/stride)."""
        return self.conv3(self.relu2(self.conv2(self.relu1(self.conv1(x)))))


class XFixupResNet(nn.Module):
    """A ResNet without norms and biases: a stem, four stages of blocks, global average pooling, one linear layer.

    Args:
        depth: a key of `DEPTHS`.
        num_classes: K.
        width: inner channels of the blocks of the first stage; they double with each stage.
        stem_stride: 4: a 7×7 convolution and a max pool, of stride 2 each; 1 (for 32 px) or 2 (for 64 px): one 3×3 convolution.
    """

    def __init__(self, depth: int, num_classes: int = 1000, width: int = 64, stem_stride: int = 4) -> None:
        super().__init__()
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"the stem of an X-DNN ResNet has stride 1, 2 or 4, not {stem_stride}")
        if width < 1:
            raise ValueError(f"the width of an X-DNN ResNet must be 1 or more, not {width}")
        counts, bottleneck = DEPTHS[depth]
        block, expansion = (FixupBottleneck, EXPANSION) if bottleneck else (FixupBasicBlock, 1)
        large = stem_stride == 4
        self.conv1 = _conv(3, width, 7, 2) if large else _conv(3, width, 3, stem_stride)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        stages, in_channels = [], width
        for index, count in enumerate(counts):
            channels = width * 2**index
            first = block(in_channels, channels, 1 if index == 0 else 2)
            in_channels = expansion * channels
            stages.append(nn.Sequential(first, *(block(in_channels, channels, 1) for _ in range(count - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(in_channels, num_classes, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Fixup: the classifier and the last of a branch's m convolutions are 0, its others scaled by L^(-1/(2m-2)), L branches.

        A step then changes the function about as much at any depth. Made B-cos at B = 2, such zeros would stay: there w = 0 has
        no gradient, so it is trained weights that can be B-cosified. Source: Zhang et al., section 3.
        """
        blocks = [module for module in self.modules() if isinstance(module, FixupBlock)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        for block in blocks:
            *others, last = block.branch()
            for layer in others:
                layer.weight *= len(blocks) ** (-1 / (2 * len(others)))
            nn.init.zeros_(last.weight)
        nn.init.zeros_(self.fc.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> logits (N, K)."""
        x = self.maxpool(self.relu(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.flatten(self.avgpool(x)))


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)
