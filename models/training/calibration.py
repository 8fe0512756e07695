"""Fit how probable a found lesion is, on patients that the network has not seen, and show how reliable that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from models.calibration import LesionCalibration
from models.segmenter.inference import SLAB_MM, lesion_sized
from models.training import datasets
from models.training.datasets import Patient
from models.training.evaluate import LESION_OVERLAP, Chance

#: Lesions below this are not reported, mm³: a sphere of 6 mm. It is published in the metadata, where the node reads it.
MINIMUM_LESION_MM3 = 100.0
#: Nor those that reach over no more than this from inferior to superior, mm. Of what one slab alone shows, as a vessel
#: that runs along it does too, 39 % were lesions on patients that the network had not seen; of what two slabs show
#: 74 %, however small.
MINIMUM_EXTENT_MM = 3.0
#: Penalty on the weights of standardised features: few lesions must not make the model sure.
_PENALTY = 1.0


@dataclass(frozen=True)
class FoundLesion:
    """A lesion that a network found in a patient whose infection was drawn, and whether it was one."""

    patient: str
    mean: float
    maximum: float
    volume_mm3: float
    true: bool


@dataclass(frozen=True)
class Reliability:
    """How far stated probabilities can be relied on.

    Attributes
    ----------
    brier
        Mean square of probability less outcome; 0 is perfect, 0.25 is what always saying 0.5 gives.
    ece
        Expected calibration error: mean distance of the bins' stated and true shares, by size.
    stated, true
        The same for each bin, for a picture.
    """

    brier: float
    ece: float
    stated: tuple[float, ...]
    true: tuple[float, ...]


def found_lesions(chances: Iterable[tuple[Patient, Chance]], threshold: float) -> list[FoundLesion]:
    """Lesions of patients and their probability maps (`evaluate.infection_chances`), healthy patients included.

    A lesion is true when at least `LESION_OVERLAP` of it was drawn.
    """
    lesions = []
    for patient, chance in chances:
        assert patient.infection is not None
        spacing = SLAB_MM / patient.slab, datasets.PIXEL_MM, datasets.PIXEL_MM
        label = cc3d.connected_components(chance >= threshold, connectivity=26)
        where = np.nonzero(label)
        of = label[where]
        sizes = np.bincount(of)
        sums, drawn = np.bincount(of, chance[where]), np.bincount(of, patient.infection[where])
        most = np.zeros(len(sizes))
        np.maximum.at(most, of, chance[where])
        # A set of single slices says nothing of the extent.
        extent_mm = MINIMUM_EXTENT_MM if len(chance) > 1 else 0.0
        sized = lesion_sized(label, spacing, MINIMUM_LESION_MM3, extent_mm)
        for n in 1 + np.flatnonzero(sized[1:]):
            volume, share = float(sizes[n] * np.prod(spacing)), drawn[n] / sizes[n]
            mean = float(sums[n] / sizes[n])
            lesions.append(FoundLesion(patient.id, mean, float(most[n]), volume, bool(share >= LESION_OVERLAP)))
    return lesions


def fit(lesions: Sequence[FoundLesion], floor: float = 0.0) -> LesionCalibration:
    """Fit the logistic model, its weights held small.

    Raises
    ------
    ValueError
        There are not both true and false lesions to tell apart.
    """
    true = np.array([lesion.true for lesion in lesions])
    if not len(true) or true.all() or not true.any():
        raise ValueError("both true and false lesions are needed for a calibration")
    features = _features(lesions)
    middle, spread = features.mean(0), np.maximum(features.std(0), 1e-3)
    standard = np.column_stack([np.ones(len(features)), (features - middle) / spread])
    sign = np.where(true, 1.0, -1.0)

    def loss(weights: NDArray[np.float64]) -> float:
        return float(np.logaddexp(0, -sign * (standard @ weights)).sum() + 0.5 * _PENALTY * (weights[1:] ** 2).sum())

    weights = optimize.minimize(loss, np.zeros(standard.shape[1]), method="BFGS").x
    slopes = weights[1:] / spread
    mean, maximum, log_volume = (float(slope) for slope in slopes)
    return LesionCalibration(float(weights[0] - (slopes * middle).sum()), mean, maximum, log_volume, floor)


def out_of_patient(lesions: Sequence[FoundLesion]) -> NDArray[np.float64]:
    """Probability of each lesion by the model that was fitted without its patient: what to report, not what to ship."""
    stated = np.empty(len(lesions))
    for patient in {lesion.patient for lesion in lesions}:
        mine = np.array([lesion.patient == patient for lesion in lesions])
        model = fit([lesion for lesion, left_out in zip(lesions, mine, strict=True) if not left_out])
        stated[mine] = probabilities(
            model, [lesion for lesion, left_out in zip(lesions, mine, strict=True) if left_out]
        )
    return stated


def probabilities(model: LesionCalibration, lesions: Sequence[FoundLesion]) -> NDArray[np.float64]:
    """What the model says of lesions."""
    mean, maximum, log_volume = _features(lesions).T
    return model.probability(mean, maximum, np.exp(log_volume))


def reliability(stated: NDArray[np.floating], true: NDArray[np.bool_], bins: int = 6) -> Reliability:
    """Brier score and calibration error, in bins of equally many lesions."""
    order = np.array_split(np.argsort(stated, kind="stable"), min(bins, len(stated)))
    pairs = [(float(stated[part].mean()), float(true[part].mean())) for part in order]
    error = sum(len(part) * abs(said - was) for part, (said, was) in zip(order, pairs, strict=True)) / len(stated)
    brier = float(((stated - true) ** 2).mean())
    return Reliability(brier, float(error), tuple(said for said, _ in pairs), tuple(was for _, was in pairs))


def calibrate(lesions: Sequence[FoundLesion], floor: float = 0.0) -> tuple[LesionCalibration, Reliability, Reliability]:
    """The model to ship, and the reliability of the voxels' mean and of the model on patients it was not fitted on."""
    true = np.array([lesion.true for lesion in lesions], bool)
    model = fit(lesions, floor)
    before = reliability(np.array([lesion.mean for lesion in lesions]), true)
    return model, before, reliability(out_of_patient(lesions), true)


def _features(lesions: Sequence[FoundLesion]) -> NDArray[np.float64]:
    return np.array([(lesion.mean, lesion.maximum, np.log(lesion.volume_mm3)) for lesion in lesions])
