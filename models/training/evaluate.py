"""Measure a network on held-out patients: overlap, surfaces, volumes, and the slices and lesions found or missed.

Overlap, surface and volume are those of a patient, over all slices at once, as a radiologist's volume is; their 95 %
interval comes from a bootstrap over patients. Slices and lesions are counted over a set, and their interval is
Wilson's (1927), which takes each for one of its own: slices of one patient are not, so it is rather too narrow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import torch
from monai.metrics.meandice import compute_dice
from monai.metrics.surface_dice import compute_surface_dice
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import binomtest
from torch.nn import functional

from models.registry import Bundle
from models.rules.consecutive_slices import MINIMUM_SLICE_AREA_MM2
from models.training import datasets
from models.training.datasets import Patient
from models.training.sampling import HU_RANGE, Task
from models.training.train import PLANS, TEST_CHANGED, TEST_PHANTOMS, VALIDATION_PHANTOMS, learners, patients_of

#: Thresholds that are tried.
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

#: Difference between thresholds, in Dice less false positives, that ten patients do not tell from none.
ALIKE = 0.005
#: A slice counts as positive, and a lesion as one, from this area on, mm².
POSITIVE_MM2 = MINIMUM_SLICE_AREA_MM2
#: Contours agree within this, mm: two pixels, and what COVID-19-CT-Seg-20 was published with (Ma et al. 2021) for
#: infection. (For lungs they took 1 mm, less than a pixel here.)
SURFACE_MM = 3.0
#: A lesion is found, and a found one is true, when the other mask covers so much of it.
LESION_OVERLAP = 0.1

#: Network and all: a patient, of whom it looks at `hu` alone → class probabilities [channel, slice, y, x].
Predict = Callable[[Patient], NDArray[np.float32]]
#: Probability of infection [slice, y, x].
Chance = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True)
class Figure:
    """One held-out figure and its 95 % interval.

    Attributes
    ----------
    source, measure
        The data set, and what was measured.
    mean, low, high
        Mean over patients, or the share of `trials`, and the interval.
    patients
        How many it was taken from.
    values
        The patients' own.
    trials
        Slices or lesions that a share is of; 0 for a mean over patients.
    """

    source: str
    measure: str
    mean: float
    low: float
    high: float
    patients: int
    values: dict[str, float]
    trials: int = 0


@dataclass(frozen=True)
class Case:
    """What was found in one patient, and how good that is.

    Attributes
    ----------
    patient
        With the truth.
    found
        Labels [slice, y, x], as in the truth.
    values
        Measure → figure of this patient.
    counts
        Measure → (hits, trials) of this patient.
    """

    patient: Patient
    found: NDArray[np.uint8]
    values: dict[str, float]
    counts: dict[str, tuple[int, int]]


def predictor(
    network: torch.nn.Module,
    stride: int,
    *,
    context: int = 0,
    hu_range: tuple[float, float] = HU_RANGE,
    pixel_mm: float = datasets.PIXEL_MM,
    batch: int = 8,
) -> Predict:
    """What a network says about slices, preprocessed as its metadata ask.

    Parameters
    ----------
    network
        In eval mode. One channel of logits is taken for a sigmoid, more for a softmax.
    stride
        Height and width of its input are multiples of this.
    context
        Neighbours on either side, a slab apart, that it sees besides a slice, as channels from inferior to superior;
        at the ends the last slice stands in for those that are missing.
    hu_range
        HU that are mapped to -1 and 1.
    pixel_mm
        Pixel size that it was trained at.
    """
    low, high = hu_range
    around = torch.arange(-context, context + 1)

    def predict(patient: Patient) -> NDArray[np.float32]:
        image = torch.from_numpy(patient.hu.astype(np.float32)).clamp(low, high)
        size, step = list(patient.hu.shape[1:]), patient.slab
        image = (image - (low + high) / 2) * (2 / (high - low))
        if pixel_mm != datasets.PIXEL_MM:
            image = _resized(image, [round(n * datasets.PIXEL_MM / pixel_mm) for n in size])
        depth, height, width = image.shape
        image = functional.pad(image, (0, -width % stride, 0, -height % stride), value=-1.0)
        parts = []
        with torch.inference_mode():
            for start in range(0, depth, batch):
                rows = torch.arange(start, min(start + batch, depth))
                seen = image[(rows[:, None] + step * around).clamp(0, depth - 1)]
                logits = network(seen.contiguous(memory_format=torch.channels_last))[..., :height, :width]
                chance = torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, 1)
                parts.append(_resized(chance, size).transpose(0, 1))
        whole: NDArray[np.float32] = torch.cat(parts, 1).numpy()
        return whole

    return predict


def bundle_predictor(bundle: Bundle) -> Predict:
    """`predictor` of a bundle's network, as its metadata say."""
    metadata = bundle.metadata
    network = bundle.load().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    low, high = metadata["hu_range"]
    return predictor(
        network,
        int(metadata["stride"]),
        context=int(metadata.get("context", 0)),
        hu_range=(float(low), float(high)),
        pixel_mm=float(metadata["pixel_mm"]),
    )


