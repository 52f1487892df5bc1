"""ResNet-18 and ResNet-50 (He et al. 2015, §4.1) with torchvision's parameter names.

Shortcuts are 1 × 1 convolutions where the shape changes (option B). In ResNet-50 the stride sits
in the 3 × 3 convolution, as torchvision has it. `stem: small` is for images of about 32 pixels: a
3 × 3 convolution of stride 1 and no max pooling. `width` scales every stage, inside and outside.

Ends of resolution stages: `layer1` (stride 4, or 1 with the small stem), `layer2`, `layer3`,
`layer4`, each half the size of the one before; classifier: `fc`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from .layers import divisible, init_kaiming

Stem = Literal["large", "small"]


def resnet18(
    classes: int, in_channels: int, *, width: float = 1.0, stem: Stem = "large"
) -> nn.Module:
    """11.7 M parameters with 1,000 classes."""
    return ResNet(
        BasicBlock, (2, 2, 2, 2), classes, in_channels=in_channels, width=width, stem=stem
    )


def resnet50(
    classes: int, in_channels: int, *, width: float = 1.0, stem: Stem = "large"
) -> nn.Module:
    """25.6 M parameters with 1,000 classes."""
    return ResNet(
        Bottleneck, (3, 4, 6, 3), classes, in_channels=in_channels, width=width, stem=stem
    )


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return result


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions around a shortcut; four times wider outside."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, *, stride: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        result: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return result


class ResNet(nn.Module):
    """Four stages of `block`; (N, in_channels, H, W) → (N, classes)."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        classes: int,
        *,
        in_channels: int,
        width: float,
        stem: Stem,
    ) -> None:
        super().__init__()
        planes = [divisible(c * width) for c in (64, 128, 256, 512)]
        first = planes[0]
        if stem == "large":
            self.conv1 = nn.Conv2d(in_channels, first, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        outer = [first, *(p * block.expansion for p in planes)]
        self.layer1 = _stage(block, outer[0], planes[0], blocks[0], stride=1)
        self.layer2 = _stage(block, outer[1], planes[1], blocks[1], stride=2)
        self.layer3 = _stage(block, outer[2], planes[2], blocks[2], stride=2)
        self.layer4 = _stage(block, outer[3], planes[3], blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(outer[4], classes)
        init_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    inputs: int,
    planes: int,
    blocks: int,
    *,
    stride: int,
) -> nn.Sequential:
    outputs = planes * block.expansion
    first = block(inputs, planes, stride=stride)
    return nn.Sequential(first, *(block(outputs, planes, stride=1) for _ in range(blocks - 1)))


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
    )
