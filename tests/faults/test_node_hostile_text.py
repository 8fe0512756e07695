"""Hostile text in every attribute and from a peer, through a whole node; and what the node leaves to other users."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import struct
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from conftest import Orthanc, wait_for
from pydicom import dcmread
from raw_peer import RELEASE, RawPeer, store
from whole_node import WholeNode, chest, whole_node

from node import __version__
from node.images.phantom_series import write_series

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*socket:pytest.PytestUnraisableExceptionWarning"),
]

MARKER = "DOE^MARKER"
#: What would retitle a terminal, wipe its lines, write others, turn text round and be markup, with a patient's name.
HOSTILE = f"\x1b]0;t\x07\x1b[2K\r\n\x9b31m\u202e\u2066\u200b\u2028[bold red]{MARKER}[/][link=http://evil]x".encode()
TEXT_VRS = ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UT")
#: Attributes of a CT (PS3.3 A.3) that the phantom lacks and something may read.
FURTHER = (
    *(0x00080005, 0x0008002A, 0x00080050, 0x00080080, 0x00081030, 0x0008103E, 0x00081040, 0x00100040, 0x00101010),
    *(0x00104000, 0x00180015, 0x00181030, 0x00181120, 0x00200012, 0x00200060, 0x00200100, 0x00201002, 0x00204000),
    *(0x00280120, 0x00321032, 0x00321060, 0x00400244, 0x00400275, 0x00401003, 0x00080201, 0x00280008),
)
#: Needed to place a slice in space and in HU: the series with everything else hostile is analysed.
NEEDED = frozenset((0x00080008, 0x00080016, 0x00080018, 0x00080060, 0x0020000D, 0x0020000E, 0x00200032, 0x00200037,
                    0x00280004, 0x00280030, 0x00281052, 0x00281053, 0x00180015, 0x00200013, 0x00180050, 0x00200052,
                    0x00280008, 0x00080005, 0x00181120, 0x00200012, 0x00200100, 0x00280120))  # fmt: skip

_Elements = dict[int, tuple[str, bytes]]


def elements_of(path: Path) -> _Elements:
    ds = dcmread(path)
    raw = {}
    for tag in ds.keys():  # noqa: SIM118 - items() would convert the values
        item = ds.get_item(tag)
        # pydicom converts Specific Character Set at once.
        raw[int(tag)] = item.VR, item.value.encode() if isinstance(item.value, str) else item.value or b""
    return raw


def encoded(elements: _Elements) -> bytes:
    """Explicit VR Little Endian; what is hostile is UN, whose length has 32 bits."""
    out = BytesIO()
    for tag in sorted(elements):
        vr, value = elements[tag]
        value += b"\0" * (len(value) % 2)
        long = vr in ("OB", "OW", "SQ", "UN", "UC", "UT")
        out.write(struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr.encode()))
        out.write(struct.pack("<HL", 0, len(value)) if long else struct.pack("<H", len(value)))
        out.write(value)
    return out.getvalue()


def send(port: int, slices: list[tuple[str, bytes]], calling: str = "SCANNER") -> list[int | None]:
    """Send data sets as they are, each with the UID that the request should name; gives the statuses."""
    with RawPeer(port, 60) as peer:
        assert peer.associate(calling=calling) == 2
        statuses = []
        for uid, raw in slices:
            peer.send(store(uid, raw))
            statuses.append(peer.status())
        peer.send(RELEASE)
        peer.answer()
    return statuses


def harmful(shown: str) -> set[str]:
    return {one for one in shown if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")}


def others_may(folder: Path) -> list[str]:
    """What other users, or the group by writing, may do below a folder, in words; links are not followed."""
    found = []
    for top, folders, files in os.walk(folder):
        for name in (".", *folders, *files):
            mode = os.lstat(Path(top) / name).st_mode
            if not stat.S_ISLNK(mode) and mode & 0o027:
                found.append(f"{Path(top) / name} {stat.filemode(mode)}")
    return found


@pytest.fixture
def lax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An umask that closes nothing, and a folder for temporary files."""
    temporary = tmp_path / "temporary"
    temporary.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = os.umask(0)
    yield temporary
    os.umask(before)


