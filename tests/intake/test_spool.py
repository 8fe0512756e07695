"""The spool: bytes as sent, durable before the answer, one instance kept for good, no path but its own."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_instances import SERIES, STUDY, dataset, dataset_bytes, encoded
from pydicom import dcmread

from node.intake.part import Part, SpoolFullError, Stored
from node.intake.spool import Spool
from node.paths import InvalidUIDError
from node.text import UID

EXPLICIT = "1.2.840.10008.1.2.1"
Keep = Callable[..., Stored]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def store(spool: Spool, n: int = 0, raw: bytes | None = None, **changes: Any) -> Stored:
    uids = {
        "study_uid": STUDY,
        "series_uid": SERIES,
        "sop_uid": f"{SERIES}.{n + 1}",
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2",
        "transfer_syntax_uid": EXPLICIT,
        **changes,
    }
    study_uid, series_uid = uids.pop("study_uid"), uids.pop("series_uid")
    part = spool.begin(**uids, calling_ae="CT1", called_ae="LUNGNODE")
    raw = encoded(dataset(n)) if raw is None else raw
    try:
        for at in range(0, len(raw), 1000):
            part.write(raw[at : at + 1000])
        assert part.dataset().read(0, len(raw) + 1) == raw
        return part.keep(study_uid, series_uid, uids["sop_uid"])
    finally:
        part.drop()


def left_over(spool: Spool) -> list[Path]:
    return list((spool.root / "incoming").iterdir())


def test_an_instance_is_a_dicom_file_with_the_bytes_as_sent(spool: Spool) -> None:
    stored = store(spool, 3)
    assert stored == Stored(spool.root / STUDY / SERIES / f"{SERIES}.4.dcm", "new")
    assert dataset_bytes(stored.path.read_bytes()) == encoded(dataset(3))
    ds = dcmread(stored.path)
    assert ds.PatientName == "SECRET^PATIENT"
    assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    assert ds.file_meta.MediaStorageSOPClassUID == ds.SOPClassUID
    assert ds.file_meta.TransferSyntaxUID == EXPLICIT
    assert ds.file_meta.SourceApplicationEntityTitle == "CT1"
    assert ds.file_meta.ReceivingApplicationEntityTitle == "LUNGNODE"
    assert len(ds.file_meta.ImplementationVersionName) <= 16
    assert left_over(spool) == []


def test_the_first_of_several_contents_is_kept(spool: Spool) -> None:
    raw = encoded(dataset(0))
    assert [store(spool, raw=r).outcome for r in (raw, raw, raw + b"\0\0", raw[:-2] + b"\1\1", raw)] == [
        "new",
        "same",
        "differs",
        "differs",
        "same",
    ]
    assert dataset_bytes(store(spool).path.read_bytes()) == raw


def test_what_comes_again_is_as_young_as_what_comes_anew_and_what_was_dropped_is_new(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, raw = store(spool).path, encoded(dataset(0))
    for again in (raw, raw + b"\0\0"):
        os.utime(path, (0, 0))
        store(spool, raw=again)
        assert path.stat().st_mtime > time.time() - 100
    same_as = Part._same_as

    def dropped_meanwhile(part: Part, kept: Path) -> bool:
        same = same_as(part, kept)
        kept.unlink()
        return same

    monkeypatch.setattr(Part, "_same_as", dropped_meanwhile)
    assert store(spool).outcome == "new"
    assert dataset_bytes(path.read_bytes()) == raw


@pytest.mark.parametrize(
    "uid",
    [
        "",
        ".",
        "..",
        "../1",
        "1/2",
        "1..2",
        "1.2.",
        ".1",
        "1.2\n",
        "1\0",
        "/1.2",
        "1.2.x",
        "١.٢",
        "1" * 65,
        " 1.2",
        "-1",
    ],
)
@pytest.mark.parametrize("which", ["study_uid", "series_uid", "sop_uid", "sop_class_uid", "transfer_syntax_uid"])
def test_what_is_no_uid_is_no_path(spool: Spool, uid: str, which: str) -> None:
    with pytest.raises(InvalidUIDError) as raised:
        store(spool, **{which: uid})
    assert not uid.strip(".1 ") or uid not in str(raised.value)
    assert {path.name for path in spool.root.rglob("*")} == {"incoming"}


@given(st.text(max_size=70) | st.from_regex(r"[0-9./]{1,70}", fullmatch=True))
def test_a_uid_that_is_let_through_is_one_path_component(uid: str) -> None:
    if UID.match(uid):
        assert Path("/spool", uid).resolve() == Path("/spool") / uid
        assert Path(uid).name == uid
        assert len(uid) <= 64


def test_leading_zeros_that_scanners_write_are_let_through(spool: Spool) -> None:
    assert store(spool, sop_uid="1.2.840.113619.2.5.063.078").outcome == "new"


def test_bytes_and_names_are_on_disk_before_the_answer(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def recorded_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(f"fsync {'file' if path.is_file() else path.relative_to(spool.root)}")
        fsync(descriptor)

    def recorded_link(source: Path, target: Path) -> None:
        steps.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_link)
    store(spool, 0)
    # The note of whom the series belongs to, and the names of the folders.
    assert sorted(steps[:3]) == ["fsync .", f"fsync {STUDY}", "fsync file"]
    assert steps[3:] == ["fsync file", "link", f"fsync {STUDY}/{SERIES}"]
    steps.clear()
    store(spool, 0)
    # Whoever linked it may not have come to the last step yet.
    assert steps == [f"fsync {STUDY}/{SERIES}"]


def test_threads_that_store_one_instance_at_once_keep_exactly_one(spool: Spool) -> None:
    contents = [encoded(dataset(0)) + bytes(2 * (n % 3)) for n in range(12)]
    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(lambda raw: store(spool, raw=raw), contents))
    assert [stored.outcome for stored in outcomes].count("new") == 1
    kept = dataset_bytes(outcomes[0].path.read_bytes())
    for raw, stored in zip(contents, outcomes, strict=True):
        assert (stored.outcome == "differs") == (raw != kept)
    assert left_over(spool) == []


def test_below_the_floor_nothing_is_taken(tmp_path: Path) -> None:
    full = Spool(tmp_path, floor_bytes=1 << 60)
    with pytest.raises(SpoolFullError):
        store(full, 1)
    assert left_over(full) == []


def test_a_large_instance_stops_at_the_floor_and_leaves_nothing(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    part = spool.begin(
        sop_uid="1.2", sop_class_uid="1.3", transfer_syntax_uid=EXPLICIT, calling_ae="CT1", called_ae="LUNGNODE"
    )
    part.write(bytes(15 << 20))
    monkeypatch.setattr(spool, "_floor", 1 << 60)
    with pytest.raises(SpoolFullError):
        part.write(bytes(1 << 20))
    part.drop()
    assert left_over(spool) == []


def test_a_write_that_fails_half_way_leaves_nothing(spool: Spool) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SpoolFullError):
            store(spool)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert left_over(spool) == []
    assert store(spool).outcome == "new"


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_spool import Spool, store
spool, n = Spool(Path(sys.argv[1])), 0
while True:
    store(spool, n)
    print(n, flush=True)
    n += 1
"""


