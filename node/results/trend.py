"""How a finding went over a patient's scans: earlier results beside this one."""

from __future__ import annotations

from collections.abc import Sequence

from node.methods.outcome import Earlier, Outcome, Statement

#: Earlier scans that are shown, the latest ones; more do not fit a line.
MOST = 4


def trend(earlier: Sequence[Earlier], outcome: Outcome) -> list[Statement]:
    """One row with the latest scans, from the first on; none where there is no earlier one."""
    shown = sorted(earlier, key=lambda one: one.day)[-MOST:]
    if not shown:
        return []
    before = ", then ".join(f"{one.day.day} {one.day:%b %Y}: {one.point.short}" for one in shown)
    verdict = f"before {shown[-1].point.long}; now {outcome.point.long}"
    return [Statement(outcome.trend, before, "earlier results of this node", verdict)]


def rows(outcome: Outcome, earlier: Sequence[Earlier]) -> list[Statement]:
    """The statements that stand on the pages, and the trend."""
    return [*(one for one in outcome.statements if one.on_pages), *trend(earlier, outcome)]
