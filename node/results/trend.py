"""How the infection went over a patient's scans: earlier results beside this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from node.methods.pneumonia.findings import Findings
from node.results.wording import Rule

#: Earlier scans that are told, the latest ones; more do not fit a line.
MOST = 4


@dataclass(frozen=True)
class Earlier:
    """What an earlier scan of the patient came to."""

    day: date
    infected_ml: float
    #: 0 to 1, of both lungs.
    infected_share: float


def course(earlier: Sequence[Earlier], findings: Findings) -> list[Rule]:
    """One row: the infected share of both lungs over the latest scans; none where there is no earlier one."""
    told = sorted(earlier, key=lambda one: one.day)[-MOST:]
    if not told:
        return []
    now = f"{100 * findings.both.infected_share:.1f} %, {findings.both.infected_ml:.1f} ml"
    before = ", then ".join(f"{one.day.day} {one.day:%b %Y}: {100 * one.infected_share:.1f} %" for one in told)
    last = f"before {100 * told[-1].infected_share:.1f} %, {told[-1].infected_ml:.1f} ml"
    return [Rule("Course, infected part of both lungs", before, "earlier results of this node", f"{last}; now {now}")]
