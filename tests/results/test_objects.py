"""The objects as independent readers see them: dicom3tools, DCMTK, dcmqi, and highdicom's own parser."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK
from conftest import tool
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage
from synthetic_chest import (
    FEET_FIRST,
    KINDS,
    MOMENT,
    PRONE,
    RIGHT_UPPER_POSTERIOR,
    Chest,
    Shape,
    crude_findings,
    findings_of,
    make_chest,
)

from models.labels import LEFT, RIGHT
from node.images.volume import read_volume
from node.methods.pneumonia.outcome import outcome_of
from node.methods.pneumonia.subject import SUBJECT
from node.results import makers
from node.results.forms import Profile
from node.results.provenance import NOT_FOR_DIAGNOSIS

LEFT_LOWER = ((70.0, 20.0, -50.0), 26.0)

#: Series that are stored in every way that has shifted or flipped somebody's segmentation.
STORED = {
    "supine": Shape(),
    "prone": Shape(orientation=PRONE, patient_position="HFP"),
    # Rows run from the patient's left to the right, and sorting along the normal goes from the head down.
    "feet first": Shape(orientation=FEET_FIRST, patient_position="FFS"),
    "oblique": Shape(orientation=(0.9961946981, 0.0871557427, 0.0, -0.0871557427, 0.9961946981, 0.0)),
    "coronal": Shape(slices=30, orientation=(1.0, 0.0, 0.0, 0.0, 0.0, -1.0), extent=(300.0, 240.0, 360.0)),
    "sagittal": Shape(slices=36, orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0), extent=(360.0, 240.0, 300.0)),
    "feet first prone": Shape(orientation=(1.0, 0.0, 0.0, 0.0, -1.0, 0.0), patient_position="FFP"),
    "2 mm overlapping": Shape(slices=120, rows=40, columns=40, attributes={"SliceThickness": "5.0"}),
    "7 x 13": Shape(slices=9, rows=7, columns=13),
    "Japanese": Shape(
        rows=40,
        columns=40,
        attributes={
            "SpecificCharacterSet": ["", "ISO 2022 IR 87"],
            "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう",
        },
    ),
    "Arabic": Shape(
        rows=40, columns=40, attributes={"SpecificCharacterSet": "ISO_IR 127", "PatientName": "قباني^لنزار"}
    ),
    "unequal spacing": Shape(rows=96, columns=40),
}


#: Real series: P001 as it is, and a part of it as one multi-frame instance.
REAL = ("P001", "P001 multi-frame")


@pytest.fixture(scope="module", params=[*STORED, *(pytest.param(name, marks=pytest.mark.data) for name in REAL)])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chest, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("chest")
    if request.param in REAL:
        paths = real_series(request.getfixturevalue("data_dir"), "P001")
        chest = crude_chest([multi_frame(paths[50:90], folder)] if "multi" in request.param else paths)
    else:
        chest = make_chest(folder / "ct", STORED[request.param], [LEFT_LOWER, RIGHT_UPPER_POSTERIOR])
    return chest, build(chest, folder)


def real_series(data_dir: Path, name: str) -> list[Path]:
    """Files of a real series in the order of its slices."""
    folder = data_dir / "ct-series" / "covid-ct-md" / name
    return sorted(folder.glob("*.dcm"), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))


def crude_chest(paths: list[Path]) -> Chest:
    """A real series with masks by thresholds."""
    volume = read_volume(paths)
    return Chest(volume, crude_findings(volume), [])


def multi_frame(paths: list[Path], folder: Path) -> Path:
    """Real slices as one Legacy Converted Enhanced CT instance, made by highdicom."""
    slices = [pydicom.dcmread(path) for path in paths]
    for one in slices:
        one.decompress()
    image = hd.legacy.LegacyConvertedEnhancedCTImage(slices, hd.UID(), 7, hd.UID(), 1)
    image.save_as(folder / "multi-frame.dcm")
    return folder / "multi-frame.dcm"


@pytest.fixture(scope="module")
def one_lesion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chest, dict[str, Path]]:
    """One small lesion, right upper lung, at the back."""
    folder = tmp_path_factory.mktemp("one")
    chest = make_chest(folder / "ct")
    return chest, build(chest, folder)


def build(chest: Chest, folder: Path, *kinds: str, **forms: Any) -> dict[str, Path]:
    """Objects by kind; each has passed the check."""
    profile = Profile(kinds or KINDS, **forms)
    made = makers.build(chest.volume, chest.outcome, None, folder, [profile], content_datetime=MOMENT)
    assert [each.problems for each in made] == [()] * len(made)
    return {each.kind: each.path for each in made}


#: What dciodvfy warns of, and why that stands.
EXPLAINED = (
    # Device UID came into Contributing Equipment with CP-1800 (PS3.3 C.12.1.1.5), after the tool's tables.
    "DeviceUID(0018,1002)> - Attribute is not present in standard DICOM IOD",
    # Private codes: the scheme is described in Coding Scheme Identification Sequence.
    "Unrecognized defined term = <99LUNGNODE>",
)


def errors_of(path: Path) -> list[str]:
    """What dciodvfy calls an error."""
    told = subprocess.run([tool("dciodvfy"), "-new", path], capture_output=True, text=True)
    lines = (told.stdout + told.stderr).splitlines()
    assert any(not line.startswith(("Warning", "Error")) for line in lines), "the IOD was not recognised"
    warnings = [line for line in lines if line.startswith("Warning")]
    assert [line for line in warnings if not any(known in line for known in EXPLAINED)] == []
    return [line for line in lines if line.startswith("Error")]


def walk(item: Dataset) -> Iterator[Dataset]:
    yield item
    for child in item.get("ContentSequence", []):
        yield from walk(child)


def groups_of(path: Path) -> list[Any]:
    document = hd.sr.srread(path)
    return list(document.content.get_volumetric_roi_measurement_groups())


@pytest.mark.peer
def test_dciodvfy_finds_no_error(made: tuple[Chest, dict[str, Path]]) -> None:
    _, paths = made
    assert set(paths) == set(KINDS)
    for path in paths.values():
        assert errors_of(path) == []


@pytest.mark.peer
def test_results_and_sources_are_one_study(made: tuple[Chest, dict[str, Path]]) -> None:
    chest, paths = made
    files = {source.path for source in chest.volume.sources} | set(paths.values())
    told = subprocess.run([tool("dcentvfy"), *files], capture_output=True, text=True)
    assert [line for line in (told.stdout + told.stderr).splitlines() if line.startswith("Error")] == []


@pytest.mark.peer
@pytest.mark.parametrize(
    ("kind", "first", "second"), [("lung-seg", "right", "left"), ("infection-seg", "right", "left")]
)
def test_dcmqi_reads_every_voxel_in_its_place(
    made: tuple[Chest, dict[str, Path]], tmp_path: Path, kind: str, first: str, second: str
) -> None:
    chest, paths = made
    # No voxel is in both: the lungs' segments are what is left beside the infection.
    expected = chest.findings.lungs * ((chest.findings.lesions > 0) == (kind == "infection-seg"))
    subprocess.run(
        [
            tool("segimage2itkimage"),
            *("--inputDICOM", paths[kind], "--outputDirectory", tmp_path, "--prefix", "mask"),
            *("--outputType", "nrrd", "--mergeSegments"),
        ],
        check=True,
        capture_output=True,
    )
    described = json.loads((tmp_path / "mask-meta.json").read_text())["segmentAttributes"][0]
    values = {segment["SegmentLabel"]: segment["labelID"] for segment in described}
    assert len(values) == 2
    assert first in min(values, key=lambda name: values[name]).lower()
    image = SimpleITK.ReadImage(str(tmp_path / "mask-1.nrrd"))
    read = SimpleITK.GetArrayFromImage(image)
    # The reader's grid spans the slices with something on them, in an order of its own: go through the patient.
    found = np.argwhere(read)
    direction = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    points = found[:, ::-1] @ direction.T + image.GetOrigin()
    inverse = np.linalg.inv(chest.volume.affine)
    column, row, plane = (points @ inverse[:3, :3].T + inverse[:3, 3]).round().astype(int).T
    placed = np.zeros_like(chest.findings.lungs)
    placed[plane, row, column] = read[tuple(found.T)]
    assert np.array_equal(placed, expected)


def test_every_frame_names_the_slice_it_lies_on(made: tuple[Chest, dict[str, Path]]) -> None:
    chest, paths = made
    positions = {(source.sop_instance_uid, source.frame): source.position for source in chest.volume.sources}
    for kind in ("lung-seg", "infection-seg"):
        seg = pydicom.dcmread(paths[kind])
        assert seg.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
        assert (seg.SegmentationType, seg.SegmentsOverlap) == ("BINARY", "NO")
        assert [segment.SegmentNumber for segment in seg.SegmentSequence] == [1, 2]
        assert all("RecommendedDisplayCIELabValue" in segment for segment in seg.SegmentSequence)
        (series,) = seg.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == chest.volume.series_instance_uid
        assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == {
            uid for uid, _ in positions
        }
        for frame in seg.PerFrameFunctionalGroupsSequence:
            (source,) = frame.DerivationImageSequence[0].SourceImageSequence
            here = [float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient]
            named = source.ReferencedSOPInstanceUID, source.get("ReferencedFrameNumber")
            assert here == pytest.approx(positions[named], abs=1e-6)
        assert seg.pixel_array.reshape(seg.NumberOfFrames, -1).any(axis=1).all(), "an empty frame"


@pytest.mark.peer
@pytest.mark.parametrize("form", ["binary-all-frames", "labelmap"])
def test_other_forms_hold_the_same_voxels(tmp_path: Path, form: str) -> None:
    chest = make_chest(tmp_path / "ct", STORED["feet first"], [LEFT_LOWER, RIGHT_UPPER_POSTERIOR])
    usual = build(chest, tmp_path)
    paths = build(chest, tmp_path, seg=form)
    for kind in ("infection-seg", "lung-seg"):
        seg, before = hd.seg.segread(paths[kind]), hd.seg.segread(usual[kind])
        assert seg.SOPInstanceUID != before.SOPInstanceUID
        assert [each.SegmentNumber for each in seg.SegmentSequence] == [1, 2]
        uids = [source.sop_instance_uid for source in chest.volume.sources]
        read = seg.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
        expected = chest.findings.lungs * ((chest.findings.lesions > 0) == (kind == "infection-seg"))
        assert np.array_equal(read, expected)
        if form == "binary-all-frames":
            assert seg.NumberOfFrames == 2 * len(uids)
            assert errors_of(paths[kind]) == []
        else:
            assert seg.NumberOfFrames <= len(uids)
            assert seg.PixelPaddingValue == 0
    # The report names the segmentations of its own peer.
    assert named_segments(paths["sr"]) <= {
        pydicom.dcmread(paths[k]).SOPInstanceUID for k in ("infection-seg", "lung-seg")
    }


def named_segments(report: Path) -> set[str]:
    """Instances that the measurements of a report were made on."""
    sources = [one for one in walk(pydicom.dcmread(report)) if one.get("RelationshipType") == "INFERRED FROM"]
    return {one.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for one in sources}


@pytest.mark.peer
def test_volumes_name_the_segments_that_they_were_measured_on(made: tuple[Chest, dict[str, Path]]) -> None:
    chest, paths = made
    segs = {kind: pydicom.dcmread(paths[kind]) for kind in ("infection-seg", "lung-seg")}
    labels = {
        (seg.SOPInstanceUID, segment.SegmentNumber): segment.SegmentLabel
        for seg in segs.values()
        for segment in seg.SegmentSequence
    }
    report = pydicom.dcmread(paths["sr"])
    told = {}
    for group in (one for one in walk(report) if one.get("ValueType") == "CONTAINER"):
        children = list(group.get("ContentSequence", []))
        names = [one.TextValue for one in children if one.ConceptNameCodeSequence[0].CodeValue == "112039"]
        for one in children:
            if names and one.get("ValueType") == "NUM" and one.ConceptNameCodeSequence[0].CodeMeaning == "Volume":
                of = [item.ReferencedSOPSequence[0] for item in one.get("ContentSequence", [])]
                numbers = [(each.ReferencedSOPInstanceUID, np.atleast_1d(each.ReferencedSegmentNumber)) for each in of]
                told[names[0]] = {labels[uid, int(number)] for uid, found in numbers for number in found}
    assert told["Right lung"] == {"Right lung, not infected", "Infection, right lung"}
    assert told["Infection, both lungs"] == {"Infection, right lung", "Infection, left lung"}
    for lesion in chest.findings.lesion_list:
        assert told[f"Lesion {lesion.label}, {lesion.side} lung"] == {f"Infection, {lesion.side} lung"}
    listed = {
        item.ReferencedSOPInstanceUID
        for series in report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert {seg.SOPInstanceUID for seg in segs.values()} <= listed


@pytest.mark.peer
def test_comprehensive_report_says_the_same(one_lesion: tuple[Chest, dict[str, Path]], tmp_path: Path) -> None:
    chest, paths = one_lesion
    other = build(chest, tmp_path, sr="comprehensive")["sr"]
    assert pydicom.dcmread(other).SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.33"
    assert errors_of(other) == []
    texts = [[item.get("TextValue") for item in walk(pydicom.dcmread(path))] for path in (paths["sr"], other)]
    assert texts[0] == texts[1]


def test_report_of_a_peer_without_segmentations_names_none(
    one_lesion: tuple[Chest, dict[str, Path]], tmp_path: Path
) -> None:
    chest, paths = one_lesion
    assert len(named_segments(paths["sr"])) == 2
    alone = build(chest, tmp_path, "sr", "capture")["sr"]
    assert named_segments(alone) == set()
    assert pydicom.dcmread(alone).SOPInstanceUID != pydicom.dcmread(paths["sr"]).SOPInstanceUID


def test_peers_share_what_they_take_in_the_same_form(one_lesion: tuple[Chest, dict[str, Path]], tmp_path: Path) -> None:
    chest, _ = one_lesion
    profiles = [Profile(), Profile(("infection-seg", "capture")), Profile(("capture",), capture="every-40-mm")]
    made = makers.build(chest.volume, chest.outcome, None, tmp_path, profiles, content_datetime=MOMENT)
    told = {(one.path.name, len(one.profiles)) for one in made}
    assert {("infection-seg.dcm", 2), ("capture.dcm", 2), ("capture-every-40-mm.dcm", 1), ("sr.dcm", 1)} <= told
    assert len(made) == 6


@pytest.mark.peer
@pytest.mark.parametrize("slices", [1, 1000, 2000])
def test_one_slice_and_thousands(tmp_path: Path, slices: int) -> None:
    # 2,000 slices show the whole body; lungs on all of them would take dciodvfy minutes.
    depth = {1: 10.0, 1000: 240.0, 2000: 1000.0}[slices]
    shape = Shape(slices=slices, rows=40, columns=40, extent=(depth, 300.0, 360.0))
    chest = make_chest(tmp_path / "ct", shape, [((-75.0, 45.0, 0.0), 18.0)])
    paths = build(chest, tmp_path)
    assert set(paths) == set(KINDS)
    for path in paths.values():
        assert errors_of(path) == []
    seg = hd.seg.segread(paths["infection-seg"])
    uids = [source.sop_instance_uid for source in chest.volume.sources]
    read = seg.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    assert np.array_equal(read > 0, chest.findings.lesions > 0)


@pytest.mark.peer
def test_pdf_is_what_dcmtk_takes_out(one_lesion: tuple[Chest, dict[str, Path]], tmp_path: Path) -> None:
    _, paths = one_lesion
    subprocess.run([tool("dcm2pdf"), paths["pdf"], tmp_path / "out.pdf"], check=True, capture_output=True)
    taken = (tmp_path / "out.pdf").read_bytes()
    assert taken.startswith(b"%PDF-")
    assert taken.rstrip(b"\0") == bytes(pydicom.dcmread(paths["pdf"]).EncapsulatedDocument).rstrip(b"\0")
    # Embedded, so that it is printed with the same letters everywhere.
    assert b"/FontFile2" in taken


def contour_of(group: Any) -> tuple[tuple[str, int | None], NDArray[np.float64]]:
    """The instance and frame that an outline lies on, and its points."""
    (region,) = group.roi
    (source,) = region.ContentSequence
    reference = source.ReferencedSOPSequence[0]
    return (reference.ReferencedSOPInstanceUID, reference.get("ReferencedFrameNumber")), region.value


def test_every_group_outlines_its_finding_on_a_source_slice(made: tuple[Chest, dict[str, Path]]) -> None:
    chest, paths = made
    findings = chest.findings
    infected = findings.lesions > 0
    masks = [findings.lungs == RIGHT, findings.lungs == LEFT, infected, findings.lesions == 1, findings.lesions == 2]
    groups = groups_of(paths["sr"])
    assert len(groups) == len(masks)
    names = {(source.sop_instance_uid, source.frame): k for k, source in enumerate(chest.volume.sources)}
    for group, mask in zip(groups, masks, strict=True):
        named, points = contour_of(group)
        plane = mask[names[named]]
        assert plane.sum() == mask.sum(axis=(1, 2)).max()
        assert np.array_equal(points[0], points[-1])
        rows, columns = np.nonzero(plane)
        assert points.min(axis=0).tolist() >= [columns.min(), rows.min()]
        # Corner coordinates: a pixel's far edge is its index plus one.
        assert points.max(axis=0).tolist() <= [columns.max() + 1, rows.max() + 1]


@pytest.mark.peer
def test_tid1500reader_reads_the_measurements(made: tuple[Chest, dict[str, Path]], tmp_path: Path) -> None:
    chest, paths = made
    out = tmp_path / "sr.json"
    subprocess.run(
        [tool("tid1500reader"), "--inputDICOM", paths["sr"], "--outputMetadata", out], check=True, capture_output=True
    )
    groups = json.loads(out.read_text())["Measurements"]
    read = [
        {item["quantity"]["CodeMeaning"]: float(item["value"]) for item in group["measurementItems"]}
        for group in groups
    ]
    right, left, infection, *lesions = read
    findings = chest.findings
    assert right["Volume"] == pytest.approx(findings.right.volume_ml, abs=0.06)
    assert left["Volume"] == pytest.approx(findings.left.volume_ml, abs=0.06)
    assert right["Right lung infected share"] == pytest.approx(100 * findings.right.infected_share, abs=0.006)
    assert left["Left lung infected volume"] == pytest.approx(findings.left.infected_ml, abs=0.006)
    assert infection["Volume"] == pytest.approx(findings.both.infected_ml, abs=0.006)
    assert infection["Mean Attenuation Coefficient"] == pytest.approx(findings.both.infected_mean_hu, abs=0.06)
    assert infection["Longest run of slices with infection"] == findings.scan.consecutive.longest_run
    assert [lesion["Volume"] for lesion in lesions] == pytest.approx(
        [lesion.volume_ml for lesion in findings.lesion_list], abs=0.006
    )
    assert [group.get("Laterality", {}).get("CodeMeaning") for group in groups[:2]] == ["Right", "Left"]
    assert all(group["TrackingIdentifier"] and group["TrackingUniqueIdentifier"] for group in groups)


@pytest.mark.peer
def test_dsrdump_shows_the_statement_with_its_inputs(made: tuple[Chest, dict[str, Path]]) -> None:
    chest, paths = made
    command = [tool("dsrdump"), "+Pl", paths["sr"]]
    # The name of a patient is printed in the character set of the file.
    told = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
    # DCMTK's checker knows neither the Japanese nor the Arabic set; it says so and reads on.
    sets = ("Specific Character Set: ", "unsupported SpecificCharacterSet")
    assert [line for line in told.stderr.splitlines() if not any(known in line for known in sets)] == []
    rule = chest.findings.scan.consecutive
    for words in (
        f"longest run {rule.longest_run} ({rule.longest_run_mm:.0f} mm)",
        f"positive from {rule.minimum_run} in a row",
        "Intensity ratio",
        "alarming from 0.15",
        "Noisy-OR",
        NOT_FOR_DIAGNOSIS,
        *(f"{model.name} {model.version} (sha256 {model.sha256})" for model in chest.findings.models),
    ):
        assert words in told.stdout.replace("\n", " "), words


def test_one_small_lesion_lies_right_up_and_back_in_every_object(one_lesion: tuple[Chest, dict[str, Path]]) -> None:
    chest, paths = one_lesion
    middle, _ = RIGHT_UPPER_POSTERIOR
    # SEG, by highdicom's volume reader.
    seg = hd.seg.segread(paths["infection-seg"])
    assert seg.number_of_segments == 1
    assert seg.get_segment_description(1).SegmentLabel == "Infection, right lung"
    volume = seg.get_volume(combine_segments=True)
    seen = volume.map_indices_to_reference(np.argwhere(volume.array)).mean(axis=0)
    assert seen == pytest.approx(middle, abs=3)
    # SR, by the slice that its outline names.
    lesion = groups_of(paths["sr"])[-1]
    (uid, _), points = contour_of(lesion)
    (source,) = [header for header in chest.headers if header.SOPInstanceUID == uid]
    column, row = (points.min(axis=0) + points.max(axis=0)) / 2
    x, y, z = (float(value) for value in source.ImagePositionPatient)
    row_mm, column_mm = source.PixelSpacing
    # 0, 0 of an outline is the corner of the first pixel, whose centre is Image Position (Patient).
    assert x + (column - 0.5) * column_mm == pytest.approx(middle[0], abs=3)
    assert y + (row - 0.5) * row_mm == pytest.approx(middle[1], abs=3)
    assert z == pytest.approx(middle[2], abs=chest.volume.spacing[0])
    assert lesion.finding_sites[0].laterality.meaning == "Right"


def test_without_infection_the_report_and_the_capture_say_so(tmp_path: Path) -> None:
    chest = make_chest(tmp_path / "ct", lesions=[])
    paths = build(chest, tmp_path)
    assert set(paths) == {"lung-seg", "sr", "capture", "pdf"}
    texts = [item.TextValue for item in walk(pydicom.dcmread(paths["sr"])) if item.get("ValueType") == "TEXT"]
    assert any(text.startswith("No infection found") for text in texts)
    groups = groups_of(paths["sr"])
    assert len(groups) == 2
    evaluations = {each.name.meaning: each.value.meaning for each in groups[0].get_qualitative_evaluations()}
    assert evaluations["Consecutive slices rule"] == "Negative"
    assert evaluations["Intensity rule"] == "Not COVID-19-like"


@pytest.mark.peer
def test_without_infection_the_objects_are_sound(tmp_path: Path) -> None:
    for path in build(make_chest(tmp_path / "ct", lesions=[]), tmp_path).values():
        assert errors_of(path) == []


def test_only_the_largest_lesions_are_listed_one_by_one(tmp_path: Path) -> None:
    balls = [((-75.0, -60.0 + 40 * n, z), 9.0 + n + z / 50) for n in range(4) for z in (-50.0, 0.0, 50.0)]
    chest = make_chest(tmp_path / "ct", Shape(slices=48), balls)
    paths = build(chest, tmp_path, "sr")
    lesions = groups_of(paths["sr"])[3:]
    assert [group.get_measurements()[1].value for group in lesions] == pytest.approx(
        [round(lesion.volume_ml, 2) for lesion in chest.findings.lesion_list[:10]]
    )
    texts = " ".join(item.get("TextValue", "") for item in walk(pydicom.dcmread(paths["sr"])))
    assert "the 10 largest of 12 lesions" in texts


@pytest.mark.peer
def test_frames_of_a_multi_frame_source_are_named(tmp_path: Path) -> None:
    chest = make_chest(tmp_path / "ct")
    sources = tuple(
        replace(source, sop_class_uid=str(EnhancedCTImageStorage), sop_instance_uid="1.2.826.0.1.9.9", frame=24 - k)
        for k, source in enumerate(chest.volume.sources)
    )
    header = Dataset(chest.headers[0])
    header.SOPClassUID, header.SOPInstanceUID = EnhancedCTImageStorage, "1.2.826.0.1.9.9"
    volume = replace(chest.volume, sources=sources)
    made = makers.build(volume, outcome_of(volume, chest.findings), [header], tmp_path, content_datetime=MOMENT)
    paths = {each.kind: each.path for each in made}
    frames = {round(source.position[2], 3): source.frame for source in sources}
    seg = pydicom.dcmread(paths["lung-seg"])
    assert len(seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 1
    for group in seg.PerFrameFunctionalGroupsSequence:
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        z = round(float(group.PlanePositionSequence[0].ImagePositionPatient[2]), 3)
        assert source.ReferencedSOPInstanceUID == "1.2.826.0.1.9.9"
        assert source.ReferencedFrameNumber == frames[z]
    for path in paths.values():
        assert errors_of(path) == []
    outline = next(item for item in walk(pydicom.dcmread(paths["sr"])) if item.get("ValueType") == "SCOORD")
    assert outline.ContentSequence[0].ReferencedSOPSequence[0].ReferencedFrameNumber in frames.values()


@pytest.mark.peer
def test_not_analysed_says_why_in_the_source_study(tmp_path: Path) -> None:
    chest = make_chest(tmp_path / "ct")
    reason = "there is a gap at z = 12.5 mm"
    made = makers.not_analysed(chest.headers, reason, tmp_path, content_datetime=MOMENT, subject=SUBJECT)
    assert [each.kind for each in made] == ["sr", "capture"]
    for each in made:
        assert errors_of(each.path) == []
        assert pydicom.dcmread(each.path).StudyInstanceUID == chest.volume.study_instance_uid
    told = subprocess.run([tool("dsrdump"), "+Pl", made[0].path], capture_output=True, text=True, check=True)
    assert f"Not analysed: {reason}" in told.stdout
    other = makers.not_analysed(
        chest.headers, "no lungs found", tmp_path, [Profile(("capture",))], content_datetime=MOMENT
    )
    assert other[0].sop_instance_uid != made[1].sop_instance_uid


@pytest.mark.data
@pytest.mark.peer
def test_a_real_healthy_chest_gets_sound_objects(data_dir: Path, tmp_path: Path) -> None:
    """normal001: real geometry, and no Patient's Name at all; nothing is infected, and the lungs are by a threshold."""
    chest = crude_chest(real_series(data_dir, "normal001"))
    lungs = chest.findings.lungs
    chest = replace(chest, findings=findings_of(chest.volume, lungs, np.zeros(lungs.shape, np.uint16), 0))
    paths = build(chest, tmp_path)
    assert set(paths) == {"lung-seg", "sr", "capture", "pdf"}
    for path in paths.values():
        assert errors_of(path) == []
        assert pydicom.dcmread(path, stop_before_pixels=True).PatientName == ""
    test_results_and_sources_are_one_study((chest, paths))
    test_dcmqi_reads_every_voxel_in_its_place((chest, paths), tmp_path, "lung-seg", "right", "left")
    test_dsrdump_shows_the_statement_with_its_inputs((chest, paths))
    out = tmp_path / "sr.json"
    subprocess.run(
        [tool("tid1500reader"), "--inputDICOM", paths["sr"], "--outputMetadata", out], check=True, capture_output=True
    )
    groups = json.loads(out.read_text())["Measurements"]
    assert [group["TrackingIdentifier"] for group in groups] == ["Right lung", "Left lung"]
    told = {item["quantity"]["CodeMeaning"]: float(item["value"]) for item in groups[0]["measurementItems"]}
    assert told["Volume"] == pytest.approx(chest.findings.right.volume_ml, abs=0.06)
    assert told["Right lung infected share"] == told["Slices with infection"] == 0


