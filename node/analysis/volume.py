"""DICOM series → `Volume`: an array in HU with its geometry and the way back to every source instance.

Only geometry and pixels live here; patient and study attributes stay in the files that `Volume.sources` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class VolumeError(ValueError):
    """A series cannot be read as one regular volume; the message says why, free of patient data."""


@dataclass(frozen=True)
class SourceSlice:
    """The instance (and frame) that one slice of a `Volume` came from."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    #: 1-based frame number in an enhanced multi-frame instance, else None.
    frame: int | None
    #: Image Position (Patient) of the slice, mm, LPS (PS3.3 C.7.6.2.1.1).
    position: tuple[float, float, float]


@dataclass(frozen=True)
class Volume:
    """A CT series as one regular grid.

    Slices are sorted along the slice normal (row cosine × column cosine), whatever their order on disk or by
    instance number; rows and columns stay as stored, so `hu[k]` is exactly the pixel matrix of `sources[k]`.
    """

    #: int16 HU, shape (slices, rows, columns).
    hu: NDArray[np.int16]
    #: 4x4, voxel index (column i, row j, slice k, 1) → patient LPS mm (PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1).
    affine: NDArray[np.float64]
    #: One per slice, in the order of `hu`.
    sources: tuple[SourceSlice, ...]
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between (slices, rows, columns), in the order of `hu`'s axes."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(k), float(j), float(i)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0
