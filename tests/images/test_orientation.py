from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from node.images.orientation import Orientation

SHAPE = (3, 4, 5)
SPACING = (2.0, 0.8, 0.7)  # slices, rows, columns

SIGNED_PERMUTATIONS = [
    np.array([[signs[c] * (permutation[c] == axis) for c in range(3)] for axis in range(3)], float)
    for permutation in permutations(range(3))
    for signs in product((1, -1), repeat=3)
]


def affine_of(direction):
    """Affine with these unit directions of (column, row, slice) as its columns."""
    affine = np.eye(4)
    affine[:3, :3] = direction * SPACING[::-1]
    affine[:3, 3] = (-120.0, 35.0, 900.0)
    return affine


def test_there_are_48_signed_permutations():
    assert len({matrix.tobytes() for matrix in SIGNED_PERMUTATIONS}) == 48


tilts = st.builds(
    lambda a, b, c: Rotation.from_euler("zyx", (a, b, c), degrees=True).as_matrix(), *[st.floats(-14, 14)] * 3
)


@given(st.sampled_from(SIGNED_PERMUTATIONS), tilts)
def test_round_trip_is_the_identity(direction, tilt):
    orientation = Orientation.of(affine_of(tilt @ direction))
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    there = orientation.canonical(array)
    assert (orientation.source(there) == array).all()
    # and the other way, from an array made on the canonical grid
    other = np.arange(there.size).reshape(there.shape)
    assert (orientation.canonical(orientation.source(other)) == other).all()


@given(st.sampled_from(SIGNED_PERMUTATIONS), tilts)
def test_canonical_indices_grow_upwards_backwards_and_leftwards(direction, tilt):
    """Every voxel carries its own LPS coordinates; along each canonical axis the right one grows, most of all."""
    affine = affine_of(tilt @ direction)
    orientation = Orientation.of(affine)
    k, j, i = np.indices(SHAPE)
    for axis, coordinate in enumerate((2, 1, 0)):  # z, y, x along axes 0, 1, 2
        row = affine[coordinate]
        values = row[0] * i + row[1] * j + row[2] * k + row[3]
        steps = np.diff(orientation.canonical(values), axis=axis)
        expected = orientation.spacing(SPACING)[axis]
        assert (steps > 0.8 * expected).all()
        assert (steps <= expected + 1e-9).all()


@pytest.mark.parametrize("direction", SIGNED_PERMUTATIONS)
def test_a_marked_point_is_where_canonical_says(direction):
    """Mark the voxel that lies furthest left, front and feet: canonical index (0, 0, last)."""
    affine = affine_of(direction)
    k, j, i = np.indices(SHAPE)
    x, y, z = np.tensordot(affine[:3, :3], np.stack((i, j, k)), 1)
    marked = np.zeros(SHAPE, bool)
    marked[np.unravel_index(np.argmax(x - y - z), SHAPE)] = True
    canonical = Orientation.of(affine).canonical(marked)
    assert canonical[0, 0, -1]
    assert canonical.sum() == 1


def test_head_first_supine_axial_is_canonical_already():
    orientation = Orientation.of(affine_of(np.eye(3)))
    assert orientation == Orientation((0, 1, 2), ())
    assert orientation.spacing(SPACING) == SPACING


def test_a_coronal_stack_turns_into_axial_slices():
    # columns to the left, rows downwards, slices backwards
    direction = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float)
    orientation = Orientation.of(affine_of(direction))
    array = np.zeros((30, 40, 50))
    assert orientation.canonical(array).shape == (40, 30, 50)
    assert orientation.spacing(SPACING) == (0.8, 2.0, 0.7)


@given(st.floats(-180, 180), st.floats(-180, 180), st.floats(-180, 180))
def test_axes_are_a_permutation_for_any_rotation(a, b, c):
    direction = Rotation.from_euler("zyx", (a, b, c), degrees=True).as_matrix()
    assert sorted(Orientation.of(affine_of(direction)).axes) == [0, 1, 2]
