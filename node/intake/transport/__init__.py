"""How bytes come from the network: pynetdicom with its waiting and its C-STORE path replaced, or pynetdicom as it is.

`DIRECT` keeps pynetdicom's state machine (PS3.8 9.2) and negotiation, and changes three things through the hooks that
it has for that, `AE.make_server` with a server and a request handler of one's own:

- Threads wait for the socket instead of sleeping a millisecond at a time, so that an idle association costs nothing
  (`sockets`).
- The fragments of a C-STORE go straight from the socket's buffer to whoever takes the instance, in the thread that
  read them: no object for each PDU, no copy, and memory that does not grow with the instance (`reactor`, `dimse`).
- A connection gets threads only when its whole A-ASSOCIATE-RQ has come and its sender is let in, so that probes,
  silence, slow writers and strangers cost a socket, and are bounded (`server`). Who calls whom is read from the first
  bytes of the request, and a request that is not let in is answered without being parsed (`request`).

`STOCK` is pynetdicom unchanged (`stock`). The underscored names that are used here are why pynetdicom is held to 3.0.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final, Literal

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AssociationServer

from node.intake.transport import stock
from node.intake.transport.reactor import Reactor
from node.intake.transport.server import Handler, Server
from node.intake.transport.service import Service

Transport = Literal["direct", "stock"]
DIRECT: Final = "direct"
STOCK: Final = "stock"


def serve(
    ae: AE,
    address: tuple[str, int],
    contexts: list[PresentationContext],
    handlers: Sequence[tuple[Any, ...]],
    transport: Transport,
    service: Service,
) -> AssociationServer:
    """Listen from a thread of its own.

    `DIRECT` asks `service` about each request before it makes an association; with `STOCK` a handler of `EVT_REQUESTED`
    has to do so. Instances go to `service` with both.

    Raises
    ------
    OSError
        The address or port cannot be had.
    """
    if transport == STOCK:
        return stock.start(ae, address, contexts, handlers, service)
    direct = ae.make_server(
        address,
        contexts=contexts,
        evt_handlers=list(handlers),
        server_class=Server,
        request_handler=Handler,
        service=service,
    )
    threading.Thread(target=direct.serve_forever, name="listener", daemon=True).start()
    return direct


def receives_instance(association: Association) -> bool:
    """Whether an instance has begun to come over an association and is not whole."""
    dul = association.dul
    return association.dimse.message is not None or (isinstance(dul, Reactor) and dul.incoming is not None)
