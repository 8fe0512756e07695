"""The database under the ledger: how it is opened, and how its tables come to this version's form."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import alembic.command
import alembic.config
import structlog
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

log = structlog.get_logger(__name__)

#: Times that a process which starts waits for the ledger.
MIGRATION_TRIES: Final = 10


def open_engine(url: str, busy_s: float) -> Engine:
    """An engine whose commits survive the loss of power: WAL, foreign keys and `synchronous=FULL`.

    A connection waits `busy_s` seconds for another process to end its transaction.
    """
    # A connection must not cross the fork of a worker's pool, so none is kept open to a file.
    engine = create_engine(url, poolclass=NullPool if url.startswith("sqlite:///") else None)

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        # The driver must not open transactions by itself: BEGIN IMMEDIATE below does, so that two writers wait for one
        # another instead of failing half-way through. Who only reads has a snapshot (WAL), and holds up nobody.
        connection.isolation_level = None
        for pragma in (f"busy_timeout={busy_s * 1000:.0f}", "journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        reads = connection.get_execution_options().get("lungnode_reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def migrate(engine: Engine, revision: str, busy_s: float) -> None:
    """Bring the tables to a revision; safe to call from several processes at once.

    A process that starts must not end because another one has the ledger for a while: it waits.
    """
    for tries_left in reversed(range(MIGRATION_TRIES)):
        try:
            _migrate(engine, revision)
            return
        except OperationalError as error:
            if not tries_left or "locked" not in str(error.orig):
                raise
            log.warning("another program holds the ledger; waiting for it", seconds=busy_s)


def _migrate(engine: Engine, revision: str) -> None:
    settings = alembic.config.Config()
    settings.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with _migration_lock(engine), engine.connect() as connection:
        settings.attributes["connection"] = connection
        alembic.command.upgrade(settings, revision)
        connection.commit()


@contextmanager
def _migration_lock(engine: Engine) -> Iterator[None]:
    """One migration at a time: a file beside the database is locked."""
    database = engine.url.database
    if not database:  # in memory
        yield
        return
    with Path(f"{database}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
