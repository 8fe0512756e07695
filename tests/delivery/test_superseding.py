"""A newer generation takes the place of the earlier ones: in the queue, in the ledger and at the peer."""

from __future__ import annotations

import dataclasses
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, Orthanc, series_closed, tool, wait_for
from pacs import CLASSES, bad_pacs
from pydicom import dcmread
from pydicom.uid import KeyObjectSelectionDocumentStorage, MultiFrameTrueColorSecondaryCaptureImageStorage
from sqlalchemy import update
from test_journey import run

from models.phantom.draw import Phantom, phantom
from node import tasks
from node.cli.folder import closed_folder
from node.config import Peer, Settings
from node.delivery.outbox import Outbox
from node.images.phantom_series import write_series
from node.installation import Node
from node.intake.assembly import ClosedSeries
from node.ledger.leases import Timeouts
from node.ledger.tables import Delivery, Series
from node.ledger.views import all_series
from node.results import makers

pytestmark = pytest.mark.usefixtures("short_waits")


@cache
def chest() -> Phantom:
    """A small chest, drawn once."""
    return phantom(3, shape=(40, 48, 48), spacing=(5.0, 7.0, 7.0))


def make_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, notes: bool = False, port: int = 104) -> Node:
    pacs = {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": port, "rejection_notes": notes}
    route = {"name": "chest", "from": ["pacs"], "to": {"pacs": ["sr", "capture"]}}
    here = Node.open(
        Settings.model_validate({"data": tmp_path / "var", "peers": {"pacs": pacs}, "routes": [route]}),
        timeouts=Timeouts(busy_s=0.2, backoff=SHORT.backoff),
    )
    monkeypatch.setattr(tasks, "node", lambda: here)
    monkeypatch.setattr(tasks, "dispatch", lambda *_: None)
    return here


def close(here: Node, slices: int) -> None:
    """Close the first `slices` of a series with a gap, so that it is told about and needs no network."""
    folder = here.spool / "1.2" / "1.3"
    if not folder.exists():
        paths = write_series(chest(), folder, 3)
        paths[20].unlink()
    (closed,) = closed_folder(folder)
    some = ClosedSeries(
        **{
            **{name: getattr(closed, name) for name in ("series_instance_uid", "study_instance_uid", "called_ae")},
            "calling_ae": "ORTHANC",
            "instances": closed.instances[:slices],
            "paths": closed.paths[:slices],
            "complete": False,
            "reason": f"incomplete: {slices} slices",
        }
    )
    series_closed(here, some)


def newest_first(here: Node) -> list[Series]:
    return all_series(here.ledger)


def test_analysis_that_nobody_began_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_node(tmp_path, monkeypatch)
    close(here, 30)
    close(here, 39)
    newer, older = newest_first(here)
    assert (newer.state, older.state) == ("waiting", "superseded")
    assert here.ledger.analyses_due() == [newer.analyses[0].id]


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("sender", ["ORTHANC", "ELSEWHERE"])
def test_analysis_that_waits_gives_way_only_to_one_that_will_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: bool, sender: str
) -> None:
    here = make_node(tmp_path, monkeypatch)
    paths = write_series(chest(), here.spool / "1.2" / "1.3", 3)
    late = paths[38 if gap else 39]
    kept = late.read_bytes()
    late.unlink()
    if gap:
        paths[39].rename(tmp_path / "last")
    (first,) = closed_folder(here.spool)
    series_closed(here, dataclasses.replace(first, calling_ae="ORTHANC"))
    assert here.ledger.analyses_due() == [1]
    if gap:
        (tmp_path / "last").rename(paths[39])
    else:
        late.write_bytes(kept)
    (again,) = closed_folder(here.spool)
    series_closed(here, dataclasses.replace(again, calling_ae=sender))
    newer, older = newest_first(here)
    assert older.analyses[0].state == ("waiting" if gap or sender == "ELSEWHERE" else "superseded")
    assert [one.not_analysed is None for one in newer.analyses] == ([] if sender == "ELSEWHERE" else [not gap])


