"""A series that is open: what came of it, the phase that it is in, and whether it is complete.

    Receiving ──end of the last association──> Ended ──the sender can be asked for its count──> Asking
        ^                                        │  <──the answer, or none in time─────────────────┘
        └──another instance, from any phase──    │ nothing came for the grace period
                                                 ├──complete──> offered to the ledger: closed, or Offered if not taken
                                                 └──not──> Examined: only the quiet period closes it
    Offered ──the pause is over──> Ended, or Receiving where no end is known

The quiet period closes a series from any phase but Asking and Offered. Two flags stand beside the phase: `broken`, that
the end of what was sent may be missing, and `reopened`, that it was closed before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from node.images.geometry import GAP_FACTOR
from node.intake.header import InstanceHeader
from node.intake.series import AssociationId, ClosedSeries, Ending, Key
from node.intake.stack import FEWEST, Tiling, count_reached, numbers_missing, tile

#: Seconds after the end of an association in which the next one may continue the series: some senders open one for
#: each instance, others one for each hundred.
GRACE_S = 2.0

#: The same for a series that came over one association so far, more than a few instances of it. If that was only the
#: sender's first batch, its next association is already open by now, and an open association is always waited for.
ONE_ASSOCIATION_GRACE_S = 1.0


@dataclass(frozen=True)
class Receiving:
    """Its sender may be sending it; no end is known."""

    ended_at: None = None

    def with_end(self, ended_at: float | None) -> Receiving | Ended:
        """The phase after the last association ended, or after something came (None)."""
        return after(ended_at)


@dataclass(frozen=True)
class Ended:
    """The last association that sent of it has ended; the next may go on with it for the grace period."""

    ended_at: float

    def with_end(self, ended_at: float | None) -> Receiving | Ended:
        """As for `Receiving`."""
        return after(ended_at)


@dataclass(frozen=True)
class Examined(Ended):
    """It was found wanting since, so that only the quiet period closes it."""


@dataclass(frozen=True)
class _Paused:
    ended_at: float | None
    until: float

    def with_end(self, ended_at: float | None) -> Self:
        """As for `Receiving`; the pause goes on."""
        return replace(self, ended_at=ended_at)


class Asking(_Paused):
    """Its sender was asked how many instances it has; the answer is waited for `until` then."""


class Offered(_Paused):
    """It was offered and not taken; it is offered again after `until`."""


Phase = Receiving | Ended | Asking | Offered


def after(ended_at: float | None) -> Receiving | Ended:
    """The phase of a series whose last association ended then, or did not end."""
    return Receiving() if ended_at is None else Ended(ended_at)


@dataclass(frozen=True)
class Judgement:
    """Whether a series is complete, why, and whether it lacks no more than slices that leave a gap."""

    complete: bool
    reason: str
    only_gaps: bool = False


@dataclass
class OpenSeries:
    """A series of which more may come."""

    key: Key
    #: When something last happened to it.
    last: float
    instances: dict[str, tuple[InstanceHeader, Path]] = field(default_factory=dict)
    #: Associations that are open and have sent of it, and when each began to.
    associations: dict[AssociationId, float] = field(default_factory=dict)
    #: How many associations have sent of it so far.
    came_over: int = 0
    #: SOP instance UIDs that were refused and have not come since.
    refused: set[str] = field(default_factory=set)
    sender: AssociationId = field(default_factory=lambda: AssociationId(0, "", ""))
    phase: Phase = field(default_factory=Receiving)
    #: What broke off the sending; empty when nothing did, or when it was begun again since and brought to its end.
    broken: str = ""
    broken_at: float = 0.0
    #: Whether it was closed before.
    reopened: bool = False
    #: When it was first offered in vain.
    offered_at: float | None = None
    #: How many instances its sender has, as it said; None while it has not.
    counted: int | None = None
    #: Questions about that number so far.
    asked: int = 0
    judgement: Judgement = field(default_factory=lambda: Judgement(False, ""))

    @property
    def headers(self) -> list[InstanceHeader]:
        """Headers of its instances, by arrival."""
        return [header for header, _ in self.instances.values()]

    @property
    def extent(self) -> tuple[int, int, int]:
        """Changes whenever the series has become another, or its sender has begun to send it again."""
        return len(self.instances), len(self.refused), self.came_over

    def touch(self, association: AssociationId, now: float) -> bool:
        """Something of it came; returns whether it is the first over this association."""
        first = association not in self.associations
        if first:
            self.associations[association] = now
            self.came_over += 1
        self.last = now
        self.phase = self.phase.with_end(None)
        return first

    def end(self, association: AssociationId, ending: Ending, now: float) -> None:
        """An association that sent of it has ended."""
        begun = self.associations.pop(association)
        self.phase = self.phase.with_end(now)
        if ending == "aborted":
            self.broken, self.broken_at = "the association was aborted", now
        elif begun >= self.broken_at:
            self.broken = ""

    def judged(self, ended: str) -> Judgement:
        """Whether it is complete, given what `ended` the series."""
        tiling, doubt = tile(self.headers), numbers_missing(self.headers)
        missing = []
        if tiling.kind == "gap":
            missing.append(tiling.detail)
        elif doubt and not _dense(tiling, self.headers):
            # Every other slice lies evenly too: without slices that touch, the numbering is believed.
            missing.append(doubt)
        if self.refused:
            missing.append(f"{len(self.refused)} instances were refused for want of disk and not sent again")
        if self.counted is not None and self.counted > len(self.instances):
            missing.append(f"its sender has {self.counted} instances of it, {len(self.instances)} came")
        if self.broken and not count_reached(self.headers) and self.counted != len(self.instances):
            missing.append(f"{self.broken}, so its end may be missing")
        if missing:
            return Judgement(False, f"incomplete: {'; '.join(missing)}; {ended}", missing == [tiling.detail])
        shape = {
            "even": tiling.detail,
            "uneven": f"no slice is missing, though they make no regular grid ({tiling.detail})",
        }.get(tiling.kind, f"geometry cannot tell ({tiling.detail})")
        return Judgement(True, f"{shape}, and {ended}{f', although {doubt}' if doubt else ''}")

    def asking(self, until: float) -> None:
        """Its sender is being asked for the number of its instances."""
        self.phase = Asking(self.phase.ended_at, until)

    def answered(self, count: int | None) -> None:
        """Its sender has answered."""
        self.counted = count
        self.phase = after(self.phase.ended_at)

    def refused_at(self, now: float, retry_at: float) -> None:
        """It was offered, and not taken."""
        self.offered_at = now if self.offered_at is None else self.offered_at
        self.phase = Offered(self.phase.ended_at, retry_at)

    def closed(self, now: float) -> ClosedSeries:
        """The series as it was last judged."""
        return ClosedSeries(
            series_instance_uid=self.key[1],
            study_instance_uid=self.key[0],
            calling_ae=self.sender.calling_ae,
            called_ae=self.sender.called_ae,
            instances=tuple(self.headers),
            paths=tuple(path for _, path in self.instances.values()),
            complete=self.judgement.complete,
            reason=self.judgement.reason,
            only_gaps=self.judgement.only_gaps,
            offered_for_s=0.0 if self.offered_at is None else now - self.offered_at,
        )

    def grace_s(self, grace_s: float) -> float:
        """Seconds that the end of an association leaves for the next to begin, where `grace_s` is the most."""
        if count_reached(self.headers):
            return 0.0
        one = self.came_over == 1 and len(self.instances) >= FEWEST
        return min(grace_s, ONE_ASSOCIATION_GRACE_S) if one else grace_s


def _dense(tiling: Tiling, headers: list[InstanceHeader]) -> bool:
    """Whether slices are about as far apart as they are thick, or have no places that could lack one."""
    if not any(header.positions for header in headers):
        return True
    thickness = min((header.slice_thickness or 0.0) for header in headers)
    return tiling.whole and tiling.step <= GAP_FACTOR * thickness
