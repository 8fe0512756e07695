"""What is drawn into a chest and around it is what its masks say."""

from __future__ import annotations

import numpy as np
import pytest

from models.phantom import thorax
from models.phantom.draw import Phantom, phantom
from models.phantom.grid import Grid
from models.training import surroundings
from models.training.robustness import AIR_HU, KNOWN_TOLERANCE, aerated, known, litres, padded, rotated, with_couch

SHAPE = (24, 96, 112)


@pytest.fixture(scope="module")
def plain() -> Phantom:
    return phantom(41, shape=SHAPE, severity=0, noise_hu=5.0)


def drawn(finding: str) -> Phantom:
    return phantom(41, shape=SHAPE, severity=0, noise_hu=5.0, findings=[finding])


@pytest.mark.parametrize("finding", ["consolidated lobe", "white lung"])
def test_lung_without_air_is_lung(plain: Phantom, finding: str) -> None:
    changed = drawn(finding)
    assert np.array_equal(changed.lungs, plain.lungs)
    solid = (changed.hu > -300) & (plain.hu < -600) & (plain.lungs > 0)
    assert solid.sum() > 0.08 * (plain.lungs > 0).sum()
    sides = [int((solid & (plain.lungs == side)).sum()) for side in (1, 2)]
    assert min(sides) < 0.05 * max(sides), "one lung alone"


@pytest.mark.parametrize("finding", ["large effusion", "collapsed lung", "absent lung", "pneumothorax"])
def test_what_takes_the_place_of_lung_is_none(plain: Phantom, finding: str) -> None:
    changed = drawn(finding)
    gone = (plain.lungs > 0) & (changed.lungs == 0)
    assert gone.sum() > 0.05 * (plain.lungs > 0).sum()
    assert not ((plain.lungs == 0) & (changed.lungs > 0)).any()
    sides = {side: (changed.lungs == side).sum() / (plain.lungs == side).sum() for side in (1, 2)}
    assert max(sides.values()) == 1.0
    assert (min(sides.values()) == 0) == (finding == "absent lung")
    middle = np.median(changed.hu[gone])
    assert middle < -950 if finding == "pneumothorax" else -20 < middle < 60


def test_fluid_lies_at_the_back_and_gas_in_front(plain: Phantom) -> None:
    rows = np.indices(SHAPE)[1]
    for finding, sign in (("large effusion", 1), ("pneumothorax", -1)):
        gone = (plain.lungs > 0) & (drawn(finding).lungs == 0)
        side = plain.lungs == plain.lungs[gone][0]
        assert sign * (rows[gone].mean() - rows[side].mean()) > 2


def test_a_single_slice_will_do() -> None:
    for finding, (_, add) in thorax.FINDINGS.items():
        rng = np.random.default_rng(1)
        hu, lungs = np.full((1, 80, 100), 40.0, np.float32), np.zeros((1, 80, 100), np.uint8)
        lungs[0, 20:60, 10:40], lungs[0, 20:60, 60:90] = 1, 2
        hu[lungs > 0] = -850
        add(rng, Grid((1, 80, 100), (2.5, 3.0, 3.0), (0.0, -120.0, -150.0)), hu, lungs, np.zeros_like(hu))
        assert np.isfinite(hu).all(), finding
        assert (hu[lungs > 0] > -300).any() or (lungs > 0).sum() < 2400, finding
        empty = np.zeros_like(lungs)
        add(rng, Grid((1, 80, 100), (2.5, 3.0, 3.0), (0.0, -120.0, -150.0)), hu, empty, np.zeros_like(hu))


def test_an_unknown_finding_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown findings"):
        phantom(1, shape=(8, 16, 16), findings=["a third lung"])


@pytest.mark.parametrize("seed", range(4))
def test_nothing_around_is_drawn_into_the_body(plain: Phantom, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hu = padded(plain.hu, plain.spacing, 600).astype(np.float32)
    body = hu > AIR_HU + 300
    before = hu.copy()
    surroundings.add_arms(rng, hu, body, plain.spacing[1])
    surroundings.add_couch(rng, hu, body, plain.spacing[1])
    surroundings.add_clutter(rng, hu, body, plain.spacing[1])
    surroundings.add_dirty_air(rng, hu, body)
    assert np.array_equal(hu[body], before[body])
    assert (np.abs(hu - before) > 100).sum() > 2000


def test_changes_leave_the_patient_alone(plain: Phantom) -> None:
    wide = padded(plain.hu, plain.spacing, 600, (40, -30))
    assert min(n * mm for n, mm in zip(wide.shape[1:], plain.spacing[1:], strict=True)) > 595
    assert (wide > -900).sum() == (plain.hu > -900).sum()
    couched = with_couch(wide, plain.spacing)
    rows = np.flatnonzero((couched != wide).any((0, 2)))
    assert (couched[wide > -300] == wide[wide > -300]).all()
    assert rows.min() > np.median(np.nonzero(wide > -300)[1])
    front = np.flatnonzero((with_couch(wide, plain.spacing, front=True) != wide).any((0, 2)))
    assert front.max() < rows.min()
    lungs = rotated((plain.lungs > 0).astype(np.int16) * 1000 + AIR_HU, 15) > -500
    assert lungs.sum() == pytest.approx((plain.lungs > 0).sum(), rel=0.03)


def test_a_known_chest_is_as_its_masks_say() -> None:
    hu, lungs, spacing = known(5000, "absent lung")
    sides = litres(lungs, spacing)
    assert sorted(volume > 0.5 for volume in sides.values()) == [False, True]
    true = aerated(lungs, hu, spacing)
    assert sum(true.values()) == pytest.approx(sum(sides.values()), rel=2 * KNOWN_TOLERANCE)
    _, small, fine = known(5000, "child")
    assert fine[1] < 1.5
    assert 0.1 < sum(litres(small, fine).values()) < 3
