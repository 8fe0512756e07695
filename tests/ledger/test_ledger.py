"""The ledger: leases, attempts, sweep, generations, migrations, and that nothing owed is ever lost or held twice."""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from conftest import Clock
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import text
from sqlalchemy.orm import Session

from node.ledger.leases import MAX_ANALYSIS_ATTEMPTS, MAX_BACKOFF_S, Lease, LeaseLost, Timeouts
from node.ledger.ledger import Ledger
from node.ledger.tables import AnalysisJob, Base, Delivery, Event, Object, Series
from node.ledger.transitions import Kind
from node.telemetry.logs import plainly

LEASE_S = Timeouts().lease_s


def add_series(ledger: Ledger, *sops: str, uid: str = "1.2", complete: bool = True) -> int | None:
    with ledger() as session:
        row = ledger.add_series(
            session,
            uid,
            "1.1",
            sops or ("1.2.1", "1.2.2"),
            calling_ae="CT",
            instances=list(sops),
            complete=complete,
            closed_because="test",
            verdict="test",
        )
        return row.id if row else None


def add_analysis(ledger: Ledger, report: bool = False, uid: str = "1.2", urgent: bool = False) -> int:
    series = add_series(ledger, uid=uid)
    assert series is not None
    with ledger() as session:
        row = AnalysisJob(
            series_id=series, route="chest-ct", destinations={"pacs": ["sr"]}, report=report, urgent=urgent
        )
        session.add(row)
        session.flush()
        return row.id


def state(ledger: Ledger, row: int) -> AnalysisJob:
    with ledger() as session:
        return session.get_one(AnalysisJob, row)


def test_migrations_make_the_tables_of_the_models(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert differences == []


def test_migrating_twice_and_from_many_threads_changes_nothing(tmp_path: Path) -> None:
    ledgers = [Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}") for _ in range(4)]
    failed: list[BaseException] = []

    def migrate(one: Ledger) -> None:
        try:
            one.migrate()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=migrate, args=(one,)) for one in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in ledgers:
        one.engine.dispose()
    assert failed == []


def test_process_that_starts_waits_for_a_ledger_that_another_holds(
    tmp_path: Path,
) -> None:
    file = tmp_path / "ledger.sqlite"
    other = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(0.7, other.execute, ("ROLLBACK",))
    timer.start()
    ledger = Ledger(f"sqlite:///{file}", timeouts=Timeouts(busy_s=0.2))
    ledger.migrate()
    timer.join()
    assert ledger.series_ids() == []
    ledger.engine.dispose()
    other.close()


def test_sqlite_is_set_to_survive_power_loss(ledger: Ledger) -> None:
    with ledger() as session:
        values = [session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "foreign_keys", "synchronous")]
    assert values == ["wal", 1, 2]


def test_who_reads_and_who_writes_do_not_wait_for_one_another(ledger: Ledger) -> None:
    ledger = Ledger(str(ledger.engine.url), timeouts=Timeouts(busy_s=0.1))
    add_series(ledger, "1")
    with ledger() as writing:
        writing.execute(text("update series set calling_ae = 'CT'"))
        assert ledger.series_ids() == [1]
        assert ledger.lacks("1.1", "1.2") is False
    with ledger.read() as reading:
        count = "select count(*) from series"
        assert reading.scalar(text(count)) == 1
        assert add_series(ledger, "1", "2") == 2
        assert reading.scalar(text(count)) == 1  # as it was when the reading began
    assert ledger.series_ids() == [1, 2]


