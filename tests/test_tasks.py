"""What is owed for a closed series, and what becomes of an analysis that fails, without broker or networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import series_closed
from pydicom import dcmread

from models.phantom.draw import phantom
from models.registry import BundleError
from models.runtime import CardMemoryError
from node import tasks
from node.cli.folder import closed_folder
from node.cli.render import all_series, deliveries, silent_peers, state
from node.config import Settings
from node.images.phantom_series import write_series
from node.images.volume import VolumeError
from node.installation import Node
from node.intake import closing
from node.intake.assembly import ClosedSeries
from node.ledger import store as ledger_module
from node.ledger.store import MAX_ANALYSIS_ATTEMPTS, MAX_BACKOFF_S
from node.methods.pneumonia import method, pipeline


class Clock:
    """Stands in for the wall clock of the ledger."""

    now = 1_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | str]]:
    bells: list[tuple[str, int | str]] = []
    monkeypatch.setattr(tasks, "ring", lambda work, rows: bells.extend((work, row) for row in rows))
    monkeypatch.setattr(closing, "_dispatch", lambda _, rows: bells.extend(("analyse", row) for row in rows))
    return bells


def make_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **route: Any) -> Node:
    peers = {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}}
    routes = [{"name": "chest", "to": {"pacs": ["infection-seg", "sr", "capture"]}, **route}]
    here = Node.open(Settings.model_validate({"data": tmp_path / "var", "peers": peers, "routes": routes}))
    monkeypatch.setattr(tasks, "node", lambda: here)
    return here


def receive(here: Node, *, complete: bool = True, **tags: str) -> ClosedSeries:
    made = phantom(3, shape=(40, 48, 48), spacing=(5.0, 7.0, 7.0))
    first, *_ = write_series(made, here.spool / "1.2" / "1.3", 3)
    if tags:
        header = dcmread(first)
        for keyword, value in tags.items():
            setattr(header, keyword, value)
        header.save_as(first)
    (closed,) = closed_folder(here.spool)
    closed = dataclasses.replace(closed, calling_ae="PACS", complete=complete)
    series_closed(here, closed)
    return closed


def test_routed_chest_ct_is_owed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: list[tuple[str, int | str]]
) -> None:
    here = make_node(tmp_path, monkeypatch)
    series_closed(here, receive(here))
    assert rung == [("analyse", 1)]
    (series,) = all_series(here.ledger)
    assert state(series) == "waiting"
    assert series.verdict.startswith("route 'chest': axial chest CT, 40 slices")


@pytest.mark.parametrize("route", [{"from": ["pacs"], "when": {"StationName": "OTHER"}}, {"when": {"Modality": "MR"}}])
def test_series_that_no_route_takes_is_kept_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: list[tuple[str, int | str]], route: dict[str, Any]
) -> None:
    here = make_node(tmp_path, monkeypatch, **route)
    receive(here)
    (series,) = all_series(here.ledger)
    assert (state(series), series.verdict, rung) == ("kept", "not analysed: no route takes it", [])


def test_header_that_cannot_be_read_ends_in_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: list[tuple[str, int | str]]
) -> None:
    here = make_node(tmp_path, monkeypatch)
    closed = receive(here)
    broken = dataclasses.replace(closed, instances=closed.instances[:30], paths=closed.paths[:30])
    broken.paths[0].write_bytes(b"Doe^Jane")
    series_closed(here, broken)
    newest = all_series(here.ledger)[0]
    assert "its header cannot be read" in newest.verdict
    assert "Doe" not in newest.verdict


@pytest.mark.parametrize(("tell", "kinds"), [(True, {"sr", "capture"}), (False, set())])
def test_incomplete_series_is_told_where_the_route_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: list[tuple[str, int | str]], tell: bool, kinds: set[str]
) -> None:
    here = make_node(tmp_path, monkeypatch, tell_not_analysed=tell)
    receive(here, complete=False)
    for _, row in list(rung):
        tasks.analyse(row)
    (series,) = all_series(here.ledger)
    assert {made.kind for analysis in series.analyses for made in analysis.objects} == kinds
    assert state(series) == ("delivering" if tell else "kept")


def test_analysis_that_keeps_failing_tells_the_study_and_names_no_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: list[tuple[str, int | str]]
) -> None:
    here, clock = make_node(tmp_path, monkeypatch), Clock()
    monkeypatch.setattr(ledger_module, "time", clock)

    def fail(*_: Any) -> None:
        raise errors.pop(0)

    errors: list[Exception] = [BundleError("weights are missing")] * (MAX_ANALYSIS_ATTEMPTS - 1)
    errors.append(ValueError("Doe^Jane"))
    monkeypatch.setattr(method, "segmenter", fail)
    receive(here)
    for _ in range(MAX_ANALYSIS_ATTEMPTS + 1):
        tasks.analyse(1)
        clock.now += 2 * MAX_BACKOFF_S
    (series,) = all_series(here.ledger)
    (analysis,) = series.analyses
    assert analysis.state == "failed"
    assert {made.kind for made in analysis.objects} == {"sr", "capture"}
    told = dcmread(here.results / analysis.objects[0].path)
    assert "the analysis failed" in told.to_json()
    words = " ".join(event.text for event in series.events)
    assert "BundleError: weights are missing" in words
    assert "Doe" not in words + analysis.reason


def test_file_that_cannot_be_read_is_named_and_the_study_is_told_by_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: list[tuple[str, int | str]]
) -> None:
    here, clock = make_node(tmp_path, monkeypatch), Clock()
    monkeypatch.setattr(ledger_module, "time", clock)
    path = receive(here).paths[0]
    away = path.rename(tmp_path / "away")
    path.symlink_to("/proc/self/mem")  # EIO, as of a bad sector
    for _ in range(MAX_ANALYSIS_ATTEMPTS + 1):
        tasks.analyse(1)
        clock.now += 2 * MAX_BACKOFF_S
    (series,) = all_series(here.ledger)
    (analysis,) = series.analyses
    assert f"{path.name} cannot be read (input/output error)" in analysis.reason
    assert (analysis.state, {made.kind for made in analysis.objects}) == ("failed", {"sr", "capture"})
    path.unlink()
    away.rename(path)
    assert here.ledger.retry(series.id) == 1
    monkeypatch.setattr(pipeline, "analyse", refuse)
    tasks.analyse(1)
    (series,) = all_series(here.ledger)
    assert series.analyses[0].reason == "not analysed: refused"


def refuse(*_: Any, **__: Any) -> None:
    raise VolumeError("refused")


@pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_sent_stays_owed_and_waits_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: list[tuple[str, int | str]]
) -> None:
    here = make_node(tmp_path, monkeypatch)
    receive(here, complete=False)
    tasks.analyse(1)
    assert rung[-1] == ("deliver", "pacs")
    tasks.deliver("pacs")
    (series,) = all_series(here.ledger)
    owed = deliveries(series)
    assert {(one.state, one.attempts) for one in owed} == {("waiting", 0)}
    assert {one.reason for one in owed} == {"no connection to PACS at 127.0.0.1:104"}
    (told,) = silent_peers(here.ledger)
    assert "no connection to PACS" in told
    assert "2 objects wait" in told
    assert state(series) == "delivering"


@pytest.mark.parametrize(
    ("route", "tags", "urgent"),
    [({}, {}, False), ({"urgent": True}, {}, True), ({}, {"RequestedProcedurePriority": "STAT"}, True)],
)
def test_urgent_by_route_or_by_the_priority_of_the_request(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rung: list[tuple[str, int | str]],
    route: dict[str, Any],
    tags: dict[str, str],
    urgent: bool,
) -> None:
    here = make_node(tmp_path, monkeypatch, **route)
    receive(here, **tags)
    (series,) = all_series(here.ledger)
    assert series.analyses[0].urgent == urgent


def test_sweeps_in_several_processes_ring_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: list[tuple[str, int | str]]
) -> None:
    here = make_node(tmp_path, monkeypatch)
    receive(here)
    other = Node.open(here.settings)
    rung.clear()
    for _ in range(3):
        tasks.ring("analyse", here.ledger.analyses_owed())
        tasks.ring("analyse", other.ledger.analyses_owed())
    assert rung == [("analyse", 1)]


def test_card_without_memory_leaves_the_analysis_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: list[tuple[str, int | str]]
) -> None:
    here, devices = make_node(tmp_path, monkeypatch), list[str | None]()

    def networks(device: str | None, *_: Any) -> Any:
        def segment(*_: Any) -> Any:
            devices.append(device)
            raise VolumeError("read on the CPU") if device == "cpu" else CardMemoryError("cuda has too little memory")

        return segment

    monkeypatch.setattr(method, "segmenter", networks)
    receive(here)
    tasks.analyse(1)
    (series,) = all_series(here.ledger)
    assert devices == [None, "cpu"]
    assert "goes on on the CPU: cuda has too little memory" in [event.text for event in series.events]
    assert series.analyses[0].reason == "not analysed: read on the CPU"
