"""What a listener takes up again after a restart, by what the ledger knows and what it lost."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from conftest import wait_for
from made_instances import SERIES, STUDY
from test_spool import store

from node.config import Settings
from node.intake import assembly as assembly_module
from node.intake import closing
from node.intake.assembly import RETRY_S, Assembly, AssociationId
from node.intake.listener import Listener
from node.intake.spool import Spool, Stored
from node.ledger.tables import Series
from node.tasks import LEDGER, Node


@pytest.fixture(autouse=True)
def no_bells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "dispatch", lambda _work, _rows: None)


def start(folder: Path) -> tuple[Node, Listener, Assembly]:
    settings = {"data": folder, "listener": {"port": 1, "accept": "any", "quiet_period_s": 0.5}}
    here = Node.open(Settings.model_validate(settings))
    listener = closing.intake(here)
    os.close(closing._LOCKS.pop())
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


def ails(path: Path, how: str) -> None:
    """Have a kept file fail for whoever reads it, root too; what it was lies beside the spool."""
    path.rename(path.parents[3] / path.name)
    if how == "EIO":
        path.symlink_to("/proc/self/mem")  # nothing is mapped where a file begins
    elif how == "ELOOP":
        path.symlink_to(path)
    elif how == "EISDIR":
        path.mkdir()


def heal(path: Path) -> None:
    path.unlink()
    (path.parents[3] / path.name).rename(path)


@pytest.mark.parametrize("how", ["EIO", "ELOOP", "EISDIR", "gone"])
def test_a_file_that_cannot_be_read_is_left_to_the_analysis_where_another_can(tmp_path: Path, how: str) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 5, age_s=3)
    here, listener, assembly = start(tmp_path)
    ails(listener._spool.series(STUDY, SERIES)[0].path, how)
    close_all(assembly)
    with here.ledger() as session:
        (row,) = session.query(Series)
        assert len(row.instances) == 5
        assert "cannot be read" not in row.verdict


def test_a_series_of_which_no_file_can_be_read_now_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 1, age_s=3)
    here, listener, assembly = start(tmp_path)
    path = listener._spool.series(STUDY, SERIES)[0].path
    ails(path, "EIO")
    time.sleep(0.6)
    assembly.tick()
    assert (closed(here), assembly.open_series) == ([], 1)
    heal(path)
    wait_for(lambda: assembly.tick() or not assembly.open_series, RETRY_S + 5, "the series to be offered again")
    with here.ledger() as session:
        assert "cannot be read" not in session.query(Series).one().verdict


def test_a_series_whose_files_are_gone_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 1, age_s=3)
    here, listener, assembly = start(tmp_path)
    ails(listener._spool.series(STUDY, SERIES)[0].path, "gone")
    close_all(assembly)
    with here.ledger() as session:
        assert "its header cannot be read" in session.query(Series).one().verdict


@pytest.mark.parametrize("again", ["resent", "restarted"])
def test_a_series_that_cannot_be_read_for_long_is_told_of_and_comes_back(
    tmp_path: Path, again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "UNREADABLE_S", 1.0)
    monkeypatch.setattr(assembly_module, "RETRY_S", 0.5)
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 3, age_s=3)
    Spool(tmp_path / "spool").end(STUDY, SERIES, 3)
    here, listener, assembly = start(tmp_path)
    kept = listener._spool.series(STUDY, SERIES)
    for one in kept:
        ails(one.path, "EIO")
    wait_for(lambda: assembly.tick() or not assembly.open_series, 10, "the series to be told of")
    assert [(count, complete) for count, complete, _ in closed(here)] == [(3, False)]
    with here.ledger() as session:
        row = session.query(Series).one()
        assert "none of its files can be read (OSError EIO (input/output error)" in row.verdict
        assert f"remove spool/{STUDY}/{SERIES}, then send the series again" in row.verdict
        assert row.closed_because.startswith("incomplete: what was kept of it cannot be read; ")
        assert not row.analyses
    for one in kept:
        heal(one.path)
    if again == "restarted":
        here, _, assembly = start(tmp_path)
    else:
        association = AssociationId(1, "CT1", "LUNGNODE")
        for one in kept:
            assembly.received(association, one.header, Stored(one.path, "same"))
        assembly.association_ended(association)
    close_all(assembly)
    assert [(count, complete) for count, complete, _ in closed(here)] == [(3, False), (3, True)]
    with here.ledger() as session:
        assert "cannot be read" not in session.query(Series).order_by(Series.id).all()[-1].verdict


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
