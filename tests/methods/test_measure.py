from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from models.calibration import LesionCalibration
from models.labels import LEFT, RIGHT
from node.images.volume import SourceSlice, Volume
from node.methods.pneumonia.measure import measure

#: Of the shipped model, mm³.
SMALLEST = 100.0


def volume_of(hu, spacing=(5.0, 5.0, 4.0)):
    """Axial volume; voxels of 100 mm³ unless said, so that every voxel is big enough to be a lesion."""
    affine = np.diag([spacing[2], spacing[1], spacing[0], 1.0])
    sources = tuple(SourceSlice(Path("x"), "1.2", f"1.2.{k}", None, (0.0, 0.0, k * spacing[0])) for k in range(len(hu)))
    return Volume(np.asarray(hu, np.int16), affine, sources, "1", "2", "3")


def test_worked_by_hand():
    lungs = np.zeros((3, 4, 6), np.uint8)
    lungs[:, 1:3, 0:3] = RIGHT  # 18 voxels
    lungs[:, 1:3, 3:6] = LEFT  # 18 voxels
    hu = np.full(lungs.shape, -800)
    probability = np.zeros(lungs.shape, np.float32)
    # One lesion of 4 voxels: 1 in the right lung, 3 in the left; most of its area on slice 1.
    for k, j, i, p in ((0, 1, 2, 0.5), (1, 1, 3, 0.75), (1, 2, 3, 0.75), (2, 1, 4, 1.0)):
        probability[k, j, i], hu[k, j, i] = p, -100 * k
    # Another of one voxel at the far side, and a certain one outside the lungs.
    probability[0, 2, 0], hu[0, 2, 0] = 0.9, -200
    probability[0, 0, 5] = 1.0

    found = measure(volume_of(hu), lungs, probability, 0.5, SMALLEST)

    assert np.argwhere(found.lesions == 1).tolist() == [[0, 1, 2], [1, 1, 3], [1, 2, 3], [2, 1, 4]]
    assert np.argwhere(found.lesions == 2).tolist() == [[0, 2, 0]]
    assert found.lesions.dtype == np.uint16
    big, small = found.lesion_list
    assert (big.label, big.side, big.key_slice, big.box) == (1, "left", 1, (0, 3, 1, 3, 2, 5))
    assert big.probability == pytest.approx(0.75)
    assert big.volume_ml == pytest.approx(0.4)
    assert big.mean_hu == pytest.approx(-100)
    assert (small.label, small.side, small.key_slice, small.box) == (2, "right", 0, (0, 1, 2, 3, 0, 1))

    assert found.right.volume_ml == pytest.approx(1.8)
    assert found.right.infected_ml == pytest.approx(0.2)
    assert found.right.mean_hu == pytest.approx((16 * -800 + 0 - 200) / 18)
    assert found.right.infected_mean_hu == pytest.approx(-100)
    assert found.right.infected_share == pytest.approx(1 / 9)
    assert found.left.infected_ml == pytest.approx(0.3)
    assert found.left.infected_mean_hu == pytest.approx(-400 / 3)
    assert found.both.volume_ml == pytest.approx(3.6)
    assert found.both.infected_mean_hu == pytest.approx(-600 / 5)


def test_nothing_found():
    lungs = np.zeros((2, 3, 4), np.uint8)
    lungs[0, 0, 0] = RIGHT
    found = measure(volume_of(np.full(lungs.shape, -700)), lungs, np.zeros(lungs.shape, np.float32), 0.5, SMALLEST)
    assert found.lesion_list == ()
    assert not found.lesions.any()
    assert found.right.mean_hu == -700
    assert math.isnan(found.right.infected_mean_hu)
    assert found.left.volume_ml == 0
    assert math.isnan(found.left.mean_hu)
    assert found.left.infected_share == 0


def test_islands_under_a_hundred_cubic_millimetres_are_healthy_lung():
    lungs = np.full((1, 3, 7), RIGHT, np.uint8)
    probability = np.zeros(lungs.shape, np.float32)
    probability[0, 0, 0:3] = 0.9  # 3 voxels of 33 mm³
    probability[0, 2, 3:7] = 0.9  # 4 voxels
    found = measure(volume_of(np.zeros(lungs.shape), (3.3, 5.0, 2.0)), lungs, probability, 0.5, SMALLEST)
    assert found.lesions[0].tolist() == [[0] * 7, [0] * 7, [0, 0, 0, 1, 1, 1, 1]]
    assert found.both.infected_ml == pytest.approx(4 * 0.033)


def test_exactly_a_hundred_cubic_millimetres_is_a_lesion_despite_rounding():
    # 1000 voxels of 0.1 mm³, which has no exact binary form.
    lungs = np.full((10, 10, 10), LEFT, np.uint8)
    found = measure(volume_of(np.zeros(lungs.shape), (0.1, 1.0, 1.0)), lungs, np.ones(lungs.shape), 0.5, SMALLEST)
    assert len(found.lesion_list) == 1


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        measure(volume_of(np.zeros((2, 3, 4))), np.zeros((2, 3, 5), np.uint8), np.zeros((2, 3, 4)), 0.5, SMALLEST)


