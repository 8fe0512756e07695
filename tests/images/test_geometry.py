from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from node.images.geometry import VolumeError, regular_grid

rotations = st.builds(
    lambda a, b, c: Rotation.from_euler("zyx", (a, b, c), degrees=True).as_matrix(),
    *[st.floats(-180, 180)] * 3,
)
corners = st.tuples(*[st.floats(-400, 400)] * 3)
spacings = st.floats(0.3, 10)


def stack(rotation, corner, spacing, count, sideways=0.0):
    """Positions of slices along the third axis of `rotation`, each `sideways` mm further along the second."""
    step = rotation[:, 2] * spacing + rotation[:, 1] * sideways
    return [tuple(np.asarray(corner) + n * step) for n in range(count)]


@given(rotations, corners, spacings, st.integers(2, 40), st.randoms(use_true_random=False))
def test_any_rotation_and_order_is_recovered(rotation, corner, spacing, count, rng):
    true = stack(rotation, corner, spacing, count)
    shuffled = rng.sample(range(count), count)
    order, affine = regular_grid([true[n] for n in shuffled], rotation[:, :2].T.ravel(), (0.9, 0.6), None)

    assert [shuffled[n] for n in order] == list(range(count))
    for k in range(count):
        assert affine @ (0, 0, k, 1) == pytest.approx([*true[k], 1], abs=1e-6)
    # PS3.3 C.7.6.2.1.1: column index along the row cosines, by the spacing between columns, and vice versa.
    assert (affine @ (1, 0, 0, 0))[:3] == pytest.approx(rotation[:, 0] * 0.6, abs=1e-9)
    assert (affine @ (0, 1, 0, 0))[:3] == pytest.approx(rotation[:, 1] * 0.9, abs=1e-9)
    assert np.linalg.det(affine[:3, :3]) > 0


@given(rotations, corners, spacings, st.integers(4, 40), st.data())
def test_any_missing_inner_slice_is_a_gap(rotation, corner, spacing, count, data):
    positions = stack(rotation, corner, spacing, count)
    missing = data.draw(st.integers(1, count - 2))
    del positions[missing]
    with pytest.raises(VolumeError, match=r"gap at [xyz] = .*expected") as caught:
        regular_grid(positions, rotation[:, :2].T.ravel(), (0.9, 0.6), None)
    said = re.search(r"mm: ([0-9.]+) mm between slices, expected ([0-9.]+)$", str(caught.value))
    assert [float(number) for number in said.groups()] == pytest.approx([2 * spacing, spacing], abs=0.0051)


@given(rotations, corners, spacings, st.integers(2, 40), st.data())
def test_any_repeated_position_is_refused(rotation, corner, spacing, count, data):
    positions = stack(rotation, corner, spacing, count)
    positions.append(positions[data.draw(st.integers(0, count - 1))])
    with pytest.raises(VolumeError, match="two slices at"):
        regular_grid(positions, rotation[:, :2].T.ravel(), (0.9, 0.6), None)


@given(rotations, corners, st.floats(1, 5), st.integers(5, 40), st.floats(3, 30))
def test_any_tilt_is_refused_in_degrees(rotation, corner, spacing, count, tilt):
    positions = stack(rotation, corner, spacing, count, sideways=spacing * np.tan(np.radians(tilt)))
    with pytest.raises(VolumeError, match="gantry tilt of") as caught:
        regular_grid(positions, rotation[:, :2].T.ravel(), (0.2, 0.2), None)
    said = re.search(r"tilt of ([0-9.]+)°", str(caught.value))
    assert float(said[1]) == pytest.approx(tilt, abs=0.051)


