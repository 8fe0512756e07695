"""structlog for our own lines and for those of Celery and pynetdicom, in one form on standard error."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Any

import structlog


def configure(level: str | None = None) -> None:
    """Set logging up for this process: coloured lines on a terminal, JSON lines elsewhere.

    Parameters
    ----------
    level
        Name of the least level shown; `LUNGNODE_LOG_LEVEL`, else INFO.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            # An exception's text may hold patient data (a value that could not be parsed): its type and place only.
            processors=[_place_of_exception, structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel((level or os.environ.get("LUNGNODE_LOG_LEVEL") or "INFO").upper())
    # Data sets that pydicom cannot parse are quoted in its warnings, and what pynetdicom says of a failed association
    # we say ourselves, with the peer's name. Celery tells of each task that it was received and done.
    levels = {
        "pydicom": "ERROR",
        "highdicom": "ERROR",
        "pynetdicom": "CRITICAL",
        "celery": "WARNING",
        "kombu": "WARNING",
    }
    for name in ("alembic", "numba", "PIL"):
        levels[name] = "WARNING"
    for name, quieter in levels.items():
        logging.getLogger(name).setLevel(quieter)


def _place_of_exception(_logger: Any, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    info = line.pop("exc_info", None)
    if info:
        error = info if isinstance(info, BaseException) else (sys.exc_info() if info is True else info)[1]
        if error is not None:
            line["error"] = plainly(error)
    return line


def plainly(error: BaseException) -> str:
    """An exception in one line: its type and place, and its text only where that holds no patient data.

    The text of our own exceptions is written to be free of it; that of others may quote a value they choked on.
    """
    trace, place = error.__traceback__, "unknown place"
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    what = type(error).__name__
    if type(error).__module__.startswith(("node.", "models.")):
        what = f"{what}: {error}"
    elif (number := _errno(error)) is not None:
        # Its words are the system's, not those of whoever raised it.
        what = f"{what} {errno.errorcode.get(number, number)} ({os.strerror(number).lower()})"
    return f"{what} at {place}"


def _errno(error: BaseException) -> int | None:
    """What the system said; pydicom raises its errors anew, with its own words and without the number."""
    if not isinstance(error, OSError):
        return None
    cause = error.__cause__
    return cause.errno if error.errno is None and isinstance(cause, OSError) else error.errno
