"""The probability that a lesion is true, from the network's probabilities of its voxels and its volume.

The mean over voxels that all exceed the threshold is near 1 for any lesion. A logistic model of three features, fitted
on patients that the network had not seen (`models.training.calibration`), says how often a lesion like this one was
true. Its coefficients are part of the bundle's metadata, `lesion_calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LesionCalibration:
    """Coefficients of the logistic model.

    Attributes
    ----------
    intercept, mean, maximum, log_volume
        Weights: constant, of the mean and of the maximum of the voxels' probabilities, of ln(volume / mm³).
    floor
        Lesions less probable than this are not reported.
    """

    intercept: float
    mean: float
    maximum: float
    log_volume: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.intercept, self.mean, self.maximum, self.log_volume)
        if not all(math.isfinite(number) for number in numbers) or not 0 <= self.floor < 1:
            raise ValueError("coefficients must be finite, and the floor at least 0 and below 1")

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> LesionCalibration | None:
        """The calibration that a bundle's metadata hold; None where there is none.

        Raises
        ------
        ValueError
            `lesion_calibration` is there, but is not one.
        """
        found = metadata.get("lesion_calibration")
        if found is None:
            return None
        try:
            names = ("intercept", "mean", "maximum", "log_volume", "floor")
            return cls(**{name: float(found[name]) for name in names if name in found})
        except (TypeError, ValueError) as error:
            raise ValueError(f"'lesion_calibration' of the metadata: {error}") from None

    def probability(
        self,
        mean: NDArray[np.floating],
        maximum: NDArray[np.floating],
        volume_mm3: NDArray[np.floating],
    ) -> NDArray[np.float64]:
        """Probability that lesions are true, from the mean and maximum over their voxels and from their volume."""
        score = self.intercept + self.mean * mean + self.maximum * maximum + self.log_volume * np.log(volume_mm3)
        chance: NDArray[np.float64] = 0.5 + 0.5 * np.tanh(0.5 * score)  # the logistic function, which cannot overflow
        return chance
