"""UIDs, patient and study, equipment: what every object carries, whatever its kind."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pydicom.valuerep import PersonName
from synthetic_chest import KINDS, MODELS, MOMENT, Chest, Shape, make_chest

from node import __version__
from node.identity import uid_of
from node.methods.pneumonia.outcome import outcome_of
from node.results import makers
from node.results.forms import Profile
from node.results.provenance import Analysis, Part, SourceInstance, describe


def build(chest: Chest, folder: Path, **arguments: Any) -> list[Dataset]:
    folder.mkdir(exist_ok=True)
    given = {"sources": None, "content_datetime": MOMENT} | arguments
    made = makers.build(chest.volume, chest.outcome, directory=folder, **given)
    return [pydicom.dcmread(each.path) for each in made]


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Chest:
    return make_chest(tmp_path_factory.mktemp("chest"))


def analysis_of(*uids: str, series: str = "1.2.3", models: tuple[Any, ...] = MODELS) -> Analysis:
    header = Dataset()
    header.SeriesInstanceUID = series
    return Analysis(header, tuple(SourceInstance("1.2", uid) for uid in uids), models, MOMENT)


uids = st.lists(st.from_regex(r"1\.2\.[1-9][0-9]{0,6}", fullmatch=True), min_size=1, max_size=6, unique=True)


@given(uids, st.randoms())
def test_uids_are_a_function_of_the_set_of_instances(instances: list[str], random: Any) -> None:
    shuffled = [*instances, instances[0]]
    random.shuffle(shuffled)
    uid = analysis_of(*instances).uid("sr", "instance")
    assert analysis_of(*shuffled).uid("sr", "instance") == uid
    assert UID(uid).is_valid
    assert len(uid) <= 64
    assert uid.startswith("2.25.")


def test_series_of_several_acquisitions_have_descriptions_and_numbers_that_fit() -> None:
    made = []
    for number in range(11):
        dataset = Dataset()
        of = replace(analysis_of("1.2.1"), part=Part(f"acquisition {10**12}, temporal position {number}", number))
        of.header.SeriesNumber = 3
        describe(
            dataset,
            of,
            kind="sr",
            sop_class_uid="1.2",
            modality="SR",
            series_offset=93,
            series_description="AI measurements (SR)",
        )
        made.append(dataset)
    assert all(len(one.SeriesDescription) == 64 for one in made[:10])
    assert [one.SeriesNumber for one in made] == [*range(393, 300, -10), 393]
    assert len({one.SOPInstanceUID for one in made}) == 11


def test_uids_differ_when_anything_that_matters_differs() -> None:
    newer = (MODELS[0], replace(MODELS[1], version="2.0.2"))
    retrained = (MODELS[0], replace(MODELS[1], sha256="c3" * 32))
    seen = [
        analysis_of("1.2.1", "1.2.2").uid("sr", "instance"),
        analysis_of("1.2.1", "1.2.2").uid("sr", "series"),
        analysis_of("1.2.1", "1.2.2").uid("capture", "instance"),
        analysis_of("1.2.1", "1.2.2", "1.2.3").uid("sr", "instance"),
        analysis_of("1.2.1", "1.2.2", series="1.2.4").uid("sr", "instance"),
        analysis_of("1.2.1", "1.2.2", models=newer).uid("sr", "instance"),
        analysis_of("1.2.1", "1.2.2", models=retrained).uid("sr", "instance"),
    ]
    assert len(set(seen)) == len(seen)
    # For ever the same, or an upgrade makes second objects of what archives hold already.
    assert uid_of("a", "b") == "2.25.39075778759584044150128396841005982017"


def test_building_twice_gives_the_same_bytes(chest: Chest, tmp_path: Path) -> None:
    build(chest, tmp_path / "a")
    build(chest, tmp_path / "b", sources=chest.headers[::-1])
    for kind in KINDS:
        assert (tmp_path / "a" / f"{kind}.dcm").read_bytes() == (tmp_path / "b" / f"{kind}.dcm").read_bytes(), kind
    assert {path.name for path in (tmp_path / "a").iterdir()} == {f"{kind}.dcm" for kind in KINDS}


def test_series_are_apart_and_say_what_they_are(chest: Chest, tmp_path: Path) -> None:
    objects = build(chest, tmp_path)
    for keyword in ("SeriesInstanceUID", "SOPInstanceUID", "SeriesNumber", "SeriesDescription"):
        values = [str(each[keyword].value) for each in objects]
        assert len(set(values)) == len(KINDS), keyword
    assert [each.SeriesNumber for each in objects] == [491, 492, 493, 494, 495]
    assert [each.Modality for each in objects] == ["SEG", "SEG", "SR", "OT", "DOC"]


def test_every_object_names_its_maker(chest: Chest, tmp_path: Path) -> None:
    for each in build(chest, tmp_path):
        assert (each.Manufacturer, each.ManufacturerModelName) == ("lungnode", "lungnode")
        assert each.SoftwareVersions == __version__
        scanner, node, *algorithms = each.ContributingEquipmentSequence
        assert scanner.PurposeOfReferenceCodeSequence[0].CodeValue == "109101"
        assert (scanner.Manufacturer, scanner.ManufacturerModelName) == ("Phantoms", "Ellipsoid")
        assert node.DeviceSerialNumber == each.DeviceSerialNumber
        assert "not for primary diagnosis" in node.ContributionDescription
        named = [(item.ManufacturerModelName, item.SoftwareVersions, item.DeviceSerialNumber) for item in algorithms]
        assert named == [(model.name, model.version, model.sha256) for model in MODELS]
        for item in (node, *algorithms):
            code = item.PurposeOfReferenceCodeSequence[0]
            assert (code.CodeValue, code.CodingSchemeDesignator) == ("109102", "DCM")
        if each.Modality == "SEG":
            for segment in each.SegmentSequence:
                algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
                assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) in [(m.name, m.version) for m in MODELS]


def raw_patient(path: Path) -> dict[int, bytes]:
    """Values of the patient's group as they stand in the file, sequences left out."""
    dataset = pydicom.dcmread(path)
    raw = [dataset.get_item(tag) for tag in list(dataset.keys()) if tag.group == 0x0010]
    return {int(element.tag): element.value or b"" for element in raw if element.VR != "SQ"}


