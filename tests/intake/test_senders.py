"""A series belongs to its sender: what another peer sends of it joins it only where both agree on all that is there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import accepts, free_port, wait_for
from made_instances import SERIES, STUDY, dataset, dataset_bytes, encoded
from raw_peer import RELEASE, RawPeer, store
from structlog.testing import capture_logs
from test_spool import store as keep

from node.config import Settings
from node.files.retention import drop_old
from node.files.series_folder import SENDER
from node.installation import Node
from node.intake import closing
from node.intake.listener import Listener
from node.intake.spool import Spool
from node.ledger import views
from node.ledger.tables import Series

#: Where each peer calls from.
HOMES = {"CT1": "127.0.0.1", "PACS": "127.0.0.2", "A/B ..": "127.0.0.3"}


class Hospital:
    """A node with its ledger, a scanner and a PACS."""

    def __init__(self, folder: Path) -> None:
        peers = {
            f"peer{n}": {"ae_title": ae, "host": host, "port": 104, "may": ["send"]}
            for n, (ae, host) in enumerate(HOMES.items())
        }
        me = {"host": "127.0.0.1", "port": free_port(), "quiet_period_s": 0.4, "addresses": "enforce"}
        self.settings = Settings.model_validate({"data": folder, "listener": me, "peers": peers})
        self.here = Node.open(self.settings)
        self.listener = self._listen()

    def _listen(self) -> Listener:
        listener = closing.intake(self.here, accepts, lambda _: None)
        os.close(closing._LOCKS.pop())
        listener.start()
        return listener

    def restart(self) -> None:
        self.listener.stop()
        self.listener = self._listen()

    def associate(self, calling: str) -> RawPeer:
        peer = RawPeer(self.listener.port, source=HOMES[calling])
        assert peer.associate(calling=calling) == 2
        return peer

    def send(self, calling: str, *slices: tuple[int, bytes], release: bool = True) -> list[int | None]:
        """Over one association; `release` false breaks it off."""
        with self.associate(calling) as peer:
            answers = [send(peer, *one) for one in slices]
            if release:
                peer.send(RELEASE)
                peer.answer()
        return answers

    def settle(self) -> None:
        """Until nothing is open, and nothing is to be compared any more."""
        assembly = self.listener._assembly

        def settled() -> bool:
            others = assembly._others.values()
            return not self.listener.associations and not assembly.open_series and all(one.examined for one in others)

        wait_for(settled, 10, "all to be closed and compared")

    def generations(self) -> list[tuple[int, bool, str]]:
        self.settle()
        with self.here.ledger() as session:
            rows = session.query(Series).order_by(Series.id)
            return [(len(row.instances), row.complete, row.calling_ae) for row in rows]

    def conflicts(self) -> list[str]:
        self.settle()
        found = views.find(self.here.ledger, SERIES)
        assert found is not None
        return [event.text for event in found.events if event.stage == "conflict"]

    def kept(self, folder: str = "") -> dict[str, bytes]:
        series = self.here.spool / STUDY / SERIES / folder
        return {path.stem: dataset_bytes(path.read_bytes()) for path in series.glob("*.dcm")}


def send(peer: RawPeer, n: int, raw: bytes) -> int | None:
    peer.send(store(f"{SERIES}.{n + 1}", raw))
    return peer.status()


def slices(*numbers: int) -> list[tuple[int, bytes]]:
    return [(n, encoded(dataset(n))) for n in numbers]


def altered(*numbers: int) -> list[tuple[int, bytes]]:
    return [(n, raw[:-2] + b"\xff\x0f") for n, raw in slices(*numbers)]


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    made = Hospital(tmp_path)
    yield made
    made.listener.stop()


FIVE = slices(*range(5))


def test_scanner_and_pacs_that_send_the_same_make_one_generation_and_no_conflict(hospital: Hospital) -> None:
    assert hospital.send("CT1", *FIVE) == hospital.send("PACS", *FIVE) == [0] * 5
    assert hospital.generations() == [(5, True, "CT1")]
    assert hospital.send("PACS", *FIVE[:2]) == [0] * 2  # a part of it
    assert (hospital.generations(), hospital.conflicts()) == ([(5, True, "CT1")], [])


def test_scanner_and_pacs_may_send_at_the_same_time(hospital: Hospital) -> None:
    """The PACS even gets ahead of the scanner: what it sent first is the same, and leaves nothing behind."""
    with hospital.associate("CT1") as scanner, hospital.associate("PACS") as pacs:
        for ct, other in ((0, 1), (1, 2), (2, 4), (4, 0), (3, 3)):
            assert send(scanner, *slices(ct)[0]) == send(pacs, *slices(other)[0]) == 0
        for peer in (pacs, scanner):
            peer.send(RELEASE)
            assert peer.answer()[0] == 6
    assert (hospital.generations(), hospital.conflicts()) == ([(5, True, "CT1")], [])
    assert hospital.kept() == {f"{SERIES}.{n + 1}": raw for n, raw in FIVE}
    assert not list((hospital.here.spool / STUDY / SERIES).glob("from-*"))


@pytest.mark.parametrize("order", ["late last", "late first", "an association each"])
def test_late_slices_by_the_pacs_join_where_it_sent_the_whole_series(hospital: Hospital, order: str) -> None:
    hospital.send("CT1", *FIVE)
    hospital.settle()
    if order == "an association each":
        for one in slices(*range(6)):
            hospital.send("PACS", one)
    else:
        hospital.send("PACS", *(slices(*range(6)) if order == "late last" else slices(5, *range(5))))
    wait_for(lambda: len(hospital.generations()) == 2, 10, "the second generation")
    assert hospital.generations() == [(5, True, "CT1"), (6, True, "CT1")]
    assert hospital.conflicts() == []
    assert hospital.kept() == {f"{SERIES}.{n + 1}": raw for n, raw in slices(*range(6))}


def test_the_pacs_makes_whole_what_the_scanner_broke_off(hospital: Hospital) -> None:
    hospital.send("CT1", *FIVE[:3], release=False)
    assert hospital.generations() == [(3, False, "CT1")]
    hospital.send("PACS", *FIVE)
    wait_for(lambda: len(hospital.generations()) == 2, 10, "the second generation")
    assert (hospital.generations()[1], hospital.conflicts()) == ((5, True, "CT1"), [])


def test_the_same_set_by_the_pacs_proves_the_end_of_what_the_scanner_broke_off(hospital: Hospital) -> None:
    hospital.send("CT1", *FIVE, release=False)
    assert hospital.generations() == [(5, False, "CT1")]
    hospital.send("PACS", *FIVE)
    wait_for(lambda: len(hospital.generations()) == 2, 10, "the second generation")
    assert hospital.generations()[1] == (5, True, "CT1")


CONFLICTS: dict[str, tuple[Callable[[], list[tuple[int, bytes]]], list[int], str]] = {
    "an extra slice alone": (lambda: slices(5), [0], "and 1 instances that CT1 did not send"),
    "an extra slice and a part": (lambda: slices(0, 1, 5), [0] * 3, "and 1 instances that CT1 did not send"),
    "an altered slice": (lambda: altered(2), [0xB000], "1 of its 5 instances with other content"),
    "all, one altered, and one more": (
        lambda: [*slices(0, 1), *altered(2), *slices(3, 4, 5)],
        [0, 0, 0xB000, 0, 0, 0],
        "1 of its 5 instances with other content",
    ),
}


@pytest.mark.parametrize(("sent", "answers", "text"), CONFLICTS.values(), ids=CONFLICTS.keys())
def test_what_does_not_agree_is_a_conflict_and_no_new_generation(
    hospital: Hospital, sent: Callable[[], list[tuple[int, bytes]]], answers: list[int], text: str
) -> None:
    hospital.send("CT1", *FIVE)
    hospital.settle()
    assert hospital.send("PACS", *sent()) == answers
    with capture_logs() as lines:
        (conflict,) = hospital.conflicts()
    assert conflict.startswith("the series belongs to CT1; PACS (calling from 127.0.0.2) sent ")
    assert text in conflict
    (line,) = (one for one in lines if one["event"] == "conflict between senders of a series")
    assert (line["belongs_to"], line["calling_ae"], line["address"]) == ("CT1", "PACS", "127.0.0.2")
    assert hospital.generations() == [(5, True, "CT1")]
    assert hospital.kept() == {f"{SERIES}.{n + 1}": raw for n, raw in FIVE}
    # What was acknowledged with success is kept, wherever.
    acknowledged = {f"{SERIES}.{n + 1}": raw for (n, raw), answer in zip(sent(), answers, strict=True) if answer == 0}
    assert acknowledged.items() <= {**hospital.kept(), **hospital.kept("from-PACS")}.items()
    series = views.find(hospital.here.ledger, SERIES)
    assert series is not None
    assert any("another peer sent other content" in one for one in series.to_do)
    # Neither the same again nor a restart says it twice.
    hospital.send("PACS", *sent())
    hospital.settle()
    hospital.restart()
    assert (len(hospital.conflicts()), hospital.generations()) == (1, [(5, True, "CT1")])


def test_a_peer_that_gets_ahead_of_the_scanner_replaces_nothing(hospital: Hospital) -> None:
    with hospital.associate("CT1") as scanner:
        assert send(scanner, *FIVE[0]) == 0
        assert hospital.send("PACS", FIVE[0], *altered(1, 2, 3, 4)) == [0] * 5
        assert [send(scanner, *one) for one in FIVE[1:]] == [0] * 4
        scanner.send(RELEASE)
        scanner.answer()
    assert "sent 4 of its " in hospital.conflicts()[0]
    assert hospital.generations() == [(5, True, "CT1")]
    assert hospital.kept() == {f"{SERIES}.{n + 1}": raw for n, raw in FIVE}
    assert hospital.kept("from-PACS") == {f"{SERIES}.{n + 1}": raw for n, raw in altered(1, 2, 3, 4)}


def test_the_scanner_may_go_on_with_its_own_series(hospital: Hospital) -> None:
    hospital.send("CT1", *FIVE)
    hospital.settle()
    hospital.restart()
    hospital.send("CT1", *slices(5))
    assert hospital.generations() == [(5, True, "CT1"), (6, True, "CT1")]


def test_what_another_peer_was_refused_makes_no_series_incomplete(hospital: Hospital) -> None:
    spool = hospital.listener._spool
    with hospital.associate("CT1") as scanner, hospital.associate("PACS") as pacs:
        assert [send(scanner, *one) for one in FIVE] == [0] * 5
        spool._floor = 1 << 60  # the disk counts as full
        assert send(pacs, *slices(5)[0]) == 0xA700
        spool._floor = 0
        scanner.send(RELEASE)
        assert scanner.answer()[0] == 6
    assert (hospital.generations(), hospital.conflicts()) == ([(5, True, "CT1")], [])


def test_a_conflict_that_the_ledger_cannot_take_is_offered_again(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.intake.assembly.RETRY_S", 0.2)
    hospital.send("CT1", *FIVE)
    hospital.settle()
    real, failures = closing.conflict_found, [0, 0]

    def fails(*arguments: Any) -> None:
        if failures:
            failures.pop()
            raise OSError("the ledger is away")
        real(*arguments)

    monkeypatch.setattr(closing, "conflict_found", fails)
    hospital.send("PACS", *slices(5))
    assert len(hospital.conflicts()) == 1


def test_what_the_node_did_not_come_to_say_is_said_after_a_restart(hospital: Hospital) -> None:
    hospital.send("CT1", *FIVE)
    hospital.settle()
    hospital.send("A/B ..", *slices(5))
    hospital.restart()
    (conflict,) = hospital.conflicts()
    assert "; A/B .. (calling from " in conflict
    assert not [path for path in hospital.here.spool.parent.rglob("*.dcm") if SERIES not in path.parts]


def by(ae_title: str, spool: Spool, n: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    begin = Spool.begin
    with monkeypatch.context() as patched:
        patched.setattr(Spool, "begin", lambda self, **uids: begin(self, **{**uids, "calling_ae": ae_title}))
        return keep(spool, n)


def test_a_series_of_an_earlier_version_belongs_to_who_is_named_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keep(Spool(tmp_path / "spool")).path.parent
    assert (folder / SENDER).read_text() == "CT1"
    (folder / SENDER).unlink()
    spool = Spool(tmp_path / "spool")
    stored = by("PACS", spool, 1, monkeypatch)
    assert (stored.belongs_to, stored.aside) == ("CT1", True)
    assert spool.belongs_to(STUDY, SERIES) == "CT1"
    assert keep(spool, 2).path.parent == folder
    assert [(one.instances, one.others) for one in spool.all_series()] == [(2, ("PACS",))]


def test_what_nobody_else_has_sent_of_belongs_to_who_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "spool")
    path = keep(spool).path
    by("PACS", spool, 1, monkeypatch)
    path.unlink()  # the disk lost it
    assert spool.adopt(STUDY, SERIES, "PACS", ()).agreed
    assert Spool(tmp_path / "spool").belongs_to(STUDY, SERIES) == "PACS"
    assert by("PACS", spool, 2, monkeypatch).path.parent == path.parent


def test_what_lies_beside_a_series_grows_old_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Node.open(Settings.model_validate({"data": tmp_path}))
    spool = Spool(here.spool)
    paths = [keep(spool).path, by("PACS", spool, 1, monkeypatch).path]
    with here.ledger() as session:
        rest: dict[str, Any] = {"calling_ae": "CT1", "instances": [], "closed_because": "", "verdict": ""}
        here.ledger.add_series(session, SERIES, STUDY, ["1.2"], True, **rest).closed_at = 1.0  # type: ignore[union-attr]
    os.utime(paths[0], (1, 1))
    assert drop_old(here.settings, here.ledger) == 0  # the other is young
    os.utime(paths[1], (1, 1))
    assert drop_old(here.settings, here.ledger) == 1
    assert not (here.spool / STUDY).exists()
    assert by("PACS", spool, 1, monkeypatch).belongs_to == ""
    assert time.time() - (here.spool / STUDY / SERIES).stat().st_mtime < 100