def test_a_killed_process_has_kept_all_it_acknowledged_and_nothing_by_halves(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(40)]
        process.kill()
        acknowledged += [int(line) for line in process.stdout if line.endswith("\n")]
    (tmp_path / "incoming" / "half.part").write_bytes(b"half")
    spool = Spool(tmp_path)
    assert left_over(spool) == []
    kept = spool.series(STUDY, SERIES)
    assert len(kept) >= len(acknowledged)
    for n in acknowledged:
        assert dataset_bytes((spool.root / STUDY / SERIES / f"{SERIES}.{n + 1}.dcm").read_bytes()) == encoded(
            dataset(n)
        )


def test_series_are_found_again_with_their_headers_and_sender(spool: Spool) -> None:
    for n in range(3):
        store(spool, n)
    store(spool, sop_uid="1.7", series_uid="1.2.3", raw=encoded(dataset(7)))
    (spool.root / STUDY / SERIES / "9.9.dcm").write_bytes(b"no DICOM")
    (spool.root / STUDY / SERIES / "9.8.dcm").write_bytes(b"")
    (spool.root / "lost+found").mkdir()
    series = list(spool.all_series())
    assert {(one.series_uid, one.instances) for one in series} == {(SERIES, 5), ("1.2.3", 1)}
    kept = [spool.series(one.study_uid, one.series_uid) for one in series]
    found = {len(instances): instances for instances in kept}
    assert sorted(found) == [1, 3]
    assert [i.header.positions[0][2] for i in found[3]] == [0, 1, 2]
    assert {(i.calling_ae, i.called_ae) for i in found[3]} == {("CT1", "LUNGNODE")}
    assert all(i.path.is_file() for i in found[3])
