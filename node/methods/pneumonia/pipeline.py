"""Series → findings: read, segment in canonical orientation, bring back, measure, judge."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.labels import LEFT, RIGHT
from models.rules.statement import state
from node.images.orientation import Orientation
from node.images.volume import Volume, VolumeError, read_volume
from node.methods.pneumonia.findings import Findings
from node.methods.pneumonia.measure import measure

if TYPE_CHECKING:  # torch takes seconds to import, and processes that only deliver import this module
    from models.segmenter.inference import Progress, Segmenter

#: Lung volumes, ml, outside which a mask is not a chest's lungs. The lower is that of an infant and well below the
#: lungs of an adult in respiratory failure; less is bowel gas, or the lung bases on an abdomen. No lungs hold more
#: than the upper.
PLAUSIBLE_LUNG_ML = (200.0, 12_000.0)

#: Lung area, mm², on the lowest or highest slice from which the lungs count as cut off there.
CUT_OFF_MM2 = 100.0


class AnalysisError(VolumeError):
    """The series reads well, but its analysis would mislead; the message says why, free of patient data."""


def analyse(
    paths: Sequence[Path], segmenter: Segmenter, progress: Progress | None = None, *, minimum_lesion_mm3: float
) -> tuple[Volume, Findings]:
    """Analyse one CT series.

    Parameters
    ----------
    paths
        All files of the series, in any order.
    segmenter
        The networks.
    progress
        Told of every stage as it starts (0) and ends (1), and whatever the networks tell in between.
    minimum_lesion_mm3
        Smaller components of the infection are not lesions: of the infection model's metadata.

    Returns
    -------
    Volume, Findings
        The volume on its source grid, and what was found on that grid. The scan-level rules judge axial slices.

    Raises
    ------
    VolumeError
        The series is not one regular CT volume.
    AnalysisError
        No lungs were found, or not of a size that lungs have.
    """
    tell = progress or (lambda stage, done: None)
    timings: dict[str, float] = {}
    with _stage("read", timings, tell):
        volume = read_volume(paths)
    with _stage("segment", timings, tell):
        orientation = Orientation.of(volume.affine)
        hu = np.ascontiguousarray(orientation.canonical(volume.hu))
        spacing = orientation.spacing(volume.spacing)
        segmentation = segmenter(hu, spacing, tell)
    _require_lungs(segmentation.lungs, volume)
    with _stage("measure", timings, tell):
        lungs = np.ascontiguousarray(orientation.source(segmentation.lungs))
        probability = orientation.source(segmentation.probability)
        calibration = segmentation.calibration
        measured = measure(volume, lungs, probability, segmentation.threshold, minimum_lesion_mm3, calibration)
    with _stage("judge", timings, tell):
        scan = state(
            segmentation.lungs,
            orientation.canonical(measured.lesions),
            hu,
            [lesion.probability for lesion in measured.lesion_list],
            spacing,
        )
    return volume, Findings(
        lungs=lungs,
        lesions=measured.lesions,
        right=measured.right,
        left=measured.left,
        both=measured.both,
        lesion_list=measured.lesion_list,
        scan=scan,
        models=tuple(segmenter.identities),
        timings=timings | {f"segment: {stage}": s for stage, s in segmentation.timings.items()},
        notes=(*segmentation.notes, *_notes(segmentation.lungs, spacing)),
        calibrated=calibration is not None,
    )


@contextmanager
def _stage(name: str, timings: dict[str, float], tell: Progress) -> Iterator[None]:
    """Time a stage and tell of its start and end."""
    tell(name, 0.0)
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start
    tell(name, 1.0)


def _require_lungs(lungs: NDArray[np.uint8], volume: Volume) -> None:
    found = np.count_nonzero(lungs) * volume.voxel_ml
    low, high = PLAUSIBLE_LUNG_ML
    if found == 0:
        raise AnalysisError("no lungs found")
    if not low <= found <= high:
        raise AnalysisError(f"implausible lungs: {found:.0f} ml, expected {low:.0f} to {high:.0f}")


def _notes(lungs: NDArray[np.uint8], spacing: tuple[float, float, float]) -> tuple[str, ...]:
    """What limits the findings, from the lung mask in canonical orientation."""
    notes = []
    for name, plane in (("lowest", lungs[0]), ("highest", lungs[-1])):
        if np.count_nonzero(plane) * spacing[1] * spacing[2] > CUT_OFF_MM2:
            notes.append(f"The lungs reach the {name} slice: part of them may not have been scanned.")
    for name, side in (("right", RIGHT), ("left", LEFT)):
        if not (lungs == side).any():
            notes.append(f"No {name} lung was found.")
    return tuple(notes)
