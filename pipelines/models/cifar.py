"""ResNets for CIFAR, with parameter-free (option A) shortcuts.

N images, C channels, H × W pixels or places, K classes.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class PadShortcut(nn.Module):
    """Option A shortcut: subsamples a feature map by `stride` and adds `new_channels` channels of zeros.

    A place of the output is the mean of a square of `window` × `window` places; 1 takes its first place.
    """

    def __init__(self, stride: int, new_channels: int, window: int = 1) -> None:
        super().__init__()
        self.stride, self.new_channels, self.window = stride, new_channels, window

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + new_channels, H/stride, W/stride)."""
        before = self.new_channels // 2
        # With a window of 1 this equals a strided slice, but its gradient keeps the memory format.
        x = F.avg_pool2d(x, self.window, self.stride)
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """A stem, three stages of n blocks, global average pooling and one linear layer: depth 6n + 2.

    Args:
        depth: 6n + 2, for n ≥ 1.
        num_classes: K.
        width: channels of the first stage; the second stage has twice as many, the third four times as many.
        stem_stride: stride s of the first convolution: 1 for images of 32 px, 2 for 64 px, 4 for 128 px, at
            about the same cost. If s > 1, every convolution of stride t has a kernel of 2t × 2t, and
            shortcuts average, so that each pixel is in equally many windows. With the paper's 3×3 kernels
            and subsampling it is not, and explanations show the strides as a grid.

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
        self.layer1 = nn.Sequential(*(BasicBlock(width, width) for _ in range(count)))
        self.layer2 = _strided_stage(width, count, even=stem_stride > 1)
        self.layer3 = _strided_stage(2 * width, count, even=stem_stride > 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> logits (N, K)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.avgpool(x)))


def _strided_stage(channels: int, count: int, even: bool) -> nn.Sequential:
    """`count` blocks, which halve the resolution and double the channels; `even`: see `stem_stride`."""
    first = BasicBlock(channels, 2 * channels, 2, PadShortcut(2, channels, window=2 if even else 1))
    if even:
        first.conv1 = nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False)
    return nn.Sequential(first, *(BasicBlock(2 * channels, 2 * channels) for _ in range(count - 1)))
