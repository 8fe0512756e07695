"""The U-Net of lungmask, R231, with the cropping to the body that it was trained with, for weights that a user brings.

Hofmanninger et al. 2020, doi:10.1186/s41747-020-00173-2: five levels of 64 to 1024 channels, two 3x3 convolutions each
followed by ReLU and then BatchNorm, average pooling, bilinear upsampling. lungmask cuts each slice to the body, resizes
that to 256x256, clips it to -1024 to 600 HU and scales it to 0 to 1; here the network does so itself, and returns its
logits to where they belong.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

#: HU that the input's -1 and 1 stand for.
HU_RANGE = (-1024.0, 600.0)

#: Side of the square that the body is resized to, and of the one in which the body is sought.
_SIDE, _SKETCH = 256, 128
_BODY_HU = -500.0
_WIDTHS = (64, 128, 256, 512, 1024)


class UNetR231(nn.Module):
    """Logits [n, 3, y, x] of background, right and left lung for slices [n, 1, y, x] of any size.

    Where a slice is cut depends on its content, so the network cannot be traced into a fixed graph.
    """

    #: Height and width of the input may be anything; the other networks here need a multiple of this.
    stride = 16

    def __init__(self) -> None:
        super().__init__()
        inputs = (1, *_WIDTHS[:-1])
        self.down = nn.ModuleList(_Block(a, b) for a, b in zip(inputs, _WIDTHS, strict=True))
        steps = list(zip(_WIDTHS[:0:-1], _WIDTHS[-2::-1], strict=True))
        self.reduce = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in steps)
        self.up = nn.ModuleList(_Block(a, b) for a, b in steps)
        self.head = nn.Conv2d(_WIDTHS[0], 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Cut, segment, put back; everything outside the body is background."""
        if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
            raise RuntimeError("this network cuts each slice to what it shows, so a trace of it would be wrong")
        unit = (image.float() + 1) / 2
        boxes = [body_box(plane) for plane in self._hu(unit)]
        cut = [_resized(one[None, :, box[0], box[1]], (_SIDE, _SIDE)) for one, box in zip(unit, boxes, strict=True)]
        logits = torch.zeros((len(image), 3, *image.shape[2:]), device=image.device)
        logits[:, 0] = 20.0
        for whole, small, (rows, columns) in zip(logits, self.segment(torch.cat(cut)), boxes, strict=True):
            size = (rows.stop - rows.start, columns.stop - columns.start)
            whole[:, rows, columns] = _resized(small[None].float(), size)[0]
        return logits

    def segment(self, x: Tensor) -> Tensor:
        """Logits of bodies that are cut out, 0 to 1 for `HU_RANGE`: the network as it was published."""
        seen = []
        for block in self.down[:-1]:
            seen.append(block(x))
            x = functional.avg_pool2d(seen[-1], 2)
        x = self.down[-1](x)
        for reduce, block in zip(self.reduce, self.up, strict=True):
            x = reduce(functional.interpolate(x, scale_factor=2, mode="bilinear"))
            x = block(torch.cat([x, seen.pop()], 1))
        logits: Tensor = self.head(x)
        return logits

    @staticmethod
    def _hu(unit: Tensor) -> NDArray[np.float32]:
        low, high = HU_RANGE
        hu: NDArray[np.float32] = (unit[:, 0] * (high - low) + low).detach().cpu().numpy()
        return hu


class _Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(outputs),
        )


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published weights to those of `UNetR231`; residual branches, which R231 holds but does not use, go.

    Raises
    ------
    ValueError
        These are not weights of a U-Net like R231.
    """
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if any(part.startswith("residual_") for part in parts):
            continue
        match parts:
            case ["down_path", level, "block", *rest]:
                renamed[".".join(("down", level, *rest))] = value
            case ["up_path", level, "up", "1", *rest]:
                renamed[".".join(("reduce", level, *rest))] = value
            case ["up_path", level, "conv_block", "block", *rest]:
                renamed[".".join(("up", level, *rest))] = value
            case ["last", *rest]:
                renamed[".".join(("head", *rest))] = value
            case _:
                raise ValueError(f"{name} is no part of lungmask's U-Net")
    if "head.weight" in renamed and len(renamed["head.weight"]) != 3:
        raise ValueError(f"it has {len(renamed['head.weight'])} classes, not background, right and left lung")
    return renamed


def body_box(hu: NDArray[np.float32]) -> tuple[slice, slice]:
    """Rows and columns of the patient in a slice [y, x]: the largest thing that is denser than -500 HU, in a sketch."""
    sketch = ndimage.zoom(hu, _SKETCH / np.array(hu.shape), order=0) > _BODY_HU
    sketch = ndimage.binary_fill_holes(ndimage.binary_closing(sketch), np.ones((3, 3)))
    labels, count = ndimage.label(ndimage.binary_erosion(sketch, iterations=2))
    if not count:
        return slice(0, hu.shape[0]), slice(0, hu.shape[1])
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    body = ndimage.zoom(ndimage.binary_dilation(largest, iterations=2), np.array(hu.shape) / _SKETCH, order=0)
    rows, columns = (np.flatnonzero(body.any(axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(image, size, mode="bilinear", align_corners=True)