@pytest.mark.parametrize(("smallest", "found"), [(20.0, [4, 3, 2]), (70.0, [4, 3]), (120.0, [4])])
def test_the_smallest_lesion_is_the_model_s(smallest, found):
    lungs = np.full((1, 5, 7), RIGHT, np.uint8)
    probability = np.zeros(lungs.shape, np.float32)
    for row, voxels in ((0, 2), (2, 3), (4, 4)):  # of 33 mm³
        probability[0, row, :voxels] = 0.9
    measured = measure(volume_of(np.zeros(lungs.shape), (3.3, 5.0, 2.0)), lungs, probability, 0.5, smallest)
    assert [round(lesion.volume_ml / 0.033) for lesion in measured.lesion_list] == found


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.uint8, (4, 5, 6), elements=st.integers(0, 2)),
    hnp.arrays(np.float32, (4, 5, 6), elements=st.floats(0, 1, width=32)),
    hnp.arrays(np.int16, (4, 5, 6), elements=st.integers(-1024, 200)),
    st.integers(1, 4),
    st.sampled_from([np.float16, np.float32]),
)
def test_agrees_with_plain_scipy(lungs, probability, hu, minimum, kind):
    probability = probability.astype(kind)
    voxel_mm3 = SMALLEST / minimum
    volume = volume_of(hu, (voxel_mm3, 1.0, 1.0))
    found = measure(volume, lungs, probability, 0.6, SMALLEST)

    infection = (probability >= kind(0.6)) & (lungs > 0)
    labels, count = ndimage.label(infection, np.ones((3, 3, 3)))
    expected = [labels == n for n in range(1, count + 1) if (labels == n).sum() >= minimum]
    assert len(found.lesion_list) == len(expected)
    assert {mask.tobytes() for mask in expected} == {
        (found.lesions == lesion.label).tobytes() for lesion in found.lesion_list
    }
    volumes = [lesion.volume_ml for lesion in found.lesion_list]
    assert volumes == sorted(volumes, reverse=True)
    assert [lesion.label for lesion in found.lesion_list] == list(range(1, len(expected) + 1))
    for lesion in found.lesion_list:
        mask = found.lesions == lesion.label
        where = np.argwhere(mask)
        box = np.stack([where.min(axis=0), where.max(axis=0) + 1], axis=1).ravel()
        assert lesion.box == tuple(box)
        assert lesion.key_slice == mask.sum(axis=(1, 2)).argmax()
        assert lesion.volume_ml == pytest.approx(mask.sum() * voxel_mm3 / 1000)
        assert lesion.probability == pytest.approx(probability[mask].mean(dtype=float))
        assert lesion.mean_hu == pytest.approx(hu[mask].mean())
        assert lesion.side == ("left" if (lungs[mask] == LEFT).mean() > 0.5 else "right")

    infected = found.lesions > 0
    for region, mask in ((found.right, lungs == RIGHT), (found.left, lungs == LEFT), (found.both, lungs > 0)):
        assert region.volume_ml == pytest.approx(mask.sum() * voxel_mm3 / 1000)
        assert region.infected_ml == pytest.approx((mask & infected).sum() * voxel_mm3 / 1000)
        for value, part in ((region.mean_hu, mask), (region.infected_mean_hu, mask & infected)):
            assert value == pytest.approx(hu[part].mean() if part.any() else math.nan, nan_ok=True)


def test_a_calibration_replaces_the_mean_and_drops_what_is_improbable():
    lungs = np.full((4, 6, 6), RIGHT, np.uint8)
    probability = np.zeros(lungs.shape, np.float32)
    probability[0:2, 0:3, 0:3] = 0.9  # 18 voxels
    probability[3, 5, 5] = 0.95  # one voxel, more probable by its mean
    probability[3, 0, 5] = 0.6
    hu = np.full(lungs.shape, -700)
    by_size = LesionCalibration(intercept=-10.0, mean=0.0, maximum=0.0, log_volume=1.5, floor=0.2)
    found = measure(volume_of(hu), lungs, probability, 0.5, SMALLEST, by_size)
    (large,) = found.lesion_list
    assert large.label == 1
    assert large.volume_ml == pytest.approx(1.8)
    assert large.probability == pytest.approx(1 / (1 + math.exp(10 - 1.5 * math.log(1800))))
    assert set(np.unique(found.lesions)) == {0, 1}
    assert (found.lesions == 1).sum() == 18
    assert found.right.infected_ml == pytest.approx(1.8)

    by_maximum = LesionCalibration(intercept=-20.0, mean=0.0, maximum=22.0, log_volume=0.0, floor=0.5)
    found = measure(volume_of(hu), lungs, probability, 0.5, SMALLEST, by_maximum)
    only = found.lesion_list[0]
    assert len(found.lesion_list) == 1
    assert (only.label, only.box) == (1, (3, 4, 5, 6, 5, 6))
    assert np.argwhere(found.lesions == 1).tolist() == [[3, 5, 5]]

    kept = measure(volume_of(hu), lungs, probability, 0.5, SMALLEST, LesionCalibration(0.0, 0.0, 0.0, 0.0))
    assert [lesion.probability for lesion in kept.lesion_list] == [0.5] * 3