def test_lease_holds_from_when_it_is_had_not_from_when_it_was_wished_for(
    ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = add_analysis(ledger)
    plain = Ledger.__call__

    @contextmanager
    def busy(self: Ledger) -> Iterator[Session]:
        clock.now += LEASE_S / 2  # another program has the ledger
        with plain(self) as session:
            yield session

    monkeypatch.setattr(Ledger, "__call__", busy)
    lease = Lease(ledger, AnalysisJob, row)
    assert lease.take()
    with ledger.read() as session:
        assert session.get_one(AnalysisJob, row).lease_until == clock.now + LEASE_S


def test_same_instances_are_the_same_generation_and_more_are_the_next(ledger: Ledger) -> None:
    first = add_series(ledger, "1.2.1", "1.2.2")
    assert add_series(ledger, "1.2.2", "1.2.1") is None
    second = add_series(ledger, "1.2.1", "1.2.2", "1.2.3")
    with ledger() as session:
        generations = [session.get_one(Series, row).generation for row in (first, second)]
    assert generations == [1, 2]


def test_same_instances_are_news_when_they_turn_out_complete(ledger: Ledger) -> None:
    assert add_series(ledger, "1.2.1", complete=False) is not None
    assert ledger.lacks("1.1", "1.2")
    assert add_series(ledger, "1.2.1", complete=False) is None
    assert add_series(ledger, "1.2.1", complete=True) is not None
    assert not ledger.lacks("1.1", "1.2")
    assert add_series(ledger, "1.2.1", complete=False) is None
    assert add_series(ledger, "1.2.1", complete=True) is None
    assert not ledger.lacks("1.1", "1.3")


def test_one_holder_at_a_time_and_done_is_done(ledger: Ledger) -> None:
    row = add_analysis(ledger)
    with ledger.lease(AnalysisJob, row) as mine:
        assert mine is not None
        with ledger.lease(AnalysisJob, row) as other:
            assert other is None
        with mine.finish("done", "found nothing"):
            pass
    with ledger.lease(AnalysisJob, row) as again:
        assert again is None
    assert (state(ledger, row).state, state(ledger, row).reason) == ("done", "found nothing")


def test_error_owes_again_with_backoff_and_without_its_values(ledger: Ledger, clock: Clock) -> None:
    row = add_analysis(ledger)
    with pytest.raises(ValueError, match="Doe"), ledger.lease(AnalysisJob, row):
        raise ValueError("Doe^Jane")
    after = state(ledger, row)
    assert (after.state, after.attempts) == ("waiting", 1)
    assert after.reason.startswith("ValueError at test_ledger.py:")
    first = ledger.timeouts.backoff[Kind.ANALYSIS].first_s
    assert first <= after.due_at - clock.now <= first * 1.2
    with ledger.lease(AnalysisJob, row) as early:
        assert early is None
    clock.now = after.due_at
    with ledger.lease(AnalysisJob, row) as later:
        assert later is not None


def test_attempts_are_capped_and_retry_brings_it_back(ledger: Ledger, clock: Clock) -> None:
    row = add_analysis(ledger)
    for _ in range(MAX_ANALYSIS_ATTEMPTS):
        with pytest.raises(OSError, match="disk"), ledger.lease(AnalysisJob, row):
            raise OSError("disk")
        clock.now += 2 * MAX_BACKOFF_S
    assert state(ledger, row).state == "failed"
    assert ledger.analyses_due() == []
    assert ledger.retry(state(ledger, row).series_id) == 1
    assert ledger.analyses_due() == [row]


def test_dead_workers_are_overtaken_and_then_given_up(ledger: Ledger, clock: Clock) -> None:
    row = add_analysis(ledger)
    for _ in range(MAX_ANALYSIS_ATTEMPTS):
        assert Lease(ledger, AnalysisJob, row).take()  # and its worker dies
        assert ledger.analyses_due() == []
        clock.now += LEASE_S
    assert ledger.analyses_due() == []
    assert state(ledger, row).state == "failed"
    with ledger() as session:
        last = session.query(Event).order_by(Event.id.desc()).first()
        told = [event.text for event in session.query(Event).order_by(Event.id)]
    assert last is not None
    assert "died" in last.text
    assert told[:2] == [f"attempt {n} ended without a word: its process died or hung" for n in (1, 2)]


def test_overtaken_worker_records_nothing(ledger: Ledger, clock: Clock) -> None:
    row = add_analysis(ledger)
    slow = Lease(ledger, AnalysisJob, row)
    assert slow.take()
    clock.now += LEASE_S
    quick = Lease(ledger, AnalysisJob, row)
    assert quick.take()
    with pytest.raises(LeaseLost), slow.finish("done") as session:
        session.add(
            Object(
                analysis_id=row, kind="sr", sop_class_uid="1", sop_instance_uid="1", series_instance_uid="1", path="x"
            )
        )
    with quick.finish("done"):
        pass
    assert state(ledger, row).state == "done"


def test_lease_is_renewed_while_work_goes_on(ledger: Ledger) -> None:
    ledger.timeouts = Timeouts(lease_s=0.2)
    row = add_analysis(ledger)
    renewed = threading.Event()
    with ledger.lease(AnalysisJob, row) as lease:
        assert lease is not None
        first = state(ledger, row).lease_until
        for _ in range(100):
            if state(ledger, row).lease_until > first:
                renewed.set()
                break
            threading.Event().wait(0.05)
    assert renewed.is_set()


def test_sweep_dispatches_once_in_a_while(ledger: Ledger, clock: Clock) -> None:
    row = add_analysis(ledger)
    assert ledger.analyses_due() == [row]
    assert ledger.analyses_due() == []
    clock.now += ledger.timeouts.notify_again_s + 1
    assert ledger.analyses_due() == [row]


def test_object_is_owed_to_a_peer_once(ledger: Ledger) -> None:
    row = add_analysis(ledger)
    with ledger() as session:
        made = Object(
            analysis_id=row, kind="sr", sop_class_uid="1", sop_instance_uid="1", series_instance_uid="1", path="x"
        )
        made.deliveries = [Delivery(peer="pacs")]
        session.add(made)
        session.flush()
        object_id = made.id
    with pytest.raises(Exception, match="UNIQUE"), ledger() as session:
        session.add(Delivery(object_id=object_id, peer="pacs"))


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("attempts", [1, 2, 5, 10, 80])
def test_backoff_grows_up_to_its_bound(kind: Kind, attempts: int) -> None:
    backoff_s = Timeouts().backoff_s
    first, factor, most = Timeouts().backoff[kind]
    assert most <= MAX_BACKOFF_S
    assert backoff_s(kind, attempts, lambda: 0.0) == min(first * factor ** (attempts - 1), most)
    assert backoff_s(kind, attempts, lambda: 1.0) == pytest.approx(1.2 * backoff_s(kind, attempts, lambda: 0.0))


def test_analysis_that_failed_stays_due_until_that_is_reported(ledger: Ledger, clock: Clock) -> None:
    row = add_analysis(ledger, report=True)
    for _ in range(MAX_ANALYSIS_ATTEMPTS):
        with pytest.raises(OSError, match="disk"), ledger.lease(AnalysisJob, row):
            raise OSError("disk")
        clock.now += 2 * MAX_BACKOFF_S
    given_up = state(ledger, row)
    assert (given_up.state, given_up.attempts) == ("report_due", 0)
    assert given_up.gave_up is not None
    with ledger.lease(AnalysisJob, row) as lease:
        assert lease is not None
        with lease.finish("failed", "told"):
            pass
    assert ledger.analyses_due() == []
    ledger.retry(given_up.series_id)
    assert state(ledger, row).gave_up is None


def test_worker_that_is_stopped_hands_back_without_an_attempt(ledger: Ledger) -> None:
    row = add_analysis(ledger)
    with pytest.raises(KeyboardInterrupt), ledger.lease(AnalysisJob, row):
        raise KeyboardInterrupt
    assert (state(ledger, row).state, state(ledger, row).attempts) == ("waiting", 0)
    assert ledger.analyses_due() == [row]


def add_deliveries(ledger: Ledger, analysis: int, *peers: str, objects: int = 3) -> None:
    uids = {"sop_class_uid": "1", "series_instance_uid": "1", "path": "x", "kind": "sr"}
    with ledger() as session:
        for n in range(objects):
            made = Object(analysis_id=analysis, sop_instance_uid=f"1.{n}", **uids)
            made.deliveries = [Delivery(peer=peer) for peer in peers]
            session.add(made)


def test_unreachable_peer_is_not_due_and_says_why(ledger: Ledger, clock: Clock) -> None:
    add_deliveries(ledger, add_analysis(ledger), "dead", "alive")
    assert ledger.peers_due() == ["dead", "alive"]
    assert ledger.peers_due() == []
    with ledger.peer_lease("dead") as held:
        assert held is not None
        with ledger.peer_lease("dead") as second:
            assert second is None
        held.unreachable("no connection")
    clock.now += ledger.timeouts.notify_again_s + 1
    with ledger.peer_lease("dead") as held:
        assert held is not None
        held.unreachable("no connection")
    with ledger.peer_lease("dead") as held:
        assert held is None
    with ledger() as session:
        reasons = {(d.peer, d.reason, d.attempts) for d in session.query(Delivery)}
        told = [event.text for event in session.query(Event)]
    assert reasons == {("dead", "no connection", 0), ("alive", "", 0)}
    assert told == ["not delivered yet, tried again until dead answers: no connection"]
    assert ledger.peers_due() == ["alive"]
    clock.now += 2 * ledger.timeouts.backoff[Kind.PEER].most_s
    with ledger.peer_lease("dead") as held:
        assert held is not None
        held.answered()
    with ledger() as session:
        assert {d.reason for d in session.query(Delivery)} == {""}
        assert [event.text for event in session.query(Event)][1:] == ["dead answers again"]
    assert ledger.peers_due() == ["dead", "alive"]


def test_peer_that_was_held_is_dispatched_at_once(ledger: Ledger) -> None:
    add_deliveries(ledger, add_analysis(ledger), "pacs")
    assert ledger.peers_due() == ["pacs"]
    with ledger.peer_lease("pacs") as held:
        assert held is not None
        assert ledger.peers_due() == []
    assert ledger.peers_due() == ["pacs"]


def test_retry_lets_a_silent_peer_be_tried_now(ledger: Ledger) -> None:
    row = add_analysis(ledger)
    add_deliveries(ledger, row, "dead")
    with ledger.peer_lease("dead") as held:
        assert held is not None
        held.unreachable("no connection")
    ledger.retry(state(ledger, row).series_id)
    with ledger.peer_lease("dead") as held:
        assert held is not None


def test_urgent_analysis_overtakes_and_nothing_passed_over_is_forgotten(ledger: Ledger) -> None:
    rows = [add_analysis(ledger, uid=f"1.{n}", urgent=n == 2) for n in range(3)]
    assert ledger.analyses_due() == [rows[2], rows[0], rows[1]]
    order = []
    for notified in rows:
        row = ledger.next_analysis(notified)
        with ledger.lease(AnalysisJob, row) as lease:
            assert lease is not None
            with lease.finish("done"):
                order.append(row)
    assert order == [rows[2], rows[1], rows[0]]
    assert ledger.next_analysis(rows[0]) == rows[0]


@pytest.mark.parametrize("jump", [-1e9, -86400.0, -600.0, 86400.0, 1e9])
def test_clock_that_jumps_forgets_nothing(ledger: Ledger, clock: Clock, jump: float) -> None:
    waits, held = add_analysis(ledger), Lease(ledger, AnalysisJob, add_analysis(ledger, uid="9.9"))
    assert held.take()
    with pytest.raises(OSError, match="disk"), ledger.lease(AnalysisJob, waits):
        raise OSError("disk")
    add_deliveries(ledger, waits, "pacs")
    with ledger.peer_lease("pacs") as peer:
        assert peer is not None
        peer.unreachable("no connection")
    clock.now += jump + 3 * MAX_BACKOFF_S  # at most so long after the jump, whichever way it went
    assert ledger.peers_due() == ["pacs"]
    assert sorted(ledger.analyses_due()) == sorted((waits, held.row))


#: What a node of version 0.1 wrote: one series, its analysis to be done again, an object that waits for a peer.
OLD_ROWS = """
INSERT INTO series VALUES (1, '1.2', '1.1', 1, 'abc', 'CT', '["a.dcm"]', 1, 'even', 'route chest', 1000.0)
INSERT INTO analyses VALUES (1, 'c', '{}', 1, NULL, NULL, 1000.0, NULL, 1, 'waiting', 1, NULL, 0, 0, 0, 'x', NULL)
INSERT INTO objects VALUES (1, 1, 'sr', '1.5', '1.6', '1.7', 'x/sr.dcm')
INSERT INTO deliveries VALUES (1, 'pacs', 1, 'waiting', 3, NULL, 0, 0, 0, 'no', NULL)
INSERT INTO events VALUES (1, 1, 1000.0, 'received', 'one')
"""


def test_ledger_of_the_first_version_is_brought_up_with_all_that_it_owes(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    ledger.migrate("0001")
    with ledger.engine.begin() as connection:
        for line in OLD_ROWS.strip().splitlines():
            connection.exec_driver_sql(line)
    ledger.migrate()
    with ledger() as session:
        assert session.scalar(text("PRAGMA foreign_key_check")) is None
        (delivery,) = session.query(Delivery)
        assert (delivery.object.analysis.series.verdict, delivery.object.analysis.urgent) == ("route chest", False)
        assert delivery.object.analysis.method == "pneumonia"
        assert (delivery.attempts, delivery.reason, delivery.stored_at, delivery.asks) == (3, "no", None, 0)
    assert ledger.peers_due() == ["pacs"]
    assert ledger.analyses_due() == [1]
    ledger.engine.dispose()


class Workers(RuleBasedStateMachine):
    """Workers that take, finish, fail and die in any order, with a clock that moves."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = Ledger("sqlite://", self.clock)
        Base.metadata.create_all(self.ledger.engine)
        self.row = add_analysis(self.ledger)
        self.holder: Lease | None = None
        self.held_until = 0.0
        self.done = 0

    def teardown(self) -> None:
        self.ledger.engine.dispose()

    @precondition(lambda self: not self.done)
    @rule(target=leases)
    def take(self) -> Lease:
        lease = Lease(self.ledger, AnalysisJob, self.row)
        # A lease that ends later than one ever lasts was written before the clock was put back.
        held = self.holder is not None and self.clock.now < self.held_until <= self.clock.now + 2 * LEASE_S
        if lease.take():
            assert not held
            self.holder, self.held_until = lease, self.clock.now + LEASE_S
        return lease

    @rule(lease=leases)
    def finish(self, lease: Lease) -> None:
        try:
            with lease.finish("done"):
                pass
        except LeaseLost:
            assert lease is not self.holder or self.done
        else:
            assert lease is self.holder
            assert not self.done
            self.done += 1

    @rule(lease=leases)
    def put_back(self, lease: Lease) -> None:
        lease.put_back("test")
        if lease is self.holder:
            self.holder = None

    @rule(seconds=st.sampled_from([1.0, 20.0, LEASE_S, 5000.0, -30.0, -5000.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def sweep(self) -> None:
        self.ledger.analyses_due()

    @invariant()
    def never_forgotten(self) -> None:
        row = state(self.ledger, self.row)
        assert row.attempts <= MAX_ANALYSIS_ATTEMPTS
        assert row.state in (
            "waiting",
            "running",
            "failed" if row.attempts == MAX_ANALYSIS_ATTEMPTS else "done",
            "done",
        )


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_errors_are_told_without_the_values_of_others() -> None:
    def told(error: Exception) -> str:
        try:
            raise error
        except Exception as caught:
            return plainly(caught)

    assert told(ValueError("Doe^Jane")).startswith("ValueError at test_ledger.py:")
    full = told(OSError(errno.ENOSPC, "Doe^Jane"))
    assert full.startswith("OSError ENOSPC (no space left on device) at test_ledger.py:")
    assert told(LeaseLost("row 5")).startswith("LeaseLost: row 5 at test_ledger.py:")
