"""Log lines that a stranger can cause, bounded: so many per address and minute, and a count of the rest."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import structlog

#: Lines about one address in a window: enough for each peer behind a gateway to be seen.
PER_ADDRESS: Final = 10

#: Lines about all addresses in a window: who has many addresses must not fill the disk either.
IN_ALL: Final = 200

#: Seconds of a window.
WINDOW_S: Final = 60.0


class LogQuota:
    """Passes warnings about callers on to `log`, as far as their quota goes.

    Parameters
    ----------
    log
        Where lines go.
    group
        Address → what counts as one caller.
    clock
        Monotonic seconds.
    """

    def __init__(
        self,
        log: structlog.stdlib.BoundLogger,
        group: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._group = group
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._lines: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def warning(self, event: str, address: str, **fields: Any) -> None:
        """Log a warning about a caller, or count it."""
        self._say(self._log.warning, event, address, fields)

    def error(self, event: str, address: str, **fields: Any) -> None:
        """Log an error about a caller, or count it."""
        self._say(self._log.error, event, address, fields)

    def flush(self) -> None:
        """At the end of a window say how many lines were left out; called now and then."""
        with self._lock:
            if self._clock() - self._since < WINDOW_S:
                return
            left_out = self._left_out
            self._since, self._lines, self._left_out = self._clock(), Counter(), Counter()
        if left_out:
            most = ", ".join(f"{address} ({count})" for address, count in left_out.most_common(5))
            self._log.warning("log lines left out", count=left_out.total(), addresses=len(left_out), most_from=most)

    def _say(self, write: Callable[..., Any], event: str, address: str, fields: dict[str, Any]) -> None:
        self.flush()
        caller = self._group(address)
        with self._lock:
            full = self._lines[caller] >= PER_ADDRESS or self._lines.total() >= IN_ALL
            if full:
                # Strangers that are too many to be named are counted as one.
                self._left_out[caller if len(self._left_out) < IN_ALL else "others"] += 1
                return
            self._lines[caller] += 1
        write(event, address=address, **fields)
