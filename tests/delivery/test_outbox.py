"""The outbox against peers that refuse, fail, hang, close and come back."""

from __future__ import annotations

import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port, wait_for
from owed import outbox, owe, states
from pacs import BadPacs, bad_pacs
from pydicom.uid import Comprehensive3DSRStorage, CTImageStorage, SegmentationStorage
from pynetdicom import AE
from sqlalchemy import insert, select, update

from node.config import Peer
from node.delivery import outbox as outbox_module
from node.delivery.outbox import ORDERED_ATTEMPTS
from node.ledger.leases import Backoff, Timeouts
from node.ledger.ledger import Ledger
from node.ledger.tables import AnalysisJob, Delivery, Event, Object, Series
from node.ledger.transitions import Kind

#: pynetdicom drops the sockets of connections that failed without closing them; Python closes them, and warns.
pytestmark = [
    pytest.mark.usefixtures("short_waits"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

THREE = (CTImageStorage, SegmentationStorage, Comprehensive3DSRStorage)


def reasons(ledger: Ledger) -> list[str]:
    with ledger() as session:
        return list(session.scalars(select(Delivery.reason).order_by(Delivery.id)))


def test_many_studies_go_over_one_association_in_their_order(ledger: Ledger, results: Path) -> None:
    uids = [uid for _ in range(5) for uid in owe(ledger, results, "pacs", classes=THREE)]
    with bad_pacs() as pacs:
        outbox(ledger, results, pacs.peer()).work_off()
    assert (pacs.stored, pacs.associations) == (uids, 1)
    assert states(ledger) == ["done"] * 15


def test_urgent_study_goes_first(ledger: Ledger, results: Path) -> None:
    routine = owe(ledger, results, "pacs", classes=THREE)
    urgent = owe(ledger, results, "pacs", classes=THREE, urgent=True)
    with bad_pacs() as pacs:
        outbox(ledger, results, pacs.peer()).work_off()
    assert pacs.stored == urgent + routine


def test_association_stays_open_for_what_follows_soon(
    ledger: Ledger, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "LINGER_S", 3.0)
    first = owe(ledger, results, "pacs")
    with bad_pacs() as pacs:
        worker = threading.Thread(target=outbox(ledger, results, pacs.peer()).work_off)
        worker.start()
        wait_for(lambda: pacs.stored == first, 5, "the first object")
        second = owe(ledger, results, "pacs")
        outbox(ledger, results, pacs.peer()).work_off()  # another worker, which leaves it to the one that has the line
        wait_for(lambda: pacs.stored == first + second, 5, "the second object")
        assert pacs.associations == 1
        worker.join()


def test_peer_that_drops_idle_associations_costs_no_attempt(
    ledger: Ledger, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "LINGER_S", 3.0)
    owe(ledger, results, "pacs")
    with bad_pacs() as pacs:
        worker = threading.Thread(target=outbox(ledger, results, pacs.peer()).work_off)
        worker.start()
        wait_for(lambda: states(ledger) == ["done"], 5, "the first object")
        pacs.drop_all()
        owe(ledger, results, "pacs")
        wait_for(lambda: states(ledger) == ["done", "done"], 10, "the second object")
        worker.join()
    assert pacs.associations == 2
    with ledger() as session:
        assert [row.attempts for row in session.scalars(select(Delivery))] == [1, 1]


def test_refused_class_is_said_once_and_the_rest_goes(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs", classes=THREE)
    with bad_pacs(classes=[CTImageStorage, Comprehensive3DSRStorage]) as pacs:
        outbox(ledger, results, pacs.peer()).work_off()
        outbox(ledger, results, pacs.peer()).work_off()
    assert states(ledger) == ["done", "refused", "done"]
    assert "does not accept Segmentation Storage" in reasons(ledger)[1]
    assert pacs.associations == 1


def test_peer_that_breaks_off_when_it_has_refused_a_class_has_refused_no_other(
    ledger: Ledger, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owe(ledger, results, "pacs", classes=THREE)
    associate = AE.associate

    def busy(*arguments: Any, **named: Any) -> Any:
        made = associate(*arguments, **named)
        pacs.drop_all()
        wait_for(lambda: not made.is_established, 5, "the end of the association")
        return made

    with bad_pacs(classes=[CTImageStorage, Comprehensive3DSRStorage]) as pacs:
        with monkeypatch.context() as patch:
            patch.setattr(AE, "associate", busy)
            outbox(ledger, results, pacs.peer()).work_off()
        assert states(ledger) == ["waiting"] * 3
        wait_for(lambda: not outbox(ledger, results, pacs.peer()).work_off() and len(pacs.stored) == 2, 10, "the rest")
    assert states(ledger) == ["done", "refused", "done"]


def test_peer_that_takes_no_class_at_all_refuses_each(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs", classes=THREE)
    with bad_pacs(classes=[]) as pacs:
        outbox(ledger, results, pacs.peer()).work_off()
    assert states(ledger) == ["refused"] * 3


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (0xA700, "waiting"),
        (0x0110, "waiting"),
        (0x0122, "refused"),
        (0xA900, "refused"),
        (0xC123, "refused"),
        (0xB000, "done"),
    ],
)
def test_passing_and_lasting_failures_are_told_apart(ledger: Ledger, results: Path, status: int, state: str) -> None:
    owe(ledger, results, "pacs")
    with bad_pacs(BadPacs(on_store=lambda _n, _uid: status)) as pacs:
        outbox(ledger, results, pacs.peer()).work_off()
    assert states(ledger)[0] == state
    assert f"0x{status:04X}" in reasons(ledger)[0]


def test_each_third_object_fails_and_all_arrive_once(ledger: Ledger, results: Path) -> None:
    uids = {uid for _ in range(4) for uid in owe(ledger, results, "pacs", classes=THREE)}
    with bad_pacs(BadPacs(on_store=lambda n, _uid: 0xA700 if n % 3 == 0 else 0)) as pacs:
        wait_for(lambda: _worked_off(ledger, results, pacs.peer()), 30, "everything to arrive")
    assert sorted(pacs.stored) == sorted(uids)


def test_failing_object_holds_back_its_study_for_a_while_only(ledger: Ledger, results: Path) -> None:
    bad, *rest = owe(ledger, results, "pacs", classes=THREE)
    other = owe(ledger, results, "pacs")
    ledger.timeouts = Timeouts(backoff=dict.fromkeys(Kind, Backoff(60.0, 1.0, 60.0)))
    with bad_pacs(BadPacs(on_store=lambda _n, uid: 0xA700 if uid == bad else 0)) as pacs:
        outbox(ledger, results, pacs.peer()).work_off()
        outbox(ledger, results, pacs.peer()).work_off()
        assert pacs.stored == other
        with ledger() as session:
            session.execute(update(Delivery).where(Delivery.state == "waiting").values(attempts=ORDERED_ATTEMPTS))
        outbox(ledger, results, pacs.peer()).work_off()
    assert pacs.stored == other + rest
    assert states(ledger) == ["waiting", "done", "done", "done"]


def test_object_over_which_the_peer_falls_silent_does_not_hold_up_others(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs", side=1024)
    small = owe(ledger, results, "pacs")
    with bad_pacs(BadPacs(cut_after=1 << 20)) as pacs:  # closes the connection amid the large one
        wait_for(lambda: not outbox(ledger, results, pacs.peer()).work_off() and pacs.stored == small, 10, "the other")
        assert states(ledger) == ["waiting", "done"]
        assert "no answer" in reasons(ledger)[0]
        pacs.cut_after = None
        wait_for(lambda: _worked_off(ledger, results, pacs.peer()), 10, "the large one")


def test_answer_after_the_timeout_makes_no_second_object(ledger: Ledger, results: Path) -> None:
    (uid,) = owe(ledger, results, "pacs")

    def slow(n: int, _uid: str) -> int:
        time.sleep(3.0 if n == 1 else 0)
        return 0x0000

    with bad_pacs(BadPacs(on_store=slow)) as pacs:
        wait_for(lambda: _worked_off(ledger, results, pacs.peer()), 30, "the object")
        wait_for(lambda: len(pacs.stored) == 2, 10, "the answer that came too late")
    assert set(pacs.stored) == {uid}


def test_peer_that_hangs_holds_up_nobody_else(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "hangs", "pacs", classes=THREE)
    go_on = threading.Event()

    def hang(_n: int, _uid: str) -> int:
        go_on.wait(10)
        return 0x0000

    with bad_pacs(BadPacs(on_store=hang)) as hanging, bad_pacs() as pacs:
        stuck = threading.Thread(target=outbox(ledger, results, hanging.peer(), "hangs").work_off)
        stuck.start()
        outbox(ledger, results, pacs.peer()).work_off()
        assert states(ledger) == ["done"] * 3
        assert stuck.is_alive()
        outbox(ledger, results, hanging.peer(), "hangs").work_off()  # a second thread does not queue up behind it
        assert stuck.is_alive()
        go_on.set()
        stuck.join()


def test_rejected_association_costs_no_attempt_and_says_what_to_change(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs", classes=THREE)
    with bad_pacs(only=["OTHER"]) as pacs:
        for _ in range(3):
            outbox(ledger, results, pacs.peer()).work_off()
            time.sleep(0.2)
    assert states(ledger) == ["waiting"] * 3
    why = "rejected the association until its settings change: Calling AE title not recognised"
    assert f"{why}; enter our AE title there (`listener.ae_title`)" in reasons(ledger)[0]
    with ledger() as session:
        assert {row.attempts for row in session.scalars(select(Delivery))} == {0}
        assert len(session.scalars(select(Event)).all()) == 1  # said once, not at every attempt
    with bad_pacs(pacs) as pacs:
        wait_for(lambda: _worked_off(ledger, results, pacs.peer()), 10, "the objects")


def test_dead_peer_is_tried_again_and_then_gets_everything(ledger: Ledger, results: Path) -> None:
    uids = [uid for _ in range(3) for uid in owe(ledger, results, "pacs", classes=THREE)]
    port = free_port()
    outbox(ledger, results, Peer(ae_title="BAD", host="127.0.0.1", port=port)).work_off()
    with bad_pacs(BadPacs(port=port)) as pacs:
        wait_for(lambda: _worked_off(ledger, results, pacs.peer()), 10, "the objects")
        assert pacs.stored == uids


def test_peer_that_left_the_settings_and_file_that_is_gone_are_refused(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs", "gone")
    outbox(ledger, results, None, "gone").work_off()
    assert states(ledger, "gone") == ["refused"]
    next(results.rglob("*.dcm")).unlink()
    with bad_pacs() as pacs:
        outbox(ledger, results, pacs.peer()).work_off()
    assert states(ledger) == ["refused"]
    assert "its file is gone" in reasons(ledger)[0]


def test_worker_that_is_stopped_leaves_the_rest_to_the_next(ledger: Ledger, results: Path) -> None:
    owe(ledger, results, "pacs", classes=THREE)
    stopping = threading.Event()

    def store(_n: int, _uid: str) -> int:
        stopping.set()
        return 0x0000

    with bad_pacs(BadPacs(on_store=store)) as pacs:
        box = outbox(ledger, results, pacs.peer())
        outbox_module.Outbox(ledger, results, "pacs", box.peer, "LUNGNODE", stopping).work_off()
        assert states(ledger) == ["done", "waiting", "waiting"]
        box.work_off()
    assert states(ledger) == ["done"] * 3


def test_long_outage_makes_no_read_of_all_that_is_owed_and_holds_up_no_writer(ledger: Ledger, results: Path) -> None:
    series = {
        "calling_ae": "CT",
        "instances": [],
        "complete": True,
        "closed_because": "",
        "verdict": "",
        "generation": 1,
    }
    ids, count = range(1, 301), 4
    with ledger() as session:
        named = [{"id": n, "series_instance_uid": f"1.2.{n}", "study_instance_uid": f"1.1.{n}"} for n in ids]
        session.execute(insert(Series), [one | series | {"content": "", "closed_at": 1.0} for one in named])
        done = {"route": "r", "destinations": {}, "state": "done", "summary": {"lesions": ["x" * 40] * 500}}
        session.execute(insert(AnalysisJob), [{"id": n, "series_id": n, **done} for n in ids])
        kind = {"kind": "sr", "sop_class_uid": "1", "series_instance_uid": "1", "path": "x"}
        objects = [{"analysis_id": n, "sop_instance_uid": f"1.3.{n}.{m}", **kind} for n in ids for m in range(count)]
        session.execute(insert(Object), objects)
        session.execute(insert(Delivery), [{"object_id": n + 1, "peer": "pacs"} for n in range(len(objects))])
    box = outbox(ledger, results, None)
    with ledger() as writing:
        writing.execute(update(Delivery).values(reason="another process writes"))
        box.due()
        tracemalloc.start()
        found = box.due()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert [one.row for one in found] == list(range(1, outbox_module.BATCH + 1))
    assert most < 2 << 20


def _worked_off(ledger: Ledger, results: Path, peer: Peer) -> bool:
    outbox(ledger, results, peer).work_off()
    return set(states(ledger)) == {"done"}


@pytest.mark.parametrize("path", ["../secret.dcm", "{absolute}", "x/../../secret.dcm", "", "\n"])
def test_object_whose_row_leads_elsewhere_is_not_sent(ledger: Ledger, results: Path, path: str) -> None:
    owe(ledger, results, "pacs")
    with ledger() as session:
        source = results / session.scalars(select(Object.path)).one()
        secret = results.parent / "secret.dcm"
        secret.write_bytes(source.read_bytes())
        session.execute(update(Object).values(path=path.format(absolute=secret)))
    peer = Peer.model_validate({"ae_title": "P", "host": "127.0.0.1", "port": free_port()})
    outbox(ledger, results, peer).work_off()
    assert states(ledger) == ["refused"]
    with ledger() as session:
        assert "its file is not looked for" in session.scalars(select(Delivery.reason)).one()
