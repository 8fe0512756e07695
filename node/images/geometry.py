"""Slice positions and direction cosines → one regular grid, or the reason why there is none.

Only numbers: nothing here reads DICOM. The reference is PS3.3 C.7.6.2.1.1 (Image Plane module).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: How far direction cosines may be from unit length, from a right angle to each other, and from those of the first
#: slice. 0.001 moves the far corner of a 400 mm field of view by 0.4 mm, less than a pixel; decimal strings are
#: written with five digits or more.
COSINE_TOLERANCE = 1e-3

#: Slices nearer than this along the normal, mm, are at one position: no CT reconstructs thinner than 0.1 mm.
DUPLICATE_MM = 0.01

#: A step of this many times the usual one is a gap: at least half a slice is missing.
GAP_FACTOR = 1.5

#: How far a slice may lie from its place on the regular grid, mm. Scanners that write positions with one decimal are
#: off by up to 0.1 mm (both ends rounded); twice that still is a fraction of any slice.
SPACING_TOLERANCE_MM = 0.2

#: How far, in pixels, the slices may shift sideways from the first to the last, and any one from the line between
#: them. Less than a pixel is rounding of positions and cosines; more is a tilted gantry or another field of view.
SIDEWAYS_TOLERANCE_PIXELS = 1.0


class VolumeError(ValueError):
    """A series cannot be read as one regular volume; the message says why, free of patient data."""


def regular_grid(
    positions: Sequence[tuple[float, float, float]],
    orientation: Sequence[float],
    pixel_spacing: tuple[float, float],
    thickness: float | None,
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Sort slices along their normal and lay a regular grid through them.

    Parameters
    ----------
    positions
        Image Position (Patient) of each slice, mm, LPS, in any order.
    orientation
        Image Orientation (Patient), the same for all: row cosines, then column cosines.
    pixel_spacing
        Pixel Spacing, mm: between rows, between columns.
    thickness
        Slice Thickness, mm, used as the spacing of a single slice, else ignored.

    Returns
    -------
    order
        Indices that sort `positions` along row cosine × column cosine.
    affine
        4x4, (column i, row j, sorted slice k, 1) → LPS mm (equation C.7.6.2.1-1). The third column is the mean step
        from slice to slice, so the first and the last slice are met exactly.

    Raises
    ------
    VolumeError
        Cosines not orthogonal, duplicate positions, a gap, uneven spacing, tilt, slices out of line, or a single
        slice of unknown thickness.
    """
    row, column = np.asarray(orientation[:3], float), np.asarray(orientation[3:], float)
    _require_orthonormal(row, column)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    points = np.asarray(positions, float)
    depth = points @ normal
    order = np.argsort(depth, kind="stable")
    points, depth = points[order], depth[order]

    if len(points) > 1:
        _require_regular(points, depth, normal)
        step = (points[-1] - points[0]) / (len(points) - 1)
        _require_straight(points, step, normal, min(pixel_spacing))
    elif thickness is not None and thickness > 0:
        step = normal * thickness
    else:
        raise VolumeError("a single slice without Slice Thickness: its spacing is unknown")

    affine = np.eye(4)
    affine[:3, 0] = row * pixel_spacing[1]
    affine[:3, 1] = column * pixel_spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = points[0]
    return order, affine


def _require_orthonormal(row: NDArray[np.float64], column: NDArray[np.float64]) -> None:
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if any(abs(length - 1) > COSINE_TOLERANCE for length in lengths):
        raise VolumeError(f"direction cosines have lengths {lengths[0]:.4f} and {lengths[1]:.4f}, not 1")
    if abs(row @ column) > COSINE_TOLERANCE:
        angle = np.degrees(np.arccos(row @ column))
        raise VolumeError(f"row and column direction cosines are {angle:.2f}° apart, not orthogonal")


def _require_regular(points: NDArray[np.float64], depth: NDArray[np.float64], normal: NDArray[np.float64]) -> None:
    """Refuse duplicates, gaps and uneven spacing, in sorted slices."""
    steps = np.diff(depth)
    # The lower median: of two steps the shorter is the usual one and the longer the gap.
    expected = float(np.sort(steps)[(len(steps) - 1) // 2])

    if duplicates := np.flatnonzero(steps < DUPLICATE_MM).tolist():
        more = f" (and {len(duplicates) - 1} more)" if len(duplicates) > 1 else ""
        raise VolumeError(f"two slices at {_place(points[duplicates[0]], normal)}{more}")
    if gaps := np.flatnonzero(steps > GAP_FACTOR * expected).tolist():
        more = f" (and {len(gaps) - 1} more)" if len(gaps) > 1 else ""
        raise VolumeError(
            f"gap at {_place(points[gaps[0]], normal)}: {steps[gaps[0]]:.2f} mm between slices, "
            f"expected {expected:.2f}{more}"
        )
    even = np.linspace(depth[0], depth[-1], len(depth))
    worst = int(np.argmax(np.abs(depth - even)))
    if abs(depth[worst] - even[worst]) > SPACING_TOLERANCE_MM:
        raise VolumeError(
            f"uneven spacing: slices are {steps.min():.2f} to {steps.max():.2f} mm apart; the slice at "
            f"{_place(points[worst], normal)} is {abs(depth[worst] - even[worst]):.2f} mm off a regular grid"
        )


def _require_straight(
    points: NDArray[np.float64], step: NDArray[np.float64], normal: NDArray[np.float64], pixel: float
) -> None:
    """Refuse slices that shift sideways, steadily (gantry tilt) or singly."""
    along = float(step @ normal)
    sideways = float(np.linalg.norm(step - along * normal))
    if sideways * (len(points) - 1) > SIDEWAYS_TOLERANCE_PIXELS * pixel:
        tilt = np.degrees(np.arctan2(sideways, along))
        raise VolumeError(
            f"gantry tilt of {tilt:.1f}°: each slice is shifted by {sideways:.2f} mm against the one before; "
            "a sheared volume is not analysed"
        )
    line = points[0] + np.arange(len(points))[:, None] * step
    offset = points - line
    offset -= (offset @ normal)[:, None] * normal
    away = np.linalg.norm(offset, axis=1)
    worst = int(np.argmax(away))
    if away[worst] > SIDEWAYS_TOLERANCE_PIXELS * pixel:
        raise VolumeError(
            f"slices are not in line: the one at {_place(points[worst], normal)} is {away[worst]:.2f} mm to the side"
        )


def _place(point: NDArray[np.float64], normal: NDArray[np.float64]) -> str:
    """Coordinate of a slice on the patient axis nearest to the slice normal."""
    axis = int(np.argmax(np.abs(normal)))
    return f"{'xyz'[axis]} = {point[axis]:.2f} mm"
