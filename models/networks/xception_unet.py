"""2D U-Net with an Xception encoder, after Lokwani et al. 2020 (arXiv:2006.13212), lean enough for a CPU.

The encoder is Xception's (Chollet 2017, arXiv:1610.02357): separable convolutions, residual blocks with a strided
1 x 1 shortcut, a middle flow at one sixteenth of the resolution. BatchNorm and ReLU only, so that both fold into the
convolutions at inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class XceptionUNet(nn.Module):
    """U-Net whose encoder is a trimmed Xception.

    Parameters
    ----------
    in_channels, out_channels
        Channels of the image, and of the logits.
    features
        Widths at 1/2 (twice: stem and entry), 1/4, 1/8 and 1/16 of the resolution.
    middle_blocks
        Residual blocks of the middle flow; Xception itself has eight.

    Notes
    -----
    Height and width of the input must be multiples of `stride`.
    """

    #: Height and width of the input are multiples of this.
    stride = 16

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (32, 64, 128, 192, 256),
        middle_blocks: int = 4,
    ) -> None:
        super().__init__()
        stem, entry, second, third, middle = features
        self.stem = nn.Sequential(_convolution(in_channels, stem, stride=2), _convolution(stem, entry))
        self.down2 = _Residual(entry, second, stride=2)
        self.down3 = _Residual(second, third, stride=2)
        self.down4 = _Residual(third, middle, stride=2)
        self.middle = nn.Sequential(*[_Residual(middle, middle) for _ in range(middle_blocks)])
        self.up3 = _Up(middle, third, third // 2)
        self.up2 = _Up(third // 2, second, second // 2)
        self.up1 = _Up(second // 2, entry, entry // 2)
        self.up0 = _Up(entry // 2, in_channels, 16)
        self.head = nn.Conv2d(16, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [n, out_channels, y, x] of images [n, in_channels, y, x]."""
        half = self.stem(image)
        quarter = self.down2(half)
        eighth = self.down3(quarter)
        deep = self.middle(self.down4(eighth))
        fine = self.up1(self.up2(self.up3(deep, eighth), quarter), half)
        logits: Tensor = self.head(self.up0(fine, image))
        return logits


class _Residual(nn.Module):
    """Two separable convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_separable(inputs, outputs, 1), nn.ReLU(inplace=True), *_separable(outputs, outputs, stride)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _Up(nn.Module):
    """Double the resolution, join the encoder's features, convolve twice."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.body = nn.Sequential(_convolution(inputs + skip, outputs), _convolution(outputs, outputs))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        joined: Tensor = self.body(torch.cat([self.upsample(x), skip], 1))
        return joined


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    ]
