"""HU volume → lungs and infection probability on the same grid: the two networks, their resampling and clean-up.

Both networks are 2D and see axial slices of the patient's box (`models.body`) at the pixel size of their metadata, one
that was trained with context also the neighbours of each. Thin slices are averaged to slabs of about `SLAB_MM`, so that
a volume of 0.6 mm slices costs no more than one of 2.5 mm; probabilities are interpolated back. The result depends on
the input alone, on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.body import Body, find_body
from models.calibration import LesionCalibration
from models.registry import Bundle, BundleError, ModelIdentity
from models.resample import Span, restore, shrink
from models.runtime import open_runtime
from models.sides import LEFT as LEFT
from models.sides import RIGHT as RIGHT
from models.sides import absent, pose_of, settled

#: Slices thinner than this are averaged before the networks see them, mm.
SLAB_MM = 2.5

#: Slabs up to so far apart, mm, may have one between them on which the lungs are their mean: no further than the slices
#: of a coarse routine CT.
_LEAP_MM = 5.5

#: Part of the lungs' area in which two slabs may differ for that: it leaves out a third of the slabs, and Dice is
#: 0.998 to 0.999 with what the network makes of all of them.
_UNLIKE = 0.1

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

#: The lumen of trachea or a main bronchus in an axial slice: gas, of such an area, mm²; and of the ring about it so
#: much is denser than aerated lung, HU: smaller bronchi, and bullae, lie in lung.
_LUMEN_HU = -900.0
_LUMEN_MM2 = (30.0, 900.0)
_WALL_HU = -600.0
_WALL_SHARE = 0.75

#: A trunk narrower than this, mm, is a child's: it is enlarged, at most so much, to the width of an adult.
_SMALL_MM, _ADULT_MM, _SMALLEST = 240.0, 300.0, 0.4

#: What the lung network sees outside the body, HU.
_AIR_HU = -1000.0

#: The infection network sees the lungs' box and at least so much around it, mm, up to its own strides: a window that
#: begins a pixel further out changes a twentieth of what it finds, and lungs that do must not move it.
_MARGIN_MM = 15.0

#: Neighbours in space that share a face.
_FACES = ndimage.generate_binary_structure(3, 1)
#: The same within an axial slice.
_IN_PLANE = _FACES & (np.arange(3) == 1)[:, None, None]

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
        smallest lesion of the model, it is held just under `threshold`.
    threshold
        Probability from which a voxel counts as infected, of the model's metadata.
    timings
        Stage → seconds.
    """

    lungs: NDArray[np.uint8]
    probability: NDArray[np.float16]
    threshold: float
    timings: dict[str, float] = field(default_factory=dict)
    #: From voxels to a lesion's probability, of the infection model's metadata.
    calibration: LesionCalibration | None = None
    #: What a reader has to know about right and left, in sentences.
    notes: tuple[str, ...] = ()


