"""The body is found whatever lies around it and wherever it lies; lungs are always inside, air outside never."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from models.body import find_body
from models.phantom.draw import Phantom, phantom
from models.training import surroundings
from models.training.robustness import AIR_HU, padded, rotated, with_couch

Spacing = tuple[float, float, float]


@pytest.fixture(scope="module")
def chest() -> Phantom:
    return phantom(4100, shape=(40, 160, 160), severity=0, noise_hu=15.0)


def mask_of(hu: np.ndarray, spacing: Spacing) -> np.ndarray:
    hu = np.ascontiguousarray(hu, np.int16)
    return find_body(hu, spacing).mask(1, ((0, hu.shape[1]), (0, hu.shape[2])), hu.shape[1:])


def wide(hu: np.ndarray, lungs: np.ndarray, spacing: Spacing, shift: tuple[float, float] = (0, 0)) -> tuple:
    """Image and lungs in a field of 650 mm."""
    label = padded(lungs.astype(np.int16) + AIR_HU, spacing, 650, shift) - AIR_HU
    return padded(hu, spacing, 650, shift), label > 0


def far_from(lungs: np.ndarray, spacing: Spacing, mm: float) -> np.ndarray:
    """Rows and columns further than this from the box of the lungs."""
    far = np.ones(lungs.shape, bool)
    box = []
    for axis in (1, 2):
        hit = np.flatnonzero(lungs.any(axis=(0, 3 - axis)))
        reach = round(mm / spacing[axis])
        box.append(slice(max(0, hit[0] - reach), hit[-1] + 1 + reach))
    far[:, box[0], box[1]] = False
    return far


@settings(max_examples=12)
@given(y=st.floats(-100, 100), x=st.floats(-100, 100), couch=st.sampled_from([None, False, True]))
def test_lungs_lie_in_the_body_and_the_room_does_not(chest: Phantom, y: float, x: float, couch: bool | None) -> None:
    hu, lungs = wide(chest.hu, chest.lungs, chest.spacing, (y, x))
    if couch is not None:
        hu = with_couch(hu, chest.spacing, front=couch)
    body = mask_of(hu, chest.spacing)
    assert body[lungs].all()
    assert not body[far_from(lungs, chest.spacing, 130)].any()


@pytest.mark.parametrize("degrees", [-90, -15, 15, 180])
def test_posture_does_not_matter(chest: Phantom, degrees: float) -> None:
    hu, lungs = wide(chest.hu, chest.lungs, chest.spacing)
    turned = rotated(lungs.astype(np.int16) * 1000 + AIR_HU, degrees) > -100
    assert mask_of(rotated(hu, degrees), chest.spacing)[turned].all()


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_arms_and_couch_beside_and_below(chest: Phantom, seed: int, up: bool) -> None:
    rng = np.random.default_rng(seed)
    hu, lungs = wide(chest.hu, chest.lungs, chest.spacing)
    trunk = mask_of(hu, chest.spacing)
    drawn = hu.astype(np.float32)
    surroundings.add_arms(rng, drawn, trunk, chest.spacing[1], up=up)
    surroundings.add_couch(rng, drawn, trunk | (drawn > -300), chest.spacing[1])
    surroundings.add_clutter(rng, drawn, trunk, chest.spacing[1])
    body = mask_of(drawn, chest.spacing)
    assert body[lungs].all()
    free = (drawn == AIR_HU) & far_from(lungs, chest.spacing, 60)
    assert body[free].mean() < 0.12, "air between arm and trunk at most"


@pytest.mark.parametrize("cut", [np.s_[:, :, 45:], np.s_[:, :, :90], np.s_[:, 50:], np.s_[:, 40:120, 40:120]])
def test_a_lung_that_the_field_cuts_open_is_inside(chest: Phantom, cut: tuple[slice, ...]) -> None:
    body = mask_of(chest.hu[cut], chest.spacing)
    lungs = chest.lungs[cut] > 0
    assert lungs.any()
    assert body[lungs].mean() > 0.995


def test_a_circle_of_reconstruction_within_the_chest(chest: Phantom) -> None:
    y, x = np.ogrid[:160, :160]
    outside = (y - 80) ** 2 + (x - 80) ** 2 > 55**2
    body = mask_of(np.where(outside, -2000, chest.hu), chest.spacing)
    assert body[(chest.lungs > 0) & ~outside].mean() > 0.995
    assert not body[:, :15].any()


def test_a_child_is_narrow_and_a_cut_patient_of_unknown_width(chest: Phantom) -> None:
    hu, _ = wide(chest.hu, chest.lungs, chest.spacing)
    adult = find_body(hu, chest.spacing).width_mm
    small = find_body(hu, tuple(0.5 * mm for mm in chest.spacing)).width_mm
    assert adult is not None
    assert small is not None
    assert small == pytest.approx(adult / 2, rel=0.05)
    assert find_body(np.ascontiguousarray(chest.hu[:, :, 30:]), chest.spacing).width_mm is None


@pytest.mark.parametrize("hu", [np.full((3, 40, 50), -1000), np.full((1, 1, 1), 40), np.full((4, 9, 9), -3024)])
def test_where_there_is_nobody_it_is_all_there_is(hu: np.ndarray) -> None:
    body = find_body(hu.astype(np.int16), (5.0, 7.0, 7.0))
    assert (body.rows, body.columns) == (slice(0, hu.shape[1]), slice(0, hu.shape[2]))


def test_the_sketch_does_not_grow_with_the_volume(chest: Phantom) -> None:
    fine = find_body(np.repeat(chest.hu, 12, 0).repeat(2, 2), (0.7, chest.spacing[1], chest.spacing[2] / 2))
    assert fine._sketch.shape[0] <= len(chest.hu) * 12 * 0.7 / 4
    assert max(fine._sketch.shape[1:]) <= 200
