"""structlog for our own lines and for those of Celery and pynetdicom, in one form on standard error."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog

from node.text import LOG_LENGTH, printable, tidy

log = structlog.stdlib.get_logger(__name__)


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
    # The list is changed in place: loggers that are in use keep the one that they began with.
    processors = structlog.get_config()["processors"]
    processors[:] = [*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter]
    structlog.configure(
        processors=processors,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            # An exception's text may hold patient data (a value that could not be parsed): its type and place only.
            processors=[
                _place_of_exception,
                _without_values,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _printable,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel((level or os.environ.get("LUNGNODE_LOG_LEVEL") or "INFO").upper())
    # What pynetdicom says of a failed association we say ourselves, with the peer's name. Celery reports for each task
    # that it was received and done, and httpx each request, with words of the server.
    levels = {
        "pydicom": "ERROR",
        "highdicom": "ERROR",
        "pynetdicom": "CRITICAL",
        "celery": "WARNING",
        "kombu": "WARNING",
        "httpx": "WARNING",
        "httpcore": "WARNING",
    }
    for name in ("alembic", "numba", "PIL"):
        levels[name] = "WARNING"
    for name, quieter in levels.items():
        logging.getLogger(name).setLevel(quieter)
    _quote_nothing()


#: Loggers whose texts are shown: our own, and those that never see a data set. Of any other, which may quote a value,
#: the log has the place in its code only.
_TRUSTED = frozenset(("node", "models", "celery", "kombu", "alembic"))


def _quote_nothing() -> None:
    """Let neither a warning nor an uncaught exception write its text, which may quote a value, to standard error."""
    # Celery captures warnings too, unless that is done already, and would log their texts.
    logging.captureWarnings(True)
    warnings.showwarning = _warned
    sys.excepthook = _uncaught
    sys.unraisablehook = lambda about: _uncaught(about.exc_type, about.exc_value, about.exc_traceback)
    threading.excepthook = lambda about: _uncaught(about.exc_type, about.exc_value, about.exc_traceback)


def _warned(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning is for developers, who ask for DEBUG."""
    log.debug("a library warned", category=category.__name__, place=f"{Path(filename).name}:{lineno}")


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """An exception that nobody caught: what `plainly` says of it, and the way to its place."""
    if issubclass(kind, KeyboardInterrupt):
        return
    way = [f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(trace)]
    what = kind.__name__ if error is None else plainly(error)
    log.critical("an exception that nobody caught", error=what, way=" > ".join(way[-12:]))


def _without_values(_logger: Any, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """The line of a library's log without its text, unless the library is trusted."""
    record = line.get("_record")
    if record is not None and not line.get("_from_structlog") and record.name.split(".")[0] not in _TRUSTED:
        line["event"], line["place"] = f"{record.name.split('.')[0]} logged", f"{record.filename}:{record.lineno}"
    return line


def _printable(_logger: Any, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Every text of a line as one that a terminal shows as it is, of bounded length."""
    return {printable(str(key), LOG_LENGTH): tidy(value, LOG_LENGTH) for key, value in line.items()}


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
