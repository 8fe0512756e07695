from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.rules.consecutive_slices import ConsecutiveSlices, consecutive_slices
from models.rules.lesion_boxes import Intensity, intensity
from models.rules.noisy_or import NoisyOr, noisy_or
from models.rules.open_lung import open_lung
from models.rules.statement import state

MILLIMETRE = (1.0, 1.0, 1.0)


def slices(pattern: str, pixels: int = 20) -> np.ndarray:
    """One slice of 5 x 5 pixels a character: 'x' with this many infected pixels, '.' with none."""
    infection = np.zeros((len(pattern), 25), bool)
    for k, character in enumerate(pattern):
        infection[k, : pixels * (character == "x")] = True
    return infection.reshape(-1, 5, 5)


# Consecutive slices


@pytest.mark.parametrize(
    ("pattern", "positive_slices", "longest", "positive"),
    [
        (".....", 0, 0, False),
        ("x", 1, 1, False),
        ("..xx.xxx.x", 6, 3, False),
        ("x" * 14, 14, 14, False),
        ("x" * 15, 15, 15, True),
        ("x" * 14 + "." + "x" * 14, 28, 14, False),
        (".." + "x" * 16 + ".x", 17, 16, True),
    ],
)
def test_fifteen_slices_in_a_row_are_positive(pattern, positive_slices, longest, positive):
    outcome = consecutive_slices(slices(pattern), (2.5, 1, 1))
    assert outcome == ConsecutiveSlices(positive_slices, longest, longest * 2.5, positive)
    assert (outcome.minimum_run, outcome.minimum_slice_area_mm2) == (15, 20)


@pytest.mark.parametrize(
    ("pixels", "spacing", "positive"),
    [
        (20, (1, 1, 1), 1),  # 20 mm², the least
        (19, (1, 1, 1), 0),
        (5, (9, 2, 2), 1),  # 5 pixels of 4 mm²; slice spacing plays no part
        (10, (1, 1.0, 2.0), 1),
        (9, (1, 1.0, 2.0), 0),
    ],
)
def test_a_slice_needs_twenty_square_millimetres(pixels, spacing, positive):
    assert consecutive_slices(slices("x", pixels), spacing).positive_slices == positive


@given(st.lists(st.booleans(), max_size=60))
def test_longest_run_agrees_with_brute_force(flags):
    infection = slices("".join("x" if flag else "." for flag in flags))
    longest = max(
        (b - a for a in range(len(flags)) for b in range(a + 1, len(flags) + 1) if all(flags[a:b])), default=0
    )
    outcome = consecutive_slices(infection, MILLIMETRE)
    assert outcome.longest_run == longest
    assert outcome.positive == (longest >= 15)
    assert outcome.positive_slices == sum(flags)


# Intensity


def plane(text: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in text.split()])


def test_boxes_over_lung_area_worked_by_hand():
    infection = np.stack(
        [
            # A corner of 2 x 3 and a single pixel: boxes of 6 and 1.
            plane("###..... #....... ........ .......#"),
            # A ring whose box holds another lesion's: 4 x 4 = 16, the inner one dropped.
            plane("####.... #..#.... #.##.... ####...."),
            # Touching at a corner: one component, its box 2 x 2 = 4.
            plane("........ .#...... ..#..... ........"),
            plane("........ ........ ........ ........"),
        ]
    )
    lungs = np.ones((4, 4, 8), np.uint8)
    outcome = intensity(lungs, infection, (5.0, 0.5, 0.5))
    assert outcome == Intensity(
        ratio=(6 + 1 + 16 + 4) / (4 * 32),
        boxes=4,
        grade="Alarming",
        box_area_mm2=27 * 0.25,
        lung_area_mm2=128 * 0.25,
        alarming_from=0.15,
    )


