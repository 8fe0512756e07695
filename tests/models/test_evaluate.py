"""Figures are what they say: overlap, surfaces, slices and lesions, and what a network is shown to get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.training.datasets import Patient, phantoms
from models.training.evaluate import (
    ALIKE,
    Case,
    choose_threshold,
    dice,
    evaluate_infection,
    evaluate_lungs,
    figure,
    figures_of,
    infection_chances,
    lesion_overlaps,
    predictor,
    share,
    surface_dice,
)
from models.training.pictures import draw_cases, draw_curve
from models.training.sampling import normalise


@pytest.fixture(scope="module")
def patients() -> Sequence[Patient]:
    return phantoms([2, 3, 5], slices=8)


class Oracle(torch.nn.Module):
    """Finds what is brighter than a level, by its logits."""

    def __init__(self, hu: float) -> None:
        super().__init__()
        self.level = float(normalise(np.array([hu], np.float32))[0])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 20 * (image - self.level)


def test_dice() -> None:
    truth = np.zeros((2, 4, 4), bool)
    truth[0, :2] = True
    assert dice(truth, truth) == 1
    assert dice(~truth, truth) == 0
    assert dice(np.zeros_like(truth), np.zeros_like(truth)) == 1
    half = truth.copy()
    half[0, 0] = False
    assert dice(half, truth) == pytest.approx(2 * 4 / (4 + 8))


def test_the_interval_holds_the_mean() -> None:
    made = figure("set", "Dice", {"a": 0.5, "b": 0.7, "c": 0.9})
    assert made.low < made.mean < made.high
    assert made.mean == pytest.approx(0.7)
    assert made.patients == 3
    alone = figure("set", "Dice", {"a": 0.5})
    assert alone.low == alone.mean == alone.high == 0.5


def test_figures_of_a_network_that_sees_density(patients: Sequence[Patient]) -> None:
    figures = {(f.source, f.measure): f for f in evaluate_infection(predictor(Oracle(-500), 1), patients, 0.5)}
    found = figures["phantom", "Dice infection"]
    assert 0.1 < found.mean < 1
    assert figures["phantom", "healthy slices called positive"].patients == 1
    never = {f.measure: f.mean for f in evaluate_infection(predictor(Oracle(4000), 1), patients, 0.5)}
    assert never["Dice infection"] == 0
    assert never["healthy slices called positive"] == 0


def test_lungs_by_side(patients: Sequence[Patient]) -> None:
    class Sides(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            left = torch.zeros_like(image)
            left[..., image.shape[-1] // 2 :] = 1
            dark = ((image < -0.4) & (image > -0.98)).float() * 9
            return torch.cat([torch.full_like(image, 5), dark * (1 - left), dark * left], 1)

    patient = patients[0]
    assert patient.lungs is not None
    swapped = replace(patient, lungs=np.array([0, 2, 1], np.uint8)[patient.lungs])
    scores = {f.measure: f.mean for f in evaluate_lungs(predictor(Sides(), 16), [patient])}
    assert scores["Dice lungs"] > 0.35
    for side in ("right", "left"):
        assert scores[f"Dice {side}"] > 0.35
        assert {f.measure: f.mean for f in evaluate_lungs(predictor(Sides(), 16), [swapped])}[f"Dice {side}"] < 0.15


def test_the_threshold_weighs_overlap_against_false_alarms(patients: Sequence[Patient]) -> None:
    real = [Patient(f"real_{p.id}", "real", "own", p.hu, p.lungs, p.infection) for p in patients]
    threshold, table = choose_threshold(infection_chances(predictor(Oracle(-420), 1), real))
    gains = {name: row["dice"] - row["false_positive_slices"] for name, row in table.items()}
    alike = [name for name, gain in gains.items() if gain >= max(gains.values()) - ALIKE - 2e-4]
    assert str(threshold) in alike
    assert table[str(threshold)]["dice"] == max(table[name]["dice"] for name in alike)
    rates = [row["false_positive_slices"] for row in table.values()]
    assert rates == sorted(rates, reverse=True)


def test_surface_dice_forgives_two_pixels_and_no_more() -> None:
    truth = np.zeros((3, 40, 40), bool)
    truth[1, 10:30, 10:30] = True
    assert surface_dice(truth, truth) == 1
    assert surface_dice(np.roll(truth, 2, 1), truth) == 1
    assert 0.4 < surface_dice(np.roll(truth, 6, 1), truth) < 0.8
    assert surface_dice(np.roll(truth, 1, 0), truth) == 0
    assert surface_dice(np.zeros_like(truth), np.zeros_like(truth)) == 1


def test_lesions_by_hand() -> None:
    truth = np.zeros((4, 30, 30), bool)
    truth[0, 0:4, 0:5] = truth[2, 10:20, 10:20] = True
    truth[3, 25, 25] = True  # a crumb
    found = np.zeros_like(truth)
    found[2, 10:12, 10:20] = True
    assert lesion_overlaps(truth, found).tolist() == [0, 0.2]
    assert lesion_overlaps(found, truth).tolist() == [1]


def test_shares_by_wilson() -> None:
    one = share("set", "slice sensitivity", {"a": (8, 9), "b": (1, 1), "c": (0, 0)})
    assert (one.mean, one.trials, one.patients) == (0.9, 10, 2)
    assert (one.low, one.high) == (0.5958, 0.9821)


def test_figures_join_what_several_networks_found(patients: Sequence[Patient]) -> None:
    ill = replace(patients[1], id="other")
    cases = [
        Case(patients[0], patients[0].hu, {"Dice infection": 0.5}, {"lesion precision": (1, 2)}),
        Case(ill, ill.hu, {"Dice infection": 0.7}, {"lesion precision": (3, 8), "lesion sensitivity": (0, 0)}),
    ]
    by_measure = {f.measure: f for f in figures_of(cases)}
    assert by_measure["Dice infection"].mean == pytest.approx(0.6)
    assert (by_measure["lesion precision"].mean, by_measure["lesion precision"].trials) == (0.4, 10)
    assert "lesion sensitivity" not in by_measure


def test_a_network_sees_its_neighbours_in_order_and_the_end_twice() -> None:
    class Seen(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            assert image.shape[-2:] == (32, 48)
            seen.append(image[:, :, 0, 0])
            return image[:, 1:2]

    seen: list[torch.Tensor] = []
    hu = np.repeat(np.array([-1000, -300, 400, 900], np.int16), 20 * 40).reshape(4, 20, 40)
    patient = Patient("a", "set", "own", hu, None, None)
    chance = predictor(Seen(), 16, context=1, batch=3)(patient)
    assert torch.cat(seen).tolist() == [[-1, -1, 0], [-1, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert chance.shape == (1, 4, 20, 40)
    seen.clear()
    predictor(Seen(), 16, context=1)(replace(patient, slab=2))
    assert torch.cat(seen).tolist() == [[-1, -1, 1], [-1, 0, 1], [-1, 1, 1], [0, 1, 1]]
    seen.clear()
    single = replace(patient, hu=hu[1:2])
    predictor(Seen(), 16, context=1)(single)
    assert seen[0].tolist() == [[0, 0, 0]]


def test_another_pixel_size_comes_back_to_the_grid(patients: Sequence[Patient]) -> None:
    fine = predictor(Oracle(-500), 1)(patients[1])
    coarse = predictor(Oracle(-500), 1, pixel_mm=2.0)(patients[1])
    assert coarse.shape == fine.shape
    assert dice(coarse[0] > 0.5, fine[0] > 0.5) > 0.95


def test_pictures_of_cases_and_of_a_run(patients: Sequence[Patient], tmp_path: Path) -> None:
    cases = [
        Case(patient, np.roll(patient.infection, n, 2).astype(np.uint8), {"Dice infection": 1 - n / 9}, {})
        for n, patient in enumerate(patients)
        if patient.infection is not None
    ]
    draw_cases(cases, "Dice infection", tmp_path / "new" / "cases.png")
    with Image.open(tmp_path / "new" / "cases.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(100_000)}
        assert picture.height > picture.width
    assert {(60, 220, 90), (255, 70, 200)} <= colours
    with pytest.raises(ValueError, match="no case has a Dice lungs"):
        draw_cases(cases, "Dice lungs", tmp_path / "none.png")

    (tmp_path / "curve.jsonl").write_text('{"step": 1, "loss": 2, "rate": 1e-3}\n{"step": 9, "dice": 0.5}\n')
    draw_curve(tmp_path / "curve.jsonl", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 500
    (tmp_path / "curve.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="holds no loss"):
        draw_curve(tmp_path / "curve.jsonl", tmp_path / "curve.png")
