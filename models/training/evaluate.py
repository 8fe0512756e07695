"""Measure a network on held-out patients.

`python -m models.training.evaluate lungs|infection --data DIR --weights FILE` prints the figures.

Dice is taken over all slices of a patient at once, as a radiologist's volume is; its 95 % interval comes from a
bootstrap over patients. The threshold is chosen on the validation patients and on the healthy material among them.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import torch
from monai.metrics.meandice import compute_dice
from numpy.typing import NDArray
from safetensors.torch import load_file

from models.training import datasets
from models.training.datasets import Patient
from models.training.sampling import Task, normalise
from models.training.train import PLANS, TEST_PHANTOMS, VALIDATION_PHANTOMS, build, patients_of

#: Thresholds that are tried.
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: A slice counts as positive from this area on, mm² (`models.scan_level`).
POSITIVE_MM2 = 20.0
#: Height and width that every network here takes are multiples of this.
STRIDE = 32


@dataclass(frozen=True)
class Figure:
    """One held-out figure: mean over patients, its 95 % interval, and the patients' own values."""

    source: str
    measure: str
    mean: float
    low: float
    high: float
    patients: int
    values: dict[str, float]


def predict(network: torch.nn.Module, patient: Patient, context: int = 0, batch: int = 8) -> NDArray[np.float32]:
    """Class probabilities [channel, slice, y, x] of a patient's slices, each seen between its neighbours."""
    depth, height, width = patient.hu.shape
    pad = (0, -width % STRIDE, 0, -height % STRIDE)
    parts = []
    with torch.inference_mode():
        for start in range(0, depth, batch):
            rows = range(start, min(start + batch, depth))
            seen = normalise(np.stack([datasets.stack(patient, row, context) for row in rows]))
            image = torch.nn.functional.pad(torch.from_numpy(seen), pad, value=-1.0)
            logits = network(image.contiguous(memory_format=torch.channels_last))[..., :height, :width]
            chance = torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, 1)
            parts.append(chance.transpose(0, 1).contiguous().numpy())
    return np.concatenate(parts, 1)


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Dice over a whole patient; 1 where both are empty."""
    score = compute_dice(torch.from_numpy(found)[None, None], torch.from_numpy(truth)[None, None], ignore_empty=False)
    return float(score)


def figure(source: str, measure: str, values: dict[str, float], seed: int = 0) -> Figure:
    """Mean and percentile bootstrap over patients."""
    array = np.array(list(values.values()))
    draws = np.random.default_rng(seed).choice(array, (10_000, len(array))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    rounded = {name: round(value, 4) for name, value in values.items()}
    mean, low, high = (round(float(value), 4) for value in (array.mean(), low, high))
    return Figure(source, measure, mean, low, high, len(array), rounded)


def evaluate_lungs(network: torch.nn.Module, patients: Sequence[Patient]) -> list[Figure]:
    """Dice of both lungs together and of each side, by source."""
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for patient in patients:
        if patient.lungs is None:
            continue
        label = predict(network, patient).argmax(0)
        pairs = {"lungs": (label > 0, patient.lungs > 0), "right": (label == 1, patient.lungs == 1)}
        pairs["left"] = (label == 2, patient.lungs == 2)
        for measure, (found, truth) in pairs.items():
            scores.setdefault((patient.source, f"Dice {measure}"), {})[patient.id] = dice(found, truth)
    return [figure(source, measure, values) for (source, measure), values in sorted(scores.items())]


def evaluate_infection(
    network: torch.nn.Module, patients: Sequence[Patient], threshold: float, context: int = 0
) -> list[Figure]:
    """Dice of infection by source, and the share of infection-free slices with a false lesion.

    Predictions outside the lungs count only where nobody drew the lungs.
    """
    overlap: dict[str, dict[str, float]] = {}
    false: dict[str, dict[str, float]] = {}
    for patient, chance in _chances(network, patients, context):
        assert patient.infection is not None
        found = chance >= threshold
        if patient.infection.any():
            overlap.setdefault(patient.source, {})[patient.id] = dice(found, patient.infection)
        else:
            false.setdefault(patient.source, {})[patient.id] = float(_positive(found).mean())
    return [figure(source, "Dice infection", values) for source, values in sorted(overlap.items())] + [
        figure(source, "healthy slices called positive", values) for source, values in sorted(false.items())
    ]


def choose_threshold(
    network: torch.nn.Module, patients: Sequence[Patient], context: int = 0
) -> tuple[float, dict[str, Any]]:
    """The threshold with the best mean Dice over real patients less the share of healthy slices called positive.

    Returns it and, for the model card, what every threshold gave.
    """
    pairs = list(_chances(network, patients, context))
    table: dict[str, Any] = {}
    best = (-2.0, THRESHOLDS[-1])
    for threshold in THRESHOLDS:
        scores, false = [], []
        for patient, chance in pairs:
            assert patient.infection is not None
            if not patient.infection.any():
                false.append(_positive(chance >= threshold))
            elif patient.source != "phantom":
                scores.append(dice(chance >= threshold, patient.infection))
        rate = float(np.concatenate(false).mean())
        table[str(threshold)] = {"dice": round(float(np.mean(scores)), 4), "false_positive_slices": round(rate, 4)}
        best = max(best, (float(np.mean(scores)) - rate, threshold))
    return best[1], table


def held_out(task: Task, data: Path, seed: int) -> tuple[list[Patient], list[Patient]]:
    """Validation and test patients of the split that training with this seed left alone."""
    parts = datasets.split(patients_of(task, data), seed)
    validation = list(parts.validation) + datasets.phantoms(VALIDATION_PHANTOMS)
    test = list(parts.test) + datasets.phantoms(TEST_PHANTOMS)
    return validation, test


def load_network(task: Task, weights: Path) -> torch.nn.Module:
    """The task's network with weights of `train`."""
    network = build(PLANS[task].network)
    network.load_state_dict(load_file(weights))
    channels_last: torch.nn.Module = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return channels_last


def evaluate(task: Task, weights: Path, data: Path, seed: int) -> dict[str, Any]:
    """All that the model card says: figures on the test patients, and how the threshold was chosen."""
    network = load_network(task, weights)
    validation, test = held_out(task, data, seed)
    if task == "lungs":
        return {"figures": [asdict(f) for f in evaluate_lungs(network, test)]}
    threshold, table = choose_threshold(network, validation, PLANS[task].context)
    figures = evaluate_infection(network, test, threshold, PLANS[task].context)
    return {"threshold": threshold, "validation": table, "figures": [asdict(f) for f in figures]}


def _chances(
    network: torch.nn.Module, patients: Iterable[Patient], context: int
) -> Iterable[tuple[Patient, NDArray[np.float32]]]:
    for patient in patients:
        chance = predict(network, patient, context)[0]
        if patient.lungs is not None:
            chance = chance * (patient.lungs > 0)
        yield patient, chance


def _positive(found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Slices [slice] with a lesion of at least `POSITIVE_MM2`."""
    pixels = round(POSITIVE_MM2 / datasets.PIXEL_MM**2)
    return np.array([cc3d.dust(plane, pixels, connectivity=8).any() for plane in found])


def main() -> None:
    """Command line: the figures as JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(PLANS))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds slices/")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="the seed that training was run with")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    print(json.dumps(evaluate(arguments.task, arguments.weights, arguments.data, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