class Segmenter:
    """The two networks, loaded once.

    Parameters
    ----------
    lungs, infection
        Bundles of `models.registry`.
    device
        'cpu' or 'cuda'; by default CUDA where there is a card.

    Raises
    ------
    BundleError
        A bundle cannot be loaded.
    """

    def __init__(self, lungs: Bundle, infection: Bundle, device: str | None = None) -> None:
        self._lungs, self._infection = _Network(lungs, device), _Network(infection, device)
        self._minimum_lesion_mm3 = float(infection.metadata["minimum_lesion_mm3"])
        self._minimum_extent_mm = float(infection.metadata.get("minimum_extent_mm", 0.0))
        self._threshold = float(infection.metadata["threshold"])
        self._calibration = _calibration(infection)

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
        timings: dict[str, float] = {}
        tell = progress or (lambda stage, done: None)
        slab, shared, found = self._find(hu, spacing, tell, timings)
        with _lap("infection", timings):
            chance = self._infection_chance(shared, found.sides, tell)
        with _lap("restore", timings):
            lungs, probability = restore(found.sides, chance, hu.shape, slab, shared.spans)
        return Segmentation(lungs, probability, self._threshold, timings, self._calibration, found.notes)

    def lungs(self, hu: NDArray[np.int16], spacing: tuple[float, float, float]) -> NDArray[np.uint8]:
        """The lungs alone, as `Segmentation.lungs`; for what is measured without infection."""
        slab, shared, found = self._find(hu, spacing, lambda stage, done: None, {})
        lungs, _ = restore(found.sides, np.zeros_like(found.sides[0]), hu.shape, slab, shared.spans)
        return lungs

    def _find(
        self, hu: NDArray[np.int16], spacing: tuple[float, float, float], tell: Progress, timings: dict[str, float]
    ) -> tuple[int, _Grid, _Found]:
        """Slices in a slab, the grid for infection, and the lungs."""
        if hu.ndim != 3 or 0 in hu.shape or len(spacing) != 3 or min(spacing) <= 0:
            raise ValueError(f"a volume [z, y, x] with a positive spacing is needed, not {hu.shape} at {spacing}")
        with _lap("body", timings):
            body = find_body(hu, spacing)
        slab = max(1, int(SLAB_MM / spacing[0] + 0.25))
        pixel_mm = self._lungs.pixel_mm * _scale(body)
        with _lap("resample", timings):
            shared = _Grid.of(hu, spacing, slab, self._infection.pixel_mm, body, self._infection.stride)
            grid = shared if pixel_mm == self._infection.pixel_mm else shared.at(hu, slab, pixel_mm)
        inside = body.mask(slab, grid.spans, grid.image.shape[1:])
        sides = self._sides(grid, inside, body, tell, timings)
        with _lap("pose", timings):
            label = np.where(sides.max(0) > 0.5, 1 + sides.argmax(0), 0).astype(np.uint8)
            pose = pose_of(label, grid.image, grid.spacing)
        if flips := pose.flips:
            # Once more as networks know patients.
            stood = replace(grid, image=np.ascontiguousarray(np.flip(grid.image, flips)))
            again = self._sides(stood, np.flip(inside, flips), body, lambda stage, done: None, timings)
            sides = np.flip(again, tuple(1 + axis for axis in flips))
        return slab, shared, _Found(sides, pose.notes)

    def _sides(
        self, grid: _Grid, inside: NDArray[np.bool_], body: Body, tell: Progress, timings: dict[str, float]
    ) -> NDArray[np.float32]:
        """Fields [2, z, y, x] of right and left lung, by place in the image."""
        with _lap("lungs", timings):
            chances = self._lung_chances(grid, inside, tell)
        with _lap("clean", timings):
            return _clean_lungs(chances, grid.image, grid.spacing, None if body.width_mm is None else inside)

    def _lung_chances(self, grid: _Grid, inside: NDArray[np.bool_], tell: Progress) -> NDArray[np.float32]:
        """Probabilities [2, z, y, x] of right and left lung: 0 outside the body, where the network sees air alone.

        Every other slab is seen first, and of the rest those whose neighbours are unlike; another is their mean.
        """
        count, stride = len(grid.image), self._lungs.stride
        chances = np.zeros((2, *grid.image.shape), np.float32)
        box = _box(inside, (0, 0, 0))
        if box is None:
            tell("lungs", 1.0)
            return chances
        image = np.where(inside, grid.image, np.float32(_AIR_HU))
        image = np.pad(image, ((0, 0), (stride, stride), (stride, stride)), constant_values=_AIR_HU)
        # Whole strides from the body's middle: where it lies in the field makes no difference.
        y, x = (
            _on_strides_from(middle, side, stride)
            for middle, side in zip((np.argwhere(inside.any(0)).mean(0) + 0.5).astype(int), box[1:], strict=True)
        )
        plane = slice(y.start + stride, y.stop + stride), slice(x.start + stride, x.stop + stride)
        height, width = inside.shape[1:]
        rows_in, columns_in = slice(max(0, y.start), min(height, y.stop)), slice(max(0, x.start), min(width, x.stop))

        def look(rows: Sequence[int]) -> None:
            for row, logits in zip(rows, self._lungs.run(image, rows, plane), strict=True):
                seen = _softmax(logits)[1:, rows_in.start - y.start :, columns_in.start - x.start :]
                part = chances[:, row, rows_in, columns_in]
                part[:] = seen[:, : part.shape[1], : part.shape[2]] * inside[row, rows_in, columns_in]
                tell("lungs", (row + 1) / count)

        if 2 * grid.spacing[0] > _LEAP_MM:
            look(range(count))
            return chances
        look(range(0, count, 2))
        unlike = [row for row in range(1, count, 2) if row + 1 == count]
        for row in range(1, count - 1, 2):
            below, above = chances[:, row - 1], chances[:, row + 1]
            if np.abs(below - above).sum() > _UNLIKE * np.maximum(below, above).sum():
                unlike.append(row)
            else:
                chances[:, row] = (below + above) / 2
        look(sorted(unlike))
        return chances

    def _infection_chance(self, grid: _Grid, sides: NDArray[np.float32], tell: Progress) -> NDArray[np.float32]:
        """Probability [z, y, x] of infection, 0 outside the lungs."""
        chance = np.zeros(grid.image.shape, np.float32)
        lungs = _at_nearest(sides.max(0), grid.image.shape)
        margins = (0, *(round(_MARGIN_MM / mm) for mm in grid.spacing[1:]))
        box = _box(lungs > 0.5, margins)
        if box is None:
            tell("infection", 1.0)
            return chance
        z, *plane = box
        stride = self._infection.stride
        y, x = (_on_strides(side, size, stride) for side, size in zip(plane, lungs.shape[1:], strict=True))
        box = z, y, x
        inside = chance[box]
        for row, logits in enumerate(self._infection.run(grid.image, range(z.start, z.stop), (y, x))):
            inside[row] = _sigmoid(logits[0])
            tell("infection", (row + 1) / len(inside))
        inside *= lungs[box] > 0.2
        positive = inside >= self._threshold
        inside[_crumbs(positive, grid.spacing, self._minimum_lesion_mm3, self._minimum_extent_mm)] = (
            0.99 * self._threshold
        )
        return chance


