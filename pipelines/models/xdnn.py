"""X-DNN ResNets: ResNets without biases and norms, trainable because of Fixup initialisation.

N images, H × W pixels, K classes; z the normalised image.

These networks f consist of layers without biases, ReLUs and pools. Hence f(c·z) = c·f(z) for c > 0, and the
gradient is constant along the line from the mean image (z = 0) to z. So input × gradient equals integrated
gradients, and sums to the logit.

Modules have the names of Hesse et al.'s public code, so that its checkpoint
`xfixup_resnet50_model_best.pth.tar` loads without translation. As in that code, Fixup's scalar biases and
multipliers are left out.

Source: Zhang et al., Fixup Initialization, ICLR 2019; Hesse et al., Fast Axiomatic Attribution for Neural
Networks, NeurIPS 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

DEPTHS = {  # depth -> number of blocks per stage, type of block
    18: ((2, 2, 2, 2), BasicBlock),
    34: ((3, 4, 6, 3), BasicBlock),
    50: ((3, 4, 6, 3), Bottleneck),
    101: ((3, 4, 23, 3), Bottleneck),
    152: ((3, 8, 36, 3), Bottleneck),
}
XFIXUPS = {f"xfixup_resnet{depth}": depth for depth in DEPTHS}


class XFixupResNet(nn.Module):
    """A stem, four stages of blocks, global average pooling and one linear layer; no norms, no biases.

    Args:
        depth: a key of `DEPTHS`.
        num_classes: K.
        width: inner channels of the blocks in the first stage; they double with each stage.
        stem_stride: 4 makes the stem a 7×7 convolution and a max pool of stride 2 each; 1 (for 32 px) or 2
            (for 64 px) makes it one 3×3 convolution.

    Raises:
        ValueError: `stem_stride` or `width` is out of range.
    """

    def __init__(self, depth: int, num_classes: int = 1000, width: int = 64, stem_stride: int = 4) -> None:
        super().__init__()
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"the stem of an X-DNN ResNet has stride 1, 2 or 4, not {stem_stride}")
        if width < 1:
            raise ValueError(f"the width of an X-DNN ResNet must be 1 or more, not {width}")
        counts, block = DEPTHS[depth]
        large = stem_stride == 4
        self.conv1 = _conv(3, width, 7, 2) if large else _conv(3, width, 3, stem_stride)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        stages, in_channels = [], width
        for index, count in enumerate(counts):
            blocks = []
            for stride in (1 if index == 0 else 2, *[1] * (count - 1)):
                out_channels = block.expansion * width * 2**index
                same = stride == 1 and in_channels == out_channels
                shortcut = None if same else _conv(in_channels, out_channels, 1, stride)
                blocks.append(block(in_channels, width * 2**index, stride, shortcut, norm_layer=nn.Identity))
                in_channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(in_channels, num_classes, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Fixup initialisation, for L residual branches of m convolutions each.

        The classifier and the last convolution of each branch are 0. The branch's other convolutions are
        scaled by L^(-1/(2m-2)). An optimiser step then changes the function by about the same amount at any
        depth.

        B-cosify trained weights only: in a B-cos layer with B = 2, a weight of 0 has gradient 0 and stays 0.

        Source: Zhang et al., section 3.
        """
        blocks = [module for module in self.modules() if isinstance(module, BasicBlock | Bottleneck)]
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out")
        for block in blocks:
            branch = [layer for name, layer in block.named_children() if name.startswith("conv")]
            for layer in ([] if block.downsample is None else [block.downsample]) + branch:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            *others, last = branch
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
