"""A disk that fills up while instances come in: refused with 0xA700, reported, and made whole by a resend."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_for
from made_instances import SERIES, dataset, dataset_bytes, encoded
from raw_peer import RELEASE, RawPeer, store
from test_listener import Node

from node.intake.transport import DIRECT, STOCK, Transport

COUNT, SIZE = 40, 256  # 131 KB each, on a disk of 4 MB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def send(node: Node) -> list[int | None]:
    with RawPeer(node.listener.port) as peer:
        assert peer.associate() == 2
        statuses = []
        for n in range(COUNT):
            peer.send(store(f"{SERIES}.{n + 1}", encoded(dataset(n, size=SIZE))))
            statuses.append(peer.status())
        peer.send(RELEASE)
        assert peer.answer()[0] == 6
    return statuses


@pytest.mark.parametrize("transport", [DIRECT, STOCK])
@pytest.mark.parametrize("floor_bytes", [0, 1 << 20])
def test_a_disk_that_fills_up(small_disk: Path, transport: Transport, floor_bytes: int) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    node = Node(small_disk, transport=transport, floor_bytes=floor_bytes)
    try:
        first = send(node)
        assert set(first) == {0x0000, 0xA700}
        kept = {f"{SERIES}.{n + 1}" for n, status in enumerate(first) if status == 0}
        assert node.kept().keys() == kept
        assert list(node.spool.root.glob("incoming/*")) == []
        wait_for(lambda: bool(node.closed), 10, "the series to be closed")
        assert (node.closed[0].complete, len(node.closed[0].instances)) == (False, len(kept))
        assert (
            f"{COUNT - len(kept)} instances were refused for want of disk and not sent again" in node.closed[0].reason
        )

        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
        assert set(send(node)) == {0x0000}
        wait_for(lambda: len(node.closed) == 2, 10, "the whole series")
        assert (node.closed[1].complete, len(node.closed[1].instances)) == (True, COUNT)
        for n in range(COUNT):
            assert node.kept()[f"{SERIES}.{n + 1}"] == encoded(dataset(n, size=SIZE))
        assert dataset_bytes(node.closed[1].paths[0].read_bytes())
    finally:
        node.listener.stop()
