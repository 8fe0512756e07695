"""Between the source grid and the networks': slabs and pixels of the one, voxels of the other.

Compiled, a few slices a thread. The filter is the triangle of bilinear interpolation, widened where pixels are merged,
as torch's `interpolate(mode="bilinear", antialias=True)` has it, which the networks were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.runtime import cores

#: HU that enter an average: metal, and the padding outside the reconstruction, must not bleed.
_LOW, _HIGH = -1024, 1500

#: Slices that a thread does at once.
_CHUNK = 8


#: From where to where along an axis, voxels of the source grid; fractions are parts of a voxel.
Span = tuple[float, float]


def shrink(
    hu: NDArray[np.int16], slab: int, matrix: tuple[int, int], spans: tuple[Span, Span] | None = None
) -> NDArray[np.float32]:
    """Average slabs of `slab` slices, and bring them, or spans of rows and columns, to another matrix (rows, columns).

    The last slab repeats the last slice where slices are missing.
    """
    image = np.empty((-(-len(hu) // slab), *matrix), np.float32)
    rows, columns = (_taps(n, m, span) for n, m, span in zip(hu.shape[1:], matrix, spans or (None, None), strict=True))
    _in_threads(lambda start, stop: _shrink(hu, slab, *rows, *columns, image, start, stop), len(image))
    return image


def restore(
    sides: NDArray[np.float32],
    chance: NDArray[np.float32],
    shape: tuple[int, ...],
    slab: int,
    spans: tuple[Span, Span] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Bring slabs back to slices, trilinearly.

    Parameters
    ----------
    sides
        Fields [2, slab, y, x] of right and left lung, over 0.5 within.
    chance
        [slab, y, x], its pixels those of `sides` or others.
    shape
        Of the source grid.
    slab
        Slices in a slab.
    spans
        Rows and columns of the source grid that `sides` and `chance` cover, by default all.

    Returns
    -------
    lungs
        uint8: 1 where right is at least left, 2 where it is less, 0 where neither is over 0.5.
    probability
        float16: `chance` within `lungs`, else 0.
    """
    lungs, probability = np.zeros(shape, np.uint8), np.zeros(shape, np.float16)
    sides = np.ascontiguousarray(sides)
    depth = _between(shape[0], len(chance), slab)
    spans = spans or ((0.0, float(shape[1])), (0.0, float(shape[2])))
    covered = [slice(max(0, math.floor(a)), min(n, math.ceil(b))) for (a, b), n in zip(spans, shape[1:], strict=True)]
    rows, columns = (_across(spans[n], covered[n], sides.shape[n + 2]) for n in (0, 1))
    chance_rows, chance_columns = (_across(spans[n], covered[n], chance.shape[n + 1]) for n in (0, 1))
    extent = _extent(sides)
    found, infected = lungs[:, covered[0], covered[1]], probability[:, covered[0], covered[1]]

    def part(start: int, stop: int) -> None:
        values = np.zeros((stop - start, *found.shape[1:]), np.float32)
        labels = np.zeros(values.shape, np.uint8)
        used = _restore(
            sides, chance, extent, depth, rows, columns, chance_rows, chance_columns, labels, values, start, stop
        )
        y, x = slice(used[0], used[1]), slice(used[2], used[3])
        found[start:stop, y, x] = labels[:, y, x]
        infected[start:stop, y, x] = values[:, y, x]

    _in_threads(part, shape[0])
    return lungs, probability


_Between = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]


def _taps(source: int, target: int, span: Span | None = None) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """First source pixel and the weights of the next, for each target pixel of the source or of a span of it."""
    begin, end = span or (0.0, float(source))
    scale = (end - begin) / target
    support = max(scale, 1.0)
    centre = begin + scale * (np.arange(target) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.intp), 0)
    last = np.minimum((centre + support + 0.5).astype(np.intp), source)
    place = first[:, None] + np.arange(int((last - first).max()))
    weights = np.maximum(0, 1 - np.abs(place + 0.5 - centre[:, None]) / support) * (place < last[:, None])
    # Weightless pixels beyond the edge are still read.
    first = np.minimum(first, source - weights.shape[1])
    moved = np.zeros_like(weights)
    for row, (start, before) in enumerate(zip(first, place[:, 0], strict=True)):
        moved[row, before - start :] = weights[row, : weights.shape[1] - (before - start)]
    return first, (moved / moved.sum(1, keepdims=True)).astype(np.float32)


def _between(target: int, source: int, scale: float | None = None) -> _Between:
    """The two source pixels about each target pixel and the share of the second; `scale` is target over source."""
    place = ((np.arange(target) + 0.5) / (scale or target / source) - 0.5).clip(0, source - 1)
    below = place.astype(np.intp)
    return below, np.minimum(below + 1, source - 1), (place - below).astype(np.float32)


def _across(span: Span, covered: slice, source: int) -> _Between:
    """The same for the target pixels `covered`, where the source lies over a span of the target."""
    begin, end = span
    centre = np.arange(covered.start, covered.stop) + 0.5 - begin
    place = (centre * (source / (end - begin)) - 0.5).clip(0, source - 1)
    below = place.astype(np.intp)
    return below, np.minimum(below + 1, source - 1), (place - below).astype(np.float32)


