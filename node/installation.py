"""The opened installation: its settings, its ledger, and where its files are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from node import permissions
from node.config import Settings
from node.ledger.leases import Timeouts
from node.ledger.ledger import Ledger

#: The ledger's file in the data folder.
LEDGER = "ledger.sqlite"


@dataclass(frozen=True)
class Node:
    """The settings of this installation and the places where its things lie."""

    settings: Settings
    ledger: Ledger

    @classmethod
    def open(cls, settings: Settings, clock: Callable[[], float] = time.time, timeouts: Timeouts | None = None) -> Node:
        """Make the folders and the ledger's tables where they are missing."""
        for folder in ("spool", "results"):
            (settings.data / folder).mkdir(parents=True, exist_ok=True)
        permissions.close(settings.data)
        ledger = Ledger(f"sqlite:///{settings.data / LEDGER}", clock, timeouts)
        ledger.migrate()
        return cls(settings, ledger)

    @property
    def spool(self) -> Path:
        """Folder of received instances."""
        return self.settings.data / "spool"

    @property
    def results(self) -> Path:
        """Folder of the objects that analyses made."""
        return self.settings.data / "results"