def test_an_absent_side_leaves_no_gap_in_the_segment_numbers(tmp_path: Path) -> None:
    chest = make_chest(tmp_path / "ct", Shape(slices=12, rows=32, columns=32), [LEFT_LOWER])
    seg = pydicom.dcmread(build(chest, tmp_path, "infection-seg")["infection-seg"])
    assert [(segment.SegmentNumber, segment.SegmentLabel) for segment in seg.SegmentSequence] == [
        (1, "Infection, left lung")
    ]


@pytest.mark.peer
def test_without_any_lung_the_reader_is_told(tmp_path: Path) -> None:
    chest = make_chest(tmp_path / "ct", Shape(slices=8, rows=24, columns=24), [])
    nothing = replace(chest.findings.right, volume_ml=0.0, infected_ml=0.0, mean_hu=float("nan"))
    findings = replace(
        chest.findings, lungs=np.zeros_like(chest.findings.lungs), right=nothing, left=nothing, both=nothing
    )
    paths = build(replace(chest, findings=findings), tmp_path)
    assert set(paths) == {"sr", "capture", "pdf"}
    assert pydicom.dcmread(paths["sr"]).ContentSequence[0].ContentSequence[0].TextValue.endswith("no lung was found")
    for path in paths.values():
        assert errors_of(path) == []