def test_a_box_wholly_in_another_is_dropped_and_one_that_sticks_out_is_not():
    around = plane("#####... #....... #.#..... #....... #####...")  # box 5 x 5, a pixel inside
    out = plane("#####... #....... #..####. #....... #####...")  # 5 x 5 and 1 x 4, partly inside
    lungs = np.ones((1, 5, 8), np.uint8)
    assert intensity(lungs, around[None], MILLIMETRE).boxes == 1
    assert intensity(lungs, around[None], MILLIMETRE).ratio == 25 / 40
    assert intensity(lungs, out[None], MILLIMETRE).boxes == 2
    assert intensity(lungs, out[None], MILLIMETRE).ratio == 29 / 40


def test_a_component_joined_at_corners_is_one_box_from_edge_to_edge():
    # cc3d 4.1.1 makes two components of it, one of them background.
    shape = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 1], [0, 1, 0]], np.uint8)
    infection = np.pad(shape, ((2, 1), (1, 3)))[None]

    found = intensity(np.ones_like(infection), infection, MILLIMETRE)

    assert (found.boxes, found.box_area_mm2) == (1, 15.0)


@pytest.mark.parametrize(
    ("boxed", "grade"), [(0, "not COVID-19-like"), (1, "Mild"), (14, "Mild"), (15, "Alarming"), (100, "Alarming")]
)
def test_grades_at_their_limits(boxed, grade):
    infection = np.zeros((1, 1, 100), bool)
    infection[..., :boxed] = True
    outcome = intensity(np.ones((1, 1, 100), np.uint8), infection, MILLIMETRE)
    assert (outcome.ratio, outcome.grade) == (boxed / 100, grade)


def test_areas_are_summed_over_slices_before_they_are_divided():
    lungs, infection = np.zeros((2, 10, 10), np.uint8), np.zeros((2, 10, 10), bool)
    lungs[0, :1], lungs[1] = 2, 1  # 10 and 100 pixels of lung
    infection[0, 0, :5] = True  # half the lung of the small slice
    outcome = intensity(lungs, infection, MILLIMETRE)
    assert outcome.ratio == 5 / 110
    assert outcome.grade == "Mild"


def test_infection_outside_the_lungs_or_without_lungs_does_not_count():
    infection = np.ones((1, 4, 4), bool)
    lungs = np.zeros((1, 4, 4), np.uint8)
    assert intensity(lungs, infection, MILLIMETRE).grade == "not COVID-19-like"
    assert intensity(lungs, infection, MILLIMETRE).ratio == 0
    lungs[0, 0, 0] = 1
    assert intensity(lungs, infection, MILLIMETRE).ratio == 1


@settings(deadline=None)
@given(hnp.arrays(bool, (3, 7, 6)), hnp.arrays(np.uint8, (3, 7, 6), elements=st.integers(0, 2)))
def test_intensity_has_at_least_the_infected_share_of_the_lung(infection, lungs):
    outcome = intensity(lungs, infection, MILLIMETRE)
    inside = np.count_nonzero(infection & (lungs > 0))
    assert outcome.ratio >= (inside / np.count_nonzero(lungs) if inside else 0) - 1e-12
    assert (outcome.boxes == 0) == (inside == 0)
    # Neither mirroring nor the order of slices matters.
    mirrored = intensity(lungs[::-1, ::-1, ::-1], infection[::-1, ::-1, ::-1], MILLIMETRE)
    assert mirrored == outcome


# Noisy-OR


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [([], 0.0), ([0.3], 0.3), ([0.5, 0.5], 0.75), ([0.9, 0.8, 0.5], 0.99), ([0.2, 1.0], 1.0), ([0, 0], 0.0)],
)
def test_noisy_or_by_hand(probabilities, expected):
    outcome = noisy_or(probabilities)
    assert outcome.probability == pytest.approx(expected, abs=1e-15)
    assert outcome.lesions == len(probabilities)


def test_noisy_or_of_many_tiny_probabilities_is_their_sum():
    assert noisy_or([1e-18] * 1000).probability == pytest.approx(1e-15, rel=1e-12)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_noisy_or_takes_probabilities_only(wrong):
    with pytest.raises(ValueError, match="between 0 and 1"):
        noisy_or([0.5, wrong])


