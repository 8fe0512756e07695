"""When series close: the rules one by one, and a state machine that mixes them in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from made_instances import STUDY, header, host

from node.images.geometry import GAP_FACTOR
from node.intake.assembly import (
    ANSWER_S,
    RETRY_S,
    Assembly,
    AssociationId,
    ClosedSeries,
    Ending,
)
from node.intake.header import InstanceHeader
from node.intake.open_series import ONE_ASSOCIATION_GRACE_S
from node.intake.part import Stored

QUIET, GRACE = 30.0, 2.0
CHEST, SCOUT, REPORT = f"{STUDY}.1", f"{STUDY}.2", f"{STUDY}.3"


class Rig:
    """An assembly with a clock to turn, a spool of names, and a list of what closed."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.closed: list[ClosedSeries] = []
        self.spool: dict[str, dict[str, tuple[InstanceHeader, Path]]] = {}
        self.failing = False
        #: What is noted of the end of each series.
        self.ends: dict[tuple[str, str], int] = {}
        self.assembly = self.restarted()
        self.associations = 0

    def restarted(self) -> Assembly:
        around = host(closed=self.take, recall=self.recall, lacks=self.lacks, ended=self.note)
        return Assembly(around, QUIET, grace_s=GRACE, clock=lambda: self.now)

    def note(self, study: str, series: str, instances: int | None) -> None:
        self.ends.pop((study, series), None)
        if instances is not None:
            self.ends[study, series] = instances

    def lacks(self, _study: str, series: str) -> bool:
        last = [one.complete for one in self.closed if one.series_instance_uid == series]
        return last[-1:] == [False]

    def take(self, closed: ClosedSeries) -> None:
        if self.failing:
            raise OSError("the ledger is away")
        self.closed.append(closed)

    def recall(self, _study: str, series: str) -> list[tuple[InstanceHeader, Path]]:
        return list(self.spool.get(series, {}).values())

    def associate(self, calling_ae: str = "CT1") -> AssociationId:
        self.associations += 1
        return AssociationId(self.associations, calling_ae, "LUNGNODE")

    def send(self, association: AssociationId, one: InstanceHeader) -> None:
        kept = self.spool.setdefault(one.series_instance_uid, {})
        outcome: Literal["new", "same"] = "same" if one.sop_instance_uid in kept else "new"
        kept.setdefault(one.sop_instance_uid, (one, Path(f"{one.sop_instance_uid}.dcm")))
        self.assembly.received(association, one, Stored(kept[one.sop_instance_uid][1], outcome))

    def send_all(self, numbers: range | list[int], ending: Ending = "released", series: str = CHEST) -> None:
        association = self.associate()
        for n in numbers:
            self.send(association, header(n, series=series))
        self.assembly.association_ended(association, ending)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.assembly.tick()

    def reasons(self) -> list[tuple[int, bool, str]]:
        return [(len(c.instances), c.complete, c.reason) for c in self.closed]


TILES = "slices tile space from z=0.0 to z=9.0 every 1.0 mm"


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_slices_that_tile_space_close_soon_after_the_association(rig: Rig) -> None:
    association = rig.associate()
    for n in (3, 1, 0, 2, *range(4, 10)):
        rig.send(association, header(n, series=CHEST))
        rig.wait(1)
    rig.assembly.association_ended(association)
    rig.wait(ONE_ASSOCIATION_GRACE_S / 2)
    assert rig.closed == []
    rig.wait(ONE_ASSOCIATION_GRACE_S / 2)
    assert rig.reasons() == [(10, True, f"{TILES}, and the association ended")]
    (closed,) = rig.closed
    assert (closed.study_instance_uid, closed.series_instance_uid) == (STUDY, CHEST)
    assert (closed.calling_ae, closed.called_ae) == ("CT1", "LUNGNODE")
    assert [p.stem for p in closed.paths] == [i.sop_instance_uid for i in closed.instances]
    rig.wait(1000)
    assert len(rig.closed) == 1
    assert rig.assembly.open_series == 0


def test_one_association_an_instance_is_one_series(rig: Rig) -> None:
    for n in range(10):
        rig.send_all([n])
        rig.wait(GRACE / 2)
    rig.wait(GRACE)
    assert rig.reasons() == [(10, True, f"{TILES}, and the association ended")]


