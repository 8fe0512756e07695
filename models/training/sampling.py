"""What a network sees while it learns: slices drawn fairly over the sources, cut out and varied.

The variety is there to carry 8-bit windows and CLAHE over to plain HU of any scanner: monotone grey curves, gamma,
gain, offset, blur, noise, the table taken away, the circle of the reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandHistogramShiftd,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.spatial.dictionary import RandAffined
from monai.transforms.transform import RandomizableTransform
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from models.phantom.grid import Grid
from models.phantom.thorax import FINDINGS
from models.training import datasets, surroundings
from models.training.datasets import Patient

Task = Literal["lungs", "infection"]

#: HU that the networks see; all beyond is clipped. Mapped to -1 ... 1.
HU_RANGE = (-1000.0, 400.0)


def normalise(hu: NDArray[np.int16] | NDArray[np.float32]) -> NDArray[np.float32]:
    """HU to the -1 ... 1 that the networks take."""
    low, high = HU_RANGE
    scaled: NDArray[np.float32] = (np.clip(hu, low, high).astype(np.float32) - (low + high) / 2) * (2 / (high - low))
    return scaled


class Slices(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless augmented slices (image, target), drawn by source, then by patient, diseased slices more often.

    Flips keep the sides true: what was the right lung is the left one after, and is called so. With a context the
    image has neighbouring slices below and above as channels, at distances and of thicknesses as they may come, now
    and then the slice itself instead: single slices are all that some sets have.
    """

    def __init__(
        self,
        task: Task,
        patients: Sequence[Patient],
        shares: dict[str, float],
        crop: int,
        seed: int | Sequence[int],
        context: int = 0,
    ) -> None:
        self.crop, self.task, self.seed, self.context = crop, task, seed, context
        self.sources = {source: [patient for patient in patients if patient.source == source] for source in shares}
        self.sources = {source: members for source, members in self.sources.items() if members}
        self.shares = np.array([shares[source] for source in self.sources])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([*np.atleast_1d(self.seed), 0 if worker is None else worker.id])
        augment = _augmentation(self.crop, wide=self.task == "lungs")
        augment.set_random_state(int(rng.integers(1 << 31)))
        names = list(self.sources)
        share = self.shares / self.shares.sum()
        while True:
            members = self.sources[names[rng.choice(len(names), p=share)]]
            patient = members[rng.integers(len(members))]
            index = self._slice(rng, patient)
            target = self._target(patient, index)
            hu = self._image(rng, patient, index)
            if self.task == "lungs":
                hu, target = _elsewhere(rng, hu, target, disease=patient.source != "changed")
            if rng.random() < 0.5:
                hu, target = hu[..., ::-1], target[:, ::-1]
                if self.task == "lungs":
                    target = np.array([0, 2, 1], np.uint8)[target]
            if self.task == "lungs":
                hu, target = _crop(rng, hu, target, _middle(target), self.crop, _AWAY[rng.choice(3, p=_AWAY_CHANCE)])
            else:
                hu, target = _crop(rng, hu, target, _window(patient, index), self.crop)
            item = augment({"image": torch.from_numpy(normalise(hu)), "target": torch.from_numpy(target)[None]})
            image = item["image"].as_tensor().float().clamp(-1, 1)
            yield image, item["target"].as_tensor().float()

    def _image(self, rng: np.random.Generator, patient: Patient, index: int) -> NDArray[np.float32]:
        """HU [channel, y, x] of a slice and its context."""
        if self.context == 0:
            return patient.hu[index : index + 1].astype(np.float32)
        if rng.random() < 0.15:
            return np.repeat(patient.hu[index : index + 1].astype(np.float32), 2 * self.context + 1, 0)
        step = int(rng.integers(1, 2 * patient.slab + 1)) * int(rng.choice((-1, 1)))
        thick = min(int(rng.integers(1, patient.slab + 2)), abs(step))
        layers = [
            datasets.stack(patient, index + offset, self.context, step)
            for offset in range(-(thick // 2), thick - thick // 2)
        ]
        image: NDArray[np.float32] = np.mean(layers, 0, dtype=np.float32)
        return image

    def _slice(self, rng: np.random.Generator, patient: Patient) -> int:
        wanted = patient.infection if self.task == "infection" else patient.lungs
        if wanted is not None and rng.random() < (0.6 if self.task == "infection" else 0.8):
            filled = np.flatnonzero(wanted.any((1, 2)))
            if len(filled):
                return int(filled[rng.integers(len(filled))])
        return int(rng.integers(len(patient.hu)))

    def _target(self, patient: Patient, index: int) -> NDArray[np.uint8]:
        mask = patient.infection if self.task == "infection" else patient.lungs
        if mask is None:
            raise ValueError(f"{patient.id} has no mask of {self.task}")
        drawn: NDArray[np.uint8] = mask[index].astype(np.uint8)
        return drawn


class _ScannerVariety(RandomizableTransform):
    """The reconstruction circle, and a window's clipping: what 8-bit sources and old scanners do to a slice."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Change `image` in place of the item."""
        image = item["image"]
        if self.R.random() < 0.15:
            size = image.shape[-1]
            y, x = np.ogrid[:size, :size]
            radius = self.R.uniform(0.47, 0.6) * size
            outside = (y - size / 2) ** 2 + (x - size / 2) ** 2 > radius**2
            image[:, torch.from_numpy(outside)] = -1.0
        if self.R.random() < 0.3:
            image = image.clamp(-1, self.R.uniform(0.3, 0.9))
        item["image"] = image
        return item


#: Slices of lungs are cut out up to so far from their middle, of the crop's side, and how often.
_AWAY, _AWAY_CHANCE = (0.06, 0.2, 0.4), (0.6, 0.3, 0.1)

#: Pixels of air put around a slice of lungs, for arms and couch.
_RIM = 64


def _elsewhere(
    rng: np.random.Generator, hu: NDArray[np.float32], target: NDArray[np.uint8], *, disease: bool
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A slice [1, y, x] of lungs as another hospital has it: what changes a whole lung, arms, couch, and air around.

    Half of them as the network sees them at inference, all air outside the body alike.
    """
    pixel = datasets.PIXEL_MM
    hu = np.pad(hu, ((0, 0), (_RIM, _RIM), (_RIM, _RIM)), constant_values=-1000.0)
    lungs = np.pad(target, _RIM)[None].copy()
    if disease and (lungs > 0).sum() > 1000 and rng.random() < 0.35:
        fine = ndimage.gaussian_filter(rng.standard_normal(hu.shape).astype(np.float32), (0, 0.8, 0.8)) * 2.5
        grid = Grid((1, *hu.shape[1:]), (2.5, pixel, pixel), (0.0, -pixel * hu.shape[1] / 2, -pixel * hu.shape[2] / 2))
        names = list(FINDINGS)
        chances = np.array([FINDINGS[name][0] for name in names])
        FINDINGS[names[rng.choice(len(names), p=chances / chances.sum())]][1](rng, grid, hu, lungs, fine)
    body = datasets.body(hu[0])[None]
    # Lung beyond the edge of the image opens the body; it is within all the same.
    body |= lungs > 0
    inside = ndimage.binary_dilation(body, iterations=int(rng.integers(1, 4)))
    if rng.random() < 0.3:
        hu = np.where(inside, hu, -1000.0).astype(np.float32)
    before = hu.copy()
    if rng.random() < 0.35:
        surroundings.add_arms(rng, hu, body, pixel, up=False)
    arms = hu != before
    if rng.random() < 0.35:
        surroundings.add_couch(rng, hu, body | arms, pixel)
    if rng.random() < 0.25:
        surroundings.add_clutter(rng, hu, body | arms, pixel)
    if rng.random() < 0.3:
        surroundings.add_dirty_air(rng, hu, body | arms)
    if rng.random() < 0.5:
        kept = inside | arms if rng.random() < 0.7 else inside
        hu = np.where(kept, hu, -1000.0).astype(np.float32)
    return hu, lungs[0]


def _augmentation(crop: int, *, wide: bool = False) -> Compose:
    """Pose, then what carries CLAHE and lung windows to plain HU: monotone curves, gamma, gain, offset, blur, noise."""
    return Compose(
        [
            RandAffined(
                keys=("image", "target"),
                prob=0.8,
                rotate_range=0.35 if wide else 0.17,
                scale_range=(0.3, 0.3) if wide else (0.18, 0.18),
                shear_range=(0.05, 0.05),
                translate_range=12,
                spatial_size=(crop, crop),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandHistogramShiftd(keys="image", num_control_points=(5, 9), prob=0.3),
            RandAdjustContrastd(keys="image", prob=0.4, gamma=(0.65, 1.5), retain_stats=False),
            RandScaleIntensityd(keys="image", factors=0.12, prob=0.5),
            RandShiftIntensityd(keys="image", offsets=0.08, prob=0.6),
            RandGaussianSmoothd(keys="image", sigma_x=(0.4, 1.2), sigma_y=(0.4, 1.2), prob=0.25),
            RandGaussianNoised(keys="image", prob=0.4, std=0.07),
            _ScannerVariety(),
        ]
    )


def _window(patient: Patient, index: int) -> tuple[float, float]:
    """Centre (y, x) of what matters in a slice: the lungs where they are known."""
    if patient.lungs is not None and patient.lungs[index].any():
        rows, columns = (np.flatnonzero(patient.lungs[index].any(axis)) for axis in (1, 0))
        return (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    return patient.hu.shape[1] / 2, patient.hu.shape[2] / 2


def _middle(lungs: NDArray[np.uint8]) -> tuple[float, float]:
    """Centre (y, x) of the lungs in a slice, or of the slice."""
    if not lungs.any():
        return lungs.shape[0] / 2, lungs.shape[1] / 2
    rows, columns = (np.flatnonzero(lungs.any(axis)) for axis in (1, 0))
    return (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2


def _crop(
    rng: np.random.Generator,
    hu: NDArray[np.float32],
    target: NDArray[np.uint8],
    centre: tuple[float, float],
    size: int,
    away: float = 0.06,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Cut a square about the centre or up to a part of its side away, or pad with air."""
    images = np.full((len(hu), size, size), -1024.0, np.float32), np.zeros((size, size), np.uint8)
    low = [round(c + rng.uniform(-away, away) * size) - size // 2 for c in centre]
    here = tuple(slice(max(o, 0), min(o + size, n)) for o, n in zip(low, target.shape, strict=True))
    there = tuple(slice(s.start - o, s.stop - o) for s, o in zip(here, low, strict=True))
    images[0][:, *there], images[1][there] = hu[:, *here], target[here]
    return images
