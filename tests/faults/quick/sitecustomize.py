"""Makes the node of the fault tests quick: on its PYTHONPATH, read by each of its processes as it starts.

A threshold stands in for the networks, which would take a minute for each of a hundred series and are not what is
tested here, and waits that are meant for a night in a hospital are cut to seconds. All else is the node as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from steps import SOCKET_S, STEPS

from models.registry import ModelIdentity
from node import tasks
from node.delivery import outbox
from node.installation import Node
from node.intake import assembly
from node.ledger.leases import Backoff, Lease, Timeouts
from node.ledger.transitions import Kind
from node.methods.pneumonia import method
from node.operations import supervisor

_TIMEOUTS = Timeouts(lease_s=4.0, notify_again_s=2.0, backoff=dict.fromkeys(Kind, Backoff(1.0, 1.5, 5.0)))
_OPEN = Node.open
Node.open = lambda settings: _OPEN(settings, timeouts=_TIMEOUTS)
outbox.LINGER_S = 0.5
assembly.RETRY_S = 1.0
supervisor.RESTART_S = (0.2, 1.0)
tasks.SWEEP_S = 0.5
tasks.app.conf.broker_transport_options = {"socket_connect_timeout": 2, "socket_timeout": SOCKET_S}


class _Threshold:
    identities = (ModelIdentity("lungs", "0", "a" * 64), ModelIdentity("infection", "0", "b" * 64))

    def __call__(self, hu: Any, _spacing: Any, _tell: Any) -> Any:
        from models.segmenter.inference import Segmentation

        air, _ = ndimage.label(hu < -400)
        outside = np.unique(np.concatenate([air[:, 0].ravel(), air[:, -1].ravel(), air[:, :, 0].ravel()]))
        inside = (air > 0) & ~np.isin(air, outside)
        half = hu.shape[2] // 2
        lungs = np.zeros(hu.shape, np.uint8)
        lungs[:, :, :half], lungs[:, :, half:] = inside[:, :, :half], 2 * inside[:, :, half:]
        dense = inside & (hu > -650)
        return Segmentation(lungs, dense.astype(np.float16), 0.5)


method.segmenter = lambda *_: _Threshold()


_FINISH = Lease.finish

#: Seconds for which a process is held at most, when nobody kills it.
HELD_S = 20.0


def _held(step: str) -> None:
    """Stand still at a step while a file asks for it; only the first to come takes the file, and says so by another."""
    asked = Path(os.environ["LUNGNODE_FAULT_HOLD"])
    with suppress(OSError):
        if asked.read_text() != step:
            return
        asked.rename(asked.with_suffix(".held"))
        until = time.monotonic() + HELD_S
        while asked.with_suffix(".held").exists() and time.monotonic() < until:
            time.sleep(0.02)


def _holding(step: str, function: Callable[..., Any], after: bool) -> Callable[..., Any]:
    if function is Lease.finish:

        @contextmanager
        def finish(*arguments: Any) -> Iterator[Any]:
            with _FINISH(*arguments) as session:
                yield session
            _held(step)

        return finish

    def held(*arguments: Any, **named: Any) -> Any:
        if not after:
            _held(step)
        result = function(*arguments, **named)
        if after:
            _held(step)
        return result

    return held


if "LUNGNODE_FAULT_HOLD" in os.environ:
    for _step, (_owner, _name, _after) in STEPS.items():
        setattr(_owner, _name, _holding(_step, getattr(_owner, _name), _after))
