"""Slices and lesions → a statement about the scan: the published scan-level rules, each by itself.

Works on plain arrays (masks, HU) in the canonical grid (axis 0 inferior → superior, 1 anterior → posterior, 2 patient
right → left), so that a slice is an axial slice however the series was stored; slice indices count from the lowest.
Each outcome carries the inputs and the limits it was judged by, so that a report can show them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: Consecutive positive slices that make a scan positive (Lokwani et al. 2020, arXiv:2006.13212). The rule counts
#: slices whatever their spacing, as published; `ConsecutiveSlices.longest_run_mm` says how much of the body that is.
MINIMUM_RUN = 15

#: Infected area that makes a slice positive, mm²: a disc of 5 mm, the bore of a segmental vessel, which is what is
#: most often mistaken for a small lesion. The paper gives no area.
MINIMUM_SLICE_AREA_MM2 = 20.0

#: Box area over lung area from which a scan is 'Alarming' (Aleem, Raj, Khan 2020, arXiv:2008.09713).
ALARMING_RATIO = 0.15

#: HU below which a pixel is dark for the open-lung rule. The published code counts stored values below 300 in 16-bit
#: images of a scanner whose rescale intercept is -1024 (COVID-CTset, Rahimzadeh et al. 2021): 300 - 1024.
DARK_HU = -724

#: Central region of the open-lung rule as (first row, last row, first column, last column), half open, on the
#: 512 x 512 matrix of the published code; other matrices take the same part of the image.
CENTRAL_REGION = (240, 340, 120, 370)
_REGION_MATRIX = 512

#: Neighbours in a slice that share an edge or a corner.
_EIGHT = np.ones((3, 3), np.bool_)

#: The open-lung rule keeps slices above (most - fewest) / this, as published.
OPEN_LUNG_DIVISOR = 1.5


@dataclass(frozen=True)
class ConsecutiveSlices:
    """Longest run of positive slices (Lokwani et al. 2020, arXiv:2006.13212)."""

    positive_slices: int
    longest_run: int
    #: `longest_run` times the slice spacing.
    longest_run_mm: float
    positive: bool
    #: The limits judged by: slices in a row, and infected mm² that make a slice positive.
    minimum_run: int = MINIMUM_RUN
    minimum_slice_area_mm2: float = MINIMUM_SLICE_AREA_MM2


@dataclass(frozen=True)
class Intensity:
    """Lesion boxes over lung area (Aleem, Raj, Khan 2020, arXiv:2008.09713)."""

    #: Box area / lung area over the slices, 0 upwards.
    ratio: float
    boxes: int
    grade: Literal["Alarming", "Mild", "not COVID-19-like"]
    #: The two areas of the ratio, mm², summed over all slices.
    box_area_mm2: float = 0.0
    lung_area_mm2: float = 0.0
    #: Ratio from which the grade is 'Alarming'.
    alarming_from: float = ALARMING_RATIO


@dataclass(frozen=True)
class NoisyOr:
    """Scan probability 1 - Π(1 - p) over lesion probabilities."""

    probability: float
    lesions: int


@dataclass(frozen=True)
class OpenLung:
    """Slices on which the lung is open (COVID-CTset, Rahimzadeh et al. 2021, doi:10.1016/j.bspc.2021.102588)."""

    #: Dark pixels in the central region, per slice.
    dark_pixels: tuple[int, ...]
    #: Slices with more dark pixels than this are kept.
    threshold: float
    kept: tuple[int, ...]
    #: HU below which a pixel is dark.
    dark_hu: int = DARK_HU


@dataclass(frozen=True)
class ScanStatement:
    """All rules' outcomes for one scan."""

    consecutive: ConsecutiveSlices
    intensity: Intensity
    noisy_or: NoisyOr
    open_lung: OpenLung


def state(
    lungs: NDArray[Any],
    infection: NDArray[Any],
    hu: NDArray[np.int16],
    lesion_probabilities: Iterable[float],
    spacing: tuple[float, float, float],
) -> ScanStatement:
    """Apply all four rules.

    Parameters
    ----------
    lungs, infection
        Masks (slices, rows, columns) in the canonical grid, non-zero inside.
    hu
        Attenuation, the same shape.
    lesion_probabilities
        0 to 1, one a lesion.
    spacing
        mm between slices, rows, columns.
    """
    return ScanStatement(
        consecutive=consecutive_slices(infection, spacing),
        intensity=intensity(lungs, infection, spacing),
        noisy_or=noisy_or(lesion_probabilities),
        open_lung=open_lung(hu),
    )


