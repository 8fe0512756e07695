"""Lesion boxes over lung area: a scan whose boxes cover 15 % of the lungs or more is 'Alarming'.

Aleem M, Raj R, Khan A. Comparative performance analysis of the ResNet backbones of Mask RCNN to segment the signs of
COVID-19 in chest CT scans. 2020, arXiv:2008.09713.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: Box area over lung area from which a scan is 'Alarming' (Aleem, Raj, Khan 2020, arXiv:2008.09713).
ALARMING_RATIO = 0.15

#: Neighbours in a slice that share an edge or a corner.
_EIGHT = np.ones((3, 3), np.bool_)


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


def intensity(lungs: NDArray[Any], infection: NDArray[Any], spacing: tuple[float, float, float]) -> Intensity:
    """Judge by the area of lesion boxes over lung area.

    On each slice the 8-connected components of the infection mask get upright bounding boxes, as the paper's
    detector would give, and a box entirely within another is dropped. The paper judges single images; here both
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


def _outer_boxes(mask: NDArray[np.bool_]) -> list[tuple[int, int, int, int]]:
    """Half-open boxes (r0, r1, c0, c1) of the components of a slice, without those entirely within another."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    # Lesions cover little of a slice, and labelling the rest costs as much per pixel. SciPy, because cc3d 4.1 labels
    # background too where components of a flat image join at corners.
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
