"""Measure what a node runs: both networks on the runtime that the node chooses, their resampling and their clean-up.

`models.training.evaluate.cases_of` measures a network alone, in torch and float32, on slices as they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from models.registry import Bundle, load_bundle
from models.segmenter.inference import SLAB_MM
from models.segmenter.single import InfectionFinder, LungFinder
from models.training.datasets import PIXEL_MM, Patient
from models.training.evaluate import Case, judge_infection, lungs_cases
from models.training.sampling import Task


def shipped_cases(task: Task, bundle: Bundle, patients: Sequence[Patient], device: str | None = None) -> Iterator[Case]:
    """Cases of a task as a node would find them.

    Infection is searched in the lungs that the model 'lungs', which comes with the program, finds, not in drawn ones.

    Parameters
    ----------
    task, bundle
        What to measure, and the model of it.
    patients
        As `evaluate.held_out` gives them; those without a mask of the task are left out.
    device
        As `Segmenter` takes it.
    """
    if task == "lungs":
        lungs = LungFinder(bundle, device)
        return lungs_cases(lambda patient: _by_label(lungs(patient.hu, _spacing(patient))), patients)
    infection = InfectionFinder(load_bundle("lungs"), bundle, device)
    return judge_infection(_found(infection, patients), 0.5)


def _spacing(patient: Patient) -> tuple[float, float, float]:
    """Voxel size (z, y, x) of a patient's slices, mm, as training takes it: a slab is `Patient.slab` slices."""
    return SLAB_MM / patient.slab, PIXEL_MM, PIXEL_MM


def _found(find: InfectionFinder, patients: Iterable[Patient]) -> Iterator[tuple[Patient, NDArray[np.float32]]]:
    """Patients whose infection was drawn, with the voxels of lesions as a probability of 1."""
    for patient in patients:
        if patient.infection is not None:
            yield patient, find(patient.hu, _spacing(patient)).astype(np.float32)


def _by_label(lungs: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Labels [slice, y, x] as class probabilities [channel, slice, y, x]."""
    chances: NDArray[np.float32] = (lungs == np.arange(3)[:, None, None, None]).astype(np.float32)
    return chances
