"""What is dropped by age, what is kept whatever its age, and when the disk is said to fill up."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from node.config import Settings
from node.files import retention
from node.installation import Node
from node.ledger.ledger import Ledger
from node.ledger.tables import AnalysisJob, Delivery, Object, Series

OLD = time.time() - 40 * 86400


@pytest.fixture
def here(tmp_path: Path) -> Node:
    return Node.open(Settings(data=tmp_path / "var"))


def series(here: Node, uid: str, *, analysis: str = "done", delivery: str = "done", closed: float = OLD) -> Path:
    """A series with one instance and one object; gives the folder of its instances."""
    folder = here.spool / "1.1" / uid
    folder.mkdir(parents=True)
    (folder / "1.dcm").write_bytes(b"x")
    (folder / "end").write_text("1")
    os.utime(folder / "1.dcm", (OLD, OLD))
    (here.results / uid / "1-1").mkdir(parents=True)
    (here.results / uid / "1-1" / "sr.dcm").write_bytes(b"x")
    with here.ledger() as session:
        row = here.ledger.add_series(
            session, uid, "1.1", [uid], True, calling_ae="CT", instances=[], closed_because="", verdict=""
        )
        assert row is not None
        row.closed_at = closed
        made = Object(kind="sr", sop_class_uid="1", sop_instance_uid=uid, series_instance_uid="1", path="x")
        made.deliveries = [Delivery(peer="pacs", state=delivery)]
        row.analyses.append(AnalysisJob(route="r", destinations={}, state=analysis, objects=[made]))
    return folder


@pytest.mark.parametrize("delivery", ["done", "confirmed", "refused", "superseded"])
def test_old_and_finished_series_is_dropped_and_remembered(here: Node, delivery: str) -> None:
    folder = series(here, "1.2", delivery=delivery)
    assert retention.drop_old(here.settings, here.ledger) == 1
    assert not folder.exists()
    assert not folder.parent.exists()
    assert not (here.results / "1.2").exists()
    with here.ledger() as session:
        row = session.get_one(Series, 1)
        assert row.dropped_at is not None
        assert row.events[-1].text == "files dropped after 30 days"
    assert retention.drop_old(here.settings, here.ledger) == 0


@pytest.mark.parametrize(
    "still",
    [
        {"delivery": "waiting"},
        {"delivery": "running"},
        {"delivery": "failed"},
        {"analysis": "waiting"},
        {"analysis": "failed"},
    ],
)
def test_what_is_owed_or_failed_is_kept_whatever_its_age(here: Node, still: dict[str, str]) -> None:
    folder = series(here, "1.2", **still)
    assert retention.drop_old(here.settings, here.ledger) == 0
    assert (folder / "1.dcm").exists()
    assert (here.results / "1.2" / "1-1" / "sr.dcm").exists()


def test_young_unknown_and_growing_series_are_kept(here: Node) -> None:
    young = series(here, "1.2", closed=time.time())
    growing = series(here, "1.3")
    (growing / "2.dcm").write_bytes(b"x")
    unknown = here.spool / "1.1" / "1.4"
    unknown.mkdir()
    (unknown / "1.dcm").write_bytes(b"x")
    os.utime(unknown / "1.dcm", (OLD, OLD))
    assert retention.drop_old(here.settings, here.ledger) == 0
    assert all(list(folder.iterdir()) for folder in (young, growing, unknown))


def test_a_series_that_comes_again_while_it_is_looked_at_is_kept(here: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = [series(here, "1.2") / "2.dcm", series(here, "1.3") / "1.dcm"]
    finished = retention._finished

    def meanwhile(ledger: Ledger, uid: str, before: float) -> bool:
        for path in fresh:
            path.touch()
        return finished(ledger, uid, before)

    monkeypatch.setattr(retention, "_finished", meanwhile)
    assert retention.drop_old(here.settings, here.ledger) == 0
    assert [len(list(path.parent.glob("*.dcm"))) for path in fresh] == [2, 1]
    assert (here.results / "1.2").exists()


def test_what_comes_while_its_series_is_being_dropped_stays(here: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = series(here, "1.2")
    for n in range(2, 5):
        (folder / f"{n}.dcm").write_bytes(b"x")
        os.utime(folder / f"{n}.dcm", (OLD, OLD))
    first, again, *_ = folder.glob("*.dcm")
    unlink = Path.unlink

    def meanwhile(path: Path, missing_ok: bool = False) -> None:
        if path == first:
            os.utime(again)
            (folder / "5.dcm").write_bytes(b"x")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    retention.drop_old(here.settings, here.ledger)
    assert set(folder.glob("*.dcm")) == {again, folder / "5.dcm"}
    assert (folder / "end").exists()


def test_null_days_keep_everything(here: Node) -> None:
    series(here, "1.2")
    settings = here.settings.model_copy(update={"retention": here.settings.retention.model_copy(update={"days": None})})
    assert retention.drop_old(settings, here.ledger) == 0


def test_disk_is_said_to_fill_up_before_the_listener_refuses(here: Node) -> None:
    free_mb = os.statvfs(here.settings.data).f_bavail * os.statvfs(here.settings.data).f_frsize >> 20
    wanted = here.settings.retention.model_copy(update={"warn_free_mb": 2 * free_mb})
    settings = here.settings.model_copy(update={"retention": wanted})
    warning = retention.pressure(settings)
    assert warning is not None
    assert "below 1024 MB C-STORE is refused" in warning
    wanted = wanted.model_copy(update={"warn_free_mb": 0})
    assert retention.pressure(here.settings.model_copy(update={"retention": wanted})) is None
    listener = here.settings.listener.model_copy(update={"disk_floor_mb": 1 << 40})
    warning = retention.pressure(here.settings.model_copy(update={"retention": wanted, "listener": listener}))
    assert warning is not None
    assert "C-STORE is refused. Free space" in warning
