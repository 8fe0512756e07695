"""The command line: what an admin sees when all is well, and when it is not."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, free_port, running_node, wait_for
from rich.console import Console
from typer.testing import CliRunner

from node import __version__
from node.cli.main import app
from node.cli.render import table, timeline
from node.config import load
from node.installation import Node
from node.ledger import views
from node.ledger.events import EventKind
from node.ledger.ledger import Ledger
from node.ledger.record import record_event
from node.ledger.tables import AnalysisJob, Delivery, Object, Series
from node.ledger.views import all_series, as_json, view

RUNNER = CliRunner()


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    file = tmp_path / "node.yaml"
    file.write_text(
        f"data: {tmp_path / 'var'}\npeers:\n  pacs: {{ae_title: PACS, host: 127.0.0.1, port: {free_port()}}}\n"
    )
    return file


def lines(*arguments: str, exit_code: int = 0) -> str:
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "160"})
    assert result.exit_code == exit_code, result.output
    return result.output


def test_config_check_accepts_the_default_and_names_a_mistake(tmp_path: Path) -> None:
    assert "is good: LUNGNODE on port 11112" in lines("config", "check", str(REPOSITORY / "config" / "node.yaml"))
    (tmp_path / "bad.yaml").write_text("listener:\n  prt: 4\n")
    told = lines("config", "check", str(tmp_path / "bad.yaml"), exit_code=1)
    assert "bad.yaml:2: listener.prt: unknown key. Did you mean 'port'?" in told


def test_config_schema_is_json() -> None:
    assert json.loads(lines("config", "schema"))["properties"]["routes"]["description"]


def test_empty_ledger_is_said(settings_file: Path) -> None:
    told = lines("status", "-c", str(settings_file), exit_code=1)
    assert "no ledger at" in told
    assert not (settings_file.parent / "var").exists()
    Node.open(load(settings_file))
    assert "nothing received yet" in lines("status", "-c", str(settings_file))
    assert json.loads(lines("status", "--json", "-c", str(settings_file))) == []
    assert "nothing failed" in lines("retry", "--all", "-c", str(settings_file))
    assert "no series 5" in lines("status", "5", "-c", str(settings_file), exit_code=1)


@pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning")
def test_peer_that_is_not_there_or_not_known_is_said(settings_file: Path) -> None:
    assert "no connection to PACS" in lines("echo", "pacs", "-c", str(settings_file), exit_code=1)
    told = lines("echo", "pax", "-c", str(settings_file), exit_code=1)
    assert "no peer 'pax' in the settings (there: pacs)" in told


def test_folder_without_ct_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no DICOM")
    assert "no DICOM series in" in lines("analyse", str(tmp_path), "--out", str(tmp_path / "out"), exit_code=1)


@pytest.mark.parametrize("state", ["failed", "unconfirmed"])
def test_what_a_peer_took_and_did_not_confirm_is_not_said_to_be_missing_there(state: str) -> None:
    made = Object(kind="sr", deliveries=[Delivery(peer="pacs", state=state, reason="mute")])
    (line,) = view(Series(id=7, complete=True, analyses=[AnalysisJob(state="done", objects=[made])]), 0.0).to_do
    assert line.startswith("pacs took sr and did not confirm" if state == "unconfirmed" else "pacs does not have sr")
    assert "`lungnode retry 7`" in line


@pytest.mark.parametrize("asks", [1, 2])
def test_peer_that_is_slow_to_confirm_is_said_to_be_looked_at(asks: int) -> None:
    made = Object(kind="sr", deliveries=[Delivery(peer="pacs", state="stored", asks=asks, reason="x")])
    lines = view(Series(id=7, complete=True, analyses=[AnalysisJob(state="done", objects=[made])]), 0.0).to_do
    assert ["is storage commitment enabled there" in line for line in lines] == [True] * (asks - 1)


@pytest.mark.parametrize(
    ("analysis", "deliveries", "word"),
    [
        (None, [], "kept"),
        ("waiting", [], "waiting"),
        ("running", [], "running"),
        ("failed", [], "failed"),
        ("done", ["done", "waiting"], "delivering"),
        ("done", ["done", "refused"], "refused"),
        ("done", ["failed", "refused"], "failed"),
        ("done", ["done", "stored"], "stored"),
        ("done", ["confirmed", "unconfirmed"], "failed"),
        ("report_due", [], "waiting"),
        ("reporting", [], "running"),
        ("done", ["done"], "delivered"),
        ("refused", ["done"], "not analysed"),
        ("refused", ["waiting"], "delivering"),
    ],
)
def test_state_is_told_in_a_word(tmp_path: Path, analysis: str | None, deliveries: list[str], word: str) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    ledger.migrate()
    rest = {"calling_ae": "[/x]", "instances": [], "complete": True, "closed_because": "", "verdict": ""}
    with ledger() as session:
        series = ledger.add_series(session, "1.2", "1.1", ["1.2.1"], **rest)
        assert series is not None
        if analysis:
            row = AnalysisJob(series_id=series.id, route="r", destinations={}, state=analysis)
            owed = [Delivery(peer=f"p{n}", state=one) for n, one in enumerate(deliveries)]
            names = {
                "kind": "sr",
                "sop_class_uid": "1",
                "sop_instance_uid": "1",
                "series_instance_uid": "1",
                "path": "x",
            }
            row.objects = [Object(**names, deliveries=owed)]
            session.add(row)
        record_event(session, series.id, EventKind.RECEIVED, instances=1, reason="one instance")
    (one,) = all_series(ledger)
    assert one.state == word
    told = as_json(one)
    assert told["state"] == word
    pages = Console(width=160, record=True, file=io.StringIO())
    pages.print(table([one]), timeline(one))
    text = pages.export_text()
    assert word in text
    assert "one instance" in text
    assert text.count("sr to p") == sum(
        one in ("waiting", "running", "failed", "stored", "unconfirmed") for one in deliveries
    )
    assert ("to do" in text) == (word in ("failed", "refused"))
    assert text.count("lungnode retry 1") == text.count("to do")
    ledger.engine.dispose()


@pytest.fixture
def many(settings_file: Path) -> Path:
    """Settings of a node that has received five series."""
    here = Node.open(load(settings_file))
    with here.ledger() as session:
        for n in range(5):
            rest = {"calling_ae": "CT", "instances": [], "closed_because": "", "verdict": "kept"}
            here.ledger.add_series(session, f"1.2.{n}", "1.1", [str(n)], True, **rest)
    return settings_file


def test_status_says_that_it_shows_a_part_and_how_to_see_the_rest(many: Path) -> None:
    def numbers(*options: str) -> tuple[list[str], str]:
        result = RUNNER.invoke(app, ["status", *options, "-c", str(many)], env={"COLUMNS": "160"})
        rows = result.stdout.splitlines()
        return [row.split()[0] for row in rows if " CT " in row], rows[-1]

    assert numbers()[0] == ["5", "4", "3", "2", "1"]
    assert "shown" not in lines("status", "-c", str(many))
    assert numbers("--limit", "2") == (["5", "4"], "2 of 5 series shown; --page 2 shows more")
    assert numbers("--limit", "2", "--page", "3") == (["1"], "1 of 5 series shown")
    assert numbers("--page", "9") == ([], "0 of 5 series shown")


def test_json_is_complete_unless_a_page_is_asked_for(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAGE", 2)

    def ids(*options: str) -> tuple[list[int], str]:
        result = RUNNER.invoke(app, ["status", "--json", *options, "-c", str(many)])
        assert result.exit_code == 0
        return [one["id"] for one in json.loads(result.stdout)], result.stderr

    assert ids() == ([5, 4, 3, 2, 1], "")
    assert ids("--limit", "3") == ([5, 4, 3], "3 of 5 series shown; --page 2 shows more\n")
    assert ids("--page", "3") == ([1], "1 of 5 series shown\n")


@pytest.fixture
def children() -> Iterator[list[psutil.Process]]:
    """Everything that was started below, to see that it is gone at the end."""
    started: list[psutil.Process] = []
    yield started
    wait_for(lambda: not any(map(_runs, started)), 20, f"the processes to be gone: {[p for p in started if _runs(p)]}")


def test_up_stops_cleanly_and_leaves_no_process(tmp_path: Path, children: list[psutil.Process]) -> None:
    with running_node(tmp_path, {"listener": {"accept": "any"}}) as node:
        process = psutil.Process(node.process.pid)
        wait_for(lambda: len(process.children()) == 4, 30, "broker, listener and two workers")
        children += [process, *process.children(recursive=True)]
    assert node.process.returncode == 0
    assert "is up as LUNGNODE" in node.log.read_text()
    assert "stopped; the ledger keeps what is still due" in node.log.read_text()


def test_killed_up_takes_its_processes_along(tmp_path: Path, children: list[psutil.Process]) -> None:
    with running_node(tmp_path, {"listener": {"accept": "any"}}) as node:
        process = psutil.Process(node.process.pid)
        wait_for(lambda: len(process.children()) == 4, 30, "broker, listener and two workers")
        children += [process, *process.children(recursive=True)]
        process.kill()


def test_worker_that_is_killed_is_started_again(tmp_path: Path) -> None:
    with running_node(tmp_path, {"listener": {"accept": "any"}}) as node:
        process = psutil.Process(node.process.pid)

        def listener() -> psutil.Process | None:
            return next((one for one in process.children() if _runs(one) and one.cmdline()[-1:] == ["listen"]), None)

        first = listener()
        assert first is not None
        first.kill()
        wait_for(lambda: (again := listener()) is not None and again.pid != first.pid, 20, "a new listener")
        assert "process died" in node.log.read_text()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_demo_clears_no_folder_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    assert "not empty and not of a demo" in lines("demo", "--out", str(tmp_path), exit_code=1)
    assert "which the demo would clear" in lines("demo", str(tmp_path), "--out", str(tmp_path), exit_code=1)
    assert (tmp_path / "mine").exists()


def test_version_needs_no_command() -> None:
    assert lines("--version").strip() == f"lungnode {__version__}"
