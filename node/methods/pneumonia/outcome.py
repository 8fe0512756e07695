"""Findings → outcome: what the pneumonia method found, in the neutral parts that reports and pages are made of.

The measurement groups are the right lung, the left lung, the infection as a whole, and its `LARGEST_LESIONS` largest
lesions. A volume names the segments that it was measured on; the tracking UIDs of the lungs are those of the segments.
What the scan-level rules say is given as numbers and codes in the infection's group (in the first lung's, where nothing
is infected), and as sentences with their inputs and thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.labels import LEFT, RIGHT
from node.images.volume import Volume
from node.methods.codes import HU, LEFT_LUNG, LUNG, MEAN_ATTENUATION, ML, MM, PERCENT, RIGHT_LUNG, VOLUME
from node.methods.codes import LEFT as ON_THE_LEFT
from node.methods.codes import RIGHT as ON_THE_RIGHT
from node.methods.outcome import (
    Colour,
    Column,
    Layer,
    Measurement,
    MeasurementGroup,
    Outcome,
    Outline,
    Pictures,
    Point,
    Row,
    Segment,
    Segmentation,
    Table,
    counted,
)
from node.methods.pneumonia import wording
from node.methods.pneumonia.codes import (
    ABNORMAL,
    ANATOMICAL,
    BOXES,
    MILD,
    NEGATIVE,
    PNEUMONIA,
    POSITIVE,
    SLICES,
    private,
)
from node.methods.pneumonia.findings import Findings, Lesion
from node.methods.pneumonia.serialise import summary
from node.methods.pneumonia.subject import SUBJECT, TITLE

INFECTION_SEG, LUNG_SEG = SEGMENTATIONS = ("infection-seg", "lung-seg")

#: Lesions that get a measurement group, largest first; the others count in the sums only. A viewer lists a row for
#: each, and more than ten hide the lungs' own.
LARGEST_LESIONS = 10

#: sRGB of each segment; of the palette of Okabe and Ito, which the colour-blind can tell apart.
COLOURS: dict[str, Colour] = {
    "right-lung": (86, 180, 233),
    "left-lung": (0, 158, 115),
    "right-infection": (230, 159, 0),
    "left-infection": (213, 94, 0),
}

#: Colours on the slices, near those of the same palette: orange and blue differ for every kind of colour vision, and
#: in brightness, so that they differ on a grey monitor too.
INFECTION_COLOUR: Colour = (255, 170, 0)
LUNG_COLOUR: Colour = (70, 150, 230)

#: Lung window: centre and width, HU.
LUNG_WINDOW = (-600.0, 1500.0)

#: Side → its word, the structure, and its laterality.
_SIDES = {RIGHT: ("right", RIGHT_LUNG, ON_THE_RIGHT), LEFT: ("left", LEFT_LUNG, ON_THE_LEFT)}


def outcome_of(volume: Volume, findings: Findings) -> Outcome:
    """What reports and pages are made of.

    Raises
    ------
    ValueError
        Masks that do not fit the volume, infection outside the lungs, or findings that name no model.
    """
    _require_sound(volume, findings)
    infection, lungs = _segmentation(findings, INFECTION_SEG), _segmentation(findings, LUNG_SEG)
    details: tuple[str, ...] = ()
    if len(findings.lesion_list) > LARGEST_LESIONS:
        count = len(findings.lesion_list)
        details = (f"Listed one by one: the {LARGEST_LESIONS} largest of {count} lesions.",)
    numbers = summary(findings, volume)
    return Outcome(
        subject=SUBJECT,
        title=TITLE,
        models=findings.models,
        segmentations=(infection, lungs),
        groups=tuple(_groups(findings, infection, lungs)),
        if_no_group="no lung was found",
        headline=wording.summary(findings),
        details=details,
        statements=wording.statements(findings),
        notes=findings.notes,
        coverage=wording.coverage(findings),
        quality=wording.quality(volume.spacing[0]),
        limits=wording.LIMITS,
        table=_table(findings),
        pictures=_pictures(findings, infection.labels),
        trend="Course, infected part of both lungs",
        point=point(findings.both.infected_ml, findings.both.infected_share),
        brief=wording.brief(findings),
        summary=numbers,
        timings=findings.timings,
    )


def point(infected_ml: float, infected_share: float, lungs_ml: float = 0.0) -> Point:
    """What a scan came to, for the comparison with others."""
    share = f"{100 * infected_share:.1f} %"
    return Point(share, f"{share}, {infected_ml:.1f} ml", lungs_ml)


def point_of(told: dict[str, Any]) -> Point | None:
    """The same, of the summary that the ledger keeps."""
    both = told.get("lungs", {}).get("both")
    return None if both is None else point(both["infected_ml"], both["infected_share"], both["volume_ml"])


def _require_sound(volume: Volume, findings: Findings) -> None:
    """A mask that was made for another grid would be painted in the wrong place: refuse it."""
    shape = volume.hu.shape
    if findings.lungs.shape != shape or findings.lesions.shape != shape:
        raise ValueError(f"masks of {findings.lungs.shape} and {findings.lesions.shape} for a volume of {shape}")
    # Slice by slice: masks of the whole volume would cost as much memory as the volume.
    if any(
        np.any((lesions > 0) & (lungs == 0)) for lesions, lungs in zip(findings.lesions, findings.lungs, strict=True)
    ):
        raise ValueError("infection outside the lungs belongs to neither side")
    if not findings.models:
        raise ValueError("findings that name no model cannot be attributed")


def _segmentation(findings: Findings, kind: str) -> Segmentation:
    """Infection, or what is left of the lungs beside it, so that no voxel lies in two segments of either series."""
    infected = kind == INFECTION_SEG
    segments: list[Segment] = []
    sides: list[int] = []
    for side, region in ((RIGHT, findings.right), (LEFT, findings.left)):
        word, lung, _ = _SIDES[side]
        # Both are a number of voxels times the same factor, so they are equal where the whole lung is infected.
        if not (region.infected_ml > 0 if infected else region.volume_ml > region.infected_ml):
            continue
        name = f"{word}-infection" if infected else f"{word}-lung"
        segments.append(
            Segment(
                number=len(segments) + 1,
                name=name,
                label=f"Infection, {word} lung" if infected else f"{word.capitalize()} lung, not infected",
                category=ABNORMAL if infected else ANATOMICAL,
                type=PNEUMONIA if infected else lung,
                regions=(lung,) if infected else (),
                colour=COLOURS[name],
                model=findings.infection_model if infected else findings.lung_model,
            )
        )
        sides.append(side)
    return Segmentation(
        kind=kind,
        description="AI infection (SEG)" if infected else "AI lungs (SEG)",
        content_label="AI_INFECTION" if infected else "AI_LUNGS",
        segments=tuple(segments),
        labels=_labels(findings, infected, sides),
    )


def _labels(findings: Findings, infected: bool, sides: list[int]) -> NDArray[np.uint8]:
    """The number of the segment of each voxel, counted over `sides`; 0 for none."""
    values = np.zeros(findings.lungs.shape, np.uint8)
    # Slice by slice: whole arrays in between would cost three times the memory, and the time to fetch it.
    for lungs, lesions, plane in zip(findings.lungs, findings.lesions, values, strict=True):
        here = lesions > 0 if infected else lesions == 0
        if here.any():
            for number, side in enumerate(sides, 1):
                plane += np.uint8(number) * (here & (lungs == side))
    return values


def _groups(findings: Findings, infection: Segmentation, lungs: Segmentation) -> Iterator[MeasurementGroup]:
    outline = Outline.largest(findings.lesions)
    # The statement about the scan goes with the infection, and without one with the first lung.
    scan = _scan_level(findings)
    pending = scan if outline is None else ((), ())
    for side in (RIGHT, LEFT):
        if lung := Outline.largest(findings.lungs, side):
            yield _lung_group(findings, side, lung, infection, lungs, *pending)
            pending = ((), ())
    if outline:
        both = findings.both
        yield MeasurementGroup(
            name="infection",
            label="Infection, both lungs",
            finding=PNEUMONIA,
            site=LUNG,
            laterality=None,
            outline=outline,
            measurements=(
                Measurement(private("105"), 100 * both.infected_share, PERCENT, 2),
                Measurement(VOLUME, both.infected_ml, ML, 2, _sources(infection, RIGHT, LEFT)),
                Measurement(MEAN_ATTENUATION, both.infected_mean_hu, HU, 1),
                *scan[0],
            ),
            model=findings.infection_model,
            evaluations=scan[1],
        )
    for lesion in findings.lesion_list[:LARGEST_LESIONS]:
        yield _lesion_group(findings, lesion, infection)


def _sources(segmentation: Segmentation, *sides: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The segments of these sides, as what was measured on."""
    words = {_SIDES[side][0] for side in sides}
    numbers = tuple(one.number for one in segmentation.segments if one.name.split("-")[0] in words)
    return ((segmentation.kind, numbers),) if numbers else ()


