"""One of the two networks by itself, on the path that a node runs it on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.lesions import components, reached
from models.registry import BuiltBundle, Bundle
from models.segmenter.inference import Segmenter


class LungFinder:
    """Lungs as `Segmenter` finds them, without a search for infection.

    Parameters
    ----------
    lungs
        A bundle of role 'lungs'.
    device
        As `Segmenter` takes it.
    """

    def __init__(self, lungs: Bundle, device: str | None = None) -> None:
        self._segmenter = Segmenter(lungs, _no_infection(lungs), device)

    def __call__(self, hu: NDArray[np.int16], spacing: tuple[float, float, float]) -> NDArray[np.uint8]:
        """Labels [z, y, x] of a volume as `Segmenter` takes it: 0 or a value of `models.labels`."""
        return self._segmenter.lungs(hu, spacing)


class InfectionFinder:
    """Infection in the lungs that a network of the lungs finds.

    Parameters
    ----------
    lungs, infection
        Bundles of these roles.
    device
        As `Segmenter` takes it.
    """

    def __init__(self, lungs: Bundle, infection: Bundle, device: str | None = None) -> None:
        self._segmenter = Segmenter(lungs, infection, device)
        self._minimum_mm3 = float(infection.metadata["minimum_lesion_mm3"])

    def __call__(self, hu: NDArray[np.int16], spacing: tuple[float, float, float]) -> NDArray[np.bool_]:
        """Voxels [z, y, x] of lesions; the floor of a calibration is not applied."""
        found = self._segmenter(hu, spacing)
        infection = reached(found.probability, found.threshold) & (found.lungs > 0)
        lesions: NDArray[np.bool_] = components(infection, self._minimum_mm3 / float(np.prod(spacing))) > 0
        return lesions


def _no_infection(lungs: Bundle) -> Bundle:
    """An infection model on the grid of a lung model, for a `Segmenter` asked for the lungs alone: never run."""
    sizes: dict[str, Any] = {key: lungs.metadata[key] for key in ("pixel_mm", "hu_range", "stride")}
    sizes |= {"threshold": 0.5, "minimum_lesion_mm3": 1.0, "context": 0, "bfloat16": False}
    nothing = Bundle("none", "0", "", sizes, lungs.path)
    return BuiltBundle.of(nothing, torch.nn.Identity())
