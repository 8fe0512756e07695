"""What the pneumonia method says, in sentences: the same words in the structured report and on the pages.

ASCII only, as it must fit any character set of a source.
"""

from __future__ import annotations

from node.methods.outcome import Statement, counted
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


def brief(findings: Findings) -> str:
    """The findings in one line, for status and logs."""
    share, scan = findings.both.infected_share, findings.scan
    if not findings.lesion_list:
        return f"lungs {findings.both.volume_ml:.0f} ml, no infection found"
    return (
        f"lungs {findings.both.volume_ml:.0f} ml, infected {findings.both.infected_ml:.0f} ml ({share:.1%}), "
        f"longest run {scan.consecutive.longest_run} slices, {scan.intensity.grade}"
    )


def statements(findings: Findings) -> tuple[Statement, ...]:
    """The scan-level rules, in a fixed order; the last judges the images and not the patient."""
    consecutive, intensity = findings.scan.consecutive, findings.scan.intensity
    open_lung = findings.scan.open_lung
    return (
        Statement(
            "Consecutive slices",
            f"{counted(consecutive.positive_slices, 'slice')} with infection, longest run {consecutive.longest_run} "
            f"({consecutive.longest_run_mm:.0f} mm)",
            f"positive from {consecutive.minimum_run} in a row of at least "
            f"{consecutive.minimum_slice_area_mm2:.0f} mm2 each",
            "Positive" if consecutive.positive else "Negative",
        ),
        Statement(
            "Intensity ratio",
            f"{intensity.ratio:.3f}: {counted(intensity.boxes, 'lesion box', 'es')} of "
            f"{intensity.box_area_mm2 / 100:.0f} cm2 on {intensity.lung_area_mm2 / 100:.0f} cm2 of lung",
            f"alarming from {intensity.alarming_from:.2f}",
            intensity.grade[0].upper() + intensity.grade[1:],
        ),
        _noisy_or(findings),
        Statement(
            "Open lung",
            f"slices with more than {open_lung.threshold:.0f} central pixels below {open_lung.dark_hu} HU",
            "chooses the slices that show open lung",
            f"{len(open_lung.kept)} of {counted(len(open_lung.dark_pixels), 'slice')}",
            on_pages=False,
        ),
    )


def _noisy_or(findings: Findings) -> Statement:
    """Of lesions' probabilities, which mean what the model's calibration makes of them.

    Without one a lesion's probability is the mean of its voxels', each above the network's threshold: a single false
    lesion brings the scan near 1, and the reader must know.
    """
    noisy_or = findings.scan.noisy_or
    limits, calibration = "not calibrated, no threshold; one false lesion suffices for a high value", "not calibrated"
    if findings.calibrated:
        limits = "each lesion's probability is calibrated, the combination is not; no threshold"
        calibration = "lesions calibrated"
    return Statement(
        "Noisy-OR",
        f"probabilities of {counted(noisy_or.lesions, 'lesion')} combined",
        limits,
        f"{noisy_or.probability:.3f}" if noisy_or.probability < 0.9995 else "Above 0.999",
        calibration,
    )


def coverage(findings: Findings) -> str:
    """Whether the lungs are in the series whole."""
    cut_off = any("reach the" in note for note in findings.notes)
    return "the lungs are cut off at an end" if cut_off else "whole lungs"


def quality(slice_mm: float) -> tuple[str, ...]:
    """What the images do not show well, in a sentence each."""
    if slice_mm <= THICK_MM:
        return ()
    return (
        f"Slices are more than {THICK_MM:g} mm apart: small infection may lie between them, and volumes are coarse.",
    )
