"""ResNets for CIFAR, with parameter-free (option A) shortcuts.

N images, C channels, H × W pixels or places, K classes.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class PadShortcut(nn.Module):
    """Option A shortcut: takes every `stride`-th place of a map and adds `new_channels` channels of zeros."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + new_channels, H/stride, W/stride)."""
        before = self.new_channels // 2
        # Equal to a strided slice, but its gradient keeps the memory format.
        x = F.avg_pool2d(x, 1, self.stride)
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """A stem, three stages of n blocks, global average pooling and one linear layer: depth 6n + 2.

    Args:
        depth: 6n + 2, for n ≥ 1.
        num_classes: K.
        width: channels of the first stage; the second stage has twice as many, the third four times as many.
        stem_stride: side s of the average pool after the first convolution: 1 for images of 32 px, 2 for
            64 px, 4 for 128 px, at about the same cost. If s > 1, the later stages begin with an average pool
            too, in place of a stride, so that explanations do not show the strides as a grid.

    Raises:
        ValueError: `depth` is not 6n + 2, or `stem_stride` is less than 1.
    """

    def __init__(self, depth: int, num_classes: int = 10, width: int = 16, stem_stride: int = 1) -> None:
        super().__init__()
        if depth % 6 != 2 or depth < 8:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), not {depth}")
        if stem_stride < 1:
            raise ValueError(f"the stem of a CIFAR ResNet has a stride of at least 1, not {stem_stride}")
        count = (depth - 2) // 6
        pooled = stem_stride > 1
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(stem_stride) if pooled else nn.Identity()
        self.layer1 = nn.Sequential(*(BasicBlock(width, width) for _ in range(count)))
        self.layer2 = _halving_stage(width, count, pooled)
        self.layer3 = _halving_stage(2 * width, count, pooled)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> logits (N, K)."""
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.avgpool(x)))


def _halving_stage(channels: int, count: int, pooled: bool) -> nn.Sequential:
    """`count` blocks that double the channels and halve the resolution, by an average pool or a stride."""
    stride = 1 if pooled else 2
    blocks = [
        BasicBlock(channels, 2 * channels, stride, PadShortcut(stride, channels)),
        *(BasicBlock(2 * channels, 2 * channels) for _ in range(count - 1)),
    ]
    return nn.Sequential(*([nn.AvgPool2d(2)] if pooled else []), *blocks)
