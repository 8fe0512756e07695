"""A ledger of every released version is brought up with all its work, in the states that it had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock
from sqlalchemy import Connection, text

from node.ledger import views
from node.ledger.leases import Lease
from node.ledger.ledger import Ledger
from node.ledger.tables import AnalysisJob, Delivery, Event, Object, PeerRecord
from node.ledger.transitions import State

REVISIONS = ("0001", "0002", "0003", "0004")

SERIES = {"content": "abc", "calling_ae": "CT", "instances": '["a.dcm"]', "complete": 1, "closed_because": "even"}
WORK = {"attempts": 0, "lease_owner": None, "lease_until": 0, "due_at": 0, "rung_at": 5.0, "reason": "x"}
#: How far ahead the lease of a worker that still runs reaches, by the clock of the test.
HELD = {"lease_owner": "abcd", "lease_until": 1_000_030.0, "attempts": 1}


def insert(connection: Connection, table: str, **row: Any) -> None:
    """Insert a row, with those of its columns that the table has at this revision."""
    there = {column[1] for column in connection.exec_driver_sql(f"PRAGMA table_info({table})")}
    row = {name: value for name, value in row.items() if name in there}
    names = ", ".join(row)
    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(':' + name for name in row)})"), row)


#: Row of an analysis → what it was, and the state that it has now.
ANALYSES = {
    1: ({"state": "waiting"}, State.WAITING),
    2: ({"state": "waiting", "gave_up": "disk"}, State.REPORT_DUE),
    3: ({"state": "running", "gave_up": "disk", **HELD}, State.REPORTING),
    4: ({"state": "running", **HELD}, State.RUNNING),
    5: ({"state": "failed", "gave_up": "disk", "finished_at": 9.0}, State.FAILED),
    6: ({"state": "done", "finished_at": 9.0}, State.DONE),
}

#: Row of an object → kind, its file, and form.
OBJECTS = {
    1: ("sr", "1.2/1-6/sr.dcm", ""),
    2: ("capture", "1.2/1-6/capture-every-5-mm.dcm", "every-5-mm"),
    3: ("lung-seg", "1.2/1-6/lung-seg-labelmap.stopped.dcm", "labelmap"),
    4: ("infection-seg", "1.2/1-6/infection-seg.stopped.dcm", ""),
    5: ("rejection-note", "1.2/1-6/rejection-note-0a1b2c3d.dcm", ""),
    6: ("sr", "1.2/1-6/sr-with-lung-seg.dcm", "with-lung-seg"),
}

#: Peer → what its delivery of the first object was, the state that it has now, and whether 0001 knew of it.
DELIVERIES = {
    "new": ({"state": "waiting", "reason": ""}, State.WAITING, True),
    "later": ({"state": "waiting", "attempts": 3}, State.WAITING, True),
    "taken": ({"state": "waiting", "stored_at": 7.0, "asks": 2, "attempts": 1}, State.STORED, False),
    "odd": ({"state": "running", "stored_at": 7.0, **HELD}, State.STORED, False),
    "mute": ({"state": "failed", "stored_at": 7.0, "finished_at": 9.0}, State.UNCONFIRMED, False),
    "bad": ({"state": "failed", "finished_at": 9.0}, State.FAILED, True),
    "done": ({"state": "done", "finished_at": 9.0}, State.DONE, True),
}

#: Peer → what its line was, and the state that it has now.
PEERS = {
    "new": ({"state": "waiting"}, State.WAITING),
    "taken": ({"state": "waiting", "silent_since": 8.0}, State.UNREACHABLE),
    "odd": ({"state": "running", "silent_since": 8.0, **HELD}, State.PROBING),
    "mute": ({"state": "running", **HELD}, State.RUNNING),
}

WHY = "stopped before sending, as its check failed: it names no patient"


def fill(connection: Connection, revision: str) -> None:
    insert(
        connection,
        "series",
        id=1,
        series_instance_uid="1.2",
        study_instance_uid="1.1",
        generation=1,
        verdict="route chest",
        closed_at=1000.0,
        **SERIES,
    )
    for row, (was, _) in ANALYSES.items():
        more = {"series_id": 1, "route": f"r{row}", "destinations": "{}", "tell": 1, "urgent": 0, "note": ""}
        insert(connection, "analyses", id=row, acquisition="", **WORK | more | was)
    for row, (kind, path, _) in OBJECTS.items():
        uids = {"sop_class_uid": "1.5", "sop_instance_uid": f"1.6.{row}", "series_instance_uid": "1.7"}
        insert(connection, "objects", id=row, analysis_id=6, kind=kind, path=path, **uids)
    for peer, (was, _, early) in DELIVERIES.items():
        if early or revision > "0001":
            insert(connection, "deliveries", object_id=1, peer=peer, **WORK | {"asks": 0} | was)
    insert(connection, "deliveries", object_id=3, peer="pacs", **WORK | {"state": "refused", "reason": WHY, "asks": 0})
    if revision > "0001":
        for peer, (was, _) in PEERS.items():
            insert(connection, "lines", peer=peer, **WORK | was)
        insert(connection, "commitments", transaction_uid="2.25.1", peer="taken", asked_at=7.0)
    for n in range(3):
        insert(connection, "events", series_id=1, at=1000.0 + n, stage="received", text=f"event {n} {{of}} 'three'")


@pytest.fixture(params=REVISIONS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Ledger, Clock]]:
    clock = Clock()
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}", clock)
    ledger.migrate(request.param)
    with ledger.engine.begin() as connection:
        fill(connection, request.param)
    ledger.migrate()
    yield request.param, ledger, clock
    ledger.engine.dispose()


def test_every_row_has_the_state_that_it_had(old: tuple[str, Ledger, Clock]) -> None:
    revision, ledger, _ = old
    with ledger.read() as session:
        assert session.execute(text("PRAGMA foreign_key_check")).all() == []
        assert {row.id: row.state for row in session.query(AnalysisJob)} == {n: now for n, (_, now) in ANALYSES.items()}
        assert all(row.report and row.last_notified_at == 5.0 for row in session.query(AnalysisJob))
        sent = {row.peer: row for row in session.query(Delivery).filter_by(object_id=1)}
        assert {peer: row.state for peer, row in sent.items()} == {
            peer: now for peer, (_, now, early) in DELIVERIES.items() if early or revision > "0001"
        }
        peers = {row.peer: (row.state, row.unreachable_since) for row in session.query(PeerRecord)}
        if revision > "0001":
            assert peers == {peer: (now, was.get("silent_since")) for peer, (was, now) in PEERS.items()}
            assert (sent["taken"].stored_at, sent["taken"].asks, sent["odd"].lease_owner) == (7.0, 2, None)


def test_objects_have_their_form_and_why_they_were_stopped(old: tuple[str, Ledger, Clock]) -> None:
    _, ledger, _ = old
    with ledger.read() as session:
        objects = {row.id: row for row in session.query(Object)}
    assert {n: row.form for n, row in objects.items()} == {n: form for n, (_, _, form) in OBJECTS.items()}
    assert {n: row.stopped for n, row in objects.items() if row.stopped is not None} == {
        3: WHY,
        4: "it did not pass its check",
    }


def test_events_keep_their_words(old: tuple[str, Ledger, Clock]) -> None:
    _, ledger, _ = old
    with ledger.read() as session:
        assert [(row.kind, row.text) for row in session.query(Event)] == [
            ("text", f"event {n} {{of}} 'three'") for n in range(3)
        ]
        stored = session.execute(text("SELECT data FROM events")).scalars().all()
    assert json.loads(stored[0]) == {"text": "event 0 {of} 'three'"}


def test_all_work_that_was_due_is_due(old: tuple[str, Ledger, Clock]) -> None:
    revision, ledger, clock = old
    clock.now += 20
    assert ledger.analyses_due() == [1, 2]
    assert set(ledger.peers_due()) == {"new", "later"} | ({"taken"} if revision > "0001" else set())
    clock.now += 200  # leases have run out
    assert set(ledger.analyses_due()) == {1, 2, 3, 4}
    assert set(ledger.peers_due()) == {"new", "later"} | ({"taken", "odd"} if revision > "0001" else set())
    assert Lease(ledger, AnalysisJob, 2).take()
    (series,) = views.all_series(ledger)
    assert series.analyses[1].state is State.REPORTING
    assert ledger.retry(1) > 0


def test_many_events_are_converted_in_several_batches(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    ledger.migrate("0004")
    with ledger.engine.begin() as connection:
        fill(connection, "0004")
        row = {"series_id": 1, "at": 1.0, "stage": "x"}
        many = text("INSERT INTO events (series_id, at, stage, text) VALUES (:series_id, :at, :stage, :text)")
        connection.execute(many, [row | {"text": f"n{n}"} for n in range(2500)])
    ledger.migrate()
    with ledger.read() as session:
        assert [event.text for event in session.query(Event).order_by(Event.id)][3:] == [f"n{n}" for n in range(2500)]
    ledger.engine.dispose()