def evaluate_lungs(predict: Predict, patients: Iterable[Patient]) -> list[Figure]:
    """All figures of the lungs, by source."""
    return figures_of(lungs_cases(predict, patients))


def evaluate_infection(predict: Predict, patients: Iterable[Patient], threshold: float) -> list[Figure]:
    """All figures of infection, by source; see `infection_cases`."""
    return figures_of(infection_cases(predict, patients, threshold))


def lungs_cases(predict: Predict, patients: Iterable[Patient]) -> Iterator[Case]:
    """Segment the patients whose lungs somebody drew."""
    for patient in patients:
        if patient.lungs is None:
            continue
        found = predict(patient).argmax(0).astype(np.uint8)
        values = {
            f"Dice {name}": dice(found == side, patient.lungs == side) for side, name in ((1, "right"), (2, "left"))
        }
        yield Case(patient, found, _overlap("lungs", found > 0, patient.lungs > 0) | values, {})


def infection_cases(predict: Predict, patients: Iterable[Patient], threshold: float) -> Iterator[Case]:
    """Segment the patients whose infection somebody drew."""
    return judge_infection(infection_chances(predict, patients), threshold)


def judge_infection(chances: Iterable[tuple[Patient, Chance]], threshold: float) -> Iterator[Case]:
    """Judge probabilities of infection, a network's of `infection_chances` or several networks' out of fold.

    Of patients without infection it is the share of slices that are called positive that counts.
    """
    for patient, chance in chances:
        assert patient.infection is not None
        found = chance >= threshold
        truth = patient.infection
        true_slices, found_slices = _positive(truth), _positive(found)
        both = int((true_slices & found_slices).sum())
        true_lesions, found_lesions = lesion_overlaps(truth, found), lesion_overlaps(found, truth)
        yield Case(
            patient,
            found.astype(np.uint8),
            _overlap("infection", found, truth)
            if truth.any()
            else {"healthy slices called positive": float(found_slices.mean())},
            {
                "slice sensitivity": (both, int(true_slices.sum())),
                "slice precision": (both, int(found_slices.sum())),
                "lesion sensitivity": (int((true_lesions >= LESION_OVERLAP).sum()), len(true_lesions)),
                "lesion precision": (int((found_lesions >= LESION_OVERLAP).sum()), len(found_lesions)),
            },
        )


def infection_chances(predict: Predict, patients: Iterable[Patient]) -> Iterator[tuple[Patient, Chance]]:
    """Probability of infection [slice, y, x], within the lungs where they were drawn, of patients who can be judged."""
    for patient in patients:
        if patient.infection is None:
            continue
        chance = predict(patient)[0]
        yield patient, chance if patient.lungs is None else chance * (patient.lungs > 0)


def figures_of(cases: Iterable[Case]) -> list[Figure]:
    """Figures by source and measure, also of cases that several networks gave, as in a cross-validation."""
    values: dict[tuple[str, str], dict[str, float]] = {}
    counts: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    diseased = set()
    for case in cases:
        source = case.patient.source
        if case.patient.infection is not None and case.patient.infection.any():
            diseased.add(source)
        for measure, value in case.values.items():
            values.setdefault((source, measure), {})[case.patient.id] = value
        for measure, count in case.counts.items():
            counts.setdefault((source, measure), {})[case.patient.id] = count
    means = [figure(source, measure, of) for (source, measure), of in sorted(values.items())]
    # Where nobody is ill there is nothing to be sensitive to.
    return means + [
        share(source, measure, of)
        for (source, measure), of in sorted(counts.items())
        if source in diseased and any(trials for _, trials in of.values())
    ]


