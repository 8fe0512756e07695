"""When is a series complete? Instances and ends of associations go in, closed series come out.

DICOM does not say how many instances a series has, so the end is proved from what there is: slices that tile space, an
association that was released, a numbering without holes. Where proof is lacking, a quiet period decides and the reason
is kept. A gap, an abort or a refused instance never reads as complete.

No thread lives here: `Assembly.tick` is called by whoever drives it, and only there are series closed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import structlog

from node.images.geometry import GAP_FACTOR
from node.intake.header import InstanceHeader
from node.intake.part import Stored
from node.intake.spool import Adoption
from node.intake.stack import FEWEST, Tiling, count_reached, numbers_missing, tile
from node.telemetry.logs import plainly

__all__ = ["Assembly", "AssociationId", "ClosedSeries", "Conflict", "Ending", "InstanceHeader"]

log = structlog.stdlib.get_logger(__name__)

#: Seconds after the end of an association in which the next one may continue the series: some senders open one for
#: each instance, others one for each hundred.
GRACE_S = 2.0

#: The same for a series that came over one association so far, more than a few instances of it. Should that have been
#: the first hundred, the sender's next association, which is waited for as soon as it is open, is long under way.
ONE_ASSOCIATION_GRACE_S = 1.0

#: How an association ended: by A-RELEASE, because nothing came for too long between two instances, or otherwise.
Ending = Literal["released", "idle", "aborted"]

#: Series whose refused instances are remembered after they were closed; beyond it the oldest are forgotten.
_REMEMBERED = 1000

#: Series of which it is remembered what another sender has sent; beyond it those that came longest ago are forgotten.
_REMEMBERED_OTHERS = 200

#: Seconds that an answer to how many instances there are is waited for.
ANSWER_S = 10.0

#: Seconds until a series is offered again when `on_closed` failed.
RETRY_S = 5.0


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


class Assembly:
    """Puts series together from instances that come in any order, over any associations, more than once.

    A closed series is forgotten. When another instance of it comes, `recall` brings back what the spool holds, and it
    is closed again as a whole, larger set, this time only after the quiet period: its sender has shown that the end of
    an association is not the end of the series.

    A series belongs to the AE title that sent its first instance. What another one sends is compared once the series
    itself is closed: where that sender has sent every instance of the series with the same content, as a PACS that
    forwards what the scanner sent here too, what else it sent joins the series; else that is a conflict, and none of it
    does. So nobody can replace, or add to, what another has sent.

    Parameters
    ----------
    on_closed
        Takes each closed series, from the thread that calls `tick`. When it raises, the series stays open and is
        offered again.
    quiet_s
        Seconds without an instance after which a series is closed without proof.
    recall
        (study UID, series UID) → the instances already kept of the series, for series closed before.
    lacking
        (study UID, series UID) → whether the series was last closed as incomplete. Then also an instance that is here
        already opens it: its sender may be sending again what broke off, and this time come to the end. Asked once a
        series and association; where it raises the series is opened, which does no harm.
    count
        (calling AE title, study UID, series UID, tell) → whether the sender is being asked how many instances the
        series has; `tell` then gets the number, or None, from any thread.
    ended
        (study UID, series UID, instances) of a series whose sender came to an end of it: for `restore`, should the
        node go down before it is closed. None withdraws that: the series goes on, or was closed as incomplete.
    adopt
        `node.intake.spool.Spool.adopt`: (study UID, series UID, AE title, SOP instance UIDs that it sent alike).
    conflict
        Takes each conflict, from the thread that calls `tick`. When it raises, it is offered again.
    clock
        Monotonic seconds.
    """

    def __init__(
        self,
        on_closed: Callable[[ClosedSeries], None],
        quiet_s: float,
        *,
        recall: Callable[[str, str], Iterable[tuple[InstanceHeader, Path]]] | None = None,
        lacking: Callable[[str, str], bool] | None = None,
        count: Callable[[str, str, str, Callable[[int | None], None]], bool] | None = None,
        ended: Callable[[str, str, int | None], None] = lambda _study, _series, _instances: None,
        adopt: Callable[[str, str, str, Collection[str]], Adoption] | None = None,
        conflict: Callable[[Conflict], None] = lambda _conflict: None,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_closed = on_closed
        self._quiet_s = quiet_s
        self._grace_s = min(grace_s, quiet_s)
        self._one_association_grace_s = min(self._grace_s, ONE_ASSOCIATION_GRACE_S)
        self._recall = recall or (lambda _study, _series: ())
        self._closed_lacking = lacking or (lambda _study, _series: False)
        self._count = count or (lambda _ae, _study, _series, _tell: False)
        self._ended = ended
        self._adopt = adopt or (lambda _study, _series, _sender, _same: Adoption(False, 0, 0, frozenset()))
        self._conflict = conflict
        self._clock = clock
        self._open: dict[_Key, _OpenSeries] = {}
        #: The series that each association sent last: it may be in the midst of it.
        self._sending: dict[AssociationId, _Key] = {}
        #: Associations that have sent nothing yet, and when they began.
        self._silent: dict[AssociationId, float] = {}
        #: SOP instance UIDs that were refused and have not come since; outlives the closing of their series.
        self._lacking: dict[_Key, set[str]] = {}
        #: Series that each association sends again though they are complete.
        self._in_vain: dict[AssociationId, set[_Key]] = {}
        #: What others sent of series that do not belong to them, by series and AE title, in order of arrival.
        self._others: dict[tuple[_Key, str], _Other] = {}
        #: Series closed so far.
        self._closings = 0
        self._lock = threading.RLock()
        self._ticking = threading.Lock()
        #: Held while the end of a series is noted, so that the last note is the true one; taken before `_lock`.
        self._noting = threading.Lock()

    def association_began(self, association: AssociationId) -> None:
        """An association is open. A series that its sender sent before may be about to go on."""
        with self._lock:
            self._silent[association] = self._clock()

    def received(self, association: AssociationId, header: InstanceHeader, stored: Stored) -> None:
        """An instance has been stored. What was there before ('same', 'differs') opens no series that is complete."""
        key = (header.study_instance_uid, header.series_instance_uid)
        if stored.belongs_to:
            self._received_of_other(association, key, header, stored)
            return
        with self._lock:
            self._sending[association] = key
            self._silent.pop(association, None)
            in_vain = self._in_vain.get(association, set())
            known = stored.outcome != "new" and key not in self._open
            if known and key in in_vain:
                return
        # Outside the lock, so that a slow ledger does not hold up other associations.
        if known and not self._lacks(key):
            with self._lock:
                if key not in self._open:
                    self._in_vain[association] = in_vain | {key}
                    return
        with self._opened(association, key, header) as series:
            if header.sop_instance_uid not in series.instances:
                series.instances[header.sop_instance_uid] = (header, stored.path)
                series.sender = association
            series.refused.discard(header.sop_instance_uid)
            first = series.touch(association, self._clock())
        if first:
            self._note(key)

    def _received_of_other(self, association: AssociationId, key: _Key, header: InstanceHeader, stored: Stored) -> None:
        with self._lock:
            self._sending.pop(association, None)
            self._silent.pop(association, None)
            name = (key, association.calling_ae)
            # At the end again, as the one that came last.
            other = self._others.pop(name, None) or _Other(stored.belongs_to, association)
            self._others[name] = other
            if len(self._others) > _REMEMBERED_OTHERS:
                waits = (one for one, its in self._others.items() if its.examined)
                self._others.pop(next(waits, next(iter(self._others))))
            other.came(association, header.sop_instance_uid, stored, self._clock())

    def restore_other(self, association: AssociationId, study_uid: str, series_uid: str, belongs_to: str) -> None:
        """What another sender sent of a series was found on disk after a restart, and may not be told of yet."""
        with self._lock:
            other = _Other(belongs_to, association, last=self._clock())
            self._others[(study_uid, series_uid), association.calling_ae] = other

    def refused(self, association: AssociationId, header: InstanceHeader) -> None:
        """An instance was not stored, through no fault of its own: until it comes again, its series lacks it."""
        key = (header.study_instance_uid, header.series_instance_uid)
        with self._opened(association, key, header) as series:
            self._sending[association] = key
            self._silent.pop(association, None)
            if header.sop_instance_uid not in series.instances:
                series.refused.add(header.sop_instance_uid)
                self._lacking[key] = series.refused
                if len(self._lacking) > _REMEMBERED:
                    del self._lacking[next(iter(self._lacking))]
            series.touch(association, self._clock())
        self._note(key)

    def pauses(self, association: AssociationId) -> None:
        """An association is amid no instance, though it stays open: the quiet period holds for its series."""
        with self._lock:
            self._sending.pop(association, None)

    def association_ended(self, association: AssociationId, ending: Ending = "released") -> None:
        """An association is over. May be told twice."""
        ended = []
        with self._lock:
            self._sending.pop(association, None)
            self._silent.pop(association, None)
            self._in_vain.pop(association, None)
            for other in self._others.values():
                if association in other.associations:
                    other.associations.discard(association)
                    other.ended_at, other.ending = self._clock(), ending
            for series in self._open.values():
                if association in series.associations:
                    series.end(association, ending, self._clock())
                    self._ask(series)
                    ended.append(series.key)
        for key in ended:
            self._note(key)

    def restore(
        self,
        association: AssociationId,
        instances: Iterable[tuple[InstanceHeader, Path]],
        *,
        ended: bool = False,
        closed: bool = False,
    ) -> None:
        """Open a series found on disk after a restart.

        One whose sender had `ended`, with just these instances, is judged by its geometry after the quiet period:
        while the node was away its sender could not go on with it. So is one that is known to have been `closed`
        before. Another is not complete unless its sender says so by sending more.
        """
        now = self._clock()
        with self._lock:
            found = dict[_Key, _OpenSeries]()
            for header, path in instances:
                key = (header.study_instance_uid, header.series_instance_uid)
                series = found[key] = self._open.setdefault(key, _OpenSeries(key, now))
                series.instances.setdefault(header.sop_instance_uid, (header, path))
                series.sender = association
            for series in found.values():
                if ended:
                    self._ask(series)  # what was answered before is lost
                elif not closed:
                    series.broken, series.broken_at = "the node was restarted while the series was open", now

    def tick(self) -> None:
        """Close what can be closed."""
        with self._ticking:
            with self._lock:
                due = [series for series in list(self._open.values()) if self._is_due_or_fails(series)]
                closing = [(series, series.closed(self._clock()), series.extent) for series in due]
            for series, closed, extent in closing:
                self._close(series, closed, extent)
            with self._lock:
                others = [(*name, other) for name, other in self._others.items() if self._may_be_compared(name, other)]
            for key, sender, other in others:
                self._compare(key, sender, other)

    @property
    def open_series(self) -> int:
        """Series that are open now."""
        return len(self._open)

    def _lacks(self, key: _Key) -> bool:
        """Whether a series was last closed as incomplete, as far as that can be learnt."""
        try:
            return self._closed_lacking(*key)
        except Exception as error:
            # The instance at hand is kept, and its sender is to be told so.
            log.warning("it cannot be learnt whether the series was complete", series=key[1], error=plainly(error))
            return True

    @contextmanager
    def _opened(self, association: AssociationId, key: _Key, header: InstanceHeader) -> Iterator[_OpenSeries]:
        """A series that is open, with the lock held; opened with what the spool holds of it, where it is not."""
        closings = self._closings
        # Outside the lock, so that a slow disk does not hold up other associations.
        recalled = None if key in self._open else self._recalled(key)
        with self._lock:
            series = self._open.get(key)
            if series is None:
                if recalled is None or closings != self._closings:
                    recalled = self._recalled(key)  # it may just have been closed, with more than was read
                series = self._open[key] = _OpenSeries(key, self._clock(), refused=self._lacking.get(key, set()))
                series.instances.update(recalled)
                series.sender = association  # the spool, which recalls it, holds this instance too
                series.reopened = bool(series.instances.keys() - {header.sop_instance_uid})
            yield series

    def _recalled(self, key: _Key) -> dict[str, tuple[InstanceHeader, Path]]:
        try:
            return {known.sop_instance_uid: (known, path) for known, path in self._recall(*key)}
        except Exception as error:
            # The instance at hand is on disk and acknowledged; it must not be lost for want of its predecessors.
            log.error("earlier instances of the series cannot be read", series=key[1], error=plainly(error))
            return {}

    def _is_due_or_fails(self, series: _OpenSeries) -> bool:
        """`_is_due`; a series that cannot be judged holds up no other, and comes to its end after the quiet period."""
        try:
            return self._is_due(series)
        except Exception as error:
            log.error("the series cannot be judged", series=series.key[1], error=plainly(error))
            reason = f"incomplete: its slices cannot be compared ({type(error).__name__})"
            series.verdict = (False, f"{reason}; no instance came for {self._quiet_s:g} s", False)
            return bool(series.instances) and self._clock() - series.last >= self._quiet_s

    def _is_due(self, series: _OpenSeries) -> bool:
        """Whether to close now; leaves the verdict in `series`."""
        now = self._clock()
        if not series.instances:
            # Nothing but refused instances: the sender holds them all, so there is nothing to close.
            if not series.associations and now - series.last >= self._quiet_s:
                del self._open[series.key]
            return False
        if now < max(series.retry_at, series.asking_until):
            return False
        if now - series.last >= self._quiet_s:
            if any(self._sending.get(association) == series.key for association in series.associations):
                # In the midst of sending this very series; the listener's timeouts end that.
                return False
            series.verdict = series.judge(f"no instance came for {self._quiet_s:g} s")
            return True
        if series.associations or series.ended_at is None or series.reopened or series.examined:
            return False
        if now - series.ended_at < self._grace(series) or self._goes_on(series, now):
            return False
        series.examined = True
        if numbers_missing(series.headers):
            return False
        series.verdict = series.judge("the association ended")
        return series.verdict[0]

    def _may_be_compared(self, name: tuple[_Key, str], other: _Other) -> bool:
        """Whether it is time to compare what another sender sent, with the series that is closed."""
        now = self._clock()
        if other.examined or name[0] in self._open or now < other.retry_at:
            return False
        other.over = now - other.last >= self._quiet_s
        ended = not other.associations and other.ended_at is not None and now - other.ended_at >= self._grace_s
        return other.over or (ended and not other.tried)

    def _compare(self, key: _Key, sender: str, other: _Other) -> None:
        """Take what another sender sent into the series, or record a conflict once no more of it comes."""
        with self._lock:
            extent, same, over = other.extent, frozenset(other.same), other.over
        try:
            # Outside the lock: it may have to read files.
            found = self._adopt(*key, sender, same)
            differing = other.differing | found.differing
            if found.agreed:
                other.joining |= found.extra > 0
                if other.joining or self._lacks(key):
                    self._join(key, other)
            elif over and (found.extra or differing):
                self._conflict(
                    Conflict(*key, other.belongs_to, sender, other.address, len(differing), found.extra, found.held)
                )
        except Exception as error:
            log.error("what another sender sent of a series is not compared yet", series=key[1], error=plainly(error))
            other.retry_at = self._clock() + RETRY_S
            return
        with self._lock:
            if other.extent == extent:
                other.tried, other.examined = True, over or found.agreed
                if found.agreed:
                    self._others.pop((key, sender), None)

    def _join(self, key: _Key, other: _Other) -> None:
        """Open a series again with what another sender has added to it, or has come to the end of."""
        sender = AssociationId(0, other.belongs_to, other.called_ae, other.address)
        recalled = self._recalled(key)
        if not recalled:
            raise OSError("no instance of the series can be read")
        with self._opened(sender, key, next(iter(recalled.values()))[0]) as series:
            for sop_instance_uid, one in recalled.items():
                series.instances.setdefault(sop_instance_uid, one)
                series.refused.discard(sop_instance_uid)
            series.touch(sender, self._clock())
            series.end(sender, other.ending, self._clock())
        self._note(key)

    def _ask(self, series: _OpenSeries) -> None:
        """Ask its sender how many instances it has."""
        series.asked += 1
        question = series.asked

        def tell(count: int | None) -> None:
            with self._lock:
                if question == series.asked:
                    series.counted, series.asking_until = count, 0.0
                    series.examined = False

        if self._count(series.sender.calling_ae, *series.key, tell):
            series.asking_until = self._clock() + ANSWER_S

    def _grace(self, series: _OpenSeries) -> float:
        """Seconds that the end of an association leaves for the next to begin."""
        if count_reached(series.headers):
            return 0.0
        one = series.came_over == 1 and len(series.instances) >= FEWEST
        return self._one_association_grace_s if one else self._grace_s

    def _goes_on(self, series: _OpenSeries, now: float) -> bool:
        """Whether its sender has opened another association, of which nothing has come yet."""
        sender = series.sender.calling_ae
        return any(one.calling_ae == sender and now - at < self._grace_s for one, at in self._silent.items())

    def _close(self, series: _OpenSeries, closed: ClosedSeries, extent: tuple[int, int, int]) -> None:
        """Offer the series as it was when it was judged; forget it unless more has come meanwhile."""
        try:
            # Outside the lock, so that a slow ledger does not hold up the associations.
            self._on_closed(closed)
        except Exception as error:
            log.error("closed series was not taken, kept open", series=series.key[1], error=plainly(error))
            with self._lock:
                now = self._clock()
                series.retry_at = now + RETRY_S
                series.offered_at = now if series.offered_at is None else series.offered_at
                series.examined = False
            return
        log.info(
            "series closed",
            series=closed.series_instance_uid,
            instances=len(closed.instances),
            complete=closed.complete,
            reason=closed.reason,
        )
        with self._noting:
            with self._lock:
                if changed := series.extent != extent:
                    series.reopened = True
                else:
                    self._open.pop(series.key, None)
                    self._closings += 1
                    if not series.refused:
                        self._lacking.pop(series.key, None)
            if not (changed or closed.complete):
                # From here on only another end is news.
                self._ended(*series.key, None)

    def _note(self, key: _Key) -> None:
        """Note that the sender of an open series has come to an end of it, or that it has not."""
        with self._noting:
            with self._lock:
                series = self._open.get(key)
                if series is None:
                    return
                doubt = series.associations or series.broken or series.refused
                instances = None if doubt else len(series.instances)
            # Outside the lock, so that a slow disk does not hold up the associations.
            self._ended(*key, instances)


_Key = tuple[str, str]


@dataclass
class _OpenSeries:
    key: _Key
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
    ended_at: float | None = None
    #: What broke off the sending; empty when nothing did, or when it was begun again since and brought to its end.
    broken: str = ""
    broken_at: float = 0.0
    #: Whether it was closed before.
    reopened: bool = False
    #: Whether it was found wanting since something last happened to it.
    examined: bool = False
    retry_at: float = 0.0
    #: When it was first offered in vain.
    offered_at: float | None = None
    #: How many instances its sender has, as it said; None while it has not.
    counted: int | None = None
    #: Questions asked so far, and until when the answer to the last is waited for.
    asked: int = 0
    asking_until: float = 0.0
    #: Whether it is complete, why, and whether it lacks no more than slices that leave a gap.
    verdict: tuple[bool, str, bool] = (False, "", False)

    @property
    def headers(self) -> list[InstanceHeader]:
        return [header for header, _ in self.instances.values()]

    @property
    def extent(self) -> tuple[int, int, int]:
        """Changes whenever the series has become another, or its sender has begun to send it again."""
        return len(self.instances), len(self.refused), self.came_over

    def touch(self, association: AssociationId, now: float) -> bool:
        """Something of it came; gives whether it is the first over this association."""
        first = association not in self.associations
        if first:
            self.associations[association] = now
            self.came_over += 1
        self.last = now
        self.examined = False
        return first

    def end(self, association: AssociationId, ending: Ending, now: float) -> None:
        begun = self.associations.pop(association)
        self.ended_at = now
        self.examined = False
        if ending == "aborted":
            self.broken, self.broken_at = "the association was aborted", now
        elif begun >= self.broken_at:
            self.broken = ""

    def judge(self, ended: str) -> tuple[bool, str, bool]:
        """The verdict, given what `ended` the series."""
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
            return False, f"incomplete: {'; '.join(missing)}; {ended}", missing == [tiling.detail]
        shape = {
            "even": tiling.detail,
            "uneven": f"no slice is missing, though they make no regular grid ({tiling.detail})",
        }.get(tiling.kind, f"geometry cannot tell ({tiling.detail})")
        return True, f"{shape}, and {ended}{f', although {doubt}' if doubt else ''}", False

    def closed(self, now: float) -> ClosedSeries:
        """The series under its last verdict."""
        return ClosedSeries(
            series_instance_uid=self.key[1],
            study_instance_uid=self.key[0],
            calling_ae=self.sender.calling_ae,
            called_ae=self.sender.called_ae,
            instances=tuple(self.headers),
            paths=tuple(path for _, path in self.instances.values()),
            complete=self.verdict[0],
            reason=self.verdict[1],
            only_gaps=self.verdict[2],
            offered_for_s=0.0 if self.offered_at is None else now - self.offered_at,
        )


class _Other:
    """What another sender than the one that a series belongs to sent of it."""

    def __init__(self, belongs_to: str, association: AssociationId, last: float = 0.0) -> None:
        self.belongs_to = belongs_to
        self.called_ae, self.address = association.called_ae, association.address
        #: SOP instance UIDs of the series that it sent with the content that is here, and with other content.
        self.same: set[str] = set()
        self.differing: set[str] = set()
        #: Instances so far, of whatever kind.
        self.extent = 0
        self.associations: set[AssociationId] = set()
        self.last = last
        self.ended_at: float | None = None
        self.ending: Ending = "released"
        #: Whether the quiet period is over, so that no more of it is waited for.
        self.over = False
        #: Whether it was compared since the last instance came, and whether it need not be again until more comes.
        self.tried = False
        self.examined = False
        #: Whether instances of it have joined the series, which is yet to be opened again for them.
        self.joining = False
        self.retry_at = 0.0

    def came(self, association: AssociationId, sop_instance_uid: str, stored: Stored, now: float) -> None:
        """An instance of it was stored."""
        self.called_ae, self.address = association.called_ae, association.address
        self.associations.add(association)
        self.last, self.ended_at = now, None
        self.tried = self.examined = False
        self.extent += 1
        if stored.outcome == "differs":
            self.differing.add(sop_instance_uid)
            self.same.discard(sop_instance_uid)
        elif not stored.aside and sop_instance_uid not in self.differing:
            self.same.add(sop_instance_uid)


def _dense(tiling: Tiling, headers: list[InstanceHeader]) -> bool:
    """Whether slices are about as far apart as they are thick, or have no places that could lack one."""
    if not any(header.positions for header in headers):
        return True
    thickness = min((header.slice_thickness or 0.0) for header in headers)
    return tiling.whole and tiling.step <= GAP_FACTOR * thickness
