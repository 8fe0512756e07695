"""The gate: every kind of damage that would mislead a reader is found, and what is found never reaches a peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from delivery.owed import outbox
from highdicom._standard_utils import get_iod_module_map, get_module_attribute_map, get_sop_class_iod_map
from pacs import bad_pacs
from pydicom.dataset import Dataset
from pydicom.uid import MultiFrameTrueColorSecondaryCaptureImageStorage
from synthetic_chest import MODELS, MOMENT, Chest, Shape, make_chest

from node import recording
from node.config import Peer, Settings
from node.installation import Node
from node.ledger.tables import AnalysisJob as Row
from node.ledger.views import all_series
from node.results import kinds, makers, preflight
from node.results.forms import Profile
from node.results.kinds import maker_of
from node.results.making import Making
from node.results.provenance import Analysis, SourceInstance

LESIONS = [((-75.0, 45.0, 55.0), 18.0), ((70.0, 20.0, -50.0), 26.0)]


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Chest:
    return make_chest(tmp_path_factory.mktemp("chest"), Shape(rows=56, columns=72), LESIONS)


@pytest.fixture(scope="module")
def sound(chest: Chest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sound")
    made = makers.build(chest.volume, chest.outcome, None, folder, content_datetime=MOMENT)
    return {each.kind: each.path for each in made}


def analysis_of(chest: Chest) -> Analysis:
    sources = tuple(SourceInstance(s.sop_class_uid, s.sop_instance_uid) for s in chest.volume.sources)
    return Analysis(chest.headers[0], sources, MODELS, MOMENT)


def problems(path: Path, kind: str, chest: Chest) -> list[str]:
    analysis = analysis_of(chest)
    return preflight.problems(path, kind, maker_of(kind), analysis, Making(chest.volume, chest.outcome, analysis))


def walk(item: Dataset) -> Iterator[Dataset]:
    yield item
    for child in item.get("ContentSequence", []):
        yield from walk(child)


def group(report: Dataset) -> Dataset:
    """The first measurement group."""
    return next(one for one in walk(report) if preflight._concept(one) == "125007")


def one_voxel_more(seg: Dataset) -> None:
    pixels = bytearray(seg.PixelData)
    pixels[0] ^= 1
    seg.PixelData = bytes(pixels)


def one_slice_off(seg: Dataset) -> None:
    frames = seg.PerFrameFunctionalGroupsSequence
    for frame in frames:
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        position[2] = float(position[2]) + 10


def names_the_next_slice(seg: Dataset) -> None:
    first, second = seg.PerFrameFunctionalGroupsSequence[:2]
    a, b = (each.DerivationImageSequence[0].SourceImageSequence[0] for each in (first, second))
    a.ReferencedSOPInstanceUID = b.ReferencedSOPInstanceUID


def sides_swapped(seg: Dataset) -> None:
    for frame in seg.PerFrameFunctionalGroupsSequence:
        item = frame.SegmentIdentificationSequence[0]
        item.ReferencedSegmentNumber = 3 - item.ReferencedSegmentNumber


def one_frame_lost(seg: Dataset) -> None:
    seg.PerFrameFunctionalGroupsSequence.pop(0)
    size = seg.Rows * seg.Columns // 8
    seg.PixelData = seg.PixelData[size:]
    seg.NumberOfFrames -= 1


def gap_in_numbers(seg: Dataset) -> None:
    seg.SegmentSequence[1].SegmentNumber = 3


def without_outline(report: Dataset) -> None:
    of = group(report)
    of.ContentSequence = [each for each in of.ContentSequence if each.ValueType != "SCOORD"]


def outline_elsewhere(report: Dataset) -> None:
    outline = next(each for each in group(report).ContentSequence if each.ValueType == "SCOORD")
    outline.GraphicData = [value + 60 for value in outline.GraphicData]


def outline_on_a_stranger(report: Dataset) -> None:
    outline = next(each for each in group(report).ContentSequence if each.ValueType == "SCOORD")
    outline.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.3"


def without_evidence(report: Dataset) -> None:
    report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence.pop(0)


def without_tracking(report: Dataset) -> None:
    of = group(report)
    of.ContentSequence = [each for each in of.ContentSequence if preflight._concept(each) != "112039"]


def half_the_pages(capture: Dataset) -> None:
    capture.PixelData = capture.PixelData[: len(capture.PixelData) // 2]


def blank_page(capture: Dataset) -> None:
    size = capture.Rows * capture.Columns * 3
    capture.PixelData = bytes(size) + capture.PixelData[size:]


def half_a_document(pdf: Dataset) -> None:
    pdf.EncapsulatedDocument = pdf.EncapsulatedDocument[:2000]


def another_patient(made: Dataset) -> None:
    made.PatientID = "LUNG-2"


def without_value(made: Dataset) -> None:
    made.SeriesNumber = None


def without_maker(made: Dataset) -> None:
    del made.ContributingEquipmentSequence


def in_the_source_series(made: Dataset) -> None:
    made.SeriesInstanceUID = "1.2.826.0.1.9.2"


DAMAGE: list[tuple[str, Callable[[Dataset], None], str]] = [
    ("infection-seg", one_voxel_more, "a frame differs from what was found"),
    ("infection-seg", one_slice_off, "does not lie on the slice"),
    ("lung-seg", names_the_next_slice, "does not lie on the slice"),
    ("lung-seg", sides_swapped, "a frame differs from what was found"),
    ("lung-seg", one_frame_lost, "lacks"),
    ("infection-seg", gap_in_numbers, "not from 1 without a gap"),
    ("sr", without_outline, "no outline"),
    ("sr", outline_elsewhere, "leaves its slice"),
    ("sr", outline_on_a_stranger, "not of the source"),
    ("sr", without_evidence, "evidence"),
    ("sr", without_tracking, "no tracking identifier"),
    ("capture", half_the_pages, "bytes of pixels"),
    ("capture", blank_page, "a page is blank"),
    ("pdf", half_a_document, "no whole PDF"),
    ("pdf", another_patient, "PatientID is not the source's"),
    ("sr", without_value, "SeriesNumber has no value"),
    ("capture", without_maker, "what made it"),
    ("sr", in_the_source_series, "source's own series"),
]


@pytest.mark.parametrize(("kind", "damage", "told"), DAMAGE, ids=lambda value: getattr(value, "__name__", None))
def test_damage_is_found_and_named(
    chest: Chest, sound: dict[str, Path], tmp_path: Path, kind: str, damage: Callable[[Dataset], None], told: str
) -> None:
    assert problems(sound[kind], kind, chest) == []
    made = pydicom.dcmread(sound[kind])
    damage(made)
    made.save_as(tmp_path / "damaged.dcm")
    found = problems(tmp_path / "damaged.dcm", kind, chest)
    assert any(told in problem for problem in found), found
    assert "Synthetic" not in " ".join(found)


def test_file_cut_short_is_found_without_a_word_of_its_content(
    chest: Chest, sound: dict[str, Path], tmp_path: Path
) -> None:
    for kind, path in sound.items():
        whole = path.read_bytes()
        (tmp_path / "cut.dcm").write_bytes(whole[: len(whole) * 2 // 3])
        assert problems(tmp_path / "cut.dcm", kind, chest)


def test_attributes_are_those_that_the_standard_wants() -> None:
    """Against the tables of PS3.3 that highdicom carries."""
    classes = {
        "infection-seg": "1.2.840.10008.5.1.4.1.1.66.4",
        "capture": str(MultiFrameTrueColorSecondaryCaptureImageStorage),
        "pdf": "1.2.840.10008.5.1.4.1.1.104.1",
    }
    for kind, uid in classes.items():
        wanted: dict[str, set[str]] = {"1": set(), "2": set()}
        for module in get_iod_module_map()[get_sop_class_iod_map()[uid]]:
            for attribute in get_module_attribute_map()[module["key"]] if module["usage"] == "M" else ():
                if not attribute["path"] and attribute["type"] in wanted:
                    wanted[attribute["type"]].add(attribute["keyword"])
        ours = set(f"{preflight.REQUIRED} {maker_of(kind).required}".split())
        there = ours | set(f"{preflight.PRESENT} {maker_of(kind).present}".split())
        # A conditional type 1 attribute of the multi-frame module, which a single page lacks.
        assert wanted["1"] - ours <= {"FrameIncrementPointer"}, kind
        assert wanted["2"] - there <= {"PatientOrientation"}, kind


@pytest.fixture
def here(tmp_path: Path) -> Node:
    peers = {"pacs": {"ae_title": "BAD", "host": "127.0.0.1", "port": 104}}
    return Node.open(Settings.model_validate({"data": tmp_path / "var", "peers": peers}))


def owe(here: Node, chest: Chest, names: tuple[str, ...]) -> None:
    """Build for the peer and owe it the results, as an analysis does."""
    profiles = {"pacs": Profile(names)}
    folder = here.results / "1"
    folder.mkdir()
    made = makers.build(
        chest.volume, chest.outcome, None, folder, recording.with_fallback(profiles), content_datetime=MOMENT
    )
    with here.ledger() as session:
        series = here.ledger.add_series(
            session, "1.2", "1.1", ["1.3"], True, calling_ae="CT", instances=[], closed_because="", verdict=""
        )
        assert series is not None
        row = Row(route="r", destinations={"pacs": list(names)}, state="done", urgent=False)
        row.objects = [recording.as_row(here, one, profiles) for one in made]
        series.analyses.append(row)


def send(here: Node, peer: Peer) -> None:
    outbox(here.ledger, here.results, peer).work_off()


def test_peer_that_refuses_a_class_gets_the_capture_in_its_place(here: Node, chest: Chest) -> None:
    owe(here, chest, ("infection-seg", "sr"))
    with bad_pacs(classes=[MultiFrameTrueColorSecondaryCaptureImageStorage]) as pacs:
        for _ in range(3):
            send(here, pacs.peer())
    (series,) = all_series(here.ledger)
    assert [(one.kind, one.state) for one in series.deliveries] == [
        ("infection-seg", "refused"),
        ("sr", "refused"),
        ("capture", "done"),
    ]
    words = [event.text for event in series.events]
    assert any("does not accept" in text and "Segmentation Storage" in text for text in words)
    assert words.count("pacs gets the capture in its place") == 1
    assert len(pacs.stored) == 1


def test_peer_that_takes_all_gets_no_capture_that_its_route_does_not_name(here: Node, chest: Chest) -> None:
    owe(here, chest, ("sr",))
    with bad_pacs(classes=["1.2.840.10008.5.1.4.1.1.88.34"]) as pacs:
        send(here, pacs.peer())
    (series,) = all_series(here.ledger)
    assert [(one.kind, one.state) for one in series.deliveries] == [("sr", "done")]


def test_object_that_fails_its_check_is_never_sent_and_the_rest_goes(
    here: Node, chest: Chest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(making: Making, *arguments: Any) -> Dataset | None:
        outcome = making.outcome
        rolled = tuple(replace(one, labels=np.roll(one.labels, 1, axis=0)) for one in outcome.segmentations)
        return right.build(replace(making, outcome=replace(outcome, segmentations=rolled)), *arguments)

    right = kinds._MAKERS["seg"]
    monkeypatch.setitem(kinds._MAKERS, "seg", replace(right, build=mistaken))
    owe(here, chest, ("lung-seg", "capture"))
    classes = ["1.2.840.10008.5.1.4.1.1.66.4", MultiFrameTrueColorSecondaryCaptureImageStorage]
    with bad_pacs(classes=classes) as pacs:
        send(here, pacs.peer())
        (series,) = all_series(here.ledger)
        first, second = series.deliveries
        assert (first.kind, first.state, second.state) == ("lung-seg", "refused", "done")
        assert "stopped before sending" in first.reason
        assert "differs from what was found" in first.reason
        assert series.analyses[0].objects[0].path.endswith("lung-seg.stopped.dcm")
        assert series.state == "refused"
        # Not even when somebody tries again by hand.
        assert here.ledger.retry(series.id) == 1
        send(here, pacs.peer())
    assert len(pacs.stored) == 1
    assert [one.state for one in all_series(here.ledger)[0].deliveries] == ["refused", "done"]
