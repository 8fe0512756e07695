"""What another sender than the one that a series belongs to sent of it, until it is compared with the series."""

from __future__ import annotations

from node.intake.part import Stored
from node.intake.series import AssociationId, Ending


class OtherSender:
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

    def is_due(self, now: float, quiet_s: float, grace_s: float) -> bool:
        """Whether it is time to compare what it sent with the series, which is closed."""
        if self.examined or now < self.retry_at:
            return False
        self.over = now - self.last >= quiet_s
        ended = not self.associations and self.ended_at is not None and now - self.ended_at >= grace_s
        return self.over or (ended and not self.tried)