def test_an_association_that_was_opened_to_go_on_is_waited_for(rig: Rig) -> None:
    rig.send_all(range(5))
    rig.wait(ONE_ASSOCIATION_GRACE_S / 2)
    going_on, other = rig.associate(), rig.associate("CT2")
    rig.assembly.association_began(going_on)
    rig.wait(GRACE * 0.9)
    assert rig.closed == []
    for n in range(5, 10):
        rig.send(going_on, header(n, series=CHEST))
    rig.assembly.association_ended(going_on)
    rig.assembly.association_began(other)  # another sender's does not matter
    rig.wait(ONE_ASSOCIATION_GRACE_S)
    assert rig.closed == []  # it needed two
    rig.wait(GRACE)
    assert rig.reasons() == [(10, True, f"{TILES}, and the association ended")]


def test_the_sender_s_own_count_needs_no_grace_and_undoes_an_abort(rig: Rig) -> None:
    for ending in ("released", "aborted"):
        series = f"{CHEST}.{ending}"
        association = rig.associate()
        for n in range(10):
            rig.send(association, header(n, series=series, images_in_acquisition=10, acquisition_number=1))
        rig.assembly.association_ended(association, ending)
        rig.wait(0)
    assert rig.reasons() == [(10, True, f"{TILES}, and the association ended")] * 2


def test_the_archive_s_count_is_a_witness(rig: Rig) -> None:
    asked = []

    def count(ae: str, study: str, series: str, tell: Callable[[int | None], None]) -> bool:
        asked.append(tell)
        assert (ae, study, series) == ("CT1", STUDY, CHEST)
        return True

    rig.assembly = Assembly(
        host(closed=rig.take, count=count, recall=rig.recall), QUIET, grace_s=GRACE, clock=lambda: rig.now
    )
    rig.send_all(range(8))
    rig.wait(GRACE)
    assert rig.closed == []  # the answer is awaited
    asked[0](10)
    rig.wait(GRACE)
    assert rig.closed == []
    rig.send_all([8])
    asked[0](3)  # too late to matter
    rig.wait(QUIET)
    short = "incomplete: its sender has 10 instances of it, 9 came; no instance came for 30 s"
    asked[1](10)
    rig.wait(0)
    assert rig.reasons() == [(9, False, short)]
    rig.send_all([9], "aborted")
    asked[2](10)
    rig.wait(QUIET)
    assert rig.reasons()[1:] == [(10, True, f"{TILES}, and no instance came for 30 s")]


def test_an_archive_that_does_not_answer_is_not_waited_for_long(rig: Rig) -> None:
    rig.assembly = Assembly(host(closed=rig.take, count=lambda *_: True), QUIET, grace_s=GRACE, clock=lambda: rig.now)
    rig.send_all(range(10))
    rig.wait(ANSWER_S - 1)
    assert rig.closed == []
    rig.wait(1)
    assert rig.reasons() == [(10, True, f"{TILES}, and the association ended")]


def test_a_gap_waits_and_is_never_whole(rig: Rig) -> None:
    rig.send_all([0, 1, 2, 3, 5, 6, 7])
    rig.wait(QUIET - 1)
    assert rig.closed == []
    rig.wait(1)
    gap = "gap at z = 4.0 mm (2.0 mm between slices, 1.0 mm elsewhere)"
    assert rig.reasons() == [(7, False, f"incomplete: {gap}; no instance came for 30 s")]
    rig.send_all([4])
    rig.wait(QUIET)
    assert rig.reasons()[1:] == [
        (8, True, "slices tile space from z=0.0 to z=7.0 every 1.0 mm, and no instance came for 30 s")
    ]
    assert rig.closed[1].calling_ae == "CT1"


def test_every_other_slice_lies_evenly_but_is_not_whole(rig: Rig) -> None:
    rig.send_all([0, 2, 4, 6, 8])
    rig.wait(QUIET)
    missing = "4 instance numbers between 1 and 9 are missing"
    assert rig.reasons() == [(5, False, f"incomplete: {missing}; no instance came for 30 s")]


def test_an_abort_hides_the_end(rig: Rig) -> None:
    rig.send_all(range(6), "aborted")
    rig.wait(QUIET - 1)
    assert rig.closed == []
    rig.send_all(range(10))
    rig.wait(GRACE)
    assert rig.reasons() == [(10, True, f"{TILES}, and the association ended")]