def test_nothing_hostile_in_a_header_or_from_a_peer_is_shown_and_no_file_is_left_open(
    tmp_path: Path, orthanc: Orthanc, lax: Path
) -> None:
    slices = [elements_of(path) for path in write_series(chest(), tmp_path / "ct", 5)]
    text_tags = sorted({tag for tag, (vr, _) in slices[0].items() if vr in TEXT_VRS} | set(FURTHER))
    with whole_node(tmp_path / "node", orthanc) as node:
        alone = []
        for n, tag in enumerate(text_tags):
            size = 5_000_000 if tag in (0x00080060, 0x00200052, 0x00180015) else 65_000
            uid, series = f"2.25.7.{n}.1", f"2.25.7.{n}"
            hostile = {0x00080018: ("UI", uid.encode()), 0x0020000E: ("UI", series.encode())}
            alone.append((uid, encoded({**slices[0], **hostile, tag: ("UN", HOSTILE + b"A" * size)})))
        statuses = send(node.port, alone)
        assert statuses.count(0xC000) == 4  # the UIDs that become an identity
        assert statuses.count(0) == len(alone) - 4
        everything = {tag: ("UN", HOSTILE + b"A" * 65_000) for tag in text_tags if tag not in NEEDED}
        for number, changes in ((8, lambda k: {}), (9, lambda k: {0x00200052: ("UN", HOSTILE + bytes([65 + k % 2]))})):
            whole = []
            for k, one in enumerate(slices):
                uid, series = f"2.25.{number}.{k + 1}", f"2.25.{number}"
                own = {0x00080018: ("UI", uid.encode()), 0x0020000E: ("UI", series.encode())}
                whole.append((uid, encoded({**one, **everything, **own, **changes(k)})))
            send(node.port, whole)
        for titles in ({"calling": "A\x1b[2K\r\nB"}, {"called": "[red]x\x9b"}, {"called": "A\tB"}):
            with RawPeer(node.port, 60) as peer:
                assert peer.associate(**titles) in (3, 7)  # rejected or aborted
        count = len(text_tags) - 4 + 2
        wait_for(lambda: len(node.series()) == count, 60, f"{count} series, {len(node.series())} came:\n{node.log}")

        def finished() -> bool:
            states = [analysis.state for one in node.series() for analysis in one.analyses]
            return len(states) >= 2 and not {"waiting", "running"} & set(states)

        wait_for(finished, 90, "both series to be analysed")
        outcomes = [analysis.reason for one in node.series() for analysis in one.analyses]
        assert any("2 frames of reference in one series: an invalid UID" in one for one in outcomes), outcomes
        shown = [_command(node, "status"), _command(node, "status", "--json")]
        shown.append(_command(node, "status", "2.25.9"))
        assert not others_may(node.data)
    log = (node.folder / "node.log").read_text()
    assert not harmful(log.replace("\n", ""))
    ours = ("{", "stopped;", f"lungnode {__version__} is up", "worker: Warm shutdown")  # the last is Celery's own
    assert all(line.startswith(ours) for line in log.splitlines() if line)
    assert max(map(len, log.splitlines())) < 2000
    for output in shown:
        assert not harmful(output.replace("\n", ""))
        assert max(map(len, output.splitlines())) < 2500
    json.loads(shown[1])
    with sqlite3.connect(node.data / "ledger.sqlite") as ledger:
        dump = "\n".join(ledger.iterdump())
    ledger.close()
    values = [row for row in dump.split(";\n") if row.startswith("INSERT")]
    assert not harmful("".join(values))
    for output in (log, dump, *shown):
        assert MARKER not in output
        assert "MARKER" not in output.upper()
        assert "AAAAAAAA" not in output
    assert not others_may(node.data)
    assert not others_may(lax)


def _command(node: WholeNode, *arguments: str) -> str:
    command = [sys.executable, "-m", "node", *arguments, "--config", str(node.folder / "node.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    return done.stdout + (done.stderr if "--json" not in arguments else "")
