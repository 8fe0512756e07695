"""No text from the network, from a file or from the ledger makes a path outside the folder it is meant for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import free_port
from hypothesis import example, given
from hypothesis import strategies as st
from made_instances import dataset, encoded
from raw_peer import RELEASE, RawPeer, store
from sqlalchemy import select

from node import recording
from node.analysis.priors import _header
from node.cli.demo import _archive
from node.config import Peer, Settings
from node.installation import Node
from node.ledger.tables import AnalysisJob, Series
from node.paths import InvalidUIDError, UnsafePathError, valid_uid, within

FOLDER = Path("/data/spool")

#: What hostile paths are made of.
pieces = st.sampled_from(
    [*"\\/~ \0\n\u202e", "..", ".", "a", "1.2", "C:", "//", "../", "/etc/passwd", ".dcm", "\uff0e\uff0e"]
)
texts = st.lists(pieces, max_size=8).map("".join) | st.text(max_size=70) | st.from_regex(r"[0-9./]{1,70}\Z")


@given(st.lists(texts, min_size=1, max_size=3))
@example(["/etc/passwd"])
@example(["1.2", "../../.."])
@example(["a", "/b"])
@example(["x/../../../y"])
@example([""])
def test_what_passes_stays_in_its_folder(names: list[str]) -> None:
    try:
        path = within(FOLDER, *names)
    except UnsafePathError:
        return
    assert Path(os.path.normpath(path)).is_relative_to(FOLDER)
    assert os.path.normpath(path) != str(FOLDER)
    assert "\0" not in str(path)


@given(texts)
def test_a_uid_that_passes_is_one_component(uid: str) -> None:
    try:
        name = valid_uid(uid)
    except InvalidUIDError:
        return
    assert within(FOLDER, name).parent == FOLDER
    assert within(FOLDER, f"{name}.dcm").parent == FOLDER
    assert len(name) <= 64


@pytest.mark.parametrize("name", [None, 1, ["a"], b"a", {"a": 1}, Path("a")])
def test_what_is_no_text_is_no_path(name: object) -> None:
    with pytest.raises(UnsafePathError):
        within(FOLDER, name)  # type: ignore[arg-type]
    with pytest.raises(InvalidUIDError):
        valid_uid(name)  # type: ignore[arg-type]


@pytest.mark.peer
@pytest.mark.parametrize("uid", ["../../escaped", "/tmp/escaped-from-demo", "..", "1.2/../../../escaped", "a", "1..2"])
def test_archive_of_the_demo_keeps_files_in_its_folder(tmp_path: Path, uid: str) -> None:
    archive, port = tmp_path / "out" / "archive", free_port()
    archive.parent.mkdir()
    with _archive(Peer(ae_title="ARCHIVE", host="127.0.0.1", port=port), archive), RawPeer(port) as peer:
        assert peer.associate(called="ARCHIVE", calling="ANY") == 2
        peer.send(store(uid, encoded(dataset(1))))
        assert peer.status() != 0x0000
        peer.send(store("1.2.3", encoded(dataset(1))))
        assert peer.status() == 0x0000
        peer.send(RELEASE)
        peer.answer()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["1.2.3.dcm"]
    assert not Path("/tmp/escaped-from-demo.dcm").exists()


@pytest.mark.parametrize("where", ["series", "analysis", "uid"])
def test_series_whose_row_leads_elsewhere_is_neither_read_nor_written(tmp_path: Path, where: str) -> None:
    here = Node.open(Settings(data=tmp_path / "var"))
    with here.ledger() as session:
        uid = "../../escaped" if where == "uid" else "1.2.3"
        paths = {"series": ["../secret.dcm"]}.get(where, ["1.2/1.2.3/1.dcm"])
        row = here.ledger.add_series(
            session, uid, "1.2", ["1"], True, calling_ae="CT", instances=paths, closed_because="", verdict=""
        )
        assert row is not None
        mine = ["/etc/passwd"] if where == "analysis" else None
        row.analyses.append(AnalysisJob(route="r", destinations={}, instances=mine))
    with here.ledger.read() as session:
        analysis = session.scalars(select(AnalysisJob.id)).one()
    with pytest.raises(UnsafePathError):
        recording.begin(here, analysis)
    (tmp_path / "var" / "secret.dcm").write_bytes(b"x")
    assert _header(here.spool, "../secret.dcm") is None
    with here.ledger.read() as session:
        assert session.scalars(select(Series)).one().events == []
