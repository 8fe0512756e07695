"""pynetdicom's own transport, to fall back to should a peer not get on with the other: no code of ours in its path.

It is half as fast, and an instance is held in memory while it comes in. Each connection has two threads, and each
request is parsed, before it can be rejected.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AssociationServer, ThreadedAssociationServer

from node.intake.transport.service import Service, StoreRequest

#: pynetdicom's Event, whose attributes it types as everything that any event may carry.
_Event = Any


def start(
    ae: AE,
    address: tuple[str, int],
    contexts: list[PresentationContext],
    handlers: Sequence[tuple[Any, ...]],
    service: Service,
) -> AssociationServer:
    """Listen as `serve` does; instances go to `service`, which is asked for nothing else."""
    own: list[Any] = [
        (evt.EVT_CONN_OPEN, _on_connection, [ae.network_timeout]),
        (evt.EVT_CONN_CLOSE, _on_connection_closed),
        (evt.EVT_C_STORE, _on_store, [service]),
    ]
    server = ae.start_server(address, block=False, evt_handlers=[*handlers, *own], contexts=contexts)
    assert isinstance(server, ThreadedAssociationServer)
    return server


def _on_connection(event: _Event, timeout_s: float) -> None:
    """Bound the wait for a peer that stalls within a PDU: the listening socket's timeout is not inherited."""
    connection = event.assoc.dul.socket.socket
    connection.settimeout(timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _on_connection_closed(event: _Event) -> None:
    """Let the thread of a probe go, which connects and asks for nothing.

    It would wait out the ACSE timeout and count as an association meanwhile, so that a load balancer that looks every
    second would fill the listener (pynetdicom #328, #669). None is what it gets when it has waited in vain.
    """
    if event.assoc.requestor.primitive is None:
        event.assoc.dul.to_user_queue.put(None)


def _on_store(event: _Event, service: Service) -> Dataset:
    """Pass the data set on in one piece."""
    asked, context = event.request, event.context
    request = StoreRequest(
        str(asked.AffectedSOPClassUID),
        str(asked.AffectedSOPInstanceUID),
        str(context.abstract_syntax),
        str(context.transfer_syntax),
    )
    instance = service.begin(event.assoc, request)
    instance.write([asked.DataSet.getbuffer()])
    status, comment = instance.end()
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment[:64]  # VR LO
    return answer
