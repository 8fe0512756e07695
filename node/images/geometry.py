"""Slice positions and direction cosines → one regular grid, or the reason why there is none.

The one judge of slice geometry: intake asks it whether a series is whole and regular, and the volume is laid out by it,
so that nothing is accepted here and refused there. Only numbers: nothing here reads DICOM. The reference is PS3.3
C.7.6.2.1.1 (Image Plane module).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: How far direction cosines may be from unit length, from a right angle to each other, and from those of the first
#: slice. 0.001 moves the far corner of a 400 mm field of view by 0.4 mm, less than a pixel; decimal strings are
#: written with five digits or more.
COSINE_TOLERANCE = 1e-3

#: Slices nearer than this along the normal, mm, are at one position: decimal strings are rounded, and no CT
#: reconstructs slices less than 0.1 mm apart.
SAME_PLACE_MM = 0.05

#: A step of more than this many times the usual one is a gap: one missing slice makes it 2.
GAP_FACTOR = 1.5

#: How far a slice may lie from its place on the regular grid, mm. It is a length and no part of the step, as it bounds
#: an error of place: masks, SEG frames and coordinates in reports are all put where the grid says. Scanners that write
#: positions with one decimal are off by up to 0.1 mm (both ends rounded), so less would refuse sound series; more, such
#: as the millimetre of a table that stops for each slice, would move a small lesion's edge by a slice of 1 mm.
SPACING_TOLERANCE_MM = 0.2

#: mm from the origin of the frame of reference beyond which a position is no place in a scanner room; it keeps sums and
#: squares of positions finite.
FARTHEST_MM = 1e6

#: Relative difference that Pixel Spacing may have within a series: half a pixel over a 512 matrix.
PIXEL_SPACING_TOLERANCE = 1e-3

#: How far, in pixels, the slices may shift sideways from the first to the last, and any one from the line between
#: them. Less than a pixel is rounding of positions and cosines; more is a tilted gantry or another field of view.
SIDEWAYS_TOLERANCE_PIXELS = 1.0


class VolumeError(ValueError):
    """A series cannot be read as one regular volume; the message says why, free of patient data."""


@dataclass(frozen=True)
class Spacing:
    """How slices follow one upon the other along their normal; numbers of slices are in sorted order, from 0."""

    #: mm; the usual step, the smallest and the largest.
    step: float
    smallest: float
    largest: float
    #: Slices at the same place as the next one.
    duplicates: tuple[int, ...]
    #: Slices after which one or more are missing.
    gaps: tuple[int, ...]
    #: The slice that lies farthest from its place on a regular grid, and how far, mm.
    farthest: int
    off_mm: float

    @property
    def on_grid(self) -> bool:
        """Whether every slice lies at its place."""
        return self.off_mm <= SPACING_TOLERANCE_MM


def spacing(depths: Sequence[float] | NDArray[np.float64]) -> Spacing:
    """Judge how slices are spaced.

    Parameters
    ----------
    depths
        mm along the slice normal, in ascending order, of two slices or more.
    """
    depth = np.asarray(depths, float)
    steps = np.diff(depth)
    # The lower quartile is the true step even when several slices are missing, and a few extra ones do not mislead it.
    usual = float(np.sort(steps)[len(steps) // 4])
    off = np.abs(depth - np.linspace(depth[0], depth[-1], len(depth)))
    farthest = int(np.argmax(off))
    return Spacing(
        step=usual,
        smallest=float(steps.min()),
        largest=float(steps.max()),
        duplicates=tuple(np.flatnonzero(steps < SAME_PLACE_MM).tolist()),
        gaps=tuple(np.flatnonzero(steps > GAP_FACTOR * usual).tolist()),
        farthest=farthest,
        off_mm=float(off[farthest]),
    )


def require_same_planes(orientations: Sequence[Sequence[float]], pixel_spacings: Sequence[Sequence[float]]) -> None:
    """Refuse slices that are not parallel, or whose pixels differ in size; of each slice, as `regular_grid` takes them.

    Raises
    ------
    VolumeError
        They differ by more than `COSINE_TOLERANCE` or `PIXEL_SPACING_TOLERANCE`.
    """
    if not np.allclose(orientations, orientations[0], rtol=0, atol=COSINE_TOLERANCE):
        raise VolumeError("slices are not parallel: more than one Image Orientation (Patient)")
    spacings = np.asarray(pixel_spacings, float)
    if not np.allclose(spacings, spacings[0], rtol=PIXEL_SPACING_TOLERANCE, atol=0):
        low, high = spacings.min(axis=0), spacings.max(axis=0)
        raise VolumeError(
            f"more than one pixel spacing: {low[0]:.4f} to {high[0]:.4f} mm between rows, "
            f"{low[1]:.4f} to {high[1]:.4f} mm between columns"
        )


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
        Cosines not orthogonal, positions beyond `FARTHEST_MM`, duplicate positions, a gap, uneven spacing, tilt,
        slices out of line, or a single slice of unknown thickness.
    """
    row, column = np.asarray(orientation[:3], float), np.asarray(orientation[3:], float)
    _require_orthonormal(row, column)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    points = np.asarray(positions, float)
    if np.abs(points).max() > FARTHEST_MM:
        raise VolumeError("a slice position is too far from the origin to be one")
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
    found = spacing(depth)
    if duplicates := found.duplicates:
        more = f" (and {len(duplicates) - 1} more)" if len(duplicates) > 1 else ""
        raise VolumeError(f"two slices at {_place(points[duplicates[0]], normal)}{more}")
    if gaps := found.gaps:
        more = f" (and {len(gaps) - 1} more)" if len(gaps) > 1 else ""
        apart = depth[gaps[0] + 1] - depth[gaps[0]]
        raise VolumeError(
            f"gap at {_place(points[gaps[0]], normal)}: {apart:.2f} mm between slices, expected {found.step:.2f}{more}"
        )
    if not found.on_grid:
        raise VolumeError(
            f"uneven spacing: slices are {found.smallest:.2f} to {found.largest:.2f} mm apart; the slice at "
            f"{_place(points[found.farthest], normal)} is {found.off_mm:.2f} mm off a regular grid"
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