def _lung_group(
    findings: Findings,
    side: int,
    outline: Outline,
    infection: Segmentation,
    lungs: Segmentation,
    scan: tuple[Measurement, ...],
    evaluations: tuple[Any, ...],
) -> MeasurementGroup:
    word, structure, laterality = _SIDES[side]
    region = findings.right if side == RIGHT else findings.left
    share, volume = ("101", "102") if side == RIGHT else ("103", "104")
    infected = _sources(infection, side)
    return MeasurementGroup(
        name=f"{word}-lung",
        label=f"{word.capitalize()} lung",
        finding=structure,
        site=LUNG,
        laterality=laterality,
        outline=outline,
        measurements=(
            Measurement(private(share), 100 * region.infected_share, PERCENT, 2),
            Measurement(private(volume), region.infected_ml, ML, 2, infected),
            # The whole lung: its segment and, where it is infected, the infection's.
            Measurement(VOLUME, region.volume_ml, ML, 1, _sources(lungs, side) + infected),
            Measurement(MEAN_ATTENUATION, region.mean_hu, HU, 1),
            *scan,
        ),
        model=findings.lung_model,
        evaluations=evaluations,
    )


def _lesion_group(findings: Findings, lesion: Lesion, infection: Segmentation) -> MeasurementGroup:
    box = tuple(slice(*lesion.box[n : n + 2]) for n in (0, 2, 4))
    # A lesion may reach across where the lungs touch, and then lies in the segments of both.
    sides = np.unique(findings.lungs[box][findings.lesions[box] == lesion.label]).tolist()
    lung = (findings.left if lesion.side == "left" else findings.right).volume_ml
    return MeasurementGroup(
        name=f"lesion-{lesion.label}",
        label=f"Lesion {lesion.label}, {lesion.side} lung",
        finding=PNEUMONIA,
        site=LUNG,
        laterality=ON_THE_LEFT if lesion.side == "left" else ON_THE_RIGHT,
        outline=Outline(lesion.key_slice, findings.lesions[lesion.key_slice] == lesion.label),
        measurements=(
            Measurement(private("106"), 100 * lesion.probability, PERCENT, 1),
            Measurement(VOLUME, lesion.volume_ml, ML, 2, _sources(infection, *sides)),
            Measurement(private("107"), 100 * lesion.volume_ml / lung if lung else float("nan"), PERCENT, 2),
            Measurement(MEAN_ATTENUATION, lesion.mean_hu, HU, 1),
        ),
        model=findings.infection_model,
    )


