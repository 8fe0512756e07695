"""What an analysis says, in sentences: the same words in the structured report and on the captured pages.

ASCII only, as it must fit any character set of a source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydicom.dataset import Dataset

from node.images.volume import Volume
from node.methods.pneumonia.findings import Findings

#: Distance of slices, mm, from which a lesion of a centimetre is seen on two slices at most.
THICK_MM = 5.0

#: Limits of use, in the words that a reader of the result needs.
LIMITS = (
    "Volumes and shares are measured on masks that were drawn by software and not checked by a person. "
    "Infection that is faint, small or outside the lung mask may be missed, and other disease that is dense on CT "
    "may be marked as infection. The rules about the scan come from published work on COVID-19 and do not name a "
    "cause. Read together with the source images."
)


@dataclass(frozen=True)
class Rule:
    """One scan-level rule as a table row: its name, what went in, the limit it is judged by, what came out."""

    name: str
    inputs: str
    limit: str
    outcome: str


def sentences(findings: Findings) -> list[str]:
    """The findings as a whole, each scan-level rule with inputs, limit and outcome, then what limits the findings."""
    judged = [*rules(findings), _open_lung(findings)]
    told = [f"{rule.name}: {rule.inputs}; {rule.limit}. Outcome: {rule.outcome}." for rule in judged]
    return [summary(findings), *told, *findings.notes]


def summary(findings: Findings) -> str:
    """One sentence: how much of the lungs is infected, or that no infection was found."""
    both = findings.both
    if both.volume_ml <= 0:
        return "No lung was found, so nothing was measured."
    if not findings.lesion_list:
        return f"No infection found in {both.volume_ml:.0f} ml of lung."
    return (
        f"Infection found: {both.infected_ml:.1f} ml in {counted(len(findings.lesion_list), 'lesion')}, "
        f"{100 * both.infected_share:.1f} % of {both.volume_ml:.0f} ml of lung "
        f"(right {100 * findings.right.infected_share:.1f} %, left {100 * findings.left.infected_share:.1f} %)."
    )


def rules(findings: Findings) -> list[Rule]:
    """The scan-level rules that judge infection, in a fixed order."""
    consecutive, intensity = findings.scan.consecutive, findings.scan.intensity
    noisy_or = findings.scan.noisy_or
    return [
        Rule(
            "Consecutive slices",
            f"{counted(consecutive.positive_slices, 'slice')} with infection, longest run {consecutive.longest_run} "
            f"({consecutive.longest_run_mm:.0f} mm)",
            f"positive from {consecutive.minimum_run} in a row of at least "
            f"{consecutive.minimum_slice_area_mm2:.0f} mm2 each",
            "Positive" if consecutive.positive else "Negative",
        ),
        Rule(
            "Intensity ratio",
            f"{intensity.ratio:.3f}: {counted(intensity.boxes, 'lesion box', 'es')} of "
            f"{intensity.box_area_mm2 / 100:.0f} cm2 on {intensity.lung_area_mm2 / 100:.0f} cm2 of lung",
            f"alarming from {intensity.alarming_from:.2f}",
            intensity.grade[0].upper() + intensity.grade[1:],
        ),
        Rule(
            "Noisy-OR",
            f"probabilities of {counted(noisy_or.lesions, 'lesion')} combined",
            # A lesion's probability is the mean of its voxels', each above the network's threshold, and no calibrated
            # one: a single false lesion brings the scan near 1, and the reader must know.
            "not calibrated, no threshold; one false lesion suffices for a high value",
            (f"{noisy_or.probability:.3f}" if noisy_or.probability < 0.9995 else "Above 0.999") + ", not calibrated",
        ),
    ]


def coverage(volume: Volume, findings: Findings, header: Dataset) -> list[str]:
    """How much of the body the series shows, and how finely; whether the lungs are in it whole."""
    slices, rows, columns = volume.hu.shape
    spacing, down, across = volume.spacing
    made = [
        f"Coverage: {counted(slices, 'slice')} over {slices * spacing:.0f} mm without a gap, "
        f"{'the lungs are cut off at an end' if any('reach the' in note for note in findings.notes) else 'whole lungs'}"
    ]
    pixel = f"{down:.2f} mm" if abs(down - across) < 0.005 else f"{down:.2f} x {across:.2f} mm"
    made.append(f"Resolution: one slice every {spacing:.2f} mm, {rows} x {columns} pixels of {pixel}")
    told = [
        ("slice thickness", _number(header, "SliceThickness"), " mm"),
        ("tube voltage", _number(header, "KVP"), " kV"),
    ]
    made += [f"{name[0].upper()}{name[1:]}: {value:g}{unit}" for name, value, unit in told if value is not None]
    if spacing > THICK_MM:
        made.append(
            f"Slices are more than {THICK_MM:g} mm apart: small infection may lie between them, and volumes are coarse"
        )
    return [f"{sentence}." for sentence in made]


def _number(header: Dataset, keyword: str) -> float | None:
    """A number of the header; None where it is absent, empty or none."""
    try:
        value = float(header.get(keyword) or "nan")
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def counted(number: int, noun: str, plural: str = "s") -> str:
    """`number` and `noun` in the singular or the plural."""
    return f"{number} {noun}{'' if number == 1 else plural}"


def _open_lung(findings: Findings) -> Rule:
    """The rule that judges the images and not the patient; in the report only."""
    rule = findings.scan.open_lung
    return Rule(
        "Open lung",
        f"slices with more than {rule.threshold:.0f} central pixels below {rule.dark_hu} HU",
        "chooses the slices that show open lung",
        f"{len(rule.kept)} of {counted(len(rule.dark_pixels), 'slice')}",
    )
