"""Infection by cross-validation: `python -m models.training.crossvalidate --data DIR --steps N [--fold K] [--seed S]`.

The ten patients of COVID-19-CT-Seg-20 in five folds of two. For each fold a network learns from the other eight, from
the training slices of the other sets and from phantoms, and predicts the two. What it predicts, `fold-K.npz`, is kept:
threshold and calibration of the shipped model are chosen on it, since that model has learnt from all ten.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from models.build import build
from models.training import datasets
from models.training.datasets import Patient
from models.training.evaluate import Chance, figures_of, infection_chances, judge_infection, predictor
from models.training.train import INFECTION_DESIGNS, TRAINING_PHANTOMS, Plan, fit, learners, patients_of

#: Folds over the ten patients.
FOLDS = 5


def held_out(patients: Sequence[Patient], fold: int, seed: int) -> list[Patient]:
    """The patients that a fold is tested on."""
    ten = sorted((patient for patient in patients if patient.source == "covid-seg-20"), key=lambda patient: patient.id)
    order = np.random.default_rng(seed).permutation(len(ten))
    return [ten[i] for i in np.array_split(order, FOLDS)[fold]]


def run_fold(patients: Sequence[Patient], fold: int, out: Path, *, seed: int, steps: int, plan: Plan) -> Path:
    """Train without a fold, predict it; returns the file of probabilities, float16 by patient id, 0 outside lungs."""
    tested = held_out(patients, fold, seed)
    left = {patient.id for patient in tested}
    drawn = datasets.phantoms(TRAINING_PHANTOMS, slices=20)
    others = [patient for patient in learners("infection", patients, seed) if patient.id not in left]
    weights = fit("infection", [*others, *drawn], out / f"fold-{fold}", seed=seed, steps=steps, plan=plan)
    network = build(plan.network)
    network.load_state_dict(load_file(weights))
    network = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    predict = predictor(network, network.stride, context=plan.context)
    chances = {patient.id: chance.astype(np.float16) for patient, chance in infection_chances(predict, tested)}
    np.savez_compressed(out / f"fold-{fold}.npz", **chances)  # type: ignore[arg-type]
    return out / f"fold-{fold}.npz"


def read_out_of_fold(files: Iterable[Path], patients: Sequence[Patient]) -> list[tuple[Patient, Chance]]:
    """Patients and their probabilities from files of `run_fold`.

    Raises
    ------
    ValueError
        A file names a patient who is not among these, or whose slices are others.
    """
    known = {patient.id: patient for patient in patients}
    pairs: list[tuple[Patient, Chance]] = []
    for file in files:
        with np.load(file, allow_pickle=False) as found:
            for name in found.files:
                chance = found[name]
                if name not in known or known[name].hu.shape != chance.shape:
                    raise ValueError(f"{file}: {name} with {chance.shape} pixels is no patient of the data")
                pairs.append((known[name], chance))
    return pairs


def main() -> None:
    """Command line: figures as JSON on standard output once all folds are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds slices/")
    parser.add_argument("--steps", type=int, default=1400, help="as many as the shipped network had")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fold", type=int, choices=range(FOLDS), help="only this one; the others may run elsewhere")
    parser.add_argument("--design", choices=sorted(INFECTION_DESIGNS), default="efficientnet-2.5d")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("build/training/crossvalidation"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    patients, plan = patients_of("infection", arguments.data), INFECTION_DESIGNS[arguments.design]
    for fold in range(FOLDS) if arguments.fold is None else [arguments.fold]:
        if not (arguments.out / f"fold-{fold}.npz").exists():
            run_fold(patients, fold, arguments.out, seed=arguments.seed, steps=arguments.steps, plan=plan)
    if all((arguments.out / f"fold-{fold}.npz").exists() for fold in range(FOLDS)):
        found = read_out_of_fold((arguments.out / f"fold-{fold}.npz" for fold in range(FOLDS)), patients)
        cases = judge_infection(found, arguments.threshold)
        print(json.dumps([asdict(one) for one in figures_of(cases)], indent=1))


if __name__ == "__main__":
    main()
