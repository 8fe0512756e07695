"""When is a series complete? Instances and ends of associations go in, closed series come out.

DICOM does not say how many instances a series has, so the end is proved from what there is: slices that tile space, an
association that was released, a numbering without holes. Where proof is lacking, a quiet period decides and the reason
is kept. A gap, an abort or a refused instance never reads as complete.

No thread lives here: `Assembly.tick` is called by whoever drives it, and only there are series closed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from node.intake.header import InstanceHeader
from node.intake.open_series import GRACE_S, Asking, Examined, Judgement, Offered, OpenSeries, Receiving, after
from node.intake.other_sender import OtherSender
from node.intake.part import Stored
from node.intake.series import AssociationId, ClosedSeries, Conflict, Ending, Host, Key
from node.intake.stack import numbers_missing
from node.telemetry.logs import plainly

__all__ = ["Assembly", "AssociationId", "ClosedSeries", "Conflict", "Ending", "Host"]

log = structlog.stdlib.get_logger(__name__)

#: Series whose refused instances are remembered after they were closed; beyond it the oldest are forgotten.
_REMEMBERED = 1000

#: Series of which it is remembered what another sender has sent; beyond it those that came longest ago are forgotten.
_REMEMBERED_OTHERS = 200

#: Seconds that an answer to how many instances there are is waited for.
ANSWER_S = 10.0

#: Seconds until a series is offered again when it was not taken.
RETRY_S = 5.0

#: An instance and where it is kept.
_Kept = tuple[InstanceHeader, Path]


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
    host
        Takes what is closed, from the thread that calls `tick`, and knows what was closed before.
    quiet_s
        Seconds without an instance after which a series is closed without proof.
    grace_s
        Seconds after the end of an association in which the next one may continue the series.
    clock
        Monotonic seconds.
    """

    def __init__(
        self, host: Host, quiet_s: float, *, grace_s: float = GRACE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._host = host
        self._quiet_s = quiet_s
        self._grace_s = min(grace_s, quiet_s)
        self._clock = clock
        self._open: dict[Key, OpenSeries] = {}
        #: The series that each association sent last: it may be in the middle of it.
        self._sending: dict[AssociationId, Key] = {}
        #: Associations that have sent nothing yet, and when they began.
        self._silent: dict[AssociationId, float] = {}
        #: SOP instance UIDs that were refused and have not come since; outlives the closing of their series.
        self._lacking: dict[Key, set[str]] = {}
        #: Series that each association sends again though they are complete.
        self._in_vain: dict[AssociationId, set[Key]] = {}
        #: What others sent of series that do not belong to them, by series and AE title, in order of arrival.
        self._others: dict[tuple[Key, str], OtherSender] = {}
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

    def _received_of_other(self, association: AssociationId, key: Key, header: InstanceHeader, stored: Stored) -> None:
        with self._lock:
            self._sending.pop(association, None)
            self._silent.pop(association, None)
            name = (key, association.calling_ae)
            # At the end again, as the one that came last.
            other = self._others.pop(name, None) or OtherSender(stored.belongs_to, association)
            self._others[name] = other
            if len(self._others) > _REMEMBERED_OTHERS:
                waits = (one for one, its in self._others.items() if its.examined)
                self._others.pop(next(waits, next(iter(self._others))))
            other.came(association, header.sop_instance_uid, stored, self._clock())

    def restore_other(self, association: AssociationId, study_uid: str, series_uid: str, belongs_to: str) -> None:
        """What another sender sent of a series was found on disk after a restart, and may not be recorded yet."""
        with self._lock:
            other = OtherSender(belongs_to, association, last=self._clock())
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
        """An association is sending no instance now, though it stays open: the quiet period holds for its series."""
        with self._lock:
            self._sending.pop(association, None)

    def association_ended(self, association: AssociationId, ending: Ending = "released") -> None:
        """An association is over. May be called twice."""
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
        self, association: AssociationId, instances: Iterable[_Kept], *, ended: bool = False, closed: bool = False
    ) -> None:
        """Open a series found on disk after a restart.

        One whose sender had `ended`, with just these instances, is judged by its geometry after the quiet period:
        while the node was away its sender could not go on with it. So is one that is known to have been `closed`
        before. Another is not complete unless its sender says so by sending more.
        """
        now = self._clock()
        with self._lock:
            found = dict[Key, OpenSeries]()
            for header, path in instances:
                key = (header.study_instance_uid, header.series_instance_uid)
                series = found[key] = self._open.setdefault(key, OpenSeries(key, now))
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
                waiting = [(*name, other) for name, other in self._others.items() if name[0] not in self._open]
                now = self._clock()
                others = [one for one in waiting if one[2].is_due(now, self._quiet_s, self._grace_s)]
            for key, sender, other in others:
                self._compare(key, sender, other)

    @property
    def open_series(self) -> int:
        """Series that are open now."""
        return len(self._open)

    def _lacks(self, key: Key) -> bool:
        """Whether a series was last closed as incomplete, as far as that can be learnt."""
        try:
            return self._host.lacks(*key)
        except Exception as error:
            # The instance at hand is kept, and its sender must get its answer.
            log.warning("it cannot be learnt whether the series was complete", series=key[1], error=plainly(error))
            return True

    @contextmanager
    def _opened(self, association: AssociationId, key: Key, header: InstanceHeader) -> Iterator[OpenSeries]:
        """A series that is open, with the lock held; opened with what the spool holds of it, where it is not."""
        closings = self._closings
        # Outside the lock, so that a slow disk does not hold up other associations.
        recalled = None if key in self._open else self._recalled(key)
        with self._lock:
            series = self._open.get(key)
            if series is None:
                if recalled is None or closings != self._closings:
                    recalled = self._recalled(key)  # it may just have been closed, with more than was read
                series = self._open[key] = OpenSeries(key, self._clock(), refused=self._lacking.get(key, set()))
                series.instances.update(recalled)
                series.sender = association  # the spool, which recalls it, holds this instance too
                series.reopened = bool(series.instances.keys() - {header.sop_instance_uid})
            yield series

    def _recalled(self, key: Key) -> dict[str, _Kept]:
        try:
            return {known.sop_instance_uid: (known, path) for known, path in self._host.recall(*key)}
        except Exception as error:
            # The instance at hand is on disk and acknowledged; it must not be lost for want of its predecessors.
            log.error("earlier instances of the series cannot be read", series=key[1], error=plainly(error))
            return {}

    def _is_due_or_fails(self, series: OpenSeries) -> bool:
        """`_is_due`; a series that cannot be judged holds up no other, and comes to its end after the quiet period."""
        try:
            return self._is_due(series)
        except Exception as error:
            log.error("the series cannot be judged", series=series.key[1], error=plainly(error))
            reason = f"incomplete: its slices cannot be compared ({type(error).__name__})"
            series.judgement = Judgement(False, f"{reason}; no instance came for {self._quiet_s:g} s")
            return bool(series.instances) and self._clock() - series.last >= self._quiet_s

    def _is_due(self, series: OpenSeries) -> bool:
        """Whether to close now; leaves the judgement in `series`."""
        now = self._clock()
        if not series.instances:
            # Nothing but refused instances: the sender holds them all, so there is nothing to close.
            if not series.associations and now - series.last >= self._quiet_s:
                del self._open[series.key]
            return False
        if isinstance(series.phase, Asking | Offered):
            if now < series.phase.until:
                return False
            series.phase = after(series.phase.ended_at)
        if now - series.last >= self._quiet_s:
            if any(self._sending.get(association) == series.key for association in series.associations):
                # Its sender is in the middle of this very series; the listener's timeouts end that.
                return False
            series.judgement = series.judged(f"no instance came for {self._quiet_s:g} s")
            return True
        phase = series.phase
        if series.associations or series.reopened or isinstance(phase, Receiving | Examined):
            return False
        if now - phase.ended_at < series.grace_s(self._grace_s) or self._goes_on(series, now):
            return False
        series.phase = Examined(phase.ended_at)
        if numbers_missing(series.headers):
            return False
        series.judgement = series.judged("the association ended")
        return series.judgement.complete

    def _compare(self, key: Key, sender: str, other: OtherSender) -> None:
        """Take what another sender sent into the series, or record a conflict once no more of it comes."""
        with self._lock:
            extent, same, over = other.extent, frozenset(other.same), other.over
        try:
            # Outside the lock: it may have to read files.
            found = self._host.adopt(*key, sender, same)
            differing = other.differing | found.differing
            if found.agreed:
                other.joining |= found.extra > 0
                if other.joining or self._lacks(key):
                    self._join(key, other)
            elif over and (found.extra or differing):
                self._host.conflict(
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

    def _join(self, key: Key, other: OtherSender) -> None:
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

    def _ask(self, series: OpenSeries) -> None:
        """Ask its sender how many instances it has."""
        series.asked += 1
        question = series.asked

        def answer(count: int | None) -> None:
            with self._lock:
                if question == series.asked:
                    series.answered(count)

        series.asking(self._clock() + ANSWER_S)
        if not self._host.count(series.sender.calling_ae, *series.key, answer):
            series.phase = after(series.phase.ended_at)

    def _goes_on(self, series: OpenSeries, now: float) -> bool:
        """Whether its sender has opened another association, of which nothing has come yet."""
        sender = series.sender.calling_ae
        return any(one.calling_ae == sender and now - at < self._grace_s for one, at in self._silent.items())

    def _close(self, series: OpenSeries, closed: ClosedSeries, extent: tuple[int, int, int]) -> None:
        """Offer the series as it was when it was judged; forget it unless more has come meanwhile."""
        try:
            # Outside the lock, so that a slow ledger does not hold up the associations.
            self._host.closed(closed)
        except Exception as error:
            log.error("closed series was not taken, kept open", series=series.key[1], error=plainly(error))
            with self._lock:
                now = self._clock()
                series.refused_at(now, now + RETRY_S)
            return
        about = {"instances": len(closed.instances), "complete": closed.complete, "reason": closed.reason}
        log.info("series closed", series=closed.series_instance_uid, **about)
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
                self._host.ended(*series.key, None)

    def _note(self, key: Key) -> None:
        """Note that the sender of an open series has come to an end of it, or that it has not."""
        with self._noting:
            with self._lock:
                series = self._open.get(key)
                if series is None:
                    return
                doubt = series.associations or series.broken or series.refused
                instances = None if doubt else len(series.instances)
            # Outside the lock, so that a slow disk does not hold up the associations.
            self._host.ended(*key, instances)