def test_an_abort_with_nothing_after_it_is_incomplete(rig: Rig) -> None:
    rig.send_all(range(10), "aborted")
    rig.wait(QUIET)
    why = "the association was aborted, so its end may be missing"
    assert rig.reasons() == [(10, False, f"incomplete: {why}; no instance came for 30 s")]


def test_a_resend_completes_a_series_that_was_closed_as_incomplete(rig: Rig) -> None:
    rig.send_all(range(10), "aborted")
    rig.wait(QUIET)
    rig.send_all(range(10))
    rig.wait(QUIET)
    assert rig.reasons()[1:] == [(10, True, f"{TILES}, and no instance came for 30 s")]
    rig.send_all(range(10))
    rig.wait(2 * QUIET)
    assert len(rig.closed) == 2


def test_whether_a_series_was_complete_is_asked_once_an_association_and_holds_up_nobody(rig: Rig) -> None:
    asked = []

    def lacks(study: str, series: str) -> bool:
        asked.append(series)
        other = threading.Thread(target=rig.send_all, args=([0],), kwargs={"series": f"{SCOUT}.{len(asked)}"})
        other.start()
        other.join(5)
        assert not other.is_alive()
        return rig.lacks(study, series)

    rig.assembly = Assembly(
        host(closed=rig.take, recall=rig.recall, lacks=lacks), QUIET, grace_s=GRACE, clock=lambda: rig.now
    )
    rig.send_all(range(5))
    rig.wait(GRACE)
    for _ in range(2):
        rig.send_all(range(5))
    assert asked == [CHEST, CHEST]
    assert rig.assembly.open_series == 2  # the others


def test_a_resend_is_taken_though_it_cannot_be_learnt_whether_the_series_was_complete(rig: Rig) -> None:
    def lacks(_study: str, _series: str) -> bool:
        raise OSError("the ledger is away")

    rig.assembly = Assembly(
        host(closed=rig.take, recall=rig.recall, lacks=lacks), QUIET, grace_s=GRACE, clock=lambda: rig.now
    )
    rig.send_all(range(5), "aborted")
    rig.wait(QUIET)
    rig.send_all(range(5))
    rig.wait(QUIET)
    assert [(count, complete) for count, complete, _ in rig.reasons()] == [(5, False), (5, True)]


def test_another_associations_good_end_does_not_undo_an_abort(rig: Rig) -> None:
    first, second = rig.associate(), rig.associate()
    for n in range(5):
        rig.send(first, header(n, series=CHEST))
        rig.send(second, header(n + 5, series=CHEST))
    rig.wait(1)
    rig.assembly.association_ended(first, "aborted")
    rig.wait(1)
    rig.assembly.association_ended(second, "released")
    rig.wait(QUIET)
    assert [complete for _, complete, _ in rig.reasons()] == [False]


def test_a_sender_that_leaves_its_association_idle_is_not_aborted(rig: Rig) -> None:
    rig.send_all(range(10), "idle")
    rig.wait(QUIET)
    assert rig.closed[0].complete


def test_a_refused_instance_keeps_its_series_from_being_whole_until_it_comes(rig: Rig) -> None:
    association = rig.associate()
    for n in range(9):
        rig.send(association, header(n, series=CHEST))
    rig.assembly.refused(association, header(9, series=CHEST))
    rig.assembly.association_ended(association)
    rig.wait(QUIET - 1)
    assert rig.closed == []
    rig.wait(1)
    why = "1 instances were refused for want of disk and not sent again"
    assert rig.reasons() == [(9, False, f"incomplete: {why}; no instance came for 30 s")]
    rig.send_all(range(10))
    rig.wait(QUIET)
    assert rig.reasons()[1:] == [(10, True, f"{TILES}, and no instance came for 30 s")]


def test_a_series_of_which_all_was_refused_is_forgotten(rig: Rig) -> None:
    association = rig.associate()
    rig.assembly.refused(association, header(0))
    rig.assembly.association_ended(association)
    rig.wait(QUIET)
    assert (rig.closed, rig.assembly.open_series) == ([], 0)


def test_what_geometry_cannot_tell_closes_after_the_association(rig: Rig) -> None:
    association = rig.associate()
    rig.send(association, header(0, series=REPORT, modality="SR", positions=(), orientation=None))
    rig.assembly.association_ended(association)
    rig.wait(GRACE)
    assert rig.reasons() == [(1, True, "geometry cannot tell (no slice positions), and the association ended")]


