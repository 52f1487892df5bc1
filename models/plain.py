"""Plain convolutional nets for small gray images (8 × 8 digits), without shortcuts.

Every layer is Conv-BatchNorm-ReLU, then global average pooling and one Linear: each has an int8
kernel in onnxruntime, and every BatchNorm folds into its convolution.

Ends of resolution stages: small `layer1` (stride 1), `layer3` (2); large `layer1` (1),
`layer2` (2), `layer3` (4), `layer4` (8); classifier: `fc`.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .layers import divisible, init_kaiming

# (channels, stride) of each 3 × 3 convolution
SMALL = ((16, 1), (32, 2), (40, 1))
# most parameters sit where the image is 2 × 2 or less, so that it trains in seconds all the same
LARGE = ((64, 1), (128, 2), (256, 2), (512, 2))


def plain_cnn_small(classes: int, in_channels: int, *, width: float = 1.0) -> nn.Module:
    """17 k parameters with 10 classes, 0.27 M multiply-adds at 8 × 8."""
    return _plain(SMALL, classes, in_channels=in_channels, width=width)


def plain_cnn_large(classes: int, in_channels: int, *, width: float = 1.0) -> nn.Module:
    """1.6 M parameters with 10 classes, 3.6 M multiply-adds at 8 × 8."""
    return _plain(LARGE, classes, in_channels=in_channels, width=width)


def _plain(
    plan: tuple[tuple[int, int], ...], classes: int, *, in_channels: int, width: float
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, (base, stride) in enumerate(plan, start=1):
        outputs = divisible(base * width)
        layers[f"layer{number}"] = nn.Sequential(
            nn.Conv2d(channels, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )
        channels = outputs
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten(1)
    layers["fc"] = nn.Linear(channels, classes)
    module = nn.Sequential(layers)
    init_kaiming(module)
    return module
