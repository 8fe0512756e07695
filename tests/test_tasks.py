"""What is owed for a closed series, and what becomes of an analysis that fails, without broker or networks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock, series_closed
from pydicom import dcmread

from models.phantom.draw import phantom
from models.registry import BundleError
from models.runtime import CardMemoryError
from node import tasks
from node.cli.folder import closed_folder
from node.config import Settings
from node.images.phantom_series import write_series
from node.images.volume import VolumeError
from node.installation import Node
from node.intake import closing
from node.intake.assembly import ClosedSeries
from node.ledger.leases import MAX_ANALYSIS_ATTEMPTS, MAX_BACKOFF_S
from node.ledger.views import all_series, unreachable_peers
from node.methods.pneumonia import method, pipeline


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | str]]:
    made: list[tuple[str, int | str]] = []
    monkeypatch.setattr(tasks, "dispatch", lambda work, rows: made.extend((work, row) for row in rows))
    monkeypatch.setattr(closing, "_dispatch", lambda _, rows: made.extend(("analyse", row) for row in rows))
    return made


def make_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Callable[[], float] = time.time, **route: Any
) -> Node:
    peers = {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}}
    routes = [{"name": "chest", "to": {"pacs": ["infection-seg", "sr", "capture"]}, **route}]
    here = Node.open(Settings.model_validate({"data": tmp_path / "var", "peers": peers, "routes": routes}), clock)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatched: list[tuple[str, int | str]]
) -> None:
    here = make_node(tmp_path, monkeypatch)
    series_closed(here, receive(here))
    assert dispatched == [("analyse", 1)]
    (series,) = all_series(here.ledger)
    assert series.state == "waiting"
    assert series.verdict.startswith("route 'chest': axial chest CT, 40 slices")


@pytest.mark.parametrize("route", [{"from": ["pacs"], "when": {"StationName": "OTHER"}}, {"when": {"Modality": "MR"}}])
def test_series_that_no_route_takes_is_kept_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatched: list[tuple[str, int | str]], route: dict[str, Any]
) -> None:
    here = make_node(tmp_path, monkeypatch, **route)
    receive(here)
    (series,) = all_series(here.ledger)
    assert (series.state, series.verdict, dispatched) == ("kept", "not analysed: no route takes it", [])


def test_header_that_cannot_be_read_ends_in_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatched: list[tuple[str, int | str]]
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dispatched: list[tuple[str, int | str]],
    tell: bool,
    kinds: set[str],
) -> None:
    here = make_node(tmp_path, monkeypatch, tell_not_analysed=tell)
    receive(here, complete=False)
    for _, row in list(dispatched):
        tasks.analyse(row)
    (series,) = all_series(here.ledger)
    assert {made.kind for analysis in series.analyses for made in analysis.objects} == kinds
    assert series.state == ("delivering" if tell else "kept")


def test_analysis_that_keeps_failing_tells_the_study_and_names_no_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatched: list[tuple[str, int | str]]
) -> None:
    clock = Clock()
    here = make_node(tmp_path, monkeypatch, clock)

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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatched: list[tuple[str, int | str]]
) -> None:
    clock = Clock()
    here = make_node(tmp_path, monkeypatch, clock)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatched: list[tuple[str, int | str]]
) -> None:
    here = make_node(tmp_path, monkeypatch)
    receive(here, complete=False)
    tasks.analyse(1)
    assert dispatched[-1] == ("deliver", "pacs")
    tasks.deliver("pacs")
    (series,) = all_series(here.ledger)
    owed = series.deliveries
    assert {(one.state, one.attempts) for one in owed} == {("waiting", 0)}
    assert {one.reason for one in owed} == {"no connection to PACS at 127.0.0.1:104"}
    (told,) = unreachable_peers(here.ledger)
    assert "no connection to PACS" in told.reason
    assert told.waiting == 2
    assert series.state == "delivering"


@pytest.mark.parametrize(
    ("route", "tags", "urgent"),
    [({}, {}, False), ({"urgent": True}, {}, True), ({}, {"RequestedProcedurePriority": "STAT"}, True)],
)
def test_urgent_by_route_or_by_the_priority_of_the_request(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dispatched: list[tuple[str, int | str]],
    route: dict[str, Any],
    tags: dict[str, str],
    urgent: bool,
) -> None:
    here = make_node(tmp_path, monkeypatch, **route)
    receive(here, **tags)
    (series,) = all_series(here.ledger)
    assert series.analyses[0].urgent == urgent


def test_sweeps_in_several_processes_dispatch_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatched: list[tuple[str, int | str]]
) -> None:
    here = make_node(tmp_path, monkeypatch)
    receive(here)
    other = Node.open(here.settings)
    dispatched.clear()
    for _ in range(3):
        tasks.dispatch("analyse", here.ledger.analyses_due())
        tasks.dispatch("analyse", other.ledger.analyses_due())
    assert dispatched == [("analyse", 1)]


def test_card_without_memory_leaves_the_analysis_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatched: list[tuple[str, int | str]]
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
