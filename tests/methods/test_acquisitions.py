"""A series of several acquisitions: each is analysed, told apart from the others, and superseded for itself."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from conftest import series_closed
from pydicom import Dataset, dcmread
from rich.console import Console
from rich.progress import Progress

from models.phantom.draw import phantom
from node import tasks
from node.cli.folder import analyse_folder, closed_folder
from node.cli.render import table, timeline
from node.config import Settings
from node.images.phantom_series import write_series
from node.installation import Node
from node.ledger.tables import AnalysisJob
from node.ledger.views import all_series, as_json

KINDS = ["infection-seg", "lung-seg", "sr", "capture", "pdf"]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Path]]:
    """Inspiration and expiration, as a scanner writes them: numbered on, and not as long."""
    folder, made = tmp_path_factory.mktemp("ct"), {}
    for acquisition, slices in ((1, 40), (2, 34)):
        scan = phantom(3, shape=(slices, 48, 48), spacing=(5.0, 7.0, 7.0), severity=2)
        made[acquisition] = write_series(scan, folder, 3, acquisition)
        for n, path in enumerate(made[acquisition], 1 if acquisition == 1 else 41):
            change(path, InstanceNumber=n)
    return made


def change(path: Path, **values: object) -> None:
    ds = dcmread(path)
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    ds.save_as(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    pacs = {"ae_title": "PACS", "host": "127.0.0.1", "port": 104, "rejection_notes": True}
    settings = {"data": tmp_path / "var", "peers": {"pacs": pacs}, "routes": [{"name": "chest", "to": {"pacs": KINDS}}]}
    made = Node.open(Settings.model_validate(settings))
    monkeypatch.setattr(tasks, "node", lambda: made)
    monkeypatch.setattr(tasks, "dispatch", lambda *_: None)
    yield made
    made.ledger.engine.dispose()


def receive(here: Node, paths: Iterable[Path]) -> None:
    """These files come, as far as they have not, and the series is closed."""
    folder = here.spool / "1.2" / "1.3"
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copy(path, folder)
    (closed,) = closed_folder(here.spool)
    series_closed(here, dataclasses.replace(closed, calling_ae="PACS"))


def analysed(here: Node) -> dict[str, AnalysisJob]:
    """Do what is owed; gives the newest analyses by their acquisitions."""
    for row in here.ledger.analyses_due():
        tasks.analyse(row)
    return {one.acquisition: one for one in all_series(here.ledger)[0].analyses}


def read(here: Node, analysis: AnalysisJob) -> dict[str, Dataset]:
    return {made.kind: dcmread(here.results / made.path) for made in analysis.objects}


def evidence(report: Dataset) -> set[str]:
    """The source instances that a report names: the series of most instances in its evidence."""
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    source = max(study.ReferencedSeriesSequence, key=lambda series: len(series.ReferencedSOPSequence))
    return {item.ReferencedSOPInstanceUID for item in source.ReferencedSOPSequence}


def uids(paths: Iterable[Path]) -> set[str]:
    return {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in paths}


def shown(here: Node) -> str:
    page = Console(width=200, record=True, file=io.StringIO())
    newest = all_series(here.ledger)[0]
    page.print(table([newest]), timeline(newest))
    return page.export_text()


def test_each_acquisition_has_objects_of_its_own_that_a_reader_can_tell_apart(
    here: Node, sent: dict[int, list[Path]]
) -> None:
    receive(here, sent[1] + sent[2])
    done = analysed(here)
    assert list(done) == ["acquisition 1", "acquisition 2"]
    made = {name: read(here, analysis) for name, analysis in done.items()}
    everything = [one for objects in made.values() for one in objects.values()]
    assert [one.kind for one in done["acquisition 1"].objects] == KINDS
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription"):
        assert len({one[keyword].value for one in everything}) == 2 * len(KINDS)
    for number, (name, objects) in enumerate(made.items(), 1):
        assert all(one.SeriesDescription.endswith(f", {name}") for one in objects.values())
        assert {one.SeriesNumber for one in objects.values()} == {
            100 + n for n in range(101 - 10 * number, 106 - 10 * number)
        }
        (series,) = objects["lung-seg"].ReferencedSeriesSequence
        assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == uids(sent[number])
        assert evidence(objects["sr"]) == uids(sent[number])
        assert {one.ReferencedSOPInstanceUID for one in objects["capture"].SourceImageSequence} == uids(sent[number])
        note = f"Analysed are {len(sent[number])} images of the series: {name}."
        assert note in objects["sr"].to_json()
        assert done[name].summary is not None
        assert note in done[name].summary["notes"]
    lungs = [one.summary["lungs"]["both"]["volume_ml"] for one in done.values() if one.summary]
    assert lungs[0] != lungs[1]

    text = shown(here)
    for name, analysis in done.items():
        assert f"{name}: {analysis.reason}" in " ".join(text.split())
        assert f"{name}: infection-seg to pacs: waiting for a worker" in text
    told = as_json(all_series(here.ledger)[0])
    assert [one["acquisition"] for one in told["analyses"]] == list(done)

    receive(here, sent[1])
    assert len(all_series(here.ledger)) == 1
    assert here.ledger.analyses_due() == []


def test_one_with_a_gap_is_told_of_and_late_slices_supersede_that_alone(
    here: Node, sent: dict[int, list[Path]]
) -> None:
    receive(here, sent[1] + sent[2][:20] + sent[2][21:])
    before = analysed(here)
    assert {name: one.state for name, one in before.items()} == {"acquisition 1": "done", "acquisition 2": "refused"}
    told = read(here, before["acquisition 2"])
    assert told.keys() == {"sr", "capture"}
    assert "Not analysed: acquisition 2: incomplete: gap at z" in told["sr"].to_json()
    assert evidence(told["sr"]) == uids(sent[2]) - uids(sent[2][20:21])
    assert told["sr"].SeriesDescription == "AI: not analysed (SR), acquisition 2"
    assert "acquisition 2: not analysed: incomplete: gap at z" in " ".join(shown(here).split())
    with here.ledger() as session:
        for analysis in before.values():
            for made in session.get_one(AnalysisJob, analysis.id).objects:
                for delivery in made.deliveries:
                    delivery.state = "done"
    assert all_series(here.ledger)[0].state == "delivered"

    receive(here, sent[2][20:21])
    after = analysed(here)
    assert {name: one.state for name, one in after.items()} == {"acquisition 1": "done", "acquisition 2": "done"}
    newest, older = all_series(here.ledger)
    first, second = older.analyses
    assert {made.superseded_by for made in first.objects} == {None}
    assert {made.superseded_by for made in second.objects} == {after["acquisition 2"].id}
    again = {made.sop_instance_uid for made in after["acquisition 1"].objects}
    assert again == {made.sop_instance_uid for made in first.objects}
    notes = [
        dcmread(here.results / made.path)
        for one in newest.analyses
        for made in one.objects
        if made.kind == "rejection-note"
    ]
    (note,) = notes
    named = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in note.ContentSequence[1:]]
    assert sorted(named) == sorted(made.sop_instance_uid for made in second.objects)


def test_another_reconstruction_of_an_acquisition_takes_the_place_of_the_first(
    here: Node, sent: dict[int, list[Path]], tmp_path: Path
) -> None:
    receive(here, sent[1] + sent[2])
    before = analysed(here)["acquisition 2"]
    longer = write_series(phantom(3, shape=(40, 48, 48), spacing=(5.0, 7.0, 7.0)), tmp_path / "sharp", 3, 2)
    for n, path in enumerate(longer):
        copy = path.rename(path.with_name(f"sharp-{path.name}"))
        change(copy, ConvolutionKernel="SHARP", SOPInstanceUID=f"1.2.3.{n + 1}", InstanceNumber=75 + n)
    receive(here, (tmp_path / "sharp").iterdir())
    # The other acquisition is analysed first, and is no heir.
    newer = analysed(here)["acquisition 2"]
    assert "kernel 2 of 2; its other reconstructions are not analysed" in newer.note
    assert not set(newer.instances or ()) & set(before.instances or ())
    older = all_series(here.ledger)[1]
    superseded = {one.acquisition: {made.superseded_by for made in one.objects} for one in older.analyses}
    assert superseded == {"acquisition 1": {None}, "acquisition 2": {newer.id}}


def test_a_folder_is_analysed_as_a_node_would(sent: dict[int, list[Path]], tmp_path: Path) -> None:
    folder, out = tmp_path / "ct", tmp_path / "out"
    folder.mkdir()
    for path in sent[1] + sent[2]:
        shutil.copy(path, folder)
    page = Console(width=200, record=True, file=io.StringIO())
    done = analyse_folder(folder, out, Settings(), Progress(console=page), device="cpu")
    assert [one.acquisition for one in done] == ["acquisition 1", "acquisition 2"]
    assert "acquisition-2/sr.dcm" in done[1].files
    assert dcmread(out / "acquisition-2" / "sr.dcm").SeriesDescription == "AI measurements (SR), acquisition 2"
    (folder / sent[2][20].name).unlink()
    (only,) = analyse_folder(folder, out, Settings(), Progress(console=page), device="cpu")
    assert (only.acquisition, "sr.dcm" in only.files) == ("acquisition 1", True)
    assert "acquisition 2: not analysed: incomplete: gap at z" in page.export_text()
