"""Child processes that end when we end, however we end."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: between fork and exec a child must not import or allocate more than it has to.
_libc = ctypes.CDLL(None, use_errno=True)


def dies_with_parent() -> None:
    """For `preexec_fn`: SIGTERM for the child when its parent is gone, also after kill -9 of the parent (Linux)."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