NAMES = {
    "japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "arabic": ("ISO_IR 127", "قباني^لنزار"),
    "utf-8": ("ISO_IR 192", "Wang^XiaoDong=王^小東"),
    "latin": ("ISO_IR 100", "Müller^Jürgen"),
}


@pytest.mark.parametrize("script", NAMES)
def test_patient_and_study_are_copied_byte_for_byte(script: str, tmp_path: Path) -> None:
    charset, name = NAMES[script]
    issuer = Dataset()
    issuer.UniversalEntityID, issuer.UniversalEntityIDType = "1.2.3", "ISO"
    attributes = {
        "SpecificCharacterSet": charset,
        "PatientName": name,
        "IssuerOfPatientID": "HOSPITAL",
        "IssuerOfPatientIDQualifiersSequence": [issuer],
        "PatientBirthDate": "",
        "PatientComments": name.replace("^", " ").split("=")[0],
        "EthnicGroup": "",
        "PatientWeight": "70.50",
        "IssuerOfAccessionNumberSequence": [issuer],
        "TimezoneOffsetFromUTC": "+0900",
    }
    chest = make_chest(tmp_path / "ct", Shape(slices=8, rows=24, columns=24, attributes=attributes))
    first = chest.volume.sources[0].path
    source = pydicom.dcmread(first)
    whole = [pydicom.dcmread(each.path) for each in chest.volume.sources]
    for headers in (None, whole):
        build(chest, tmp_path / "results", sources=headers)
        for kind in KINDS:
            path = tmp_path / "results" / f"{kind}.dcm"
            assert raw_patient(path) == raw_patient(first)
            made = pydicom.dcmread(path)
            assert made.SpecificCharacterSet == source.SpecificCharacterSet
            assert str(made.PatientName) == name
            assert made.IssuerOfPatientIDQualifiersSequence[0].UniversalEntityID == "1.2.3"
            assert made.IssuerOfAccessionNumberSequence[0].UniversalEntityIDType == "ISO"
            for keyword in ("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "AccessionNumber"):
                assert made[keyword].value == source[keyword].value
            assert made.TimezoneOffsetFromUTC == "+0900"


def test_what_the_source_lacks_is_present_and_empty(tmp_path: Path) -> None:
    missing = ("PatientName", "PatientBirthDate", "StudyID", "AccessionNumber", "ReferringPhysicianName")
    attributes: dict[str, Any] = dict.fromkeys(missing)
    chest = make_chest(tmp_path / "ct", Shape(slices=8, rows=24, columns=24, attributes=attributes))
    for each in build(chest, tmp_path / "results"):
        for keyword in missing:
            assert keyword in each
            assert not each[keyword].value
        assert each.PatientID == "LUNG-1"
        assert "SpecificCharacterSet" not in each


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_source_that_breaks_the_rules_is_copied_and_not_refused(tmp_path: Path, caplog: Any) -> None:
    chest = make_chest(tmp_path / "ct", Shape(slices=8, rows=24, columns=24))
    for header in chest.headers:
        for keyword, value in (
            ("PatientSex", "male"),
            ("PatientBirthDate", "unknown"),
            ("PatientName", PersonName("A=B=C=D=E")),
        ):
            header[keyword]._value = value
    caplog.set_level("DEBUG")
    for each in build(chest, tmp_path / "results", sources=chest.headers):
        assert each.get_item("PatientSex").value.strip() == b"male"
        assert each.get_item("PatientBirthDate").value.strip() == b"unknown"
    assert "A=B=C" not in caplog.text


def test_content_time_is_in_the_zone_of_the_source() -> None:
    header = Dataset()
    header.StudyInstanceUID, header.SeriesInstanceUID, header.TimezoneOffsetFromUTC = "1.2", "1.2.3", "+0530"
    moment = datetime(2026, 3, 5, 20, 0, 1, tzinfo=UTC)
    target = Dataset()
    describe(
        target,
        Analysis(header, (SourceInstance("1.2", "1.2.3.4"),), (), moment),
        kind="sr",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.88.11",
        modality="SR",
        series_offset=93,
        series_description="x",
    )
    assert (target.ContentDate, target.ContentTime) == ("20260306", "013001.000000")
    assert target.TimezoneOffsetFromUTC == "+0530"


def test_kinds_choose_what_is_made(chest: Chest, tmp_path: Path) -> None:
    made = makers.build(
        chest.volume, chest.outcome, None, tmp_path, [Profile(("capture", "sr"))], content_datetime=MOMENT
    )
    assert [each.kind for each in made] == ["sr", "capture"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["capture.dcm", "sr-alone.dcm"]


def test_what_does_not_fit_together_is_refused(chest: Chest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown kinds of result \\['gsps'\\]"):
        Profile(("gsps",))
    shifted = replace(chest.findings, lungs=chest.findings.lungs[1:])
    with pytest.raises(ValueError, match="masks of"):
        outcome_of(chest.volume, shifted)
    segmentation = chest.outcome.segmentations[0]
    cut = (replace(segmentation, labels=segmentation.labels[1:]), chest.outcome.segmentations[1])
    with pytest.raises(ValueError, match="masks of"):
        makers.build(chest.volume, replace(chest.outcome, segmentations=cut), None, tmp_path, content_datetime=MOMENT)
    with pytest.raises(ValueError, match="pneumonia makes no emphysema-seg"):
        makers.build(
            chest.volume, chest.outcome, None, tmp_path, [Profile(("emphysema-seg",))], content_datetime=MOMENT
        )
    outside = replace(chest.findings, lesions=chest.findings.lesions + 1)
    with pytest.raises(ValueError, match="outside the lungs"):
        outcome_of(chest.volume, outside)
    with pytest.raises(ValueError, match="no header"):
        makers.build(chest.volume, chest.outcome, chest.headers[1:], tmp_path, content_datetime=MOMENT)
    with pytest.raises(ValueError, match="at least one header"):
        makers.not_analysed([], "x", tmp_path, content_datetime=MOMENT)
    assert list(tmp_path.iterdir()) == []
