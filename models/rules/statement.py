"""All published scan-level rules on one scan, each judged by itself.

The rules work on plain arrays (masks, HU) in the canonical grid (axis 0 inferior → superior, 1 anterior → posterior,
2 patient right → left), so that a slice is an axial slice however the series was stored; slice indices count from the
lowest. Each outcome carries the inputs and the limits that it was judged by, so that a report can show them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.rules.consecutive_slices import ConsecutiveSlices, consecutive_slices
from models.rules.lesion_boxes import Intensity, intensity
from models.rules.noisy_or import NoisyOr, noisy_or
from models.rules.open_lung import OpenLung, open_lung


@dataclass(frozen=True)
class ScanStatement:
    """All rules' outcomes for one scan."""

    consecutive: ConsecutiveSlices
    intensity: Intensity
    noisy_or: NoisyOr
    open_lung: OpenLung


def state(
    lungs: NDArray[Any],
    infection: NDArray[Any],
    hu: NDArray[np.int16],
    lesion_probabilities: Iterable[float],
    spacing: tuple[float, float, float],
) -> ScanStatement:
    """Apply all four rules.

    Parameters
    ----------
    lungs, infection
        Masks (slices, rows, columns) in the canonical grid, non-zero inside.
    hu
        Attenuation, the same shape.
    lesion_probabilities
        0 to 1, one per lesion.
    spacing
        mm between slices, rows, columns.
    """
    return ScanStatement(
        consecutive=consecutive_slices(infection, spacing),
        intensity=intensity(lungs, infection, spacing),
        noisy_or=noisy_or(lesion_probabilities),
        open_lung=open_lung(hu),
    )