probabilities = st.lists(st.floats(0, 1), max_size=30)


@given(probabilities, st.floats(0, 1), st.randoms(use_true_random=False))
def test_noisy_or_is_bounded_monotonic_and_blind_to_order(given_ones, further, rng):
    outcome = noisy_or(given_ones).probability
    assert max(given_ones, default=0) - 1e-12 <= outcome <= 1
    assert outcome == pytest.approx(1 - math.prod(1 - p for p in given_ones), abs=1e-12)
    assert noisy_or([*given_ones, further]).probability >= outcome
    shuffled = given_ones.copy()
    rng.shuffle(shuffled)
    assert noisy_or(shuffled) == noisy_or(given_ones)


# Open lung


def dark_slices(counts, shape=(512, 512), hu=-900) -> np.ndarray:
    """Soft tissue with this many dark pixels in the central region, and all of the rest of the image dark."""
    volume = np.full((len(counts), *shape), hu, np.int16)
    for k, count in enumerate(counts):
        region = np.zeros(100 * 250, np.int16)
        region[:count] = hu
        volume[k, 240:340, 120:370] = region.reshape(100, 250)
    return volume


def test_open_slices_are_those_above_the_published_threshold():
    # (7500 - 300) / 1.5 = 4800; a slice must have more.
    outcome = open_lung(dark_slices([300, 4799, 4800, 4801, 7500, 600]))
    assert outcome.dark_pixels == (300, 4799, 4800, 4801, 7500, 600)
    assert outcome.threshold == 4800
    assert outcome.kept == (3, 4)


def test_dark_is_below_300_stored_on_the_published_scanner():
    counts = [open_lung(dark_slices([10], hu=hu)).dark_pixels[0] for hu in (299 - 1024, 300 - 1024)]
    assert counts == [10, 0]


def test_the_region_scales_with_the_matrix():
    full = dark_slices([0, 0])
    full[1, 240:340, 120:370] = -900
    outcome = open_lung(full[:, ::2, ::4])  # 256 x 128: rows 120 to 170, columns 30 to 92
    assert outcome.dark_pixels[1] == 50 * 62
    assert outcome.kept == (1,)


def test_without_any_dark_pixel_nothing_is_kept():
    assert open_lung(np.zeros((3, 16, 16), np.int16)).kept == ()
    assert open_lung(np.zeros((0, 16, 16), np.int16)).kept == ()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 25000), min_size=1, max_size=12))
def test_the_darkest_slice_is_kept_unless_no_pixel_is_dark(counts):
    volume = np.zeros((len(counts), 512, 512), np.int16)
    for k, count in enumerate(counts):
        region = np.zeros(25000, np.int16)
        region[:count] = -1000
        volume[k, 240:340, 120:370] = region.reshape(100, 250)
    outcome = open_lung(volume)
    assert outcome.dark_pixels == tuple(counts)
    assert (counts.index(max(counts)) in outcome.kept) == (max(counts) > 0)


# All together


def test_state_applies_all_four():
    lungs = np.ones((20, 5, 5), np.uint8)
    infection = slices("." * 2 + "x" * 16 + "..")
    hu = np.full(lungs.shape, -800, np.int16)
    statement = state(lungs, infection, hu, [0.5, 0.5], (2.0, 1.0, 1.0))
    assert statement.consecutive == ConsecutiveSlices(16, 16, 32.0, True)
    assert statement.intensity.ratio == 16 * 20 / (20 * 25)
    assert statement.noisy_or == NoisyOr(0.75, 2)
    assert statement.open_lung == open_lung(hu)


def test_state_of_a_healthy_scan():
    lungs = np.ones((20, 5, 5), np.uint8)
    statement = state(lungs, np.zeros(lungs.shape, bool), np.zeros(lungs.shape, np.int16), [], MILLIMETRE)
    assert not statement.consecutive.positive
    assert statement.intensity.grade == "not COVID-19-like"
    assert statement.noisy_or == NoisyOr(0.0, 0)