def test_an_association_that_goes_on_to_other_series_does_not_hold_up_the_first(rig: Rig) -> None:
    association = rig.associate()
    for n in range(10):
        rig.send(association, header(n, series=CHEST))
    for n in range(int(QUIET) + 1):
        rig.wait(1)
        rig.send(association, header(n, series=SCOUT))
    assert rig.reasons() == [(10, True, f"{TILES}, and no instance came for 30 s")]
    assert rig.assembly.open_series == 1


def test_a_stalled_sender_is_waited_for(rig: Rig) -> None:
    association = rig.associate()
    for n in range(5):
        rig.send(association, header(n, series=CHEST))
    rig.wait(10 * QUIET)
    assert rig.closed == []
    rig.assembly.association_ended(association, "aborted")
    rig.wait(0)
    assert [complete for _, complete, _ in rig.reasons()] == [False]


def test_a_resend_does_not_open_a_closed_series_and_late_slices_do(rig: Rig) -> None:
    rig.send_all(range(5))
    rig.wait(GRACE)
    rig.send_all(range(5))
    rig.wait(2 * QUIET)
    assert len(rig.closed) == 1
    rig.send_all(range(3, 10))
    rig.wait(GRACE)
    assert len(rig.closed) == 1  # its sender has shown that an association's end is not the series'
    rig.wait(QUIET)
    assert rig.reasons()[1:] == [(10, True, f"{TILES}, and no instance came for 30 s")]


def test_nothing_is_lost_when_a_closed_series_is_not_taken(rig: Rig) -> None:
    rig.failing = True
    rig.send_all(range(5))
    rig.wait(GRACE)
    rig.wait(RETRY_S / 2)
    rig.failing = False
    assert rig.assembly.open_series == 1
    rig.wait(RETRY_S / 2)
    assert [n for n, _, _ in rig.reasons()] == [5]


def test_what_comes_while_a_series_is_being_taken_closes_with_it_again(rig: Rig) -> None:
    def take(closed: ClosedSeries) -> None:
        rig.closed.append(closed)
        if len(rig.closed) == 1:
            rig.send_all([5])

    rig.assembly = Assembly(host(closed=take), QUIET, grace_s=GRACE, clock=lambda: rig.now)
    rig.send_all(range(5))
    rig.wait(GRACE)
    rig.wait(QUIET)
    assert [n for n, _, _ in rig.reasons()] == [5, 6]
    assert rig.assembly.open_series == 0


def test_a_restart_leaves_the_end_in_doubt_until_the_sender_returns(rig: Rig) -> None:
    rig.send_all(range(5))
    for resend in (False, True):
        rig.closed.clear()
        rig.assembly = rig.restarted()
        rig.assembly.restore(AssociationId(0, "CT1", "LUNGNODE"), rig.recall(STUDY, CHEST))
        if resend:
            rig.send_all(range(5))
            rig.wait(GRACE)
        rig.wait(QUIET)
        assert [(len(c.instances), c.complete, c.calling_ae) for c in rig.closed] == [(5, resend, "CT1")]


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_series_that_had_ended_before_a_restart_may_go_on_for_the_quiet_period(rig: Rig, goes_on: bool) -> None:
    rig.send_all(range(5))
    assert rig.ends == {(STUDY, CHEST): 5}
    rig.assembly = rig.restarted()
    rig.assembly.restore(AssociationId(0, "CT1", "LUNGNODE"), rig.recall(STUDY, CHEST), ended=True)
    rig.wait(QUIET - 1)
    assert rig.closed == []
    if goes_on:
        rig.send_all(range(5, 10))
        rig.wait(GRACE)
    rig.wait(1)
    assert [(len(c.instances), c.complete) for c in rig.closed] == [(10 if goes_on else 5, True)]


def test_a_series_that_had_ended_before_a_restart_is_counted_anew(rig: Rig) -> None:
    def count(_ae: str, _study: str, _series: str, tell: Callable[[int | None], None]) -> bool:
        tell(10)
        return True

    rig.send_all(range(5))
    rig.assembly = Assembly(host(closed=rig.take, count=count), QUIET, clock=lambda: rig.now)
    rig.assembly.restore(AssociationId(0, "CT1", "LUNGNODE"), rig.recall(STUDY, CHEST), ended=True)
    rig.wait(QUIET + ANSWER_S)
    short = "incomplete: its sender has 10 instances of it, 5 came; no instance came for 30 s"
    assert rig.reasons() == [(5, False, short)]


