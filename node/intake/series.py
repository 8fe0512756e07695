"""What intake passes on: associations, closed series, conflicts; and what it needs of the node around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from node.intake.header import InstanceHeader

#: Study and Series Instance UID.
Key = tuple[str, str]

#: How an association ended: by A-RELEASE, because nothing came for too long between two instances, or otherwise.
Ending = Literal["released", "idle", "aborted"]


@dataclass(frozen=True)
class AssociationId:
    """One association: a number of our own, the AE titles of its ends, and the address that it came from."""

    number: int
    calling_ae: str
    called_ae: str
    address: str = ""


@dataclass(frozen=True)
class Conflict:
    """Another sender than the one that a series belongs to sent something else of it."""

    study_instance_uid: str
    series_instance_uid: str
    #: AE title that the series belongs to, AE title of the other sender, and the address that it called from.
    belongs_to: str
    sender: str
    address: str
    #: Instances of the series that it sent with other content; those that were here first are kept.
    differing: int
    #: Instances that the series does not have; kept beside it.
    extra: int
    #: Instances of the series.
    held: int


@dataclass(frozen=True)
class ClosedSeries:
    """A series that is believed to be all there, or to get no further."""

    series_instance_uid: str
    study_instance_uid: str
    calling_ae: str
    called_ae: str
    #: In the order of `paths`, by arrival.
    instances: tuple[InstanceHeader, ...]
    paths: tuple[Path, ...]
    #: False where something is known or must be feared to be missing.
    complete: bool
    #: Why it was closed, and why it is or is not complete, in words without patient data.
    reason: str
    #: Whether all that is known to be missing are slices that leave a gap: a stack without one is whole.
    only_gaps: bool = False
    #: Seconds since it was first offered, in vain so far.
    offered_for_s: float = 0.0


@dataclass(frozen=True)
class Adoption:
    """What came of comparing what another sender sent with the series."""

    #: Whether it sent all that is in the series, with the same content, so that the rest of it joins the series.
    agreed: bool
    #: Instances of the series before.
    held: int
    #: Instances that it sent and the series does not have; they have joined it if `agreed`.
    extra: int
    #: SOP instance UIDs that were found to differ.
    differing: frozenset[str]


class Host:
    """What an assembly needs of the node around it.

    The methods here are those of a node that takes closed series and keeps nothing else.
    """

    def closed(self, closed: ClosedSeries) -> None:
        """Take a closed series. When this raises, the series stays open and is offered again."""

    def conflict(self, conflict: Conflict) -> None:
        """Take a conflict. When this raises, it is offered again."""

    def recall(self, study_uid: str, series_uid: str) -> Iterable[tuple[InstanceHeader, Path]]:
        """Give back the instances already kept of a series, for series closed before."""
        return ()

    def lacks(self, study_uid: str, series_uid: str) -> bool:
        """Whether a series was last closed as incomplete.

        Then also an instance that is here already opens it: its sender may be sending again what broke off, and this
        time come to the end. Asked once for each series and association; where it raises the series is opened, which
        does no harm.
        """
        return False

    def count(self, calling_ae: str, study_uid: str, series_uid: str, answer: Callable[[int | None], None]) -> bool:
        """Whether the sender is being asked how many instances a series has.

        `answer` then gets the number, or None, from any thread.
        """
        return False

    def ended(self, study_uid: str, series_uid: str, instances: int | None) -> None:
        """Note that a sender came to an end of a series, for `Assembly.restore`, should the node go down.

        None withdraws the note: the series goes on, or was closed as incomplete.
        """

    def adopt(self, study_uid: str, series_uid: str, sender: str, same: Collection[str]) -> Adoption:
        """Let what another sender sent join a series: `node.intake.spool.Spool.adopt`."""
        return Adoption(False, 0, 0, frozenset())
