"""The Segmenter on phantoms, whose masks are exact."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import ndimage

from models.body import find_body
from models.phantom.draw import Phantom, phantom
from models.registry import load_bundle
from models.segmenter import inference
from models.segmenter.inference import (
    LEFT,
    RIGHT,
    Segmentation,
    Segmenter,
    _airways,
    _crumbs,
    _largest_each,
    _on_strides,
    _on_strides_from,
    _without_gas,
)
from models.training import robustness

#: Honest floors on phantoms of 40 to 72 slices; the held-out figures are in the bundles' cards.
LUNG_DICE, SIDE_DICE = 0.90, 0.88


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (found & truth).sum() / max(found.sum() + truth.sum(), 1))


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(load_bundle("lungs"), load_bundle("infection"), "cpu")


@pytest.fixture(scope="module")
def diseased() -> Phantom:
    return phantom(3001, shape=(72, 192, 192), severity=3)


@pytest.fixture(scope="module")
def found(segmenter: Segmenter, diseased: Phantom) -> Segmentation:
    return segmenter(diseased.hu, diseased.spacing)


def test_lungs_whole_and_on_their_sides(found: Segmentation, diseased: Phantom) -> None:
    assert found.lungs.dtype == np.uint8
    assert found.lungs.shape == diseased.hu.shape
    assert dice(found.lungs > 0, diseased.lungs > 0) > LUNG_DICE
    for side in (RIGHT, LEFT):
        assert dice(found.lungs == side, diseased.lungs == side) > SIDE_DICE


def test_infection_is_found_where_it_is(found: Segmentation, diseased: Phantom) -> None:
    assert found.probability.dtype == np.float16
    assert found.probability.min() >= 0
    assert found.probability.max() <= 1
    assert not found.probability[found.lungs == 0].any()
    assert dice(found.probability >= found.threshold, diseased.infection) > 0.45
    inside = found.probability[diseased.infection & (found.lungs > 0)].mean()
    assert inside > 3 * found.probability[(diseased.lungs > 0) & ~diseased.infection].mean()


def test_healthy_lungs_stay_healthy(segmenter: Segmenter) -> None:
    healthy = phantom(3002, shape=(40, 160, 160), severity=0)
    found = segmenter(healthy.hu, healthy.spacing)
    infected = (found.probability >= found.threshold).sum()
    assert infected < 0.01 * (found.lungs > 0).sum()


def test_doing_it_twice_changes_nothing(segmenter: Segmenter, diseased: Phantom, found: Segmentation) -> None:
    again = segmenter(diseased.hu, diseased.spacing)
    assert np.array_equal(again.lungs, found.lungs)
    assert np.array_equal(again.probability, found.probability)


def test_thin_slices_and_uneven_pixels(segmenter: Segmenter) -> None:
    drawn = phantom(3003, shape=(150, 96, 128), severity=1)
    assert drawn.spacing[0] < 3
    fine = (drawn.spacing[0] / 2, drawn.spacing[1], drawn.spacing[2])
    found = segmenter(np.repeat(drawn.hu, 2, 0), fine)
    truth = np.repeat(drawn.lungs, 2, 0)
    assert dice(found.lungs > 0, truth > 0) > LUNG_DICE
    assert dice(found.lungs == LEFT, truth == LEFT) > SIDE_DICE


def test_lungs_between_slabs_that_are_alike_are_those_that_the_network_would_see(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = phantom(3004, shape=(160, 128, 128), severity=2)
    assert drawn.spacing[0] < 3
    seen: list[int] = []
    run = segmenter._lungs.run
    monkeypatch.setattr(
        segmenter._lungs, "run", lambda image, rows, plane: seen.extend(rows) or run(image, rows, plane)
    )

    some = segmenter(drawn.hu, drawn.spacing)
    slabs = len(seen)
    monkeypatch.setattr(inference, "_LEAP_MM", 0.0)
    every = segmenter(drawn.hu, drawn.spacing)

    assert sorted(seen[:slabs]) == sorted(set(seen[:slabs]))
    assert slabs < 0.85 * (len(seen) - slabs)
    assert dice(some.lungs > 0, every.lungs > 0) > 0.995
    assert max(np.count_nonzero(a != b) for a, b in zip(some.lungs > 0, every.lungs > 0, strict=True)) < 0.1 * max(
        np.count_nonzero(plane) for plane in every.lungs
    )


def test_mirrored_volumes_swap_sides(segmenter: Segmenter, diseased: Phantom) -> None:
    found = segmenter(np.ascontiguousarray(diseased.hu[:, :, ::-1]), diseased.spacing)
    assert dice(found.lungs == LEFT, diseased.lungs[:, :, ::-1] == RIGHT) > SIDE_DICE


@pytest.mark.parametrize("front", [False, True])
def test_a_wide_field_and_a_couch_change_nothing(segmenter: Segmenter, front: bool) -> None:
    drawn = phantom(4001, shape=(40, 160, 160), severity=0)
    before = robustness.litres(segmenter.lungs(drawn.hu, drawn.spacing), drawn.spacing)
    wide = robustness.padded(drawn.hu, drawn.spacing, 650, (0, 100))
    after = robustness.litres(
        segmenter.lungs(robustness.with_couch(wide, drawn.spacing, front=front), drawn.spacing), drawn.spacing
    )
    assert after == pytest.approx(before, rel=robustness.TOLERANCE)


def test_a_prone_patient_called_supine_keeps_the_sides(segmenter: Segmenter, diseased: Phantom) -> None:
    turned = np.ascontiguousarray(diseased.hu[:, ::-1, ::-1])
    found = segmenter(turned, diseased.spacing)
    assert dice(found.lungs == LEFT, diseased.lungs[:, ::-1, ::-1] == LEFT) > SIDE_DICE
    assert len(found.notes) == 1
    assert found.notes[0].startswith("Right and left follow the anatomy")


def test_a_child_is_an_adult_in_smaller_pixels(segmenter: Segmenter) -> None:
    drawn = phantom(4103, shape=(40, 160, 160), severity=0)
    wide = robustness.padded(drawn.hu, drawn.spacing, 1.1 * 160 * drawn.spacing[1])
    spacing = (0.5 * drawn.spacing[0], 0.5 * drawn.spacing[1], 0.5 * drawn.spacing[2])
    truth = robustness.litres(drawn.lungs, spacing)
    assert robustness.litres(segmenter.lungs(wide, spacing), spacing) == pytest.approx(truth, rel=0.08)


def test_nothing_outside_the_body_is_lung(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = phantom(4001, shape=(16, 96, 96), severity=0)
    wide = robustness.padded(drawn.hu, drawn.spacing, 650)

    def everywhere(image: np.ndarray, rows: list[int], plane: tuple[slice, slice]) -> Iterator[np.ndarray]:
        for row in rows:
            shape = image[row][plane].shape
            yield np.stack([np.zeros(shape), *np.full((2, *shape), 9.0)]).astype(np.float32)

    monkeypatch.setattr(segmenter._lungs, "run", everywhere)
    found = segmenter.lungs(wide, drawn.spacing) > 0
    assert found.any()
    body = find_body(wide, drawn.spacing).mask(1, ((0, wide.shape[1]), (0, wide.shape[2])), wide.shape[1:])
    assert not (found & ~ndimage.binary_dilation(body, iterations=2)).any()


def test_specks_of_a_lung_that_is_not_there_go(segmenter: Segmenter) -> None:
    drawn = phantom(4001, shape=(40, 128, 128), severity=0)
    half = np.ascontiguousarray(drawn.hu[:, :, : 5 + int(np.flatnonzero((drawn.lungs == LEFT).any((0, 1)))[0])])
    ml = robustness.litres(segmenter.lungs(half, drawn.spacing), drawn.spacing)
    assert ml["right"] > 0.5
    assert ml["left"] == 0


def test_air_and_noise_have_no_lungs(segmenter: Segmenter) -> None:
    rng = np.random.default_rng(0)
    for hu in (np.full((6, 40, 50), -1000), rng.normal(0, 30, (6, 40, 50)), np.full((1, 1, 1), 40)):
        found = segmenter(hu.astype(np.int16), (5.0, 7.0, 7.0))
        assert not found.lungs.any()
        assert not found.probability.any()


def test_progress_and_timings(segmenter: Segmenter) -> None:
    told: list[tuple[str, float]] = []
    small = phantom(1, shape=(20, 64, 64))
    found = segmenter(small.hu, small.spacing, lambda stage, done: told.append((stage, done)))
    for stage in ("lungs", "infection"):
        parts = [done for name, done in told if name == stage]
        assert parts == sorted(parts)
        assert parts[-1] == 1.0
    assert set(found.timings) >= {"resample", "lungs", "infection", "restore"}


def chest() -> tuple[np.ndarray, np.ndarray]:
    """Label and HU of two box-shaped lungs, 2 mm voxels."""
    label = np.zeros((10, 60, 100), np.uint8)
    label[1:9, 10:50, 5:40], label[1:9, 10:50, 60:95] = RIGHT, LEFT
    return label, np.where(label > 0, -850, 40).astype(np.float32)


def test_the_trachea_is_no_lung_but_a_thin_apex_is() -> None:
    truth, hu = chest()
    truth[9, 20:26, 20:26] = RIGHT
    hu[9, 20:26, 20:26] = -860
    label = truth.copy()
    label[2:10, 26:34, 46:54] = RIGHT
    hu[2:10, 26:34, 46:54] = -990
    assert np.array_equal(_without_gas(label, hu, (2.0, 2.0, 2.0)), truth)


def test_a_main_bronchus_is_no_lung_but_a_bulla_is() -> None:
    y, x = np.mgrid[:60, :60]
    hu = np.full((3, 60, 60), 40.0, np.float32)
    hu[:, :, 30:] = -860.0
    bronchus = np.broadcast_to((y - 30) ** 2 + (x - 18) ** 2 <= 16, hu.shape)
    bulla = np.broadcast_to((y - 30) ** 2 + (x - 46) ** 2 <= 16, hu.shape)
    hu[bronchus | bulla] = -990.0
    label = np.where(hu < -500, np.uint8(RIGHT), np.uint8(0))
    airways = _airways(label, hu, (2.0, 1.5, 1.5))
    assert airways[bronchus].all()
    assert not (airways & (label > 0) & ~bronchus).any()
    assert not _airways(np.where(bronchus, np.uint8(0), label), hu, (2.0, 1.5, 1.5)).any(), "not where no lung was seen"


def test_strays_change_sides_and_dust_goes() -> None:
    truth, _ = chest()
    label = truth.copy()
    label[3:6, 20:30, 90:95] = RIGHT  # A patch of the left lung called right.
    label[0, 2:4, 2:4] = LEFT  # Dust outside.
    assert np.array_equal(_largest_each(label), truth)


@pytest.mark.parametrize(("shape", "spacing"), [((4, 4), (1, 1, 1)), ((0, 4, 4), (1, 1, 1)), ((4, 4, 4), (1, 0, 1))])
def test_what_is_no_volume(segmenter: Segmenter, shape: tuple[int, ...], spacing: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="a volume"):
        segmenter(np.zeros(shape, np.int16), spacing)


def test_a_lesion_has_a_volume_and_more_than_one_thin_slab() -> None:
    positive = np.zeros((4, 12, 12), bool)
    positive[0, :6, :6] = True  # 162 mm³ on one slab of 2 mm
    positive[1:3, 8:, 8:] = True  # 144 mm³ over two
    positive[3, 0, 0] = True
    spacing = (2.0, 1.5, 1.5)
    assert np.array_equal(
        _crumbs(positive, spacing, 100.0, 3.0), positive & ~np.isin(np.arange(4), (1, 2))[:, None, None]
    )
    one = (positive * (np.arange(4) == 3)[:, None, None]).astype(bool)
    assert np.array_equal(_crumbs(positive, spacing, 100.0, 0.0), one)
    # A slab of 5 mm is more than 3 mm on its own.
    assert np.array_equal(_crumbs(positive, (5.0, 1.5, 1.5), 100.0, 3.0), one)
    assert not _crumbs(positive, spacing, 0.0, 0.0).any()
    assert not _crumbs(np.zeros_like(positive), spacing, 100.0, 3.0).any()


@given(st.integers(0, 400), st.integers(1, 300), st.integers(0, 600), st.sampled_from([16, 32]))
def test_a_window_lies_on_strides_from_a_pixel(start: int, length: int, middle: int, stride: int) -> None:
    window = _on_strides_from(middle, slice(start, start + length), stride)
    assert window.start <= start < start + length <= window.stop
    assert start - window.start < stride > window.stop - start - length
    assert (window.start - middle) % stride == (window.stop - window.start) % stride == 0


@given(st.integers(1, 600), st.data())
def test_a_window_lies_on_strides_about_its_box(size: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1))
    box = slice(start, data.draw(st.integers(start + 1, size)))
    window = _on_strides(box, size, 32)
    assert window.start <= box.start < box.stop <= window.stop <= size
    assert window.start % 32 == 0
    assert window.stop % 32 == 0 or window.stop == size
    assert box.start - window.start < 32 > window.stop - box.stop
