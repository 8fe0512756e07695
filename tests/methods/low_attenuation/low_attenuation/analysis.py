"""Lungs by the network of the bundle, and the voxels of them that are nearly air."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.sr.coding import Code

from low_attenuation import KIND, LIMIT_HU, METHOD
from models.registry import Bundle
from models.resample import shrink
from models.runtime import open_runtime
from node.images.orientation import Orientation
from node.images.volume import Volume, VolumeError, read_volume
from node.methods.codes import LEFT, LEFT_LUNG, LUNG, ML, PERCENT, RIGHT, RIGHT_LUNG, VOLUME
from node.methods.outcome import (
    CodingScheme,
    Column,
    Layer,
    Measurement,
    MeasurementGroup,
    Outcome,
    Outline,
    Pictures,
    Row,
    Segment,
    Segmentation,
    Statement,
    Table,
)

SCHEME = CodingScheme("99LOWATT", "Codes of the low attenuation method", "2.25.950950950", "tests")
SHARE = Code("1", SCHEME.designator, "Share of the lung below -950 HU")
EMPHYSEMA = Code("87433001", "SCT", "Pulmonary emphysema")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
COLOUR = (204, 121, 167)
SIDES = {1: ("right", RIGHT_LUNG, RIGHT), 2: ("left", LEFT_LUNG, LEFT)}


def lungs_of(hu: NDArray[np.int16], spacing: Sequence[float], bundle: Bundle, device: str | None) -> NDArray[np.uint8]:
    """Labels 1 (right) and 2 (left) in the canonical grid, slice by slice."""
    about = bundle.metadata
    low, high = about["hu_range"]
    matrix = [round(n * mm / about["pixel_mm"]) for n, mm in zip(hu.shape[1:], spacing[1:], strict=True)]
    image = 2 * (np.clip(shrink(hu, 1, (matrix[0], matrix[1])), low, high) - low) / (high - low) - 1
    padding = [(0, -n % about["stride"]) for n in matrix]
    slabs = (np.pad(plane, padding, constant_values=-1)[None].astype(np.float32) for plane in image)
    logits = np.stack(list(open_runtime(bundle, device).run(slabs)))[..., : matrix[0], : matrix[1]]
    rows, columns = ((np.arange(n) * m // n) for n, m in zip(hu.shape[1:], matrix, strict=True))
    return logits.argmax(1)[:, rows[:, None], columns].astype(np.uint8)


def analyse(paths: Sequence[Path], bundle: Bundle, device: str | None, progress: Any) -> tuple[Volume, Outcome]:
    progress("read", 0.0)
    volume = read_volume(paths)
    orientation = Orientation.of(volume.affine)
    hu = np.ascontiguousarray(orientation.canonical(volume.hu))
    progress("lungs", 0.0)
    found = lungs_of(hu, orientation.spacing(volume.spacing), bundle, device)
    lungs = np.ascontiguousarray(orientation.source(found))
    if not lungs.any():
        raise VolumeError("no lungs found")
    return volume, outcome_of(volume, lungs, bundle)


def outcome_of(volume: Volume, lungs: NDArray[np.uint8], bundle: Bundle) -> Outcome:
    dark = lungs * (volume.hu < LIMIT_HU)
    sizes = {side: (int((lungs == side).sum()), int((dark == side).sum())) for side in SIDES}
    sizes[0] = sizes[1][0] + sizes[2][0], sizes[1][1] + sizes[2][1]
    share = {side: low / max(all_, 1) for side, (all_, low) in sizes.items()}
    present = [side for side in SIDES if sizes[side][1]]
    labels = sum((np.uint8(n) * (dark == side) for n, side in enumerate(present, 1)), np.zeros_like(lungs))
    segments = [
        Segment(n, f"{SIDES[side][0]}-low", f"Below -950 HU, {SIDES[side][0]} lung", ABNORMAL, EMPHYSEMA,
                (SIDES[side][1],), COLOUR, bundle.identity)
        for n, side in enumerate(present, 1)
    ]  # fmt: skip
    groups = [
        MeasurementGroup(
            name=f"{word}-lung",
            label=f"{word.capitalize()} lung",
            finding=lung,
            site=LUNG,
            laterality=laterality,
            outline=outline,
            measurements=(
                Measurement(SHARE, 100 * share[side], PERCENT, 2),
                Measurement(
                    VOLUME, sizes[side][1] * volume.voxel_ml, ML, 2,
                    ((KIND, (present.index(side) + 1,)),) if side in present else (),
                ),
            ),
            model=bundle.identity,
        )
        for side, (word, lung, laterality) in SIDES.items()
        if (outline := Outline.largest(lungs, side))
    ]  # fmt: skip
    text = f"{100 * share[0]:.1f} % of the lungs is below {LIMIT_HU} HU."
    names = {1: "Right lung", 2: "Left lung", 0: "Both lungs"}
    summary = {"low_attenuation": {"right": share[1], "left": share[2], "both": share[0]}}
    return Outcome(
        subject=METHOD.subject,
        title="Chest CT: low attenuation",
        models=(bundle.identity,),
        segmentations=(Segmentation(KIND, "AI low attenuation (SEG)", "AI_LOW_ATT", tuple(segments), labels),),
        groups=tuple(groups),
        if_no_group="no lung was found",
        headline=text,
        details=(),
        statements=(
            Statement("Low attenuation", f"{100 * share[0]:.1f} %", "6 % and more is seen in emphysema",
                      "Raised" if share[0] >= 0.06 else "Not raised"),
        ),
        notes=(),
        coverage="lungs as scanned",
        quality=(),
        limits="Made for a test.",
        table=Table(
            (Column("Lung, ml", 0), Column("Below -950 HU, %", 1)),
            tuple(
                Row(name, (sizes[side][0] * volume.voxel_ml, 100 * share[side]), share[side])
                for side, name in names.items()
            ),
        ),
        pictures=Pictures(
            outlined=Layer(lungs, (70, 150, 230), "lungs", "Lungs"),
            tinted=Layer(labels, COLOUR, "low attenuation", text),
            window=(-800.0, 500.0),
            window_name="Emphysema window",
            here="Below -950 HU here: {area:.1f} cm2, {share:.1f} % of lung area",
            nothing_here="Nothing below -950 HU here",
            most="Slice with most",
            middle="Middle of the lungs",
        ),
        trend="Course, share below -950 HU",
        point=METHOD.point(summary) or METHOD.point(summary),  # type: ignore[arg-type]
        brief=text,
        summary=summary,
        schemes=(SCHEME,),
    )  # fmt: skip