def _extent(sides: NDArray[np.float32]) -> NDArray[np.intp]:
    """First and last column [slab, y, 2] over 0.5 in either field; last is before first where there is none."""
    lung = sides.max(0) > 0.5
    width = lung.shape[2]
    none = ~lung.any(2)
    first, last = lung.argmax(2), width - 1 - lung[:, :, ::-1].argmax(2)
    first[none], last[none] = width, -1
    return np.stack([first, last], -1)


def _in_threads(work: Callable[[int, int], None], count: int) -> None:
    """Do the work for 0 to `count`, a chunk at a time, on all cores: compiled code lets go of the interpreter."""
    with ThreadPoolExecutor(cores()) as pool:
        for done in [pool.submit(work, n, min(n + _CHUNK, count)) for n in range(0, count, _CHUNK)]:
            done.result()


@njit(nogil=True, cache=True, fastmath=True)
def _shrink(hu, slab, first_row, row_weights, first_column, column_weights, image, start, stop):  # type: ignore[no-untyped-def]
    depth, _, width = hu.shape
    line = np.empty(width, np.float32)
    for k in range(start, stop):
        for j in range(image.shape[1]):
            line[:] = 0
            for tap in range(row_weights.shape[1]):
                weight = row_weights[j, tap] / np.float32(slab)
                if weight == 0:
                    continue
                row = first_row[j] + tap
                for n in range(slab):
                    source = hu[min(k * slab + n, depth - 1), row]
                    for i in range(width):
                        line[i] += weight * np.float32(min(max(source[i], _LOW), _HIGH))
            for i in range(image.shape[2]):
                total = np.float32(0)
                for tap in range(column_weights.shape[1]):
                    total += column_weights[i, tap] * line[first_column[i] + tap]
                image[k, j, i] = total


@njit(nogil=True, cache=True)
def _blend(plane_a, plane_b, z, row_a, row_b, y, first, last, line):  # type: ignore[no-untyped-def]
    """One line between two rows of two slabs."""
    a0, a1, b0, b1 = plane_a[row_a], plane_a[row_b], plane_b[row_a], plane_b[row_b]
    for i in range(first, last):
        upper = a0[i] + (b0[i] - a0[i]) * z
        lower = a1[i] + (b1[i] - a1[i]) * z
        line[i] = upper + (lower - upper) * y


@njit(nogil=True, cache=True)
def _restore(  # type: ignore[no-untyped-def]
    sides, chance, extent, depth, rows, columns, chance_rows, chance_columns, lungs, values, start, stop
):
    """Fill `lungs` and `values` with slices `start` to `stop`; the rows and columns between which there is lung."""
    height, width = lungs.shape[1:]
    coarse, coarse_chance = sides.shape[3], chance.shape[2]
    right, left = np.empty(coarse, np.float32), np.empty(coarse, np.float32)
    infected = np.empty(coarse_chance, np.float32)
    top, bottom, leftmost, rightmost = height, 0, width, 0
    for k in range(start, stop):
        below, above, z = depth[0][k], depth[1][k], depth[2][k]
        for j in range(height):
            a, b, y = rows[0][j], rows[1][j], rows[2][j]
            first = min(min(extent[below, a, 0], extent[below, b, 0]), min(extent[above, a, 0], extent[above, b, 0]))
            last = max(max(extent[below, a, 1], extent[below, b, 1]), max(extent[above, a, 1], extent[above, b, 1]))
            if last < first:
                continue
            # A voxel over 0.5 lies next to a pixel over 0.5.
            x0, x1 = width, 0
            for i in range(width):
                if columns[1][i] >= first and columns[0][i] <= last:
                    x0, x1 = min(x0, i), i + 1
            if x1 == 0:
                continue  # a grid far coarser than the fields: the lung lies between its pixels
            low, high = columns[0][x0], columns[1][x1 - 1] + 1
            _blend(sides[0, below], sides[0, above], z, a, b, y, low, high, right)
            _blend(sides[1, below], sides[1, above], z, a, b, y, low, high, left)
            low, high = chance_columns[0][x0], chance_columns[1][x1 - 1] + 1
            _blend(
                chance[below], chance[above], z, chance_rows[0][j], chance_rows[1][j], chance_rows[2][j], low, high,
                infected,
            )  # fmt: skip
            top, bottom = min(top, j), max(bottom, j + 1)
            leftmost, rightmost = min(leftmost, x0), max(rightmost, x1)
            for i in range(x0, x1):
                p, q, x = columns[0][i], columns[1][i], columns[2][i]
                r = right[p] + (right[q] - right[p]) * x
                s = left[p] + (left[q] - left[p]) * x
                if max(r, s) > np.float32(0.5):
                    lungs[k - start, j, i] = 1 if r >= s else 2
                    p, q, x = chance_columns[0][i], chance_columns[1][i], chance_columns[2][i]
                    values[k - start, j, i] = infected[p] + (infected[q] - infected[p]) * x
    return top, bottom, leftmost, rightmost