@dataclass(frozen=True)
class _Found:
    """The lungs on the network's grid."""

    #: Fields [2, z, y, x] of right and left lung, over 0.5 within.
    sides: NDArray[np.float32]
    #: `Segmentation.notes`.
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Grid:
    """The volume as a network sees it."""

    #: HU [z, y, x] in slabs and network pixels, of the patient's box.
    image: NDArray[np.float32]
    #: Size (z, y, x) of a voxel of it, mm.
    spacing: tuple[float, float, float]
    #: Rows and columns of the volume that it covers.
    spans: tuple[Span, Span]

    @classmethod
    def of(
        cls,
        hu: NDArray[np.int16],
        spacing: tuple[float, float, float],
        slab: int,
        pixel_mm: float,
        body: Body,
        stride: int,
    ) -> _Grid:
        """The pixels are those of the whole field, cut out on whole strides, so that a box may move by a few."""
        spans, matrix, pixel = [], [], []
        for side, n, mm in zip((body.rows, body.columns), hu.shape[1:], spacing[1:], strict=True):
            whole = max(1, round(n * mm / pixel_mm))
            part = _on_strides(slice(side.start * whole // n, -(-side.stop * whole // n)), whole, stride)
            spans.append((part.start * n / whole, part.stop * n / whole))
            matrix.append(part.stop - part.start)
            pixel.append(n * mm / whole)
        image = shrink(hu, slab, (matrix[0], matrix[1]), (spans[0], spans[1]))
        return cls(image, (spacing[0] * slab, pixel[0], pixel[1]), (spans[0], spans[1]))

    def at(self, hu: NDArray[np.int16], slab: int, pixel_mm: float) -> _Grid:
        """The same part of the volume in other pixels."""
        height, width = (
            max(1, round(n * mm / pixel_mm)) for n, mm in zip(self.image.shape[1:], self.spacing[1:], strict=True)
        )
        pixel = (n * mm / m for n, mm, m in zip(self.image.shape[1:], self.spacing[1:], (height, width), strict=True))
        return _Grid(shrink(hu, slab, (height, width), self.spans), (self.spacing[0], *pixel), self.spans)


def _scale(body: Body) -> float:
    """How large the network's pixels are beside those of an adult: a child fills as many of them."""
    if body.width_mm is None:
        return 1.0
    return max(_SMALLEST, body.width_mm / _ADULT_MM) if body.width_mm < _SMALL_MM else 1.0


def _crumbs(
    positive: NDArray[np.bool_], spacing: tuple[float, float, float], minimum_mm3: float, minimum_extent_mm: float
) -> NDArray[np.bool_]:
    """What is too small for a lesion: below a volume, or not over more than so many mm from inferior to superior."""
    label = cc3d.connected_components(positive, connectivity=26)
    small = ~lesion_sized(label, spacing, minimum_mm3, minimum_extent_mm)
    small[0] = False
    crumbs: NDArray[np.bool_] = small[label]
    return crumbs


def lesion_sized(
    label: NDArray[np.integer], spacing: tuple[float, float, float], minimum_mm3: float, minimum_extent_mm: float
) -> NDArray[np.bool_]:
    """Whether each label of [z, y, x], the background's 0 first, has the size of a lesion.

    Parameters
    ----------
    label
        Components, numbered from 1 without gaps.
    spacing
        Voxel size (z, y, x) in mm.
    minimum_mm3
        A lesion has at least this volume.
    minimum_extent_mm
        A lesion reaches over more than this from inferior to superior.
    """
    found = cc3d.statistics(label)
    slabs = np.array([box[0].stop - box[0].start for box in found["bounding_boxes"]])
    large = found["voxel_counts"] * float(np.prod(spacing)) >= minimum_mm3 * (1 - 1e-6)
    sized: NDArray[np.bool_] = large & (slabs * spacing[0] > minimum_extent_mm)
    return sized


def _calibration(infection: Bundle) -> LesionCalibration | None:
    try:
        return LesionCalibration.of(infection.metadata)
    except ValueError as error:
        raise BundleError(f"{infection.path / 'configs' / 'metadata.json'}: {error}") from None


class _Network:
    """One network and the input it wants."""

    def __init__(self, bundle: Bundle, device: str | None) -> None:
        self.identity = bundle.identity
        try:
            self.pixel_mm = float(bundle.metadata["pixel_mm"])
            low, high = (float(value) for value in bundle.metadata["hu_range"])
            #: Neighbours below and above that the network sees beside a slab.
            self._context = int(bundle.metadata.get("context", 0))
            self.stride = int(bundle.metadata["stride"])
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{bundle.path / 'configs' / 'metadata.json'}: {error!r}") from None
        self._low, self._high = low, high
        self._runtime = open_runtime(bundle, device)

    def run(
        self, image: NDArray[np.float32], rows: Iterable[int], plane: tuple[slice, slice] = (slice(None), slice(None))
    ) -> Iterator[NDArray[np.float32]]:
        """Logits [channel, y, x] of these slabs of HU [z, y, x], or of a part of their plane."""
        height, width = image[0][plane].shape
        padded = height + -height % self.stride, width + -width % self.stride

        def slabs() -> Iterator[NDArray[np.float32]]:
            for row in rows:
                # Inferior to superior; at the ends of the scan the last slab stands in for what is missing.
                around = np.clip(np.arange(row - self._context, row + self._context + 1), 0, len(image) - 1)
                slab = np.full((len(around), *padded), -1.0, np.float32)
                part = np.clip(image[(around, *plane)], self._low, self._high)
                slab[:, :height, :width] = (part - (self._low + self._high) / 2) * (2 / (self._high - self._low))
                yield slab

        for logits in self._runtime.run(slabs()):
            yield logits[:, :height, :width]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    raised = np.exp(logits - logits.max(0))
    chances: NDArray[np.float32] = raised / raised.sum(0)
    return chances


def _sigmoid(logit: NDArray[np.float32]) -> NDArray[np.float32]:
    # By tanh, which does not overflow.
    chance: NDArray[np.float32] = 0.5 + 0.5 * np.tanh(0.5 * logit)
    return chance


def _at_nearest(values: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Slices of another pixel size, by their nearest pixels."""
    if values.shape == shape:
        return values
    rows, columns = (
        ((np.arange(n) + 0.5) * m / n).astype(np.intp) for n, m in zip(shape[1:], values.shape[1:], strict=True)
    )
    return values[:, rows[:, None], columns]


def _clean_lungs(
    chances: NDArray[np.float32],
    image: NDArray[np.float32],
    spacing: tuple[float, float, float],
    body: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Fields [2, z, y, x] of right and left lung, over 0.5 within.

    One component a side, its holes filled; strays of one side within the other change sides, free gas goes, and so does
    a lung that is not there but for dust. Where the whole body is known, each lung lies on its side of the midline.
    """
    fields = np.zeros_like(chances)
    any_lung = chances.sum(0)
    found = any_lung > 0.5
    box = _box(found, (1, 1, 1))
    if box is None:
        return fields
    right, left = (side[box] for side in chances)
    label = np.where(right >= left, np.uint8(RIGHT), np.uint8(LEFT)) * found[box]
    airways = _airways(label, image[box], spacing)
    label[airways] = 0
    sides = _largest_each(_without_gas(label, image[box], spacing))
    if body is not None:
        sides = settled(sides, body[box])
    ml = [np.count_nonzero(sides == side) * float(np.prod(spacing)) / 1000 for side in (RIGHT, LEFT)]
    for side, gone in zip((RIGHT, LEFT), absent((ml[0], ml[1])), strict=True):
        if gone:
            sides[sides == side] = 0
    any_lung = any_lung[box]
    for index, side in enumerate((RIGHT, LEFT)):
        of_side = sides == side
        if (part := _box(of_side, (1, 1, 1))) is None:
            continue
        mask = _fill(of_side[part], spacing) & ~airways[part]
        rim = _dilated(mask) & ~mask
        inside, thought = fields[index][box][part], any_lung[part]
        # Inside, at least a clear yes; on the rim, what the network thought; so that the outline stays smooth.
        inside[mask] = thought[mask].clip(min=0.55)
        inside[rim] = thought[rim].clip(max=0.45)
    return fields


def _airways(
    label: NDArray[np.uint8], hu: NDArray[np.float32], spacing: tuple[float, float, float]
) -> NDArray[np.bool_]:
    """Trachea and main bronchi, with their walls, as far as the label reaches into them."""
    airways = np.zeros(label.shape, bool)
    pixel_mm2 = spacing[1] * spacing[2]
    for plane, values, lung in zip(airways, hu, label, strict=True):
        lumens = cc3d.connected_components(values < _LUMEN_HU, connectivity=4)
        found = cc3d.statistics(lumens)
        areas = found["voxel_counts"] * pixel_mm2
        for lumen in 1 + np.flatnonzero((areas[1:] >= _LUMEN_MM2[0]) & (areas[1:] <= _LUMEN_MM2[1])):
            box = tuple(slice(max(0, side.start - 4), side.stop + 4) for side in found["bounding_boxes"][lumen])
            inside = lumens[box] == lumen
            if not lung[box][inside].any():
                continue
            # Pixels from the lumen; its wall is two thick, and what it lies in begins there.
            away = ndimage.distance_transform_cdt(~inside, "taxicab")
            ring = (away == 2) | (away == 3)
            if (values[box][ring] > _WALL_HU).mean() > _WALL_SHARE:
                plane[box] |= away <= 2
    return airways


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
    found = cc3d.statistics(parts)
    sizes, boxes = found["voxel_counts"].astype(np.intp), found["bounding_boxes"]
    sizes[0] = 0
    main: dict[int, int] = {}
    for side in (RIGHT, LEFT):
        of_side = np.bincount(parts[label == side])
        if len(of_side):
            main[side] = int(np.argmax(of_side))
    kept = np.zeros(label.shape, np.uint8)
    for side, part in main.items():
        kept[parts == part] = side
    strays = [int(part) for part in np.argsort(-sizes)[:_STRAYS] if sizes[part] and part not in main.values()]
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
    # A frame of background joins all that is outside.
    framed = np.pad(~mask, 1, constant_values=True)
    regions = cc3d.connected_components(framed, connectivity=6, binary_image=True)
    framed = np.pad(regions[1:-1, 1:-1, 1:-1] == regions[0, 0, 0], ((0, 0), (1, 1), (1, 1)), constant_values=True)
    holes, count = ndimage.label(framed, _IN_PLANE)
    sizes = np.bincount(holes.ravel(), minlength=count + 1)
    kept = sizes > _HOLE_MM2 / (spacing[1] * spacing[2])
    # Outside even where a thin frame is all of it.
    kept[holes[:, 0, 0]] = True
    kept[0] = False
    filled: NDArray[np.bool_] = ~kept[holes[:, 1:-1, 1:-1]]
    return filled


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and its neighbours by face."""
    dilated = mask.copy()
    for axis in range(3):
        ahead, behind = np.moveaxis(dilated, axis, 0)[1:], np.moveaxis(dilated, axis, 0)[:-1]
        source = np.moveaxis(mask, axis, 0)
        ahead |= source[:-1]
        behind |= source[1:]
    return dilated


def _box(mask: NDArray[np.bool_], margins: Sequence[int]) -> tuple[slice, slice, slice] | None:
    """Box about the mask with margins in voxels, within the array, or None."""
    planes = np.flatnonzero([plane.any() for plane in mask])
    if not len(planes):
        return None
    flat: NDArray[np.bool_] = np.any(mask[planes], axis=0)
    found = planes, np.flatnonzero(flat.any(1)), np.flatnonzero(flat.any(0))
    z, y, x = (
        slice(max(0, int(f[0]) - m), min(n, int(f[-1]) + 1 + m))
        for f, m, n in zip(found, margins, mask.shape, strict=True)
    )
    return z, y, x


def _on_strides(side: slice, size: int, stride: int) -> slice:
    """The whole strides of an image of this size, from its first pixel on, in which a side of a box lies."""
    return slice(side.start // stride * stride, min(size, -(-side.stop // stride) * stride))


def _on_strides_from(middle: int, side: slice, stride: int) -> slice:
    """The whole strides, counted from a pixel, in which a side of a box lies; less than a stride beyond the image."""
    start = side.start - (side.start - middle) % stride
    return slice(start, start - (start - side.stop) // stride * stride)


@contextmanager
def _lap(stage: str, timings: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = round(timings.get(stage, 0.0) + time.perf_counter() - start, 3)