def test_objects_still_owed_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_node(tmp_path, monkeypatch)
    for slices in (30, 39):
        close(here, slices)
        tasks.analyse(all_series(here.ledger)[0].analyses[0].id)
    newer, older = newest_first(here)
    assert (newer.state, older.state) == ("delivering", "superseded")
    assert {one.state for one in older.deliveries} == {"superseded"}
    assert here.ledger.retry(older.id) == 0
    assert "2 not sent any more" in older.events[-1].text


@pytest.mark.parametrize("first", ["refused", "failed"])
def test_series_whose_results_were_sent_and_outdated_is_superseded_and_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    here = make_node(tmp_path, monkeypatch)
    close(here, 30)
    tasks.analyse(1)
    with here.ledger() as session:
        series = session.get_one(Series, 1)
        series.complete, series.analyses[0].state = first != "refused", first
        for made in series.analyses[0].objects:
            for delivery in made.deliveries:
                delivery.state = "done"
    (series,) = newest_first(here)
    words = {"refused": "not analysed", "failed": "failed"}
    assert (series.state, bool(series.to_do)) == (words[first], True)
    close(here, 39)
    tasks.analyse(2)
    _, older = newest_first(here)
    assert (older.state, older.to_do) == ("superseded", [])


def test_generation_that_cannot_be_analysed_takes_nothing_from_one_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_node(tmp_path, monkeypatch)
    close(here, 30)
    tasks.analyse(1)
    with here.ledger() as session:
        session.get_one(Series, 1).analyses[0].state = "done"
    close(here, 39)
    tasks.analyse(2)
    assert [one.state for one in newest_first(here)] == ["delivering", "delivering"]


@pytest.mark.peer
def test_peer_gets_a_rejection_note_that_names_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orthanc: Orthanc
) -> None:
    here = make_node(tmp_path, monkeypatch, notes=True, port=orthanc.port)
    close(here, 30)
    tasks.analyse(1)
    tasks.deliver("pacs")
    close(here, 39)
    tasks.analyse(2)
    tasks.deliver("pacs")
    newer, older = newest_first(here)
    assert (newer.state, older.state) == ("not analysed", "superseded")
    *_, note = newer.analyses[0].objects
    assert (note.kind, note.sop_class_uid) == ("rejection-note", KeyObjectSelectionDocumentStorage)
    (instance,) = orthanc.find("Instance", SOPInstanceUID=note.sop_instance_uid)
    stored = tmp_path / "note.dcm"
    stored.write_bytes(orthanc.get(f"/instances/{instance}/file").content)
    read = dcmread(stored)
    assert read.ConceptNameCodeSequence[0].CodeValue == "113001"
    named = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in read.ContentSequence[1:]]
    assert named == [made.sop_instance_uid for made in older.analyses[0].objects]
    evidence = read.CurrentRequestedProcedureEvidenceSequence[0]
    assert evidence.StudyInstanceUID == older.study_instance_uid
    assert {one.SeriesInstanceUID for one in evidence.ReferencedSeriesSequence} == {
        made.series_instance_uid for made in older.analyses[0].objects
    }
    assert "Error" not in run(tool("dciodvfy"), stored)
    assert "Rejected for Quality Reasons" in run(tool("dsrdump"), stored)


def sent(here: Node) -> None:
    """Count all that is owed as delivered."""
    with here.ledger() as session:
        session.execute(update(Delivery).where(Delivery.state == "waiting").values(state="done"))


@pytest.mark.parametrize("again", [False, True])
def test_peers_that_have_the_same_get_one_note_and_a_retry_makes_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    here = make_node(tmp_path, monkeypatch, notes=True)
    changed = here.settings.model_dump(by_alias=True)
    changed["peers"]["other"] = changed["peers"]["pacs"]
    changed["routes"][0]["to"]["other"] = ["sr", "capture"]
    object.__setattr__(here, "settings", Settings.model_validate(changed))
    close(here, 30)
    tasks.analyse(1)
    sent(here)
    close(here, 39)
    tasks.analyse(2)
    if again:
        sent(here)
        assert here.ledger.retry(2) == 1
        tasks.analyse(2)
    newer = newest_first(here)[0].analyses[0]
    assert (newer.state, [made.kind for made in newer.objects]) == ("refused", ["sr", "capture", "rejection-note"])
    assert [one.peer for one in newer.objects[-1].deliveries] == ["other", "pacs"]


