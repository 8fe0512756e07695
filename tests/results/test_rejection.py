"""The rejection note in file form; what peers do with it is tested in tests/delivery/test_superseding.py."""

from __future__ import annotations

import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from conftest import tool
from pydicom import Dataset, dcmread
from pydicom.uid import (
    Comprehensive3DSRStorage,
    EncapsulatedPDFStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SegmentationStorage,
)

from node.results import makers

#: SOP class, how the content tree refers to it (PS3.3 C.18.3, C.18.4), its series.
OUTDATED = [
    (SegmentationStorage, "IMAGE", "1.2.10"),
    (Comprehensive3DSRStorage, "COMPOSITE", "1.2.11"),
    (MultiFrameTrueColorSecondaryCaptureImageStorage, "IMAGE", "1.2.12"),
    (MultiFrameTrueColorSecondaryCaptureImageStorage, "IMAGE", "1.2.12"),
    (EncapsulatedPDFStorage, "COMPOSITE", "1.2.13"),
]


def header() -> Dataset:
    made = Dataset()
    made.StudyInstanceUID, made.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    made.PatientName, made.PatientID, made.SpecificCharacterSet = "Phantom^A", "A", "ISO_IR 100"
    made.StudyID, made.StudyDate, made.StudyTime = "1", "20200102", "030405"
    return made


@pytest.mark.peer
def test_note_conforms_and_refers_to_each_object_as_what_it_is(tmp_path: Path) -> None:
    named = [(str(uid), f"{series}.{n}", series) for n, (uid, _, series) in enumerate(OUTDATED, 1)]
    made = makers.rejection_note(header(), named, tmp_path, "note", datetime(2020, 1, 2))
    note = dcmread(made.path)
    assert not made.problems
    assert (note.Modality, note.ContinuityOfContent) == ("KO", "SEPARATE")
    assert note.ConceptNameCodeSequence[0].CodeValue == "113001"
    why, *items = note.ContentSequence
    assert why.ConceptNameCodeSequence[0].CodeValue == "113012"
    assert [item.ValueType for item in items] == [value_type for _, value_type, _ in OUTDATED]
    references = [item.ReferencedSOPSequence[0] for item in items]
    assert [(one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in references] == [n[:2] for n in named]
    (evidence,) = note.CurrentRequestedProcedureEvidenceSequence
    assert [(one.SeriesInstanceUID, len(one.ReferencedSOPSequence)) for one in evidence.ReferencedSeriesSequence] == [
        ("1.2.10", 1),
        ("1.2.11", 1),
        ("1.2.12", 2),
        ("1.2.13", 1),
    ]
    said = subprocess.run([tool("dciodvfy"), made.path], capture_output=True, text=True)
    assert "Error" not in said.stdout + said.stderr
