"""What the transports and whoever takes the instances know of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pynetdicom.association import Association

from node.telemetry.quota import LogQuota


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """A C-STORE-RQ, with what was negotiated for its data set."""

    sop_class_uid: str
    sop_instance_uid: str
    abstract_syntax: str
    transfer_syntax: str


class Incoming(Protocol):
    """Takes the data set of one C-STORE; none of its methods raises."""

    def write(self, fragments: Sequence[memoryview]) -> None:
        """Take the next bytes, which are gone when this returns."""

    def end(self) -> tuple[int, str]:
        """The data set is whole: C-STORE status and Error Comment to answer."""

    def drop(self) -> None:
        """No more will come, and nobody waits for an answer."""


@dataclass(frozen=True, slots=True)
class AssociationRequest:
    """Who asks for an association, from where; the AE titles without the spaces, or NULs, that fill them up."""

    called_ae: str
    calling_ae: str
    #: Its address, and the one of ours that it called.
    address: str
    own_address: str


#: A-ASSOCIATE-RJ as result, source and reason (PS3.8 table 9-21).
Answer = tuple[int, int, int]


class Service(Protocol):
    """What `DIRECT` asks of who takes instances. None of its methods raises or waits for the network."""

    quota: LogQuota

    def screen(self, request: AssociationRequest) -> Answer | None:
        """How to reject a request, by who makes it; None lets it in. Called before the rest of it has come."""

    def admit(self, request: AssociationRequest) -> Answer | None:
        """How to reject a request that was let in, for want of room; None where an association is to be made of it."""

    def began(self, association: Association, request: AssociationRequest) -> None:
        """The association was made, and is about to be started."""

    def failed(self, association: Association) -> None:
        """It could not be started."""

    def begin(self, association: Association, request: StoreRequest) -> Incoming:
        """An instance begins to come."""
