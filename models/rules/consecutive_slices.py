"""Consecutive positive slices: a scan is positive from 15 infected slices in a row.

Lokwani R, Gaikwad A, Kulkarni V, Pant A, Kharat A. Automated detection of COVID-19 from CT scans using convolutional
neural networks. 2020, arXiv:2006.13212.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Consecutive positive slices that make a scan positive (Lokwani et al. 2020, arXiv:2006.13212). The rule counts
#: slices whatever their spacing, as published; `ConsecutiveSlices.longest_run_mm` says how much of the body that is.
MINIMUM_RUN = 15

#: Infected area that makes a slice positive, mm²: a disc of 5 mm, the calibre of a segmental vessel, which is most
#: often mistaken for a small lesion. The paper gives no area.
MINIMUM_SLICE_AREA_MM2 = 20.0


@dataclass(frozen=True)
class ConsecutiveSlices:
    """Longest run of positive slices (Lokwani et al. 2020, arXiv:2006.13212)."""

    positive_slices: int
    longest_run: int
    #: `longest_run` times the slice spacing.
    longest_run_mm: float
    positive: bool
    #: The limits applied: slices in a row, and infected mm² that make a slice positive.
    minimum_run: int = MINIMUM_RUN
    minimum_slice_area_mm2: float = MINIMUM_SLICE_AREA_MM2


def consecutive_slices(infection: NDArray[Any], spacing: tuple[float, float, float]) -> ConsecutiveSlices:
    """Judge by the longest run of slices with at least `MINIMUM_SLICE_AREA_MM2` of infection."""
    slice_mm, row_mm, column_mm = spacing
    area = np.array([np.count_nonzero(plane) for plane in infection]) * row_mm * column_mm
    # Areas are whole numbers of pixels: keep the comparison from failing by a rounding of row_mm * column_mm.
    positive = area >= MINIMUM_SLICE_AREA_MM2 * (1 - 1e-9)
    # Where the padded mask changes, runs start and end in turn.
    changes = np.flatnonzero(np.diff(np.pad(positive.astype(np.int8), 1)))
    longest = int(max(changes[1::2] - changes[::2], default=0))
    return ConsecutiveSlices(
        positive_slices=int(positive.sum()),
        longest_run=longest,
        longest_run_mm=longest * slice_mm,
        positive=longest >= MINIMUM_RUN,
    )
