"""Who may read what lungnode writes: the umask of its processes, and the repair of what lies open at the start."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from conftest import REPOSITORY

from node import permissions
from node.config import Settings
from node.installation import Node
from node.permissions import close, keep_private


@pytest.fixture(autouse=True)
def lax() -> Iterator[None]:
    before, core = os.umask(0), resource.getrlimit(resource.RLIMIT_CORE)
    yield
    os.umask(before)
    resource.setrlimit(resource.RLIMIT_CORE, core)


def modes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder.parent)): oct(stat.S_IMODE(path.lstat().st_mode))
        for path in (folder, *folder.rglob("*"))
        if not path.is_symlink()
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder that everybody may read and write."""
    folder = tmp_path / "var"
    (folder / "spool" / "1.2").mkdir(parents=True)
    (folder / "spool" / "1.2" / "1.dcm").write_bytes(b"patient")
    (folder / "ledger.sqlite").write_bytes(b"")
    (folder / "broker").mkdir(mode=0o700)
    return folder


def test_what_lies_open_is_closed_first_at_the_top_and_then_below_with_a_line_each(data: Path) -> None:
    with structlog.testing.capture_logs() as lines:
        thread = close(data, everything=True)
        assert thread is not None
        thread.join()
    assert modes(data) == {
        "var": "0o750",
        "var/spool": "0o750",
        "var/spool/1.2": "0o750",
        "var/spool/1.2/1.dcm": "0o640",
        "var/ledger.sqlite": "0o640",
        "var/broker": "0o700",
    }
    assert [(line["log_level"], line["entries"]) for line in lines] == [("warning", 3), ("warning", 2)]
    with structlog.testing.capture_logs() as lines:
        close(data)
    assert lines == []


def test_every_process_that_opens_the_data_folder_closes_it(data: Path) -> None:
    Node.open(Settings(data=data)).ledger.engine.dispose()
    assert data.stat().st_mode & 0o027 == 0
    assert (data / "spool").stat().st_mode & 0o027 == 0


def test_links_are_not_followed_and_said(data: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"")
    (data / "results").symlink_to(elsewhere)
    (data / "spool" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(data)
    with structlog.testing.capture_logs() as lines:
        thread = close(tmp_path / "link", everything=True)  # the data folder itself may be a link
        assert thread is not None
        thread.join()
    assert modes(elsewhere) == {"elsewhere": "0o777", "elsewhere/file": "0o666"}
    assert modes(data)["var"] == "0o750"
    assert any("chmod" in line.get("hint", "") for line in lines if line["log_level"] == "error")


@pytest.mark.parametrize("refusal", ["another user's", "no modes"])
def test_what_cannot_be_closed_is_a_line_and_no_crash(
    data: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    def chmod(*_: object, **__: object) -> None:
        if refusal == "another user's":
            raise PermissionError(1, "not permitted")

    monkeypatch.setattr(permissions.os, "chmod", chmod)
    with structlog.testing.capture_logs() as lines:
        close(data)
    (line,) = lines
    assert (line["log_level"], line["entries"]) == ("error", 3)
    assert "chown" in line["hint"]


@pytest.mark.parametrize(("before", "after"), [(0o000, 0o027), (0o022, 0o027), (0o077, 0o077)])
def test_the_umask_takes_away_and_gives_nothing(before: int, after: int) -> None:
    os.umask(before)
    keep_private()
    assert os.umask(0) == after
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0


def test_what_a_command_writes_is_closed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "node", "phantom", "--out", str(tmp_path / "made" / "ct")]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, timeout=120, umask=0)
    assert set(modes(tmp_path / "made").values()) == {"0o750", "0o640"}
