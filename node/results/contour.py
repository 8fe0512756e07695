"""Outline of a region on one slice, in the image coordinates of SCOORD."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def outer_contour(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Outer outline of the largest 4-connected part of `mask`, along the edges of its pixels.

    Parameters
    ----------
    mask
        Shape (rows, columns); at least one pixel set.

    Returns
    -------
    NDArray[np.float64]
        Shape (n, 2): (column, row) of every corner, the first repeated at the end. 0, 0 is the outer corner of the
        first pixel and its centre is 0.5, 0.5 (PS3.3 C.18.6.1.2), so the enclosed area in pixels is exactly the
        part's with its holes filled.

    Raises
    ------
    ValueError
        The mask is empty.
    """
    if not mask.any():
        raise ValueError("no pixel is set, so there is nothing to outline")
    part = np.pad(ndimage.binary_fill_holes(_largest_part(mask)), 1)
    row, column = (int(index) for index in np.argwhere(part)[0])
    start = row, column
    corners, heading = [start], 0
    # The region lies at the right hand all the way round, first along the top of its first pixel.
    while True:
        row, column = row + _STEP[heading][0], column + _STEP[heading][1]
        if not part[_beside(row, column, heading, right=True)]:
            turn = 1
        elif part[_beside(row, column, heading, right=False)]:
            turn = -1
        else:
            turn = 0
        if turn or (row, column) == start:
            corners.append((row, column))
        heading = (heading + turn) % 4
        if (row, column) == start and heading == 0:
            break
    return np.array(corners, dtype=np.float64)[:, ::-1] - 1.0


#: Row and column step for the headings east, south, west, north.
_STEP = ((0, 1), (1, 0), (0, -1), (-1, 0))
#: From a corner to the pixel ahead at the right hand, by heading; at the left hand it is the one of the heading before.
_AHEAD_RIGHT = ((0, 0), (0, -1), (-1, -1), (-1, 0))


def _beside(row: int, column: int, heading: int, *, right: bool) -> tuple[int, int]:
    down, across = _AHEAD_RIGHT[heading if right else heading - 1]
    return row + down, column + across


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    part: NDArray[np.bool_] = labels == sizes.argmax()
    return part