# Below 1 mm, rounding in all three coordinates is no longer a small part of an oblique step.
@given(rotations, corners, st.floats(1, 10), st.integers(2, 40))
def test_positions_rounded_to_a_tenth_of_a_millimetre_still_make_a_volume(rotation, corner, spacing, count):
    exact = stack(rotation, corner, spacing, count)
    rounded = [tuple(round(value, 1) for value in position) for position in exact]
    _, affine = regular_grid(rounded, rotation[:, :2].T.ravel(), (0.9, 0.9), None)
    for k in range(count):
        assert (affine @ (0, 0, k, 1))[:3] == pytest.approx(np.array(exact[k]), abs=0.1)


def test_thin_axial_slices_rounded_to_a_tenth_of_a_millimetre_make_a_volume():
    positions = [(0.0, 0.0, round(0.625 * n, 1)) for n in range(200)]
    _, affine = regular_grid(positions, (1, 0, 0, 0, 1, 0), (1, 1), None)
    assert affine[2, 2] == pytest.approx(0.625, abs=0.001)


def test_a_gap_is_placed_at_the_last_slice_before_it():
    positions = [(0.0, 0.0, z) for z in (1, 2, 3, 6, 7)]
    with pytest.raises(VolumeError) as caught:
        regular_grid(positions, (1, 0, 0, 0, 1, 0), (1, 1), None)
    assert str(caught.value) == "gap at z = 3.00 mm: 3.00 mm between slices, expected 1.00"


def test_further_gaps_are_counted():
    positions = [(0.0, 0.0, z) for z in (1, 2, 4, 5, 7, 8)]
    with pytest.raises(VolumeError, match=r"gap at z = 2.00 mm.*\(and 1 more\)"):
        regular_grid(positions, (1, 0, 0, 0, 1, 0), (1, 1), None)


def test_a_gap_in_a_coronal_stack_is_named_by_y():
    positions = [(0.0, y, 0.0) for y in (1, 2, 3, 5)]
    with pytest.raises(VolumeError, match=r"gap at y = 3.00 mm"):
        regular_grid(positions, (1, 0, 0, 0, 0, -1), (1, 1), None)


def test_uneven_spacing_says_how_far_off():
    positions = [(0.0, 0.0, z) for z in (0, 2, 4, 6.8, 8.8, 10.8)]
    with pytest.raises(VolumeError, match=r"uneven spacing: slices are 2.00 to 2.80 mm apart"):
        regular_grid(positions, (1, 0, 0, 0, 1, 0), (1, 1), None)


def test_one_slice_to_the_side_is_refused():
    positions = [(0.0, 0.0, 0.0), (0.0, 0.0, 2.0), (0.0, 9.0, 4.0), (0.0, 0.0, 6.0)]
    with pytest.raises(VolumeError, match=r"not in line: the one at z = 4.00 mm is 9.00 mm to the side"):
        regular_grid(positions, (1, 0, 0, 0, 1, 0), (1, 1), None)


@pytest.mark.parametrize(
    ("cosines", "message"),
    [
        ((1, 0, 0, 0.05, 0.99875, 0), "87.13° apart, not orthogonal"),
        ((1, 0, 0, 0, 0.9, 0), "lengths 1.0000 and 0.9000, not 1"),
        ((0, 0, 0, 0, 0, 0), "lengths 0.0000"),
    ],
)
def test_cosines_must_be_orthonormal(cosines, message):
    with pytest.raises(VolumeError, match=message):
        regular_grid([(0.0, 0.0, 0.0), (0.0, 0.0, 1.0)], cosines, (1, 1), None)


def test_a_single_slice_is_as_thick_as_it_says():
    _, affine = regular_grid([(5.0, 6.0, 7.0)], (1, 0, 0, 0, 0, -1), (1, 1), 3.0)
    assert (affine @ (0, 0, 1, 1)).tolist() == [5, 9, 7, 1]
    for unknown in (None, 0.0):
        with pytest.raises(VolumeError, match="single slice without Slice Thickness"):
            regular_grid([(5.0, 6.0, 7.0)], (1, 0, 0, 0, 1, 0), (1, 1), unknown)
