"""ResNets for CIFAR, with parameter-free (option A) shortcuts.

N images, C channels, H × W pixels or places, K classes.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class PadShortcut(nn.Module):
    """Option A shortcut: subsamples a feature map by `stride` and adds `new_channels` channels of zeros."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + new_channels, H/stride, W/stride)."""
        before = self.new_channels // 2
        # equals a strided slice, but its gradient keeps the memory format
        x = F.avg_pool2d(x, 1, self.stride)
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """A stem, three stages of n blocks, global average pooling and one linear layer: depth 6n + 2.

    Args:
        depth: 6n + 2, for n ≥ 1.
        num_classes: K.
        width: channels of the first stage; the second stage has twice as many, the third four times as many.
        stem_stride: stride s of the first convolution: 1 for images of 32 px, 2 for 64 px, 4 for 128 px, at
            about the same cost. Its kernel is 3×3 for s = 1, else 2s×2s, so that each pixel is in equally
            many windows. Under strided 3×3 kernels it is not, and explanations show the stride as a grid.

    Raises:
        ValueError: `depth` is not 6n + 2, or `stem_stride` is neither 1 nor even.
    """

    def __init__(self, depth: int, num_classes: int = 10, width: int = 16, stem_stride: int = 1) -> None:
        super().__init__()
        if depth % 6 != 2 or depth < 8:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), not {depth}")
        if stem_stride != 1 and (stem_stride < 1 or stem_stride % 2):
            raise ValueError(
                f"the stem of a CIFAR ResNet has stride 1, 2 or another even one, not {stem_stride}"
            )
        count = (depth - 2) // 6
        kernel, padding = (3, 1) if stem_stride == 1 else (2 * stem_stride, stem_stride // 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stem_stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(width, width, count, 1)
        self.layer2 = self._stage(width, 2 * width, count, 2)
        self.layer3 = self._stage(2 * width, 4 * width, count, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, count: int, stride: int) -> nn.Sequential:
        shortcut = None if in_channels == channels else PadShortcut(stride, channels - in_channels)
        first = BasicBlock(in_channels, channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> logits (N, K)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.avgpool(x)))
