"""Public data sets and phantoms as patients of one kind: HU-like slices at one pixel size, masks, source and licence.

None of the sets is plain HU: each is mapped by two points, aerated lung and the chest wall's soft tissue, and training
varies window and contrast besides. All slices come out in canonical orientation (see `phantom`), at `PIXEL_MM`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from models.phantom.draw import phantom
from models.phantom.thorax import FINDINGS

#: Pixel size of every slice, and of the networks.
PIXEL_MM = 1.5
#: The two points of the mapping to HU: median of lung that is not diseased, median of the chest wall.
AERATED_HU, WALL_HU = -870.0, 30.0

CC_BY_NC_SA = "CC BY-NC-SA"


@dataclass(frozen=True)
class Patient:
    """Slices of one patient, arrays [slice, y, x].

    Attributes
    ----------
    id
        Unique over all sets.
    source, licence
        The set, and what it may be used for.
    hu
        int16, HU or close to it.
    lungs
        uint8, 1 right and 2 left, or None where nobody drew them.
    infection
        bool, or None where nobody drew it. None is not 'healthy'.
    part
        'train' or 'test' where the publisher of the set prescribes it, else None.
    slab
        Stored slices in about 2.5 mm, the slab that networks see at inference: what they see next to a slice is so
        far away.
    """

    id: str
    source: str
    licence: str
    hu: NDArray[np.int16]
    lungs: NDArray[np.uint8] | None
    infection: NDArray[np.bool_] | None
    part: str | None = None
    slab: int = 1


def stack(patient: Patient, index: int, context: int, step: int | None = None) -> NDArray[np.int16]:
    """Slice `index` between its `context` neighbours on either side, [2 context + 1, y, x]; at the ends repeated.

    Neighbours are `step` slices apart, by default a slab.
    """
    places = index + np.arange(-context, context + 1) * (patient.slab if step is None else step)
    chosen: NDArray[np.int16] = patient.hu[np.clip(places, 0, len(patient.hu) - 1)]
    return chosen


@dataclass(frozen=True)
class Split:
    """Patients to learn from, to choose thresholds on, and to report on."""

    train: tuple[Patient, ...]
    validation: tuple[Patient, ...]
    test: tuple[Patient, ...]


def split(patients: Iterable[Patient], seed: int) -> Split:
    """Divide patients, never slices: of each source a fifth to test, a seventh to validate, the rest to train.

    Raises
    ------
    ValueError
        When two patients share an id.
    """
    patients = sorted(patients, key=lambda patient: patient.id)
    if len({patient.id for patient in patients}) != len(patients):
        raise ValueError("two patients share an id: their slices could land on both sides of the split")
    parts: dict[str, list[Patient]] = {"train": [], "validation": [], "test": []}
    rng = np.random.default_rng(seed)
    for source in sorted({patient.source for patient in patients}):
        free = [patient for patient in patients if patient.source == source and patient.part is None]
        order = [free[i] for i in rng.permutation(len(free))]
        tests, validations = -(-len(order) // 5), round(len(order) / 7 + 0.2)
        parts["test"] += order[:tests]
        parts["validation"] += order[tests : tests + validations]
        parts["train"] += order[tests + validations :]
        for patient in patients:
            if patient.source == source and patient.part is not None:
                parts[patient.part].append(patient)
    return Split(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]))


def covid_seg_20(slices: Path) -> list[Patient]:
    """COVID-19-CT-Seg-20 (Ma et al. 2020): ten patients of coronacases.org, lungs and infection, 8-bit after CLAHE."""
    patients = []
    for path in sorted((slices / "covid-seg-20").glob("*.npz")):
        with np.load(path, allow_pickle=False) as data:
            hu = _to_hu(data["ct"], data["lung"], data["infection"])
            # 256 pixels over a reconstructed field of about 370 mm, slices of 1 to 1.5 mm; the set does not say it
            # exactly.
            licence = f"{CC_BY_NC_SA} 4.0"
            drawn = _patient(path.stem, "covid-seg-20", licence, hu, data["lung"], data["infection"], 1.45)
            patients.append(replace(drawn, slab=2))
    return patients


def medseg_9(slices: Path) -> list[Patient]:
    """Whole volumes of MedSeg / Radiopaedia in a lung window: neck and abdomen too, so most slices are empty.

    Three patients to test on: nothing is trained or chosen on them.
    """
    patients = []
    for path in sorted((slices / "medseg-9").glob("volume_[125].npz")):
        with np.load(path, allow_pickle=False) as data:
            # All are stored mirrored (the liver at high x), volume 1 from the neck downwards.
            step = -1 if path.stem == "volume_1" else 1
            ct, lung, infection = (data[name][::step, :, ::-1] for name in ("ct", "lung", "infection"))
            name = f"medseg_{path.stem}"
            licence = f"{CC_BY_NC_SA} 3.0"
            patients.append(_patient(name, "medseg-9", licence, _to_hu(ct, lung, infection), lung, infection, 1.37))
    return patients


def radiopaedia(slices: Path) -> list[Patient]:
    """Two patients of Radiopaedia with much pneumonia, to learn from: the fourth of MedSeg, and the one not among them.

    A set that is not there is left out: it came later than the others.
    """
    patients = []
    for path in (slices / "medseg-9" / "volume_4.npz", slices / "radiopaedia-14" / "radiopaedia_14.npz"):
        if not path.is_file():
            continue
        with np.load(path, allow_pickle=False) as data:
            shown = np.flatnonzero(data["has_lung"] if "has_lung" in data else np.ones(len(data["ct"]), bool))
            ct, lung, infection = (data[name][shown] for name in ("ct", "lung", "infection"))
            hu = _to_hu(ct, lung, infection)
            licence = f"{CC_BY_NC_SA} 3.0"
            patients.append(
                _patient(f"radiopaedia_{path.stem}", "radiopaedia", licence, hu, lung, infection, 1.37, "train")
            )
    return patients


def finding_lungs(slices: Path) -> list[Patient]:
    """Kaggle 'Finding lungs in CT data': one slice a scan from many scanners, lungs only."""
    with np.load(slices / "finding-lungs" / "finding_lungs.npz", allow_pickle=False) as data:
        cts, lungs, names = data["ct"], data["lung"], data["name"]
    patients = []
    for ct, lung, name in zip(cts, lungs, names, strict=True):
        hu = _to_hu(ct[None], lung[None], None)[0]
        if (lung & ~body(hu)).sum() > 0.1 * lung.sum():
            continue  # A mask that holds the air around the patient.
        if _is_prone(hu, lung):
            hu, lung = hu[::-1, ::-1], lung[::-1, ::-1]
        patients.append(_patient(f"finding_{name}", "finding-lungs", "not stated", hu[None], lung[None], None, 1.45))
    return patients


def healthy_finding_lungs(slices: Path) -> list[Patient]:
    """The slices of `finding_lungs` on which nothing is denser than vessels are, as patients without infection.

    Nobody drew infection in that set, so lack of it has to be shown: opening by 5 pixels removes the vessels from
    what is denser than -720 HU; slices where under 4.6 % of the lung remains were looked at, and are clear.
    """
    healthy = []
    for patient in finding_lungs(slices):
        assert patient.lungs is not None
        lung = ndimage.binary_closing(patient.lungs[0] > 0, iterations=3)
        inner = ndimage.binary_erosion(lung, iterations=3)
        dense = inner & (ndimage.gaussian_filter(patient.hu[0].astype(np.float32), 1.0) > -720)
        disk = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 2)
        if ndimage.binary_opening(dense, disk).sum() < 0.046 * inner.sum():
            healthy.append(replace(patient, infection=np.zeros(patient.hu.shape, bool)))
    return healthy


def semiseg(slices: Path) -> list[Patient]:
    """COVID-SemiSeg (Fan et al. 2020): 98 single slices cropped to the lungs, infection only, the published split.

    The set does not say which slices share a patient; the published split is kept as it is.
    """
    folders = {"train": "TrainingSet/LungInfection-Train/Doctor-label", "test": "TestingSet/LungInfection-Test"}
    patients = []
    for part, folder in folders.items():
        for path in sorted((slices / "semiseg" / folder / "Imgs").glob("*.jpg")):
            grey = np.asarray(Image.open(path).convert("L")).T
            drawn = np.asarray(Image.open(path.parents[1] / "GT" / f"{path.stem}.png").convert("L")).T > 127
            # Cropped to the lungs, so the width is that of a chest inside: about 285 mm.
            patients.append(
                _patient(
                    f"semiseg_{part}_{path.stem}",
                    "semiseg",
                    "not stated (images of SIRM)",
                    _grey_to_hu(grey)[None],
                    None,
                    drawn[None],
                    285.0 / grey.shape[1],
                    part,
                )
            )
    return patients


def phantoms(seeds: Sequence[int], *, slices: int = 28, severity: int | None = None) -> list[Patient]:
    """Procedural patients; without a severity one in three is healthy, the rest of all degrees; extras by the seed."""
    patients = []
    for seed in seeds:
        drawn = phantom(
            seed,
            shape=(slices, 256, 256),
            severity=(0, 1, 2, 0, 2, 3)[seed % 6] if severity is None else severity,
            extras=None,
        )
        name = f"phantom_{seed}_{severity}"
        pixel = drawn.spacing[2]
        patients.append(
            _patient(name, "phantom", "own", drawn.hu.astype(np.float32), drawn.lungs, drawn.infection, pixel)
        )
    return patients


def changed_phantoms(seeds: Sequence[int], *, slices: int = 20) -> list[Patient]:
    """Phantoms with a finding of `thorax` each, in wide fields of view, every third the size of a child."""
    patients = []
    names, chances = list(FINDINGS), np.array([chance for chance, _ in FINDINGS.values()])
    for seed in seeds:
        rng = np.random.default_rng([seed, 2])
        drawn = phantom(
            seed,
            shape=(slices, 256, 320),
            spacing=(330 / slices, 1.5, 1.5),
            severity=(0, 0, 2, 3)[seed % 4],
            extras=None,
            findings=[str(rng.choice(names, p=chances / chances.sum()))],
        )
        size = rng.uniform(0.45, 0.8) if seed % 3 == 0 else 1.0
        hu, pixel = drawn.hu.astype(np.float32), size * drawn.spacing[2]
        patients.append(_patient(f"changed_{seed}", "changed", "own", hu, drawn.lungs, drawn.infection, pixel))
    return patients


def right_and_left(lungs: NDArray[np.bool_], midline: float) -> NDArray[np.uint8]:
    """Sides of an unsided lung mask [y, x] by component and midline; lungs that touch are parted by erosion."""
    eroded = lungs
    for _ in range(12):
        labels, count = ndimage.label(eroded)
        spans = ndimage.find_objects(labels)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        left_share = np.bincount(labels[:, round(midline) :].ravel(), minlength=count + 1)[1:] / np.maximum(sizes, 1)
        if not any(size > 200 and 0.2 < share < 0.8 for size, share in zip(sizes, left_share, strict=True)):
            break
        eroded = ndimage.binary_erosion(eroded)
    else:
        sides = np.where(np.arange(lungs.shape[1]) < midline, 1, 2)
        return np.where(lungs, sides, 0).astype(np.uint8)
    if not spans:
        return np.zeros(lungs.shape, np.uint8)
    side = np.concatenate([[0], np.where(left_share > 0.5, 2, 1)])
    nearest = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    return np.where(lungs, side[labels[tuple(nearest)]], 0).astype(np.uint8)


def body(hu: NDArray[np.int16] | NDArray[np.float32]) -> NDArray[np.bool_]:
    """The patient in one slice [y, x], holes filled, without the table."""
    labels, count = ndimage.label(ndimage.binary_opening(hu > -350, iterations=2))
    if count == 0:
        return np.zeros(hu.shape, bool)
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    filled: NDArray[np.bool_] = ndimage.binary_fill_holes(largest)
    return filled


def _patient(
    name: str,
    source: str,
    licence: str,
    hu: NDArray[np.float32],
    lungs: NDArray[np.uint8] | NDArray[np.bool_] | None,
    infection: NDArray[np.bool_] | None,
    pixel_mm: float,
    part: str | None = None,
) -> Patient:
    zoom = (1.0, pixel_mm / PIXEL_MM, pixel_mm / PIXEL_MM)
    fine = np.clip(np.rint(ndimage.zoom(hu, zoom, order=1)), -1024, 3071).astype(np.int16)
    sides = None if lungs is None else ndimage.zoom(lungs.astype(np.uint8), zoom, order=0)
    if sides is not None and lungs is not None and lungs.dtype == bool:
        midline = _midline(fine)
        sides = np.stack([right_and_left(mask > 0, midline) for mask in sides])
    drawn = None
    if infection is not None:
        drawn = ndimage.zoom(infection.astype(np.float32), zoom, order=1) >= 0.5
    return Patient(name, source, licence, fine, sides, drawn, part)


def _midline(hu: NDArray[np.int16]) -> float:
    """Column of the patient's midline: the median over slices of the middle of the body."""
    middles = []
    for image in hu[:: max(1, len(hu) // 20)]:
        columns = np.flatnonzero(body(image).sum(0) > 20)
        if len(columns):
            middles.append((columns[0] + columns[-1]) / 2)
    return float(np.median(middles)) if middles else hu.shape[2] / 2


def _to_hu(
    grey: NDArray[np.generic], lungs: NDArray[np.bool_], infection: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    """Map aerated lung and the chest wall's soft tissue to `AERATED_HU` and `WALL_HU`."""
    step = max(1, len(grey) // 12)
    sample, lung = grey[::step].astype(np.float32), lungs[::step]
    aerated = lung if infection is None else lung & ~infection[::step]
    wall = np.stack(
        [ndimage.binary_dilation(m, iterations=12) & ~ndimage.binary_dilation(m, iterations=4) for m in lung]
    )
    low, high = np.median(sample[aerated]), np.median(sample[wall])
    hu: NDArray[np.float32] = AERATED_HU + (grey.astype(np.float32) - low) * ((WALL_HU - AERATED_HU) / (high - low))
    return hu


def _grey_to_hu(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The same without a lung mask: the darkest tenth is aerated lung, the bright peak is soft tissue."""
    low = float(np.percentile(grey, 10))
    histogram = np.convolve(np.bincount(grey.ravel(), minlength=256)[:250], np.ones(9), "same")
    start = int(low) + 60
    high = start + int(np.argmax(histogram[start:])) if start < 245 else 250
    gain = (WALL_HU + 20 - AERATED_HU) / (high - low)
    hu: NDArray[np.float32] = AERATED_HU + (grey.astype(np.float32) - low) * np.float32(gain)
    return hu


def _is_prone(hu: NDArray[np.float32], lungs: NDArray[np.bool_]) -> bool:
    """Whether the spine, the most bone near the midline, lies at low y."""
    rows, columns = np.nonzero(lungs)
    width = columns.max() - columns.min()
    middle = slice(int(columns.min() + 0.38 * width), int(columns.max() - 0.38 * width))
    bone = ndimage.gaussian_filter(hu, 1.5)[:, middle] > 220
    centre = int(rows.mean())
    return bool(bone[:centre].sum() > 1.5 * bone[centre:].sum())
