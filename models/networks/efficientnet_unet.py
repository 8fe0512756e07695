"""U-Net with an EfficientNet-Lite0 encoder, which can start from ImageNet weights: few data, a good beginning.

The encoder is EfficientNet (Tan and Le 2019, arXiv:1905.11946) in its 'lite' form: inverted residuals without
squeeze-and-excitation, ReLU6, the head left out. BatchNorm folds into the convolutions and ReLU6 bounds what int8 has
to hold, so the network is as quick on a CPU as it is small. Three input channels, ImageNet's colours, take three
neighbouring slices instead: a vessel runs on in the next slice, ground glass does so otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

#: Stages of the encoder: repeats, kernel, stride, expansion, channels (Tan and Le 2019, table 1, without the head).
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
)

#: TensorFlow's, which the published weights were trained with.
_EPSILON = 1e-3


class EfficientNetUNet(nn.Module):
    """U-Net over EfficientNet-Lite0.

    Parameters
    ----------
    in_channels, out_channels
        Channels of the image, and of the logits.
    decoder
        Widths at 1/16, 1/8, 1/4, 1/2 and full resolution.

    Notes
    -----
    Height and width of the input must be multiples of `stride`.
    """

    #: Height and width of the input are multiples of this.
    stride = 32

    def __init__(self, in_channels: int, out_channels: int, decoder: Sequence[int] = (96, 64, 48, 32, 16)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32, _EPSILON), nn.ReLU6(inplace=True)
        )
        self.blocks = nn.ModuleList()
        width = 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for index in range(repeats):
                self.blocks.append(_InvertedResidual(width, outputs, kernel, stride if index == 0 else 1, expansion))
                width = outputs
        skips = (112, 40, 24, 16, in_channels)
        self.up = nn.ModuleList()
        for skip, outputs in zip(skips, decoder, strict=True):
            self.up.append(_Up(width, skip, outputs))
            width = outputs
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [n, out_channels, y, x] of images [n, in_channels, y, x]."""
        skips = [image]
        x = self.stem(image)
        for block in self.blocks:
            if block.stride == 2:
                skips.append(x)
            x = block(x)
        for up in self.up:
            x = up(x, skips.pop())
        logits: Tensor = self.head(x)
        return logits

    def load_imagenet(self, state: Mapping[str, Tensor]) -> None:
        """Take the encoder's weights from a classifier's state of the `efficientnet-lite-pytorch` package.

        A stem for one channel takes the sum over the colours.

        Raises
        ------
        ValueError
            When a weight is missing or has another shape.
        """
        names = {
            "_expand_conv": "expand.0",
            "_bn0": "expand.1",
            "_depthwise_conv": "depthwise.0",
            "_bn1": "depthwise.1",
        }
        names |= {"_project_conv": "project.0", "_bn2": "project.1"}
        own = self.state_dict()
        stem = state["_conv_stem.weight"]
        found = {"stem.0.weight": stem if own["stem.0.weight"].shape[1] == 3 else stem.sum(1, keepdim=True)}
        found |= {f"stem.1.{key[5:]}": value for key, value in state.items() if key.startswith("_bn0.")}
        for key, value in state.items():
            if key.startswith("_blocks."):
                _, index, layer, weight = key.split(".")
                found[f"blocks.{index}.{names[layer]}.{weight}"] = value
        found = {key: value for key, value in found.items() if key in own}
        wanted = {key for key in own if key.startswith(("stem.", "blocks."))}
        wrong = [key for key in wanted if key not in found or found[key].shape != own[key].shape]
        if wrong:
            raise ValueError(f"not the weights of EfficientNet-Lite0: {len(wrong)} do not fit, {min(wrong)} first")
        self.load_state_dict(own | found)


class _InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.stride = stride
        self.slow_in_bf16 = kernel != 3 or stride != 1
        self.residual = stride == 1 and inputs == outputs
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner, _EPSILON), nn.ReLU6(inplace=True)
            )
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner, _EPSILON),
            nn.ReLU6(inplace=True),
        )
        self.project = nn.Sequential(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs, _EPSILON))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.expand(x)
        if self.training and self.slow_in_bf16 and x.device.type == "cpu":
            # Backwards, oneDNN takes 3 to 8 times as long for these in bf16 as in fp32.
            with torch.autocast("cpu", enabled=False):
                y = self.depthwise(y.float())
        else:
            y = self.depthwise(y)
        y = self.project(y)
        return x + y if self.residual else y


class _Up(nn.Module):
    """Double the resolution, join the encoder's features, convolve twice."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.body = nn.Sequential(
            nn.Conv2d(inputs + skip, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        joined: Tensor = self.body(torch.cat([self.upsample(x), skip], 1))
        return joined
