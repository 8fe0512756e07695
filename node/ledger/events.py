"""What can happen to a series: the kinds of event, and the words for each, in one place.

An event is stored as its kind and data, so that a console, metrics or an audit log can read it; `render` puts it into
words. Neither holds patient data.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from node.text import SENTENCE_LENGTH, printable


class EventKind(StrEnum):
    """What happened."""

    #: Words that an earlier version stored.
    TEXT = "text"
    RECEIVED = "received"
    TRIAGED = "triaged"
    CONFLICT = "conflict"
    ANALYSIS_STARTED = "analysis_started"
    ANALYSIS_STAGE = "analysis_stage"
    CONTINUED_ON_CPU = "continued_on_cpu"
    ANALYSIS_ENDED = "analysis_ended"
    ANALYSIS_SUPERSEDED = "analysis_superseded"
    REPORT_STARTED = "report_started"
    OBJECT_STOPPED = "object_stopped"
    WORKER_LOST = "worker_lost"
    ATTEMPT_FAILED = "attempt_failed"
    SET_ASIDE = "set_aside"
    RETRIED = "retried"
    PEER_UNREACHABLE = "peer_unreachable"
    PEER_ANSWERS = "peer_answers"
    DELIVERED = "delivered"
    DELIVERED_WITH_WARNING = "delivered_with_warning"
    REFUSED = "refused"
    NOT_SENT = "not_sent"
    CAPTURE_ADDED = "capture_added"
    CONFIRMED = "confirmed"
    SENT_AGAIN = "sent_again"
    NOT_KEPT = "not_kept"
    UNCONFIRMED = "unconfirmed"
    CONFIRMATION_DROPPED = "confirmation_dropped"
    OBJECTS_SUPERSEDED = "objects_superseded"
    FILES_DROPPED = "files_dropped"


#: Kind → the words, with the names of its data; `object` is a kind of result object. Where the row belongs to one of
#: several acquisitions of its series, `render` puts the acquisition before them.
WORDS: Final[Mapping[EventKind, str]] = {
    EventKind.TEXT: "{text}",
    EventKind.RECEIVED: "{instances} instances: {reason}",
    EventKind.TRIAGED: "{decision}",
    EventKind.CONFLICT: (
        "the series belongs to {belongs_to}; {sender} (calling from {address}) sent {differing} of its {held} instances"
        " with other content, and {extra} instances that {belongs_to} did not send: what {belongs_to} sent is kept,"
        " the rest lies beside the series and is no part of it"
    ),
    EventKind.ANALYSIS_STARTED: "started{attempt}",
    EventKind.ANALYSIS_STAGE: "{stage}",
    EventKind.CONTINUED_ON_CPU: "goes on on the CPU: {reason}",
    EventKind.ANALYSIS_ENDED: "{outcome}",
    EventKind.ANALYSIS_SUPERSEDED: "{reason}",
    EventKind.REPORT_STARTED: "making the objects that report the failure{attempt}",
    EventKind.OBJECT_STOPPED: "{object} {reason}",
    EventKind.WORKER_LOST: "attempt {attempt} ended without a word: its process died or hung",
    EventKind.ATTEMPT_FAILED: "will be tried again after attempt {attempt}: {reason}",
    EventKind.SET_ASIDE: "set aside: {reason}",
    EventKind.RETRIED: "{count} retried by hand",
    EventKind.PEER_UNREACHABLE: "not delivered yet, tried again until {peer} answers: {reason}",
    EventKind.PEER_ANSWERS: "{peer} answers again",
    EventKind.DELIVERED: "{object} delivered to {peer}",
    EventKind.DELIVERED_WITH_WARNING: "{object} delivered to {peer} ({warning})",
    EventKind.REFUSED: "{object} refused by {peer}: {reason}",
    EventKind.NOT_SENT: "{object} not delivered to {peer}: {reason}",
    EventKind.CAPTURE_ADDED: "{peer} gets the {object} in its place",
    EventKind.CONFIRMED: "{object} confirmed by {peer}",
    EventKind.SENT_AGAIN: "{object} not kept by {peer} (failure reason {failure}), sent again",
    EventKind.NOT_KEPT: "{object} not kept by {peer} (failure reason {failure})",
    EventKind.UNCONFIRMED: "delivered, not confirmed: {reason}",
    EventKind.CONFIRMATION_DROPPED: "{object} delivered; its confirmation by {peer} is no longer asked for",
    EventKind.OBJECTS_SUPERSEDED: "superseded by generation {generation}, {unsent} not sent any more",
    EventKind.FILES_DROPPED: "files dropped after {days} days",
}

#: The stage of a series' way to which an event belongs, where its row does not say it.
STAGES: Final[Mapping[EventKind, str]] = {
    EventKind.RECEIVED: "received",
    EventKind.TRIAGED: "triage",
    EventKind.CONFLICT: "conflict",
    EventKind.OBJECT_STOPPED: "check",
    EventKind.RETRIED: "retry",
    EventKind.PEER_UNREACHABLE: "delivery",
    EventKind.PEER_ANSWERS: "delivery",
    EventKind.OBJECTS_SUPERSEDED: "delivery",
    EventKind.FILES_DROPPED: "retention",
}


def render(kind: str, data: Mapping[str, Any]) -> str:
    """An event in words; one of a kind or with data that this version does not know is shown as it is stored."""
    words = dict(data)
    acquisition = words.pop("acquisition", "")
    if kind in (EventKind.ANALYSIS_STARTED, EventKind.REPORT_STARTED):
        words["attempt"] = f", attempt {words['attempt']}" if words.get("attempt", 1) != 1 else ""
    try:
        text = WORDS[EventKind(kind)].format(**words)
    except (ValueError, KeyError, IndexError):
        text = " ".join([kind, *(f"{name}={value}" for name, value in words.items())])
    return printable(f"{acquisition}: {text}" if acquisition else text, SENTENCE_LENGTH)
