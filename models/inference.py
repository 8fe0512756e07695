"""HU volume → lungs and infection probability on the same grid: the two networks, their resampling and clean-up.

Both networks are 2D and see axial slices at the pixel size they were trained at. Thin slices are averaged to slabs of
about `SLAB_MM`, so that a volume of 0.6 mm slices costs no more than one of 2.5 mm; probabilities are interpolated
back. The result depends on the input alone, on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from models.registry import Bundle, BundleError, ModelIdentity

RIGHT, LEFT = 1, 2

#: Slices thinner than this are averaged before the networks see them, mm.
SLAB_MM = 2.5

#: Slices that go through a network at once, and through resampling.
BATCH = 8
_CHUNK = 32

#: What of the other lung's label is joined to a lung is given to it up to this part of the lung's volume; more is a
#: lung of its own.
_STRAY = 0.2

#: Components looked at for that, the largest ones; the rest is dust and goes.
_STRAYS = 24

#: Holes of a lung in an axial slice up to this area, mm², are vessels and small lesions; larger ones may be the dome of
#: the diaphragm.
_HOLE_MM2 = 150.0

#: An island of the lungs in an axial slice is free gas, in airway or bowel, when it is at most so large, mm², and its
#: core's median as dark as this: aerated lung is about -850 HU, gas -1000.
_GAS_MM2 = 900.0
_GAS_HU = -935.0

#: The infection network sees the lungs' box and so much around it, mm.
_MARGIN_MM = 15.0

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Segmentation:
    """What the networks say about one volume, on the grid they were given.

    Attributes
    ----------
    lungs
        uint8 [z, y, x]: 0 background, 1 right lung, 2 left lung.
    probability
        float16 [z, y, x]: infection, 0 to 1, 0 outside the lungs. Where a region of at least `threshold` is below the
        minimum lesion of the model, it is held just under `threshold`.
    threshold
        Probability from which a voxel counts as infected, of the model's metadata.
    timings
        Stage → seconds.
    """

    lungs: NDArray[np.uint8]
    probability: NDArray[np.float16]
    threshold: float
    timings: dict[str, float] = field(default_factory=dict)


class Segmenter:
    """The two networks, loaded once.

    Parameters
    ----------
    lungs, infection
        Bundles of `models.registry`.
    device
        Of torch; by default CUDA where there is a card.

    Raises
    ------
    BundleError
        A bundle cannot be loaded, or the two do not fit together.
    """

    def __init__(self, lungs: Bundle, infection: Bundle, device: str | None = None) -> None:
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._lungs, self._infection = _Network(lungs, self._device), _Network(infection, self._device)
        if self._lungs.pixel_mm != self._infection.pixel_mm:
            raise BundleError(f"{lungs.path} and {infection.path} want different pixel_mm")
        self._minimum_lesion_mm3 = float(infection.metadata["minimum_lesion_mm3"])
        self._threshold = float(infection.metadata["threshold"])

    @property
    def identities(self) -> tuple[ModelIdentity, ...]:
        """The models, in order of use."""
        return self._lungs.identity, self._infection.identity

    def __call__(
        self, hu: NDArray[np.int16], spacing: tuple[float, float, float], progress: Progress | None = None
    ) -> Segmentation:
        """Segment a volume.

        Parameters
        ----------
        hu
            [z, y, x] in canonical orientation: inferior to superior, anterior to posterior, right to left.
        spacing
            Voxel size (z, y, x) in mm.
        progress
            Told the stage and the part of it that is done.

        Raises
        ------
        ValueError
            For an array that is not three-dimensional or a spacing that is not positive.
        """
        if hu.ndim != 3 or 0 in hu.shape or len(spacing) != 3 or min(spacing) <= 0:
            raise ValueError(f"a volume [z, y, x] with a positive spacing is needed, not {hu.shape} at {spacing}")
        tell = progress or (lambda stage, done: None)
        timings: dict[str, float] = {}
        with torch.inference_mode():
            clock = time.perf_counter()
            image, slab, pixel = _shrink(hu, spacing, self._lungs.pixel_mm)
            timings["resample"], clock = _lap(clock)
            sides = self._segment_lungs(image, (spacing[0] * slab, *pixel), tell)
            timings["lungs"], clock = _lap(clock)
            chance = self._segment_infection(image, sides, (spacing[0] * slab, *pixel), tell)
            timings["infection"], clock = _lap(clock)
            lungs, probability = _grow(sides, chance, hu.shape, slab)
            timings["restore"], clock = _lap(clock)
        return Segmentation(lungs, probability, self._threshold, timings)

    def _segment_lungs(self, image: Tensor, spacing: tuple[float, float, float], tell: Progress) -> Tensor:
        """Fields [2, z, y, x] of right and left lung, over 0.5 within."""
        chances = torch.empty((2, *image.shape))
        for rows, logits, done in self._lungs.run(image):
            chances[:, rows] = torch.softmax(logits, 1)[:, 1:].transpose(0, 1).cpu()
            tell("lungs", done)
        return _clean_lungs(chances, image, spacing)

    def _segment_infection(
        self, image: Tensor, sides: Tensor, spacing: tuple[float, float, float], tell: Progress
    ) -> Tensor:
        """Probability [z, y, x] of infection, whatever lies outside the lungs."""
        chance = torch.zeros(image.shape)
        box = _box((sides.amax(0) > 0.5).numpy(), spacing)
        if box is None:
            tell("infection", 1.0)
            return chance
        inside = chance[box]
        for rows, logits, done in self._infection.run(image[box]):
            inside[rows] = torch.sigmoid(logits)[:, 0].cpu()
            tell("infection", done)
        inside *= sides.amax(0)[box] > 0.2
        positive = (inside >= self._threshold).numpy()
        smallest = max(1, round(self._minimum_lesion_mm3 / float(np.prod(spacing))))
        small = positive & ~cc3d.dust(positive, smallest, connectivity=26).astype(bool)
        inside[torch.from_numpy(small)] = 0.99 * self._threshold
        return chance


class _Network:
    """One network and the input it wants."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self.identity = bundle.identity
        self.pixel_mm = float(bundle.metadata["pixel_mm"])
        self._low, self._high = (float(value) for value in bundle.metadata["hu_range"])
        self._device = device
        self._module = bundle.load(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._stride = int(bundle.metadata["stride"])

    def run(self, image: Tensor) -> Iterator[tuple[slice, Tensor, float]]:
        """Rows, logits [n, channel, y, x] and the part done, batch by batch, for HU [z, y, x]."""
        depth, height, width = image.shape
        pad = (0, -width % self._stride, 0, -height % self._stride)
        for start in range(0, depth, BATCH):
            rows = slice(start, min(start + BATCH, depth))
            batch = (image[rows].clamp(self._low, self._high) - (self._low + self._high) / 2) * 2
            batch = functional.pad(batch / (self._high - self._low), pad, value=-1.0)[:, None]
            logits = self._module(batch.to(self._device).contiguous(memory_format=torch.channels_last))
            yield rows, logits[..., :height, :width], rows.stop / depth


def _shrink(
    hu: NDArray[np.int16], spacing: tuple[float, float, float], pixel_mm: float
) -> tuple[Tensor, int, tuple[float, float]]:
    """The volume [z, y, x] in slabs and network pixels, slices in a slab, and the pixel size (y, x) got."""
    slab = max(1, int(SLAB_MM / spacing[0] + 0.25))
    height, width = (max(1, round(n * s / pixel_mm)) for n, s in zip(hu.shape[1:], spacing[1:], strict=True))
    depth = -(-hu.shape[0] // slab)
    image = torch.empty((depth, height, width))
    for start in range(0, depth, _CHUNK):
        stop = min(start + _CHUNK, depth)
        # Clipped before it is averaged: metal and the padding outside the reconstruction must not bleed.
        part = np.clip(hu[start * slab : stop * slab], -1024, 1500).astype(np.float32)
        short = (stop - start) * slab - len(part)
        if short:
            part = np.concatenate([part, np.repeat(part[-1:], short, 0)])
        thick = torch.from_numpy(part).view(stop - start, slab, *hu.shape[1:]).mean(1)
        image[start:stop] = functional.interpolate(thick[:, None], (height, width), mode="bilinear", antialias=True)[
            :, 0
        ]
    return image, slab, (hu.shape[1] * spacing[1] / height, hu.shape[2] * spacing[2] / width)


def _grow(
    sides: Tensor, chance: Tensor, shape: tuple[int, ...], slab: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Lungs and probability on the source grid, slices a few at a time."""
    lungs = np.zeros(shape, np.uint8)
    probability = np.zeros(shape, np.float16)
    fields = torch.cat([sides, chance[None]])
    for start in range(0, shape[0], _CHUNK):
        rows = torch.arange(start, min(start + _CHUNK, shape[0]))
        place = ((rows + 0.5) / slab - 0.5).clamp(0, fields.shape[1] - 1)
        below = place.floor().long()
        above = (below + 1).clamp(max=fields.shape[1] - 1)
        share = (place - below)[:, None, None]
        part = fields[:, below] * (1 - share) + fields[:, above] * share
        right, left, infected = functional.interpolate(part, shape[1:], mode="bilinear")
        label = torch.where(right >= left, RIGHT, LEFT) * (torch.maximum(right, left) > 0.5)
        lungs[rows] = label.to(torch.uint8).numpy()
        probability[rows] = (infected * (label > 0)).to(torch.float16).numpy()
    return lungs, probability


def _clean_lungs(chances: Tensor, image: Tensor, spacing: tuple[float, float, float]) -> Tensor:
    """One component a side, its holes filled; strays of one side within the other change sides, free gas goes."""
    label = torch.where(chances[0] >= chances[1], RIGHT, LEFT) * (chances.sum(0) > 0.5)
    sides = _largest_each(_without_gas(label.to(torch.uint8).numpy(), image.numpy(), spacing))
    fields = torch.zeros_like(chances)
    any_lung = chances.sum(0)
    for index, side in enumerate((RIGHT, LEFT)):
        mask = _fill(sides == side, spacing)
        rim = ndimage.binary_dilation(mask) & ~mask
        # Inside, at least a clear yes; on the rim, what the network thought; so that the outline stays smooth.
        fields[index][torch.from_numpy(mask)] = any_lung[torch.from_numpy(mask)].clamp(min=0.55)
        fields[index][torch.from_numpy(rim)] = any_lung[torch.from_numpy(rim)].clamp(max=0.45)
    return fields


def _without_gas(
    label: NDArray[np.uint8], hu: NDArray[np.float32], spacing: tuple[float, float, float]
) -> NDArray[np.uint8]:
    """The label without islands of free gas in axial slices: trachea above the carina, colon beside the lung base."""
    limit = _GAS_MM2 / (spacing[1] * spacing[2])
    for plane, values in zip(label, hu, strict=True):
        islands, count = ndimage.label(plane)
        if not count:
            continue
        sizes = np.bincount(islands.ravel(), minlength=count + 1)
        inner = islands * ndimage.binary_erosion(plane > 0)
        for island in 1 + np.flatnonzero(sizes[1:] <= limit):
            core = inner == island
            if np.median(values[core if core.any() else islands == island]) < _GAS_HU:
                plane[islands == island] = 0
    return label


def _largest_each(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The largest component of each side; others change sides when they touch the other lung, else they go."""
    parts = cc3d.connected_components(label, connectivity=6)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    main: dict[int, int] = {}
    for side in (RIGHT, LEFT):
        of_side = np.unique(parts[label == side])
        if len(of_side):
            main[side] = int(of_side[np.argmax(sizes[of_side])])
    kept = np.zeros(label.shape, np.uint8)
    for side, part in main.items():
        kept[parts == part] = side
    strays = [int(part) for part in np.argsort(-sizes)[:_STRAYS] if sizes[part] and part not in main.values()]
    boxes = cc3d.statistics(parts)["bounding_boxes"]
    for part in strays:
        box = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in boxes[part])
        where = parts[box] == part
        touched = np.bincount(kept[box][ndimage.binary_dilation(where) & ~where], minlength=3)[1:]
        side = 1 + int(np.argmax(touched))
        if touched.any() and sizes[part] <= _STRAY * sizes[main[side]]:
            kept[box][where] = side
    return kept


def _fill(mask: NDArray[np.bool_], spacing: tuple[float, float, float]) -> NDArray[np.bool_]:
    """Fill what the lung encloses in space, and small holes in each slice."""
    filled: NDArray[np.bool_] = ndimage.binary_fill_holes(mask)
    limit = _HOLE_MM2 / (spacing[1] * spacing[2])
    for plane in filled:
        if plane.any():
            holes, count = ndimage.label(ndimage.binary_fill_holes(plane) & ~plane)
            if count:
                plane |= np.isin(holes, 1 + np.flatnonzero(np.bincount(holes.ravel())[1:] <= limit))
    return filled


def _box(mask: NDArray[np.bool_], spacing: tuple[float, float, float]) -> tuple[slice, slice, slice] | None:
    """Box about the mask with the margin in its slices, or None."""
    if not mask.any():
        return None
    found = ndimage.find_objects(mask.astype(np.uint8))[0]
    margins = (0, round(_MARGIN_MM / spacing[1]), round(_MARGIN_MM / spacing[2]))
    z, y, x = (slice(max(0, s.start - m), s.stop + m) for s, m in zip(found, margins, strict=True))
    return z, y, x


def _lap(start: float) -> tuple[float, float]:
    now = time.perf_counter()
    return round(now - start, 3), now
