"""A lesion's probability says how often lesions like it were true, also of patients it was not fitted on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.calibration import LesionCalibration
from models.training.calibration import (
    FoundLesion,
    calibrate,
    fit,
    found_lesions,
    out_of_patient,
    probabilities,
    reliability,
)
from models.training.datasets import PIXEL_MM, Patient


def made_up(count: int, seed: int = 0) -> tuple[list[FoundLesion], np.ndarray]:
    """Lesions whose true chance is known, from 20 patients."""
    rng = np.random.default_rng(seed)
    mean, log_volume = rng.uniform(0.8, 1.0, count), rng.normal(6.5, 1.2, count)
    chance = 1 / (1 + np.exp(-(-17 + 14 * mean + 0.7 * log_volume)))
    true = rng.random(count) < chance
    lesions = [
        FoundLesion(
            f"p{n % 20}", float(mean[n]), float(min(mean[n] + 0.05, 1)), float(np.exp(log_volume[n])), bool(true[n])
        )
        for n in range(count)
    ]
    return lesions, chance


def test_a_known_chance_is_found_again() -> None:
    lesions, chance = made_up(4000)
    stated = probabilities(fit(lesions), lesions)
    assert np.abs(stated - chance).mean() < 0.03
    assert ((stated > 0) & (stated < 1)).all()


def test_unseen_patients_are_better_served_than_by_the_mean() -> None:
    lesions, _ = made_up(400)
    true = np.array([lesion.true for lesion in lesions])
    before = reliability(np.array([lesion.mean for lesion in lesions]), true)
    after = reliability(out_of_patient(lesions), true)
    assert after.brier < before.brier
    assert after.ece < before.ece / 2


def test_reliability_by_hand() -> None:
    perfect = reliability(np.array([0.0, 0.0, 1.0, 1.0]), np.array([False, False, True, True]), bins=2)
    assert (perfect.brier, perfect.ece, perfect.stated, perfect.true) == (0, 0, (0, 1), (0, 1))
    sure = reliability(np.full(4, 0.9), np.array([True, False, False, False]), bins=1)
    assert sure.ece == pytest.approx(0.65)
    assert sure.brier == pytest.approx((0.01 + 3 * 0.81) / 4)


def test_lesions_are_true_when_a_tenth_was_drawn_and_crumbs_are_none() -> None:
    infection = np.zeros((3, 40, 40), bool)
    infection[1:, 0:2, 0:20] = True
    chance = np.zeros(infection.shape, np.float32)
    chance[1:, 0:20, 0:20] = 0.9  # a tenth of it drawn
    chance[1:, 30:36, 30:36] = 0.85  # nothing there
    chance[1, 30, 30] = 0.99
    chance[1:, 0, 39] = 1.0  # a crumb
    chance[0, 5:20, 25:39] = 1.0  # what one slab alone shows
    patient = Patient("a", "set", "own", np.zeros(infection.shape, np.int16), None, infection)
    large, small = found_lesions([(patient, chance)], 0.8)
    assert (large.true, small.true) == (True, False)
    assert large.mean == pytest.approx(0.9)
    assert small.maximum == pytest.approx(0.99)
    assert small.volume_mm3 == pytest.approx(2 * 36 * PIXEL_MM**2 * 2.5)


def test_both_kinds_are_needed() -> None:
    lesions, _ = made_up(50)
    with pytest.raises(ValueError, match="both true and false"):
        fit([lesion for lesion in lesions if lesion.true])
    with pytest.raises(ValueError, match="both true and false"):
        calibrate([])


def test_metadata_carry_it(tmp_path: Path) -> None:
    lesions, _ = made_up(100)
    model = fit(lesions, floor=0.1)
    written = json.loads(json.dumps({"lesion_calibration": vars(model)}))
    assert LesionCalibration.of(written) == model
    assert LesionCalibration.of({}) is None
    for broken in ({}, {"intercept": 0}, {**vars(model), "floor": 1.0}, {**vars(model), "mean": "nan"}, 3):
        with pytest.raises(ValueError, match="lesion_calibration"):
            LesionCalibration.of({"lesion_calibration": broken})
