"""Slices and lesions → a statement about the scan: the published scan-level rules, each by itself.

Works on plain arrays (masks, HU) in the canonical or the source grid; axis 0 is the slice axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ConsecutiveSlices:
    """Longest run of positive slices (Lokwani et al. 2020, arXiv:2006.13212)."""

    positive_slices: int
    longest_run: int
    longest_run_mm: float
    positive: bool


@dataclass(frozen=True)
class Intensity:
    """Lesion boxes over lung area (arXiv 2020, Mask R-CNN comparison)."""

    #: Box area / lung area over the slices, 0 upwards.
    ratio: float
    boxes: int
    grade: Literal["Alarming", "Mild", "not COVID-19-like"]


@dataclass(frozen=True)
class NoisyOr:
    """Scan probability 1 - Π(1 - p) over lesion probabilities."""

    probability: float
    lesions: int


@dataclass(frozen=True)
class OpenLung:
    """Slices on which the lung is open (COVID-CTset work)."""

    #: Dark pixels in the central region, per slice.
    dark_pixels: tuple[int, ...]
    threshold: float
    kept: tuple[int, ...]


@dataclass(frozen=True)
class ScanStatement:
    """All rules' outcomes for one scan."""

    consecutive: ConsecutiveSlices
    intensity: Intensity
    noisy_or: NoisyOr
    open_lung: OpenLung
