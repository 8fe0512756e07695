"""The states of work, and the one table of transitions between them.

`node.ledger.record.move` is the only writer of a state, and it allows what stands in `TRANSITIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """What a row of work is about."""

    ANALYSIS = "analysis"
    DELIVERY = "delivery"
    PEER = "peer"


class State(StrEnum):
    """Where a row of work stands."""

    #: Due at `due_at`, for whichever worker takes it.
    WAITING = "waiting"
    #: A worker has it under a lease.
    RUNNING = "running"
    #: Finished, and a peer with storage commitment has nothing to confirm.
    DONE = "done"
    #: Ended for a reason that trying again would not change.
    REFUSED = "refused"
    #: All attempts are used up.
    FAILED = "failed"
    #: A newer generation of the series has taken its place.
    SUPERSEDED = "superseded"

    #: Analysis: it failed, and the objects that say so in the study are due.
    REPORT_DUE = "report_due"
    #: Analysis: a worker makes the objects that say that it failed.
    REPORTING = "reporting"

    #: Delivery: the peer has the object and has yet to commit to it (PS3.4 annex J).
    STORED = "stored"
    #: Delivery: the peer has committed to keep the object.
    CONFIRMED = "confirmed"
    #: Delivery: the peer has the object, and the commitment that the settings require did not come.
    UNCONFIRMED = "unconfirmed"

    #: Peer: it was not reached; due again at `due_at`.
    UNREACHABLE = "unreachable"
    #: Peer: a worker tries whether it is back.
    PROBING = "probing"


#: States in which a worker may take the row once it is due, and the state that it has then.
TAKEN: Final[Mapping[State, State]] = {
    State.WAITING: State.RUNNING,
    State.REPORT_DUE: State.REPORTING,
    State.UNREACHABLE: State.PROBING,
}

#: States under a lease, and the state to which the row is put back.
PUT_BACK: Final[Mapping[State, State]] = {leased: due for due, leased in TAKEN.items()}

#: States in which nothing more happens by itself.
ENDED: Final = frozenset(
    (State.DONE, State.REFUSED, State.FAILED, State.SUPERSEDED, State.CONFIRMED, State.UNCONFIRMED)
)

#: States that a person may retry.
RETRIED: Final = frozenset((State.FAILED, State.REFUSED, State.UNCONFIRMED))

#: States in which a row may be created. An object that did not pass its check is refused from the start.
INITIAL: Final[Mapping[Kind, frozenset[State]]] = {
    Kind.ANALYSIS: frozenset((State.WAITING,)),
    Kind.DELIVERY: frozenset((State.WAITING, State.REFUSED)),
    Kind.PEER: frozenset((State.WAITING,)),
}

_TAKE = "a worker takes it"
_TAKE_OVER = "its lease ran out, another worker takes it over"
_PUT_BACK = "put back for another attempt"
_USED_UP = "its attempts are used up"
_USED_UP_REPORT = "its attempts are used up, and the study gets a report"
_NEWER = "a newer generation takes its place"
_RETRY = "retried by hand"

#: Which state may follow which, and why. A state that stands nowhere as a key is none of that kind.
TRANSITIONS: Final[Mapping[tuple[Kind, State], Mapping[State, str]]] = {
    (Kind.ANALYSIS, State.WAITING): {
        State.RUNNING: _TAKE,
        State.REPORT_DUE: _USED_UP_REPORT,
        State.FAILED: _USED_UP,
        State.SUPERSEDED: _NEWER,
    },
    (Kind.ANALYSIS, State.RUNNING): {
        State.RUNNING: _TAKE_OVER,
        State.WAITING: _PUT_BACK,
        State.DONE: "analysed",
        State.REFUSED: "cannot be analysed",
        State.REPORT_DUE: _USED_UP_REPORT,
        State.FAILED: _USED_UP,
        State.SUPERSEDED: _NEWER,
    },
    (Kind.ANALYSIS, State.REPORT_DUE): {
        State.REPORTING: _TAKE,
        State.FAILED: _USED_UP,
        State.SUPERSEDED: _NEWER,
    },
    (Kind.ANALYSIS, State.REPORTING): {
        State.REPORTING: _TAKE_OVER,
        State.REPORT_DUE: _PUT_BACK,
        State.FAILED: "reported, or its attempts are used up",
        State.SUPERSEDED: _NEWER,
    },
    (Kind.ANALYSIS, State.DONE): {},
    (Kind.ANALYSIS, State.REFUSED): {State.WAITING: _RETRY},
    (Kind.ANALYSIS, State.FAILED): {State.WAITING: _RETRY},
    (Kind.ANALYSIS, State.SUPERSEDED): {},
    (Kind.DELIVERY, State.WAITING): {
        State.RUNNING: _TAKE,
        State.FAILED: _USED_UP,
        State.SUPERSEDED: _NEWER,
    },
    (Kind.DELIVERY, State.RUNNING): {
        State.RUNNING: _TAKE_OVER,
        State.WAITING: _PUT_BACK,
        State.DONE: "the peer took it, and is not asked for its commitment",
        State.STORED: "the peer took it, and is asked for its commitment",
        State.REFUSED: "the peer refused it, or it cannot be sent",
        State.FAILED: _USED_UP,
        State.SUPERSEDED: _NEWER,
    },
    (Kind.DELIVERY, State.STORED): {
        State.CONFIRMED: "the peer committed to it",
        State.WAITING: "the peer did not keep it, it is sent again",
        State.REFUSED: "the peer does not keep its SOP class",
        State.DONE: "the commitment is not asked for any more",
        State.UNCONFIRMED: "the required commitment did not come",
    },
    (Kind.DELIVERY, State.DONE): {},
    (Kind.DELIVERY, State.CONFIRMED): {},
    (Kind.DELIVERY, State.UNCONFIRMED): {State.WAITING: _RETRY, State.SUPERSEDED: _NEWER},
    (Kind.DELIVERY, State.REFUSED): {State.WAITING: _RETRY, State.SUPERSEDED: _NEWER},
    (Kind.DELIVERY, State.FAILED): {State.WAITING: _RETRY, State.SUPERSEDED: _NEWER},
    (Kind.DELIVERY, State.SUPERSEDED): {},
    (Kind.PEER, State.WAITING): {State.RUNNING: _TAKE},
    (Kind.PEER, State.RUNNING): {
        State.RUNNING: _TAKE_OVER,
        State.WAITING: "nothing more is due",
        State.UNREACHABLE: "it was not reached",
    },
    (Kind.PEER, State.UNREACHABLE): {State.PROBING: _TAKE},
    (Kind.PEER, State.PROBING): {
        State.PROBING: _TAKE_OVER,
        State.RUNNING: "it answers",
        State.UNREACHABLE: "it was not reached, or not tried",
    },
}


class TransitionError(RuntimeError):
    """A state that cannot follow the row's present one: a fault in the code that asked for it."""


def require(kind: Kind, now: State, to: State) -> None:
    """Raise `TransitionError` unless `to` may follow `now`."""
    if to not in TRANSITIONS.get((kind, now), {}):
        raise TransitionError(f"{kind}: {to} cannot follow {now}")


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for kind in Kind:
        lines.append(f"    state {kind} {{")
        lines += [f"        state {_quoted(state)} as {kind}_{state}" for of, state in TRANSITIONS if of is kind]
        lines += [f"        [*] --> {kind}_{state}" for state in sorted(INITIAL[kind])]
        for (of, state), follow in TRANSITIONS.items():
            if of is kind:
                lines += [f"        {kind}_{state} --> {kind}_{to} : {why}" for to, why in follow.items()]
                lines += [] if follow else [f"        {kind}_{state} --> [*]"]
        lines.append("    }")
    return "\n".join(lines) + "\n"


def _quoted(state: State) -> str:
    return f'"{state.replace("_", " ")}"'
