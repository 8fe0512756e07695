"""Open-lung selection: the slices of a scan on which the inside of the lungs is visible.

Rahimzadeh M, Attar A, Sakhaei SM. A fully automated deep learning-based network for detecting COVID-19 from a new and
large lung CT scan dataset. Biomedical Signal Processing and Control 2021, doi:10.1016/j.bspc.2021.102588; their
data set is COVID-CTset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: HU below which a pixel is dark for the open-lung rule. The published code counts stored values below 300 in 16-bit
#: images of a scanner whose rescale intercept is -1024 (COVID-CTset, Rahimzadeh et al. 2021): 300 - 1024.
DARK_HU = -724

#: Central region of the open-lung rule as (first row, last row, first column, last column), half open, on the
#: 512 x 512 matrix of the published code; other matrices take the same part of the image.
CENTRAL_REGION = (240, 340, 120, 370)
_REGION_MATRIX = 512

#: The open-lung rule keeps slices above (most - fewest) / this, as published.
OPEN_LUNG_DIVISOR = 1.5


@dataclass(frozen=True)
class OpenLung:
    """Slices on which the lung is open (COVID-CTset, Rahimzadeh et al. 2021, doi:10.1016/j.bspc.2021.102588)."""

    #: Dark pixels in the central region, per slice.
    dark_pixels: tuple[int, ...]
    #: Slices with more dark pixels than this are kept.
    threshold: float
    kept: tuple[int, ...]
    #: HU below which a pixel is dark.
    dark_hu: int = DARK_HU


def open_lung(hu: NDArray[np.int16]) -> OpenLung:
    """Keep the slices on which the central region shows open lung.

    Counts the pixels below `DARK_HU` in `CENTRAL_REGION`, and keeps slices with more than (most - fewest) /
    `OPEN_LUNG_DIVISOR` of them. Deviations from the published code: HU instead of stored values, and a region that
    scales with the matrix; like the published one it does not follow the field of view.
    """
    rows, columns = hu.shape[1:]
    r0, r1 = (round(edge * rows / _REGION_MATRIX) for edge in CENTRAL_REGION[:2])
    c0, c1 = (round(edge * columns / _REGION_MATRIX) for edge in CENTRAL_REGION[2:])
    dark = [int(np.count_nonzero(plane[r0:r1, c0:c1] < DARK_HU)) for plane in hu]
    threshold = (max(dark, default=0) - min(dark, default=0)) / OPEN_LUNG_DIVISOR
    return OpenLung(
        dark_pixels=tuple(dark),
        threshold=threshold,
        kept=tuple(k for k, count in enumerate(dark) if count > threshold),
    )
