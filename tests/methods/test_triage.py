"""Triage: what is analysed, and the sentence for everything that is not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_instances import SERIES, STUDY, dataset_bytes, header

from node.intake.assembly import ClosedSeries
from node.intake.header import InstanceHeader, read_header
from node.intake.stack import tile
from node.intake.verdict import Verdict
from node.methods.pneumonia.triage import MIN_COVERAGE_MM, MIN_SLICES, triage


def closed(instances: list[InstanceHeader], reason: str = "") -> ClosedSeries:
    gap = tile(instances).kind == "gap"
    why = reason or (f"incomplete: {tile(instances).detail}" if gap else "")
    complete, only_gaps = not gap and not reason, gap and not reason
    return ClosedSeries(SERIES, STUDY, "CT1", "LUNGNODE", tuple(instances), (), complete, why, only_gaps)


def chest(count: int = 150, step: float = 2.0, **changes: Any) -> list[InstanceHeader]:
    values = {"slice_thickness": step, **changes}
    return [header(n, **{"positions": ((-180.0, -180.0, n * step),), **values}) for n in range(count)]


def said(instances: list[InstanceHeader], reason: str = "") -> str:
    (verdict,) = triage(closed(instances, reason))
    assert verdict.analyse != verdict.reason.startswith("not analysed: ")
    return verdict.reason.removeprefix("not analysed: ")


def test_an_axial_chest_ct_is_analysed() -> None:
    assert said(chest()) == "axial chest CT, 150 slices every 2.0 mm over 300 mm"


@pytest.mark.parametrize(
    "part",
    [
        *("CHEST", "Thorax", "LUNG", "LUNGS", "CHEST_TO_PELVIS", "CHESTABDPELVIS", "CHESTABDOMEN", "NECKCHESTABDPELV"),
        *("THORAX ABDOMEN", "TAP", "TORAX", "TORACE", "HR LUNG", "THORAX^ROUTINE", "CHST", "PULMONARY"),
    ],
)
def test_the_chest_by_any_name(part: str) -> None:
    assert said(chest(body_part=part)).startswith("axial chest CT")


@pytest.mark.parametrize("part", ["", "BODY", "WHOLEBODY", "TRUNK", "UNDEFINED", "?"])
def test_a_body_part_that_says_nothing_is_let_through(part: str) -> None:
    assert said(chest(body_part=part)).startswith("axial CT, body part not given as chest")


@pytest.mark.parametrize(
    "part",
    ["HEAD", "ABDOMEN", "ABDOMENPELVIS", "HEADNECK", "TSPINE", "LSPINE", "THORACIC SPINE", "HEART", "CORONARY", "KNEE"],
)
def test_another_body_part_is_not(part: str) -> None:
    assert said(chest(body_part=part)) == f"body part {part.replace(' ', '_')}, not chest"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"body_part": "HEAD of DOE JOHN"}, "body part HEAD, not chest"),
        ({"body_part": "DOE^JOHN abdominal"}, "body part ABD, not chest"),
        ({"modality": "DOE"}, "modality unknown, not CT"),
        ({"modality": "CT\x1b[2K"}, "modality unknown, not CT"),
        ({"modality": "MR"}, "modality MR, not CT"),
        ({"sop_class_uid": "1.2.3.4"}, "no CT images, but a private object"),
    ],
)
def test_only_terms_of_the_standard_are_quoted(change: dict[str, str], why: str) -> None:
    assert said(chest(**change)) == why


SR, SEG, CAPTURE = (f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("88.22", "66.4", "7"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sop_class_uid": "1.2.840.10008.5.1.4.1.1.88.67", "modality": "SR"}, "dose report"),
        ({"sop_class_uid": SR, "modality": "SR"}, "structured report"),
        ({"sop_class_uid": SEG, "modality": "SEG"}, "segmentation"),
        ({"sop_class_uid": CAPTURE}, "secondary capture"),
        ({"sop_class_uid": "1.2.840.10008.5.1.4.1.1.128", "modality": "PT"}, "PET images, not CT"),
        ({"sop_class_uid": "1.3.12.2.1107.5.9.1"}, "no CT images, but a private object"),
        ({"modality": "PT"}, "modality PT, not CT"),
        ({"modality": ""}, "modality not given, not CT"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "localizer (scout view)"),
        ({"image_type": ("DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE")}, "derived images (average, reformatted)"),
        ({"image_type": ("DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 MPR")}, "derived images (mpr), not the original"),
        ({"orientation": (1, 0, 0, 0, 0, -1)}, "coronal slices, not axial"),
        ({"orientation": (0, 1, 0, 0, 0, -1)}, "sagittal slices, not axial"),
        ({"orientation": None}, "slices without position or orientation"),
        ({"positions": ()}, "slices without position or orientation"),
        ({"gantry_tilt": -12.0}, "gantry tilt of 12 degrees"),
        ({"slice_thickness": 10.0}, "slices are 10.0 mm thick; at most 6 mm can be analysed"),
    ],
)
def test_what_is_refused_and_why(change: dict[str, Any], why: str) -> None:
    assert said(chest(**change)).startswith(why)


def test_a_lossy_slice_is_derived_but_no_reformat() -> None:
    assert said(chest(image_type=("DERIVED", "PRIMARY", "AXIAL"))).startswith("axial chest CT")


def test_a_feet_first_or_prone_patient_is_axial() -> None:
    for orientation in ((-1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, -1, 0), (0, 1, 0, -1, 0, 0)):
        assert said(chest(orientation=orientation)).startswith("axial chest CT")


@given(st.floats(0, 45), st.sampled_from(["tilted gantry", "oblique reformat"]))
def test_a_tilted_stack_is_told_from_an_oblique_one(degrees: float, kind: str) -> None:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The table moves along z whatever the gantry does; a reformat moves along its own normal.
    way = (0.0, 0.0, 1.0) if kind == "tilted gantry" else (0.0, sine, cosine)
    slices = [
        header(n, orientation=(1, 0, 0, 0, cosine, -sine), positions=((way[0], n * 2 * way[1], n * 2 * way[2]),))
        for n in range(150)
    ]
    verdict = said(slices)
    if kind == "tilted gantry" and degrees > 1.01:
        # Half a degree is rounded up or down, as the cosine of it was.
        assert verdict in {f"gantry tilt of {degrees + error:.0f} degrees" for error in (-1e-6, 1e-6)}
    elif kind == "tilted gantry" and 0.14 < degrees < 0.99:
        # The slices shift by more than a pixel over the 298 mm of the stack, of which no volume is made.
        assert verdict.startswith("slices make no regular stack: gantry tilt of")
    elif degrees > 10.01:
        assert verdict.endswith(" slices, not axial")
    elif degrees < 0.13 or (kind == "oblique reformat" and degrees < 9.99):
        assert verdict.startswith("axial chest CT")


def test_a_series_that_is_not_whole_is_not_analysed() -> None:
    slices = chest()
    gap = "incomplete: gap at z = 200.0 mm (4.0 mm between slices, 2.0 mm elsewhere)"
    assert said([*slices[:100], *slices[101:]]) == gap
    assert said(slices, "incomplete: the association was aborted") == "incomplete: the association was aborted"


def test_too_few_too_far_too_short() -> None:
    assert said(chest(1)) == f"1 slice; at least {MIN_SLICES} are needed"
    assert said(chest(24, 5.0)) == f"24 slices; at least {MIN_SLICES} are needed"
    assert said(chest(40, 10.0, slice_thickness=1.0)).startswith("slices are 10.0 mm apart")
    assert said(chest(60)) == f"slices cover 120 mm; whole lungs need at least {MIN_COVERAGE_MM:g} mm"


def test_slices_that_are_not_one_stack() -> None:
    slices = chest()
    assert said([*slices[:-1], header(149, z=298.0, rows=256)]) == "slices differ in matrix size"
    scout = header(150, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"), orientation=(1, 0, 0, 0, 0, -1))
    assert said([*slices[:20], scout]) == "1 localizers among the slices"
    twice = [header(n + 500, positions=one.positions, slice_thickness=2.0) for n, one in enumerate(slices)]
    assert said([*slices, *twice]).startswith("2 slices at each place")


def verdicts(*stacks: list[InstanceHeader], reason: str = "") -> list[Verdict]:
    """Verdicts on a series of several stacks, whose slices are numbered on as they come."""
    instances = [header for stack in stacks for header in stack]
    numbered = [replace(header, instance_number=n, sop_instance_uid=f"1.{n}") for n, header in enumerate(instances)]
    return triage(closed(numbered, reason))


def test_each_acquisition_that_is_fit_is_analysed() -> None:
    expiration, inspiration = chest(100, acquisition_number=2), chest(150, acquisition_number=1)
    first, second = verdicts(expiration, inspiration)
    assert (first.acquisition, first.part) == ("acquisition 1", tuple(range(100, 250)))
    assert (second.acquisition, second.part) == ("acquisition 2", tuple(range(100)))
    assert (first.analyse, second.analyse) == (True, True)
    assert first.reason == "axial chest CT, 150 slices every 2.0 mm over 300 mm"
    assert first.note == "Analysed are 150 images of the series: acquisition 1."


@pytest.mark.parametrize("offset", [0.0, 0.3, 1.0, 1.7])
def test_phases_that_share_no_place_are_told_apart_by_their_number(offset: float) -> None:
    late = [replace(one, positions=((0.0, 0.0, one.positions[0][2] + offset),)) for one in chest(acquisition_number=2)]
    assert [one.acquisition for one in verdicts(chest(acquisition_number=1), late)] == [
        "acquisition 1",
        "acquisition 2",
    ]


def test_phases_of_one_number_are_told_apart_by_temporal_position_or_time() -> None:
    early, late = chest(acquisition_number=3, temporal_position=1), chest(acquisition_number=3, temporal_position=2)
    assert [one.acquisition for one in verdicts(late, early)] == ["temporal position 1", "temporal position 2"]

    def timed(start: float) -> list[InstanceHeader]:
        return [replace(one, acquired_at=start + n / 20) for n, one in enumerate(chest(acquisition_number=3))]

    assert [one.acquisition for one in verdicts(timed(60.0), timed(20.0))] == ["phase 1", "phase 2"]
    sharp = [replace(one, kernel="B70f") for one in timed(20.0)]
    (only,) = verdicts(timed(20.0), sharp)
    assert (only.acquisition, only.part) == ("", tuple(range(150)))


def test_passes_of_the_table_that_lie_end_to_end_are_one_volume() -> None:
    slices = chest()
    passes = [
        replace(one, acquisition_number=1 + n // 50, acquired_at=10.0 * (n // 50)) for n, one in enumerate(slices)
    ]
    (only,) = verdicts(passes)
    assert (only.analyse, only.part, only.note, only.acquisition) == (True, (), "", "")
    # A contrast phase after it, in passes too.
    again = [replace(one, acquisition_number=4 + n // 75) for n, one in enumerate(slices)]
    native, contrast = verdicts(passes, again)
    assert (native.acquisition, native.part) == ("acquisitions 1 to 3", tuple(range(150)))
    assert (contrast.acquisition, contrast.part) == ("acquisitions 4 to 5", tuple(range(150, 300)))


def test_of_several_reconstructions_the_one_that_shows_most_is_analysed() -> None:
    (thin,) = verdicts(chest(60, 5.0), chest(300, 1.0))
    assert (thin.part, thin.acquisition) == (tuple(range(60, 360)), "")
    assert thin.note == (
        "Analysed are 300 images of the series: slice thickness 1; its other reconstructions are not analysed."
    )
    sharp, soft = chest(kernel="B70f"), chest(kernel="B30f")
    (verdict,) = verdicts([one for pair in zip(sharp, soft, strict=True) for one in pair])
    assert verdict.part == tuple(range(0, 300, 2))
    assert verdict.note == (
        "Analysed are 150 images of the series: kernel 1 of 2; its other reconstructions are not analysed."
    )
    assert "B70f" not in verdict.reason + verdict.note
    stacks = [chest(kernel=kernel, acquisition_number=a) for a in (1, 2) for kernel in ("B70f", "B30f")]
    assert [one.part for one in verdicts(*stacks)] == [tuple(range(150)), tuple(range(300, 450))]


def test_a_localizer_in_the_series_is_left_out() -> None:
    scout = header(150, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"), orientation=(1, 0, 0, 0, 0, -1))
    (verdict,) = verdicts([scout], chest())
    assert (verdict.part, verdict.acquisition) == (tuple(range(1, 151)), "")


@pytest.mark.parametrize("number", [1, 2])
def test_slices_that_watch_for_the_contrast_are_left_out(number: int) -> None:
    watched = [header(200 + n, z=100.4, slice_thickness=10.0, acquisition_number=number) for n in range(2)]
    scan = chest(300, 1.0, acquisition_number=2)
    (verdict,) = triage(closed(watched + scan))
    assert (verdict.analyse, verdict.part, verdict.acquisition) == (True, tuple(range(2, 302)), "")
    assert verdict.reason == "axial chest CT, 300 slices every 1.0 mm over 300 mm"
    assert verdict.note == "Analysed are 300 images of the series: those of an axial chest CT."
    assert said(watched + scan[:130]) == "slices cover 130 mm; whole lungs need at least 150 mm"


def test_an_acquisition_with_a_gap_is_told_of_beside_one_that_is_analysed() -> None:
    inspiration, expiration = chest(acquisition_number=1), chest(acquisition_number=2)
    numbered = [replace(one, instance_number=n) for n, one in enumerate([*inspiration, *expiration])]
    fit, unfit = triage(closed(numbered[:220] + numbered[221:]))
    assert (fit.analyse, fit.acquisition) == (True, "acquisition 1")
    assert (unfit.analyse, unfit.tell, unfit.acquisition) == (False, True, "acquisition 2")
    assert unfit.reason.startswith("not analysed: incomplete: gap at z = 140.0 mm")
    assert unfit.part == tuple(range(150, 299))
    # Numbers that are missing next to the first one's: its end may be.
    lost = numbered[:140] + numbered[160:220] + numbered[221:]
    assert said(lost).startswith("incomplete: gap at z = 140.0 mm")
    # What else may be missing, nobody knows of which.
    assert said(numbered, "incomplete: the association was aborted").startswith("incomplete: the association was")


def test_an_acquisition_that_nobody_would_miss_is_not_told_of() -> None:
    monitoring = [header(n, z=100.0, acquisition_number=2) for n in range(10)]
    (only,) = verdicts(chest(acquisition_number=1), monitoring)
    assert (only.analyse, only.acquisition, only.part) == (True, "acquisition 1", tuple(range(150)))


def test_an_enhanced_chest_ct_is_analysed() -> None:
    frames = tuple((0.0, 0.0, 2.0 * n) for n in range(150))
    enhanced = header(0, sop_class_uid="1.2.840.10008.5.1.4.1.1.2.1", positions=frames, number_of_frames=150)
    assert said([enhanced]) == "axial chest CT, 150 slices every 2.0 mm over 300 mm"


def test_only_what_readers_would_miss_is_told_of() -> None:
    slices = chest()
    tell = {
        "gap": closed([*slices[:100], *slices[101:]]),
        "tilt": closed(chest(gantry_tilt=12.0)),
        "short": closed(chest(60)),
    }
    silent = {
        "localizer": closed(chest(2, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))),
        "coronal": closed(chest(orientation=(1, 0, 0, 0, 0, -1))),
        "head": closed(chest(body_part="HEAD")),
        "report": closed([header(0, sop_class_uid=SR, modality="SR", positions=(), orientation=None)]),
    }
    assert {name: triage(series)[0].tell for name, series in tell.items()} == dict.fromkeys(tell, True)
    assert {name: triage(series)[0].tell for name, series in silent.items()} == dict.fromkeys(silent, False)


@pytest.mark.data
@pytest.mark.parametrize(("patient", "count"), [("P001", 148), ("normal001", 154)])
def test_real_chest_cts_are_analysed(data_dir: Path, patient: str, count: int) -> None:
    files = sorted((data_dir / "ct-series" / "covid-ct-md" / patient).glob("*.dcm"))
    instances = [read_header(dataset_bytes(file.read_bytes()), "1.2.840.10008.1.2.4.70") for file in files]
    assert said(instances) == f"axial chest CT, {count} slices every 2.0 mm over {2 * count} mm"
    assert said(instances[:60] + instances[61:]).startswith("incomplete: gap at z = ")
