"""The table of states: what it allows, that nothing else can be written, and that all of it can be reached."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import hypothesis.strategies as st
import pytest
from conftest import REPOSITORY, Clock
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import select

from node.ledger import superseding
from node.ledger.leases import MAX_BACKOFF_S, Lease, LeaseLost, PeerLease
from node.ledger.ledger import Ledger
from node.ledger.record import move, move_all
from node.ledger.tables import AnalysisJob, Base, Delivery, Object, PeerRecord, Series, Work
from node.ledger.transitions import (
    ENDED,
    INITIAL,
    PUT_BACK,
    TAKEN,
    TRANSITIONS,
    Kind,
    State,
    TransitionError,
    diagram,
)

TABLES: dict[Kind, type[Work]] = {
    Kind.ANALYSIS: AnalysisJob,
    Kind.DELIVERY: Delivery,
    Kind.PEER: PeerRecord,
}


def states_of(kind: Kind) -> set[State]:
    return {state for of, state in TRANSITIONS if of is kind}


@contextmanager
def memory(clock: Clock) -> Iterator[Ledger]:
    ledger = Ledger("sqlite://", clock)
    Base.metadata.create_all(ledger.engine)
    yield ledger
    ledger.engine.dispose()


@pytest.mark.parametrize("kind", list(Kind))
def test_every_state_can_be_reached_and_has_a_row(kind: Kind) -> None:
    reached, new = set[State](), set(INITIAL[kind])
    while new:
        reached |= new
        new = {to for state in new for to in TRANSITIONS[kind, state]} - reached
    assert reached == states_of(kind)


def test_every_state_belongs_to_a_kind_and_is_due_leased_ended_or_stored() -> None:
    assert {state for _, state in TRANSITIONS} == set(State)
    groups = (set(TAKEN), set(PUT_BACK), set(ENDED), {State.STORED})
    assert set.union(*groups) == set(State)
    assert sum(map(len, groups)) == len(State)
    for (kind, state), follow in TRANSITIONS.items():
        assert all(follow.values())
        if state in TAKEN:
            assert {to for to in follow if to in PUT_BACK} == {TAKEN[state]}
        if state in PUT_BACK:
            assert {state, PUT_BACK[state]} <= set(follow)  # taken over, and put back
        assert follow or (kind, state) != (Kind.PEER, state)  # a peer has no end


@given(kind=st.sampled_from(Kind), wanted=st.lists(st.sampled_from(State), max_size=12))
@settings(max_examples=200)
def test_a_row_moves_as_the_table_says_and_in_no_other_way(kind: Kind, wanted: list[State]) -> None:
    clock = Clock()
    with memory(clock) as ledger, ledger() as session:
        row = TABLES[kind](state=State.WAITING, lease_owner="x", lease_until=5.0, last_notified_at=5.0)
        for to in wanted:
            before = row.state, row.finished_at, row.lease_owner
            if to in TRANSITIONS.get((kind, row.state), {}):
                move(session, row, to, reason="why")
                assert (row.state, row.reason) == (to, "why")
                assert (row.finished_at == clock.now) == (to in ENDED)
                assert to in PUT_BACK or row.lease_owner is None
            else:
                with pytest.raises(TransitionError, match="cannot follow"):
                    move(session, row, to)
                assert before == (row.state, row.finished_at, row.lease_owner)


@given(kind=st.sampled_from(Kind), of=st.sets(st.sampled_from(State), min_size=1), to=st.sampled_from(State))
@settings(max_examples=100)
def test_rows_in_bulk_move_as_the_table_says(kind: Kind, of: set[State], to: State) -> None:
    with memory(Clock()) as ledger, ledger() as session:
        allowed = all(to in TRANSITIONS.get((kind, state), {}) for state in of)
        if not allowed:
            with pytest.raises(TransitionError):
                move_all(session, TABLES[kind], of, to)
            return
        session.execute(PeerRecord.__table__.insert(), [{"peer": state, "state": state} for state in states_of(kind)])
        if kind is Kind.PEER:
            assert move_all(session, PeerRecord, of, to) == len(of)
            left = session.scalars(select(PeerRecord.state).where(PeerRecord.peer.not_in(of))).all()
            assert set(left) == states_of(kind) - of


def test_a_text_that_is_no_state_is_refused(ledger: Ledger) -> None:
    with pytest.raises(Exception, match="not a valid State"), ledger() as session:
        session.add(PeerRecord(peer="pacs", state="dnoe"))


#: Where a state may be written: the writers, and the rows of objects that are created as refused.
WRITERS = {"node/ledger/record.py", "node/recording.py"}


def test_no_module_writes_a_state_but_by_the_writers() -> None:
    found = set()
    for file in (REPOSITORY / "node").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AugAssign)
                else []
            )
            flat = [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
            assigned = any(isinstance(one, ast.Attribute) and one.attr == "state" for one in flat)
            keyword = (
                isinstance(node, ast.Call)
                and any(one.arg == "state" for one in node.keywords)
                and ast.unparse(node.func).split(".")[-1] in ("values", "AnalysisJob", "Delivery", "PeerRecord")
            )
            mapping = isinstance(node, ast.Dict) and any(
                isinstance(key, ast.Constant) and key.value == "state" for key in node.keys
            )
            if assigned or keyword or (mapping and "State." in ast.unparse(node)):
                found.add(str(file.relative_to(REPOSITORY)))
    assert found <= WRITERS
    assert "node/ledger/record.py" in found


def test_the_diagram_shows_every_transition() -> None:
    shown = diagram()
    assert shown.startswith("stateDiagram-v2\n")
    for (kind, state), follow in TRANSITIONS.items():
        assert f"as {kind}_{state}\n" in shown
        for to, why in follow.items():
            assert f"{kind}_{state} --> {kind}_{to} : {why}\n" in shown
    assert shown.count("-->") == sum(
        [*(max(1, len(follow)) for follow in TRANSITIONS.values()), *map(len, INITIAL.values())]
    )


class Operations(RuleBasedStateMachine):
    """Everything that the node does with its work, in any order; the database itself records each change of a state."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = Ledger("sqlite://", self.clock)
        Base.metadata.create_all(self.ledger.engine)
        self.leases: list[Lease] = []
        self.generation = 0

    def teardown(self) -> None:
        self.ledger.engine.dispose()

    @initialize()
    def watched(self) -> None:
        with self.ledger.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE moves (kind TEXT, before TEXT, after TEXT)")
            for kind, table in TABLES.items():
                name = table.__tablename__
                connection.exec_driver_sql(
                    f"CREATE TRIGGER watch_{name} AFTER UPDATE OF state ON {name} BEGIN "
                    f"INSERT INTO moves VALUES ('{kind}', OLD.state, NEW.state); END"
                )
        self.close(report=True)

    @rule(report=st.booleans())
    def close(self, report: bool) -> None:
        self.generation += 1
        with self.ledger() as session:
            sops = [f"1.{n}" for n in range(self.generation)]
            more: dict[str, Any] = {"instances": sops, "closed_because": "", "verdict": ""}
            series = self.ledger.add_series(session, "1.2", "1.1", sops, True, calling_ae="CT", **more)
            assert series is not None
            series.analyses.append(AnalysisJob(route="r", destinations={}, report=report))
            session.flush()
            superseding.drop_waiting(session, series)

    @rule(table=st.sampled_from([AnalysisJob, Delivery]), row=st.integers(1, 4))
    def take(self, table: type[Work], row: int) -> None:
        lease = Lease(self.ledger, table, row)
        if lease.take():
            self.leases.append(lease)

    @rule()
    def take_peer(self) -> None:
        with self.ledger() as session:
            if session.get(PeerRecord, 1) is None:
                session.add(PeerRecord(peer="pacs"))
        lease = PeerLease(self.ledger, PeerRecord, 1)
        if lease.take():
            self.leases.append(lease)

    @rule(how=st.integers(0, 4))
    def end(self, how: int) -> None:
        """A worker ends what it has: well, badly, or with another attempt to come."""
        if not self.leases:
            return
        lease = self.leases.pop(0)
        with suppress(LeaseLost):
            if isinstance(lease, PeerLease):
                (lease.answered, lambda: lease.unreachable("no connection"))[how % 2]()
                lease.hand_back()
            elif how < 3:
                lease.put_back("test", counted=how > 0)
            elif lease._table is AnalysisJob:
                self.analysed(lease, State.DONE if how == 3 else State.REFUSED)
            else:
                states = (State.DONE, State.STORED, State.REFUSED)
                with lease.finish(states[lease.row % 3]):
                    pass

    def analysed(self, lease: Lease, state: State) -> None:
        with self.ledger.read() as session:
            row = session.get_one(AnalysisJob, lease.row)
        with lease.finish(State.FAILED if row.state is State.REPORTING else state) as session:
            analysis = session.get_one(AnalysisJob, lease.row)
            uid = f"1.{analysis.id}.{len(analysis.objects)}"
            made = Object(kind="sr", sop_class_uid="1", sop_instance_uid=uid, series_instance_uid="1", path="x")
            made.deliveries = [Delivery(peer="pacs")]
            analysis.objects.append(made)
            session.flush()
            superseding.supersede(session, analysis)

    @rule(seconds=st.sampled_from([1.0, 61.0, 3 * MAX_BACKOFF_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def sweep(self) -> None:
        self.ledger.analyses_due()
        self.ledger.peers_due()

    @rule()
    def tire(self) -> None:
        """So many attempts that the next is the last."""
        with self.ledger() as session:
            for table, most in ((AnalysisJob, 6), (Delivery, 80)):
                for row in session.scalars(select(table).where(table.attempts > 0)):
                    row.attempts = most - (row.state not in PUT_BACK)

    @rule(to=st.sampled_from([State.CONFIRMED, State.WAITING, State.REFUSED, State.DONE, State.UNCONFIRMED]))
    def commit(self, to: State) -> None:
        with self.ledger() as session:
            for row in session.scalars(select(Delivery).where(Delivery.state == State.STORED)):
                move(session, row, to)

    @rule()
    def retry(self) -> None:
        for series in self.ledger.series_ids():
            self.ledger.retry(series)

    @invariant()
    def only_what_the_table_allows(self) -> None:
        with self.ledger.engine.begin() as connection:
            moves = connection.exec_driver_sql("SELECT DISTINCT kind, before, after FROM moves").all()
        for kind, before, after in moves:
            assert State(after) in TRANSITIONS[Kind(kind), State(before)], (kind, before, after)


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_a_worker_that_dies_while_it_reports_is_overtaken_as_reporting(ledger: Ledger, clock: Clock) -> None:
    with ledger() as session:
        series = ledger.add_series(
            session, "1.2", "1.1", ["1"], True, calling_ae="", instances=[], closed_because="", verdict=""
        )
        assert isinstance(series, Series)
        series.analyses.append(AnalysisJob(route="r", destinations={}, state=State.REPORT_DUE, gave_up="disk"))
    assert Lease(ledger, AnalysisJob, 1).take()
    clock.now += ledger.timeouts.lease_s
    with ledger.lease(AnalysisJob, 1) as lease:
        assert lease is not None
        with ledger.read() as session:
            row = session.get_one(AnalysisJob, 1)
        assert (row.state, row.attempts, row.gave_up) == (State.REPORTING, 2, "disk")
    with ledger.read() as session:
        assert session.get_one(AnalysisJob, 1).state is State.REPORT_DUE