def consecutive_slices(infection: NDArray[Any], spacing: tuple[float, float, float]) -> ConsecutiveSlices:
    """Judge by the longest run of slices with at least `MINIMUM_SLICE_AREA_MM2` of infection."""
    slice_mm, row_mm, column_mm = spacing
    area = np.array([np.count_nonzero(plane) for plane in infection]) * row_mm * column_mm
    # Areas are whole numbers of pixels: keep the comparison from failing by a rounding of row_mm * column_mm.
    positive = area >= MINIMUM_SLICE_AREA_MM2 * (1 - 1e-9)
    # Where the padded mask changes, runs start and end in turn.
    changes = np.flatnonzero(np.diff(np.pad(positive.astype(np.int8), 1)))
    longest = int(max(changes[1::2] - changes[::2], default=0))
    return ConsecutiveSlices(
        positive_slices=int(positive.sum()),
        longest_run=longest,
        longest_run_mm=longest * slice_mm,
        positive=longest >= MINIMUM_RUN,
    )


def intensity(lungs: NDArray[Any], infection: NDArray[Any], spacing: tuple[float, float, float]) -> Intensity:
    """Judge by the area of lesion boxes over lung area.

    On each slice the 8-connected components of the infection mask get upright bounding boxes, as the paper's
    detector would give, and a box that lies wholly in another is dropped. The paper judges single images; here both
    areas are summed over all slices before they are divided, so a slice counts by its lung area.
    """
    pixel_mm2 = spacing[1] * spacing[2]
    areas: list[int] = []
    for lung_plane, plane in zip(lungs, infection, strict=True):
        if plane.any():
            areas += [(r1 - r0) * (c1 - c0) for r0, r1, c0, c1 in _outer_boxes((plane > 0) & (lung_plane > 0))]
    box_pixels, lung_pixels = sum(areas), int(np.count_nonzero(lungs))
    ratio = box_pixels / lung_pixels if lung_pixels else 0.0
    grade: Literal["Alarming", "Mild", "not COVID-19-like"] = "Alarming" if ratio >= ALARMING_RATIO else "Mild"
    return Intensity(
        ratio=ratio,
        boxes=len(areas),
        grade=grade if areas else "not COVID-19-like",
        box_area_mm2=box_pixels * pixel_mm2,
        lung_area_mm2=lung_pixels * pixel_mm2,
    )


def noisy_or(probabilities: Iterable[float]) -> NoisyOr:
    """Combine lesion probabilities: 1 - Π(1 - p), 0 for none.

    Summed as logarithms and exactly (`math.fsum`), so that neither many small probabilities nor their order matter.

    Raises
    ------
    ValueError
        A probability outside 0 to 1.
    """
    given = list(probabilities)
    if not all(0 <= p <= 1 for p in given):
        raise ValueError("lesion probabilities lie between 0 and 1")
    if any(p == 1 for p in given):
        return NoisyOr(1.0, len(given))
    return NoisyOr(abs(math.expm1(math.fsum(math.log1p(-p) for p in given))), len(given))


def open_lung(hu: NDArray[np.int16]) -> OpenLung:
    """Keep the slices on which the central region shows open lung.

    Counts the pixels below `DARK_HU` in `CENTRAL_REGION`, and keeps slices with more than (most - fewest) /
    `OPEN_LUNG_DIVISOR` of them. Deviations from the published code: HU instead of stored values, and a region that
    scales with the matrix; like there it does not follow the field of view.
    """
    rows, columns = hu.shape[1:]
    r0, r1 = (round(edge * rows / _REGION_MATRIX) for edge in CENTRAL_REGION[:2])
    c0, c1 = (round(edge * columns / _REGION_MATRIX) for edge in CENTRAL_REGION[2:])
    dark = [int(np.count_nonzero(plane[r0:r1, c0:c1] < DARK_HU)) for plane in hu]
    threshold = (max(dark, default=0) - min(dark, default=0)) / OPEN_LUNG_DIVISOR
    return OpenLung(
        dark_pixels=tuple(dark),
        threshold=threshold,
        kept=tuple(k for k, count in enumerate(dark) if count > threshold),
    )


def _outer_boxes(mask: NDArray[np.bool_]) -> list[tuple[int, int, int, int]]:
    """Half-open boxes (r0, r1, c0, c1) of the components of a slice, without those wholly in another."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    # Lesions cover little of a slice, and to label the rest takes as long a pixel. By SciPy: cc3d 4.1 labels also
    # background where components of a flat image join at corners.
    top, left = int(rows[0]), int(columns[0])
    labels, _ = ndimage.label(mask[top : rows[-1] + 1, left : columns[-1] + 1], _EIGHT)
    # Largest first: a box can only lie in one at least as large, and of two equal ones the first stays.
    boxes = sorted(
        (
            (top + int(r.start), top + int(r.stop), left + int(c.start), left + int(c.stop))
            for r, c in ndimage.find_objects(labels)
        ),
        key=lambda box: -(box[1] - box[0]) * (box[3] - box[2]),
    )
    outer: list[tuple[int, int, int, int]] = []
    for box in boxes:
        if not any(_within(box, other) for other in outer):
            outer.append(box)
    return outer


def _within(box: Sequence[int], other: Sequence[int]) -> bool:
    r0, r1, c0, c1 = box
    return other[0] <= r0 and r1 <= other[1] and other[2] <= c0 and c1 <= other[3]