def figure(source: str, measure: str, values: dict[str, float], seed: int = 0) -> Figure:
    """Mean and percentile bootstrap over patients."""
    array = np.array(list(values.values()))
    draws = np.random.default_rng(seed).choice(array, (10_000, len(array))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    rounded = {name: round(value, 4) for name, value in values.items()}
    mean, low, high = (round(float(value), 4) for value in (array.mean(), low, high))
    return Figure(source, measure, mean, low, high, len(array), rounded)


def share(source: str, measure: str, counts: dict[str, tuple[int, int]]) -> Figure:
    """Hits among trials over all patients, and Wilson's interval."""
    hits, trials = (sum(count[i] for count in counts.values()) for i in (0, 1))
    values = {name: round(hit / of, 4) for name, (hit, of) in counts.items() if of}
    interval = binomtest(hits, trials).proportion_ci(method="wilson")
    low, high = round(float(interval.low), 4), round(float(interval.high), 4)
    return Figure(source, measure, round(hits / trials, 4), low, high, len(values), values, trials)


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Dice over a whole patient; 1 where both are empty."""
    score = compute_dice(torch.from_numpy(found)[None, None], torch.from_numpy(truth)[None, None], ignore_empty=False)
    return float(score)


def surface_dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Share of the contours that lie within `SURFACE_MM` of each other, mean over the slices that hold either.

    Slice by slice, since the sets do not say how far apart their slices are.
    """
    either, both = (way(found.any((1, 2)), truth.any((1, 2))) for way in (np.logical_or, np.logical_and))
    if not either.any():
        return 1.0
    if not both.any():
        return 0.0
    found_surface, true_surface = (torch.from_numpy(mask[both])[:, None] for mask in (found, truth))
    pixel = (datasets.PIXEL_MM, datasets.PIXEL_MM)
    with warnings.catch_warnings():
        # MONAI 1.6 warns of an argument that it gives to itself.
        warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges:always_return_as_numpy", FutureWarning)
        scores = compute_surface_dice(
            found_surface, true_surface, class_thresholds=[SURFACE_MM], include_background=True, spacing=pixel
        )
    return float(scores.sum() / either.sum())


def lesion_overlaps(lesions: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of each lesion of one mask, the share that the other covers; crumbs below `POSITIVE_MM2` are not lesions."""
    label = cc3d.connected_components(lesions, connectivity=26)
    sizes = np.bincount(label.ravel())
    covered = np.bincount(label[other], minlength=len(sizes))
    kept = sizes >= POSITIVE_MM2 / datasets.PIXEL_MM**2
    kept[0] = False
    overlaps: NDArray[np.float64] = covered[kept] / sizes[kept]
    return overlaps


def choose_threshold(chances: Iterable[tuple[Patient, Chance]]) -> tuple[float, dict[str, Any]]:
    """The threshold with the best mean Dice over real patients less the share of healthy slices called positive.

    Of thresholds that are as good within `ALIKE` it is the one with the best Dice: to mark too much is the lesser evil.
    Returns it and, for the model card, what every threshold gave.
    """
    pairs = list(chances)
    table: dict[str, Any] = {}
    worth: dict[float, float] = {}
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
        worth[threshold] = float(np.mean(scores)) - rate
    alike = [threshold for threshold in THRESHOLDS if worth[threshold] >= max(worth.values()) - ALIKE]
    return max(alike, key=lambda threshold: table[str(threshold)]["dice"]), table


def held_out(task: Task, data: Path, seed: int) -> tuple[list[Patient], list[Patient]]:
    """Validation and test patients that training with this seed left alone.

    Sets that the task does not train on at all are an outside test, every patient of them.
    """
    known, sources = patients_of(task, data), PLANS[task].shares
    learned = {patient.id for patient in learners(task, known, seed)}
    outside = [patient for patient in known if patient.source not in sources]
    parts = datasets.split(known, seed)
    validation, test = (
        [p for p in part if p.source in sources and p.id not in learned] for part in (parts.validation, parts.test)
    )
    drawn = datasets.phantoms(TEST_PHANTOMS)
    if task == "lungs":
        drawn += datasets.changed_phantoms(TEST_CHANGED)
    return validation + datasets.phantoms(VALIDATION_PHANTOMS), test + outside + drawn


def cases_of(task: Task, bundle: Bundle, patients: Sequence[Patient]) -> Iterator[Case]:
    """Cases of a task with a bundle's network, and for infection with its threshold."""
    predict = bundle_predictor(bundle)
    if task == "lungs":
        return lungs_cases(predict, patients)
    return infection_cases(predict, patients, float(bundle.metadata["threshold"]))


def _overlap(what: str, found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> dict[str, float]:
    return {
        f"Dice {what}": dice(found, truth),
        f"surface Dice {what}": surface_dice(found, truth),
        f"volume error {what}": abs(int(found.sum()) - int(truth.sum())) / max(int(truth.sum()), 1),
    }


def _positive(found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Slices [slice] with a lesion of at least `POSITIVE_MM2`."""
    pixels = round(POSITIVE_MM2 / datasets.PIXEL_MM**2)
    # By SciPy: cc3d 4.1 errs in flat images where components join at corners.
    labels = (ndimage.label(plane, np.ones((3, 3)))[0] for plane in found)
    return np.array([np.bincount(label.ravel())[1:].max(initial=0) >= pixels for label in labels])


def _resized(planes: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Planes [..., y, x] at another size, bilinear; unchanged where they have it."""
    if list(planes.shape[-2:]) == size:
        return planes
    flat = planes.reshape(-1, 1, *planes.shape[-2:])
    small = functional.interpolate(flat, size, mode="bilinear", antialias=True)
    return small.reshape(*planes.shape[:-2], *size)
