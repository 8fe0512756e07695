"""What a listener takes up again after a restart, by what the ledger knows and what it lost."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from conftest import wait_for
from made_instances import SERIES, STUDY
from test_spool import store

from node import reception
from node.config import Settings
from node.intake.assembly import RETRY_S, Assembly, AssociationId
from node.intake.listener import Listener
from node.intake.spool import Spool, Stored
from node.ledger import Series
from node.tasks import LEDGER, Node


@pytest.fixture(autouse=True)
def no_bells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception, "ring", lambda _work, _rows: None)


def start(folder: Path) -> tuple[Node, Listener, Assembly]:
    settings = {"data": folder, "listener": {"port": 1, "accept": "any", "quiet_period_s": 0.5}}
    here = Node.open(Settings.model_validate(settings))
    listener = reception.intake(here)
    os.close(reception._LOCKS.pop())
    return here, listener, listener._assembly


def spooled(folder: Path, count: int, age_s: float) -> None:
    spool = Spool(folder / "spool")
    for n in range(count):
        store(spool, n)
    then = time.time() - age_s
    os.utime(folder / "spool" / STUDY / SERIES, (then, then))


def close_all(assembly: Assembly) -> None:
    wait_for(lambda: assembly.open_series > 0, 5, "what was lost to be opened again")
    time.sleep(0.6)
    assembly.tick()
    assert assembly.open_series == 0


def closed(here: Node) -> list[tuple[int, bool, str]]:
    with here.ledger() as session:
        rows = session.query(Series).order_by(Series.id)
        return [(len(row.instances), row.complete, row.closed_because) for row in rows]


def test_what_was_open_when_the_node_went_down_stays_in_doubt(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 5, age_s=3)
    here, _, assembly = start(tmp_path)
    close_all(assembly)
    ((count, complete, why),) = closed(here)
    assert (count, complete) == (5, False)
    assert "the node was restarted while the series was open" in why


def test_what_had_ended_when_the_node_went_down_is_complete_unless_more_came(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    for count, complete in ((5, True), (6, False)):
        spooled(tmp_path, count, age_s=3)
        Spool(tmp_path / "spool").end(STUDY, SERIES, 5)
        here, _, assembly = start(tmp_path)
        close_all(assembly)
        assert closed(here)[-1][:2] == (count, complete)


def test_an_end_that_came_after_the_series_was_closed_as_incomplete_is_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 5, age_s=3)
    _, _, assembly = start(tmp_path)
    close_all(assembly)
    Spool(tmp_path / "spool").end(STUDY, SERIES, 5)
    for _ in range(2):
        here, _, assembly = start(tmp_path)
        if assembly.open_series:
            close_all(assembly)
    assert [(count, complete) for count, complete, _ in closed(here)] == [(5, False), (5, True)]
    assert start(tmp_path)[2].open_series == 0


def test_an_end_is_withdrawn_on_disk_when_the_series_goes_on(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 5, age_s=3)
    _, listener, assembly = start(tmp_path)
    association = AssociationId(1, "CT1", "LUNGNODE")
    (one, *_) = listener._spool.series(STUDY, SERIES)
    for again, ending in ((False, "released"), (True, "aborted")):
        assembly.received(association, one.header, Stored(one.path, "same"))
        assert not again or not listener._spool.ended(STUDY, SERIES, 5)
        assembly.association_ended(association, ending)  # type: ignore[arg-type]
        assert listener._spool.ended(STUDY, SERIES, 5) is not again


def test_a_series_that_the_ledger_knows_is_left_alone_and_a_late_slice_opens_it(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 5, age_s=3)
    _, _, assembly = start(tmp_path)
    close_all(assembly)
    _, _, assembly = start(tmp_path)
    assert assembly.open_series == 0
    spooled(tmp_path, 6, age_s=3)
    here, _, assembly = start(tmp_path)
    close_all(assembly)
    assert [count for count, _, _ in closed(here)] == [5, 6]


@pytest.mark.parametrize(("gone", "count"), [(False, 0), (True, 1)])
def test_a_file_that_cannot_be_read_now_is_tried_again_and_one_that_is_gone_is_told_of(
    tmp_path: Path, gone: bool, count: int
) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 5, age_s=3)
    here, listener, assembly = start(tmp_path)
    path = listener._spool.series(STUDY, SERIES)[0].path
    away = path.rename(tmp_path / "away")
    if not gone:
        path.symlink_to(path)  # ELOOP, for whoever runs this
    time.sleep(0.6)
    assembly.tick()
    assert (len(closed(here)), assembly.open_series) == (count, 1 - count)
    if not gone:
        path.unlink()
        away.rename(path)
        wait_for(lambda: assembly.tick() or not assembly.open_series, RETRY_S + 5, "the series to be offered again")
    with here.ledger() as session:
        (row,) = session.query(Series)
        assert ("its header cannot be read" in row.verdict) is gone


def test_a_lost_ledger_makes_old_series_be_judged_by_their_geometry(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 5, age_s=1000)
    _, listener, assembly = start(tmp_path)
    close_all(assembly)
    listener._spool.still_alive()
    for left in tmp_path.glob(f"{LEDGER}*"):
        left.unlink()
    here, _, assembly = start(tmp_path)
    close_all(assembly)
    tiles = "slices tile space from z=0.0 to z=4.0 every 1.0 mm"
    assert closed(here) == [(5, True, f"{tiles}, and no instance came for 0.5 s")]
