"""What the node of the fault tests and the tests agree on: its waits, and the steps at which a process is held.

At a step it or another can be killed just then.
"""

from __future__ import annotations

from typing import Any

from node import recording
from node.delivery.peer import ByAssociation
from node.intake import closing
from node.intake.part import Part
from node.ledger import superseding
from node.ledger.leases import Lease
from node.results import makers

#: Seconds that a worker waits for an answer of Redis.
SOCKET_S = 4

#: Step of the work → the function before (False) or after (True) which it lies.
STEPS: dict[str, tuple[Any, str, bool]] = {
    "instance written, not synced": (Part, "keep", False),
    "instance kept, not acknowledged": (Part, "keep", True),
    "series closed, not recorded": (closing, "series_closed", False),
    "series recorded, not dispatched": (closing, "_dispatch", False),
    "analysis taken": (recording, "begin", False),
    "analysis begun": (recording, "begin", True),
    "one object written": (makers, "_write", True),
    "all objects written": (superseding, "supersede", False),
    "in the midst of the record": (recording, "rejection_notes", False),
    "analysis recorded, not dispatched": (Lease, "finish", True),
    "object taken": (ByAssociation, "send", False),
    "object sent, not recorded": (ByAssociation, "send", True),
}
