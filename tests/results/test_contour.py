"""Outlines of regions on a slice."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import ndimage

from node.results.contour import outer_contour

masks = hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))).filter(lambda mask: bool(mask.any()))


def enclosed(points: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels whose centre a closed line goes round, by counting crossings to the right."""
    inside = np.zeros(shape, bool)
    for row in range(shape[0]):
        for column in range(shape[1]):
            crossings = 0
            for (x0, y0), (x1, y1) in pairwise(points):
                if x0 == x1 and x0 > column + 0.5 and min(y0, y1) < row + 0.5 < max(y0, y1):
                    crossings += 1
            inside[row, column] = crossings % 2
    return inside


@given(masks)
def test_the_outline_goes_round_the_largest_part_and_nothing_else(mask: NDArray[np.bool_]) -> None:
    points = outer_contour(mask)
    labels, _ = ndimage.label(mask)
    largest = np.bincount(labels[mask]).argmax()
    expected = ndimage.binary_fill_holes(labels == largest)
    assert np.array_equal(enclosed(points, mask.shape), expected)
    x, y = points.T
    area = abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2
    assert area == expected.sum()


@given(masks)
def test_the_outline_is_closed_with_steps_along_one_axis(mask: NDArray[np.bool_]) -> None:
    points = outer_contour(mask)
    assert np.array_equal(points[0], points[-1])
    steps = np.diff(points, axis=0)
    assert ((steps == 0).sum(axis=1) == 1).all()
    # A corner is where the direction changes; none lies on a straight line.
    headings = np.flatnonzero(np.concatenate([steps, steps[:1]]).T[0] != 0) % 2
    assert len(set(headings.tolist())) == 1
    assert points.min() >= 0
    assert (points.max(axis=0) <= mask.shape[::-1]).all()


def test_one_pixel_is_outlined_by_its_corners() -> None:
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    assert outer_contour(mask).tolist() == [[2, 1], [3, 1], [3, 2], [2, 2], [2, 1]]


def test_an_empty_mask_has_no_outline() -> None:
    with pytest.raises(ValueError, match="nothing to outline"):
        outer_contour(np.zeros((3, 3), bool))
