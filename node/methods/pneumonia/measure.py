"""Masks and probabilities → lesions, volumes and attenuation, on the source grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.calibration import LesionCalibration
from models.labels import LEFT, RIGHT
from models.lesions import components, reached
from node.images.volume import Volume
from node.methods.pneumonia.findings import Lesion, Region, Side


@dataclass(frozen=True)
class Measurements:
    """Lesions and regions of one volume; fields as in `Findings`."""

    lesions: NDArray[np.uint16]
    right: Region
    left: Region
    both: Region
    lesion_list: tuple[Lesion, ...]


def measure(
    volume: Volume,
    lungs: NDArray[np.uint8],
    probability: NDArray[np.floating],
    threshold: float,
    minimum_lesion_mm3: float,
    calibration: LesionCalibration | None = None,
) -> Measurements:
    """Find lesions and measure them and the lungs.

    Infection is where `probability` reaches `threshold` inside the lungs. A lesion is a 26-connected component of
    it of at least `minimum_lesion_mm3`; smaller ones count as healthy lung.

    Parameters
    ----------
    volume
        The volume (slices, rows, columns).
    lungs
        Same shape: 0 background, then `models.labels`.
    probability
        Same shape: infection probability, 0 to 1.
    threshold
        From which probability a voxel is infected.
    minimum_lesion_mm3
        Components smaller than this are not lesions, as the metadata of the infection model say. The shipped model's
        100 mm³ is a sphere of 6 mm, below which the Fleischner Society (2017) does not follow a nodule up, and the
        size of the vessel ends and noise that a network marks.
    calibration
        Says how probable a lesion is, and which are too improbable to be reported; without one it is the mean over
        the lesion's voxels, and all are.
    """
    if not volume.hu.shape == lungs.shape == probability.shape:
        raise ValueError("volume, lungs and probability differ in shape")
    lesions = np.zeros(lungs.shape, np.uint16)
    lesion_list: tuple[Lesion, ...] = ()
    # Sums by side and infected or not; the regions follow from them.
    counts, sums = np.zeros((3, 2)), np.zeros((3, 2))
    if box := _bounding_box(lungs > 0):
        infection = reached(probability[box], threshold)
        infection &= lungs[box] > 0
        lesions[box] = components(infection, minimum_lesion_mm3 / (1000 * volume.voxel_ml))
        lesion_list = _lesion_list(volume, lungs, probability, lesions, box, calibration)
        if calibration is not None:
            lesion_list = _without_improbable(lesion_list, lesions[box], calibration.floor)
        counts, sums = _count_and_sum(volume.hu[box], lungs[box], lesions[box])
    return Measurements(
        lesions=lesions,
        right=_region(counts[RIGHT], sums[RIGHT], volume.voxel_ml),
        left=_region(counts[LEFT], sums[LEFT], volume.voxel_ml),
        both=_region(counts[1:].sum(axis=0), sums[1:].sum(axis=0), volume.voxel_ml),
        lesion_list=lesion_list,
    )


@njit(nogil=True, cache=True)
def _count_and_sum(hu, lungs, lesions):  # type: ignore[no-untyped-def]
    """Voxels and sum of HU by label of `lungs` and infected or not."""
    counts, sums = np.zeros((3, 2), np.int64), np.zeros((3, 2), np.int64)
    for k in range(hu.shape[0]):
        for j in range(hu.shape[1]):
            for i in range(hu.shape[2]):
                side = lungs[k, j, i]
                if side:
                    infected = 1 if lesions[k, j, i] else 0
                    counts[side, infected] += 1
                    sums[side, infected] += hu[k, j, i]
    return counts, sums


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    """Smallest box around the mask; None for an empty one."""
    slices = np.flatnonzero([plane.any() for plane in mask])
    if not len(slices):
        return None
    k = slice(int(slices[0]), int(slices[-1]) + 1)
    plane: NDArray[np.bool_] = np.any(mask[k], axis=0)
    rows, columns = np.flatnonzero(np.any(plane, axis=1)), np.flatnonzero(np.any(plane, axis=0))
    return k, slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _lesion_list(
    volume: Volume,
    lungs: NDArray[np.uint8],
    probability: NDArray[np.floating],
    lesions: NDArray[np.uint16],
    box: tuple[slice, slice, slice],
    calibration: LesionCalibration | None,
) -> tuple[Lesion, ...]:
    """Measure each lesion; `box` holds them all."""
    where = np.nonzero(lesions[box] > 0)  # of booleans, which is several times quicker
    index = tuple(axis + part.start for axis, part in zip(where, box, strict=True))
    label = lesions[index]
    count = int(label.max(initial=0))
    if not count:
        return ()
    sizes = np.bincount(label, minlength=count + 1)
    probabilities = np.bincount(label, probability[index], minlength=count + 1) / np.maximum(sizes, 1)
    if calibration is not None:
        most = np.zeros(count + 1)
        np.maximum.at(most, label, probability[index])
        # Label 0 is no lesion, and has no volume.
        volumes = np.maximum(sizes, 1) * volume.voxel_ml * 1000
        probabilities = calibration.probability(probabilities, most, volumes)
    mean_hu = np.bincount(label, volume.hu[index], minlength=count + 1) / np.maximum(sizes, 1)
    in_left = np.bincount(label, lungs[index] == LEFT, minlength=count + 1)
    first, last = np.full((3, count + 1), np.iinfo(np.intp).max), np.full((3, count + 1), -1)
    for axis in range(3):
        np.minimum.at(first[axis], label, index[axis])
        np.maximum.at(last[axis], label, index[axis])
    depth = len(lungs)
    per_slice = np.bincount(label * np.intp(depth) + index[0], minlength=(count + 1) * depth)
    key_slices = per_slice.reshape(count + 1, depth).argmax(axis=1)

    def lesion(n: int) -> Lesion:
        (k0, j0, i0), (k1, j1, i1) = first[:, n].tolist(), (last[:, n] + 1).tolist()
        side: Side = "left" if in_left[n] * 2 > sizes[n] else "right"
        return Lesion(
            label=n,
            side=side,
            probability=min(float(probabilities[n]), 1.0),
            volume_ml=float(sizes[n] * volume.voxel_ml),
            mean_hu=float(mean_hu[n]),
            box=(k0, k1, j0, j1, i0, i1),
            key_slice=int(key_slices[n]),
        )

    return tuple(lesion(n) for n in range(1, count + 1))


def _without_improbable(
    lesion_list: tuple[Lesion, ...], lesions: NDArray[np.uint16], floor: float
) -> tuple[Lesion, ...]:
    """Drop lesions below the floor from the list and, in place, from the label map, and number the rest anew."""
    kept = [lesion for lesion in lesion_list if lesion.probability >= floor]
    new_label = np.zeros(len(lesion_list) + 1, np.uint16)
    new_label[[lesion.label for lesion in kept]] = np.arange(1, len(kept) + 1)
    if len(kept) < len(lesion_list):
        lesions[:] = new_label[lesions]
    return tuple(replace(lesion, label=int(new_label[lesion.label])) for lesion in kept)


def _region(counts: NDArray[np.float64], sums: NDArray[np.float64], voxel_ml: float) -> Region:
    """Region from voxel counts and HU sums of its healthy and its infected part."""
    voxels, infected = float(counts.sum()), float(counts[1])
    return Region(
        volume_ml=voxels * voxel_ml,
        infected_ml=infected * voxel_ml,
        mean_hu=float(sums.sum()) / voxels if voxels else float("nan"),
        infected_mean_hu=float(sums[1]) / infected if infected else float("nan"),
    )