def _scan_level(findings: Findings) -> tuple[tuple[Measurement, ...], tuple[Any, ...]]:
    """Inputs and outcomes of the rules, as numbers and as codes."""
    consecutive, intensity, noisy_or = findings.scan.consecutive, findings.scan.intensity, findings.scan.noisy_or
    grades = {"Alarming": private("221"), "Mild": MILD, "not COVID-19-like": private("222")}
    numbers = (
        Measurement(private("201"), consecutive.positive_slices, SLICES, 0),
        Measurement(private("202"), consecutive.longest_run, SLICES, 0),
        Measurement(private("203"), consecutive.longest_run_mm, MM, 1),
        Measurement(private("204"), 100 * intensity.ratio, PERCENT, 2),
        Measurement(private("205"), intensity.boxes, BOXES, 0),
        Measurement(private("206"), 100 * noisy_or.probability, PERCENT, 2),
    )
    evaluations = (
        (private("211"), POSITIVE if consecutive.positive else NEGATIVE),
        (private("212"), grades[intensity.grade]),
    )
    return numbers, evaluations


def _table(findings: Findings) -> Table:
    regions = (("Right lung", findings.right), ("Left lung", findings.left), ("Both lungs", findings.both))
    return Table(
        columns=(
            Column("Lung, ml", 0),
            Column("Infected, ml", 1),
            Column("Infected, %", 1),
            Column("Lung, HU", 0, on_page=False),
            Column("Infected, HU", 0),
        ),
        rows=tuple(
            Row(
                name,
                (
                    region.volume_ml,
                    region.infected_ml,
                    100 * region.infected_share,
                    region.mean_hu,
                    region.infected_mean_hu,
                ),
                region.infected_share,
            )
            for name, region in regions
        ),
    )


def _pictures(findings: Findings, infection: NDArray[np.uint8]) -> Pictures:
    both, lesions = findings.both, counted(len(findings.lesion_list), "lesion")
    found = f"Infection {both.infected_ml:.1f} ml, {100 * both.infected_share:.1f} % of both lungs, {lesions}"
    return Pictures(
        outlined=Layer(findings.lungs, LUNG_COLOUR, "lungs", f"Lungs {both.volume_ml:.0f} ml"),
        tinted=Layer(infection, INFECTION_COLOUR, "infection", found if findings.lesion_list else "No infection found"),
        window=LUNG_WINDOW,
        window_name="Lung window",
        here="Infected here: {area:.1f} cm2, {share:.1f} % of lung area",
        nothing_here="No infection marked here",
        most="Most infected slice",
        middle="Middle of the lungs",
    )