def test_note_is_written_though_the_first_file_of_the_series_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_node(tmp_path, monkeypatch, notes=True)
    close(here, 30)
    tasks.analyse(1)
    sent(here)
    close(here, 39)
    first = here.spool / newest_first(here)[0].instances[0]
    first.unlink()
    first.symlink_to("/proc/self/mem")  # EIO, as of a bad sector
    tasks.analyse(2)
    newer = newest_first(here)[0].analyses[0]
    assert (newer.state, newer.objects[-1].kind) == ("refused", "rejection-note")


def test_note_is_written_while_others_write_to_the_ledger_and_names_what_was_sent_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_node(tmp_path, monkeypatch, notes=True)
    close(here, 30)
    tasks.analyse(1)
    with here.ledger() as session:  # the first object is being sent, the second not yet
        under_way = session.get_one(Delivery, 1)
        under_way.state, under_way.lease_until = "running", time.time() + 60
    close(here, 39)
    written: list[int] = []
    write = makers.rejection_note

    def meanwhile(header: Any, outdated: Any, *rest: Any) -> Any:
        written.append(len(outdated))
        if len(written) == 1:
            with here.ledger() as session:
                session.execute(update(Delivery).where(Delivery.id == 2).values(state="done"))
        return write(header, outdated, *rest)

    monkeypatch.setattr(makers, "rejection_note", meanwhile)
    tasks.analyse(2)
    newer = newest_first(here)[0].analyses[0]
    assert (newer.state, written) == ("refused", [1, 2])
    note = dcmread(here.results / newer.objects[-1].path)
    assert len(note.ContentSequence) == 1 + 2


def test_object_under_way_when_it_was_superseded_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_node(tmp_path, monkeypatch)
    close(here, 30)
    tasks.analyse(1)
    sent: list[Any] = []

    def store(n: int, uid: str) -> int:
        if n == 1:
            close(here, 39)
            tasks.analyse(2)
            return 0xA700
        sent.append(uid)
        return 0x0000

    with bad_pacs(
        classes=[
            *CLASSES,
            "1.2.840.10008.5.1.4.1.1.88.11",
            MultiFrameTrueColorSecondaryCaptureImageStorage,
            "1.2.840.10008.5.1.4.1.1.7",
        ]
    ) as pacs:
        pacs.on_store = store
        peer: Peer = pacs.peer()
        for _ in range(20):
            Outbox(here.ledger, here.results, "pacs", peer, "LUNGNODE").work_off()
    newer, older = newest_first(here)
    assert {one.state for one in older.deliveries} == {"superseded"}
    assert sent == [made.sop_instance_uid for made in newer.analyses[0].objects]


@pytest.mark.parametrize("later", ["", "failed"])
def test_analysis_that_failed_while_a_later_generation_came_gives_way_when_it_is_to_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    here = make_node(tmp_path, monkeypatch)
    close(here, 30)

    def overtaken(*_: Any) -> Any:
        close(here, 39)
        raise OSError("passing")

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "_make", overtaken)
        tasks.analyse(1)
    assert [one.state for one in newest_first(here)] == ["waiting", "waiting"]
    tasks.analyse(2)
    if later:
        with here.ledger() as session:
            session.get_one(Series, 2).analyses[0].state = later
    wait_for(lambda: 1 in here.ledger.analyses_due(), 5, "the next attempt")
    tasks.analyse(1)
    _, older = newest_first(here)
    assert (older.state, len(older.deliveries)) == (("delivering", 2) if later else ("superseded", 0))
    if not later:
        assert older.events[-1].text == "superseded by generation 2, before it was analysed"
