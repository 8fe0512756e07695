"""What an analysis found: masks on the source grid, measurements, lesions, the statement about the scan.

Plain data between the analysis and the results; it holds no DICOM and no patient attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.registry import ModelIdentity
from models.rules.statement import ScanStatement

Side = Literal["right", "left"]


@dataclass(frozen=True)
class Region:
    """Measurements of one lung, or of both together."""

    #: Whole lung including the infected part, ml.
    volume_ml: float
    infected_ml: float
    #: Mean attenuation of the whole lung, HU; nan for an empty region.
    mean_hu: float
    #: Mean attenuation of the infected part, HU; nan where nothing is infected.
    infected_mean_hu: float

    @property
    def infected_share(self) -> float:
        """Infected part of the lung volume, 0 to 1; 0 for an empty region."""
        return self.infected_ml / self.volume_ml if self.volume_ml > 0 else 0.0


@dataclass(frozen=True)
class Lesion:
    """One connected component of the infection mask."""

    #: Value of this lesion's voxels in `Findings.lesions`, from 1, largest volume first.
    label: int
    side: Side
    #: 0 to 1: as the model's calibration has it; without one the mean of the network's probability over the voxels.
    probability: float
    volume_ml: float
    mean_hu: float
    #: Half-open index box (k0, k1, j0, j1, i0, i1) on the source grid.
    box: tuple[int, int, int, int, int, int]
    #: Index of the slice on which the lesion's area is largest.
    key_slice: int


@dataclass(frozen=True)
class Findings:
    """Everything that one analysis says about one series."""

    #: uint8 (slices, rows, columns) on the source grid: 0 or a side of `models.labels`; includes the infected part.
    lungs: NDArray[np.uint8]
    #: uint16 (slices, rows, columns): 0, or the `Lesion.label`; non-zero is the infection mask, a subset of `lungs`.
    lesions: NDArray[np.uint16]
    right: Region
    left: Region
    both: Region
    #: Largest first; `lesion_list[n].label == n + 1`.
    lesion_list: tuple[Lesion, ...]
    scan: ScanStatement
    #: The models that took part, in order of use: that of the lungs, then that of infection (one may be both).
    models: tuple[ModelIdentity, ...]
    #: Stage name → seconds.
    timings: dict[str, float]
    #: What limits these findings, in a sentence each, such as lungs that reach the last slice.
    notes: tuple[str, ...] = ()
    #: Whether the lesions' probabilities are as the model's calibration has them.
    calibrated: bool = False

    @property
    def lung_model(self) -> ModelIdentity:
        """The model that found the lungs."""
        return self.models[0]

    @property
    def infection_model(self) -> ModelIdentity:
        """The model that found the infection."""
        return self.models[-1]