def test_no_end_is_noted_while_it_is_in_doubt(rig: Rig) -> None:
    first, second = rig.associate(), rig.associate()
    for n in range(3):
        rig.send(first, header(n, series=CHEST))
        rig.send(second, header(3 + n, series=CHEST))
    rig.assembly.association_ended(first, "released")  # the other goes on
    rig.assembly.association_ended(second, "aborted")
    third = rig.associate()
    rig.send(third, header(6, series=CHEST))
    rig.assembly.refused(third, header(7, series=CHEST))
    rig.assembly.association_ended(third, "released")
    assert rig.ends == {}
    rig.send_all([7])
    assert rig.ends == {(STUDY, CHEST): 8}


def test_an_end_holds_until_something_of_the_series_comes_again(rig: Rig) -> None:
    for ending in ("aborted", "released"):
        rig.send_all(range(5))
        assert rig.ends == {(STUDY, CHEST): 5}
        again = rig.associate()
        rig.send(again, header(0, series=CHEST))
        assert rig.ends == {}
        rig.assembly.association_ended(again, ending)
        assert rig.ends == ({(STUDY, CHEST): 5} if ending == "released" else {})
    rig.assembly.refused(rig.associate(), header(5, series=CHEST))
    assert rig.ends == {}


def test_the_end_of_a_series_that_was_closed_as_incomplete_is_the_next_one(rig: Rig) -> None:
    rig.send_all([0, 1, 2, 4, 5])
    assert rig.ends == {(STUDY, CHEST): 5}
    rig.wait(QUIET)
    assert rig.ends == {}
    rig.send_all([0, 1, 2, 4, 5])
    assert rig.ends == {(STUDY, CHEST): 5}


def test_a_resend_while_the_series_is_being_taken_is_no_resend_of_nothing(rig: Rig) -> None:
    def take(closed: ClosedSeries) -> None:
        if not rig.closed:
            rig.send_all(range(5))
        rig.closed.append(closed)

    rig.assembly = Assembly(host(closed=take, recall=rig.recall), QUIET, grace_s=GRACE, clock=lambda: rig.now)
    rig.send_all(range(5), "aborted")
    rig.wait(QUIET)
    rig.wait(QUIET)
    assert [(count, complete) for count, complete, _ in rig.reasons()] == [(5, False), (5, True)]


def test_predecessors_that_cannot_be_read_do_not_lose_the_late_slice(rig: Rig) -> None:
    def broken(_study: str, _series: str) -> list[tuple[InstanceHeader, Path]]:
        raise OSError

    rig.assembly = Assembly(host(closed=rig.take, recall=broken), QUIET, grace_s=GRACE, clock=lambda: rig.now)
    rig.send_all([7])
    rig.wait(QUIET)
    assert [n for n, _, _ in rig.reasons()] == [1]


def test_a_series_is_read_from_the_spool_without_holding_up_other_associations(rig: Rig) -> None:
    def recall(study: str, series: str) -> list[tuple[InstanceHeader, Path]]:
        if series == CHEST:
            other = threading.Thread(target=rig.send_all, args=([0],), kwargs={"series": SCOUT})
            other.start()
            other.join(5)
            assert not other.is_alive()
        return rig.recall(study, series)

    rig.send_all(range(10))
    rig.wait(GRACE)
    rig.assembly = Assembly(host(closed=rig.take, recall=recall), QUIET, grace_s=GRACE, clock=lambda: rig.now)
    rig.send_all([10])
    rig.wait(QUIET)
    assert sorted(len(one.instances) for one in rig.closed[1:]) == [1, 11]


def test_a_series_that_is_closed_while_it_is_read_from_the_spool_lacks_nothing_afterwards(rig: Rig) -> None:
    asked: list[str] = []

    def recall(study: str, series: str) -> list[tuple[InstanceHeader, Path]]:
        found = rig.recall(study, series)
        asked.append(series)
        if len(asked) == 1:  # the disk is slow: another association goes on with the series, and it closes meanwhile
            rig.send_all([11])
            rig.wait(QUIET)
        return found

    rig.send_all(range(10))
    rig.wait(GRACE)
    rig.assembly = Assembly(host(closed=rig.take, recall=recall), QUIET, grace_s=GRACE, clock=lambda: rig.now)
    rig.send_all([10])
    rig.wait(QUIET)
    assert {header.sop_instance_uid for header in rig.closed[-1].instances} == rig.spool[CHEST].keys()


