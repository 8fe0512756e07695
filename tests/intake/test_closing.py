"""What a listener takes up again after a restart, by what the ledger knows and what it lost."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from conftest import accepts, wait_for
from made_instances import SERIES, STUDY, dataset, encoded
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from test_spool import store

from node.config import Settings
from node.files import retention
from node.files.series_folder import ATTEMPTS, attempts
from node.installation import LEDGER, Node
from node.intake import assembly as assembly_module
from node.intake import closing, open_series
from node.intake import spool as spool_module
from node.intake.assembly import RETRY_S, Assembly, AssociationId
from node.intake.header import InstanceHeader
from node.intake.listener import Listener
from node.intake.part import Stored
from node.intake.spool import Spool
from node.intake.stack import Tiling
from node.ledger import views
from node.ledger.tables import Series


def start(folder: Path) -> tuple[Node, Listener, Assembly]:
    settings = {"data": folder, "listener": {"port": 1, "accept": "any", "quiet_period_s": 0.5}}
    here = Node.open(Settings.model_validate(settings))
    try:
        listener = closing.intake(here, accepts, lambda _: None)
    finally:
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


class Death(BaseException):
    """The end of the process, as far as a test within it can have it."""


@pytest.mark.parametrize("step", ["closing", "taking up"])
def test_a_series_at_which_the_process_dies_is_set_aside_after_three_attempts(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 3, age_s=3)
    Spool(tmp_path / "spool").end(STUDY, SERIES, 3)

    def dies(*_: object) -> None:
        raise Death

    monkeypatch.setattr(*((closing, "first_header") if step == "closing" else (spool_module, "_read")), dies)
    for _ in range(3):
        with pytest.raises(Death):
            close_all(start(tmp_path)[2])
    for _ in range(2):
        here, _, assembly = start(tmp_path)
        time.sleep(0.6)
        assembly.tick()
        assert assembly.open_series == 0
    with here.ledger() as session:
        row = session.query(Series).one()
        assert (len(row.instances), row.complete) == (3, False)
        assert row.verdict.startswith("not analysed: set aside, as the listener failed or ended 3 times")
        assert views.view(row, time.time()).state == "failed"
        assert [event.stage for event in row.events] == ["received", "triage"]
    assert not retention._finished(here.ledger, SERIES, time.time() + 1)
    # The folder is moved away, as the verdict says, and the series is sent again.
    monkeypatch.undo()
    (tmp_path / "spool" / STUDY / SERIES).rename(tmp_path / "away")
    spooled(tmp_path, 3, age_s=3)
    Spool(tmp_path / "spool").end(STUDY, SERIES, 3)
    here, _, assembly = start(tmp_path)
    close_all(assembly)
    assert [complete for _, complete, _ in closed(here)] == [False, True]


def test_two_deaths_at_a_series_are_forgotten_once_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 3, age_s=3)
    folder = tmp_path / "spool" / STUDY / SERIES
    judge = closing.first_header

    def dies(*_: object) -> None:
        raise Death

    monkeypatch.setattr(closing, "first_header", dies)
    for deaths in (1, 2):
        with pytest.raises(Death):
            close_all(start(tmp_path)[2])
        assert attempts(folder) == deaths
    monkeypatch.setattr(closing, "first_header", judge)
    here, _, assembly = start(tmp_path)
    close_all(assembly)
    assert "set aside" not in closed(here)[0][2]
    assert not (folder / ATTEMPTS).exists()


def test_a_ledger_that_fails_counts_as_no_attempt_and_another_failure_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 3, age_s=3)
    _, listener, assembly = start(tmp_path)
    folder = tmp_path / "spool" / STUDY / SERIES
    monkeypatch.setattr(assembly_module, "RETRY_S", 0.0)
    record = closing._record
    for error, counted in ((OperationalError("", None, Exception()), 0), (OSError(), 0), (KeyError(), 3)):

        def fails(node: Node, judged: closing._Judged, dispatch: closing.Dispatch, error: Exception = error) -> None:
            if not judged.verdicts[0].reason.startswith("not analysed: set aside"):
                raise error
            record(node, judged, dispatch)

        monkeypatch.setattr(closing, "_record", fails)
        time.sleep(0.6)
        for _ in range(5):
            assembly.tick()
        assert attempts(folder) == counted
    assert assembly.open_series == 0
    assert listener._spool.series(STUDY, SERIES)


def test_odd_entries_in_the_spool_stop_neither_the_start_nor_the_other_series(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 3, age_s=3)
    spool, other = tmp_path / "spool", tmp_path / "spool" / "1.9" / "1.9.1"
    other.mkdir(parents=True)
    (spool / "incoming" / "folder").mkdir()
    (spool / "1.5").write_text("a file where a study should be")
    (spool / "1.6").mkdir()
    (spool / "1.6" / "1.6.1").write_text("a file where a series should be")
    (spool / "1.7").symlink_to("1.7")
    (spool / "no uid").mkdir()
    os.mkfifo(other / "1.dcm")
    (other / "2.dcm").touch()
    (other / "3.dcm").mkdir()
    (other / "4.dcm").symlink_to("/dev/zero")
    (other / "5.dcm").write_bytes(bytes(128) + b"DICM" + bytes(7))
    os.mkfifo(other / "end")
    for _ in range(4):
        here, _, assembly = start(tmp_path)
        if assembly.open_series:
            close_all(assembly)
    with here.ledger() as session:
        rows = {row.series_instance_uid: row for row in session.query(Series)}
        assert rows.keys() == {SERIES, "1.9.1"}
        assert "set aside" in rows["1.9.1"].verdict
        assert "set aside" not in rows[SERIES].verdict


def test_a_damaged_row_of_the_ledger_does_not_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 3, age_s=3)
    here, _, assembly = start(tmp_path)
    close_all(assembly)
    with here.ledger() as session:
        session.execute(text("UPDATE series SET instances = '[\"cut'"))
    start(tmp_path)


def test_a_series_that_cannot_be_judged_holds_up_no_other_and_comes_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spool").mkdir()
    spooled(tmp_path, 3, age_s=3)
    spool, other = Spool(tmp_path / "spool"), f"{SERIES}.7"
    store(spool, raw=encoded(dataset(0, series=other)), series_uid=other, sop_uid=f"{other}.1")
    here, _, assembly = start(tmp_path)
    tile = open_series.tile

    def fails(headers: list[InstanceHeader]) -> Tiling:
        if headers[0].series_instance_uid == SERIES:
            raise RecursionError
        return tile(headers)

    monkeypatch.setattr(open_series, "tile", fails)
    close_all(assembly)
    with here.ledger() as session:
        rows = {row.series_instance_uid: row.closed_because for row in session.query(Series)}
    assert rows.keys() == {SERIES, other}
    assert "its slices cannot be compared (RecursionError)" in rows[SERIES]
