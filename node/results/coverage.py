"""How much of the body a series shows, and how finely, in sentences for report and PDF."""

from __future__ import annotations

import math

from pydicom.dataset import Dataset

from node.images.volume import Volume
from node.methods.outcome import Outcome, counted


def coverage(volume: Volume, outcome: Outcome, header: Dataset) -> list[str]:
    """Extent, resolution and exposure of the series, and what the method says of the quality of its images."""
    slices, rows, columns = volume.hu.shape
    spacing, down, across = volume.spacing
    made = [
        f"Coverage: {counted(slices, 'slice')} over {slices * spacing:.0f} mm without a gap, {outcome.coverage}",
    ]
    pixel = f"{down:.2f} mm" if abs(down - across) < 0.005 else f"{down:.2f} x {across:.2f} mm"
    made.append(f"Resolution: one slice every {spacing:.2f} mm, {rows} x {columns} pixels of {pixel}")
    exposure = [
        ("Slice thickness", _number(header, "SliceThickness"), " mm"),
        ("Tube voltage", _number(header, "KVP"), " kV"),
    ]
    made += [f"{name}: {value:g}{unit}" for name, value, unit in exposure if value is not None]
    return [*(f"{sentence}." for sentence in made), *outcome.quality]


def _number(header: Dataset, keyword: str) -> float | None:
    """A number of the header; None where it is absent, empty or none."""
    try:
        value = float(header.get(keyword) or "nan")
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None