class Interleaved(RuleBasedStateMachine):
    """Any interleaving of series, associations, resends, refusals, aborts, pauses and failures of the taker."""

    associations = Bundle("associations")

    @initialize()
    def begin(self) -> None:
        self.rig = Rig()
        self.open: set[AssociationId] = set()
        self.refused: set[str] = set()
        self.seen = 0
        self.covered: dict[str, set[str]] = {}
        self.whole: dict[str, bool] = {}

    @rule(target=associations)
    def associate(self) -> AssociationId:
        association = self.rig.associate()
        self.open.add(association)
        return association

    @rule(association=associations, n=st.integers(0, 7), series=st.sampled_from((CHEST, SCOUT, REPORT)))
    def send(self, association: AssociationId, n: int, series: str) -> None:
        # One series without instance numbers, so that geometry has to find the gaps by itself.
        one = header(n, series=series, instance_number=None if series == SCOUT else n + 1)
        self.refused.discard(one.sop_instance_uid)
        self.rig.send(association, one)

    @rule(association=associations, first=st.integers(0, 7), count=st.integers(1, 8))
    def send_run(self, association: AssociationId, first: int, count: int) -> None:
        for n in range(first, min(first + count, 8)):
            self.send(association, n, CHEST)

    @rule(association=associations, n=st.integers(0, 7))
    def refuse(self, association: AssociationId, n: int) -> None:
        one = header(n, series=CHEST)
        if one.sop_instance_uid not in self.rig.spool.get(CHEST, {}):
            self.refused.add(one.sop_instance_uid)
            self.rig.assembly.refused(association, one)

    @rule(association=consumes(associations), ending=st.sampled_from(("released", "idle", "aborted")))
    def end(self, association: AssociationId, ending: Ending) -> None:
        self.open.discard(association)
        self.rig.assembly.association_ended(association, ending)

    @rule(seconds=st.sampled_from((0.0, 0.5, GRACE, RETRY_S, QUIET, 3 * QUIET)))
    def wait(self, seconds: float) -> None:
        self.rig.wait(seconds)

    @rule(failing=st.booleans())
    def taker(self, failing: bool) -> None:
        self.rig.failing = failing

    @invariant()
    def an_end_is_noted_of_what_came_to_it(self) -> None:
        for (_, series), instances in self.rig.ends.items():
            assert instances == len(self.rig.spool[series])
            assert not {uid for uid in self.refused if uid.startswith(f"{series}.")} or self.whole.get(series)

    @invariant()
    def nothing_closes_as_whole_with_a_gap(self) -> None:
        for closed in self.rig.closed[self.seen :]:
            series = closed.series_instance_uid
            uids = {one.sop_instance_uid for one in closed.instances}
            assert len(uids) == len(closed.instances)
            # Each closed set holds all of the one before, and something more unless it only tells of a refusal, or of
            # a resend that made an incomplete series whole.
            assert uids >= self.covered.get(series, set())
            assert uids > self.covered.get(series, set()) or not (closed.complete and self.whole[series])
            self.covered[series], self.whole[series] = uids, closed.complete
            if closed.complete:
                places = sorted(one.positions[0][2] for one in closed.instances)
                steps = {b - a for a, b in pairwise(places)}
                assert not steps or max(steps) <= (GAP_FACTOR * min(steps) if series == SCOUT else 1.0)
                assert not {uid for uid in self.refused if uid.startswith(f"{series}.")}
            else:
                assert closed.reason.startswith("incomplete: ")
        self.seen = len(self.rig.closed)

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        for association in self.open:
            self.rig.assembly.association_ended(association)
        self.rig.failing = False
        for _ in range(4):
            self.rig.wait(QUIET + RETRY_S)
        self.nothing_closes_as_whole_with_a_gap()
        assert self.rig.assembly.open_series == 0
        assert self.covered == {series: set(kept) for series, kept in self.rig.spool.items()}


Interleaved.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyInterleaving = Interleaved.TestCase
