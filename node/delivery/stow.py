"""Delivery by STOW-RS (PS3.18 10.5): one POST an object over a connection that is kept open."""

from __future__ import annotations

import os
import re
import secrets
import ssl
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final

import httpx

from node.config import Stow
from node.delivery.peer import CONNECT_S, SLOWEST_LINE, TIMEOUT_S, Outgoing, PeerError, hexadecimal

#: Bytes read from disk at a time.
_BLOCK = 1 << 20

#: HTTP statuses after which the same object may well be taken: a timeout, a conflict with what the server is doing, too
#: many requests, a server or a proxy that is not well. 401 and 403 are credentials that an admin is about to mend, 404
#: and 405 an address (no answer to a store, PS3.18 table 10.5.3-1), or a proxy whose service is just being replaced.
_PASSES: Final = frozenset((401, 403, 404, 405, 408, 423, 425, 429))

#: Failure Reason (0008,1197) of an object that is there already: duplicate SOP instance (PS3.3 C.14.1.1), and the same
#: in the words of Microsoft's DICOM service (45070 in its conformance statement). Our UIDs are derived, so it is this
#: very object, from a POST whose answer was lost.
_REASONS_THAT_IT_IS_THERE: Final = frozenset((0x0111, 0xB00E))

#: Failure Reason that passes: processing failure, no resources (PS3.18 table 10.5.3-2, PS3.3 C.14.1.1), and from
#: Microsoft's service that another request is just creating the object (45071).
_REASONS_THAT_PASS: Final = frozenset((0x0110, 0x0213, *range(0xA700, 0xA800), 0xB00F))


class ByStow:
    """Sends objects to a DICOMweb service, as a context manager.

    Parameters
    ----------
    service
        Address and certificates.
    name
        The peer's name in the settings. `LUNGNODE_STOW_` and this name in capitals, other characters than letters and
        digits as '_', is the variable of the environment that holds the Authorization header, such as 'Bearer …'.
    """

    def __init__(self, service: Stow, name: str) -> None:
        headers = {"Accept": "application/dicom+json"}
        if credentials := os.environ.get(credentials_variable(name)):
            headers["Authorization"] = credentials
        self._url = service.url.rstrip("/") + "/studies"
        self._where = httpx.URL(service.url).host
        timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_S)
        try:
            self._client = httpx.Client(headers=headers, timeout=timeout, verify=_tls(service))
        except (OSError, ValueError) as error:
            # An admin is about to mend it: files that were moved, or credentials that no header can hold.
            what = f"peers.{name}.stow.ca and certificate, or {credentials_variable(name)}, cannot be used"
            raise PeerError(f"{what} ({type(error).__name__})", permanent=False, reached=False) from None

    def __enter__(self) -> ByStow:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def carries(self, _item: Outgoing) -> bool:
        """Any object."""
        return True

    def send(self, item: Outgoing) -> str:
        """Store one object; gives '' or the service's warning, raises `PeerError`."""
        boundary = secrets.token_hex(16)
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        size = item.path.stat().st_size
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Content-Length": str(len(head) + size + len(tail)),
        }

        def body() -> Iterator[bytes]:
            yield head
            with item.path.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block
            yield tail

        timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_S, read=TIMEOUT_S + size / SLOWEST_LINE)
        try:
            answer = self._client.post(self._url, content=body(), headers=headers, timeout=timeout)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            why = "its certificate cannot be checked" if "CERTIFICATE" in str(error) else "no connection"
            raise PeerError(f"{why}: {self._where}", permanent=False, reached=False) from None
        except httpx.HTTPError as error:
            what = f"{self._where} broke off or did not answer ({type(error).__name__})"
            raise PeerError(what, permanent=False, reached=False) from None
        return _judge(answer, item)


def credentials_variable(name: str) -> str:
    """Variable of the environment that holds the Authorization header for a peer."""
    return f"LUNGNODE_STOW_{re.sub(r'[^A-Z0-9]', '_', name.upper())}"


def _judge(answer: httpx.Response, item: Outgoing) -> str:
    """What an answer says of the one object that was sent (PS3.18 tables 10.5.3-1 and 10.5.3-2)."""
    code = answer.status_code
    failures, warnings = _reasons(answer, "00081198", "00081197"), _reasons(answer, "00081199", "00081196")
    if code in (200, 202) and item.sop_instance_uid not in failures:
        warning = warnings.get(item.sop_instance_uid)
        return "" if not warning else f"stored with warning {hexadecimal(warning)}"
    if code in (200, 202, 409):
        reason = failures.get(item.sop_instance_uid)
        if reason in _REASONS_THAT_IT_IS_THERE:
            return f"stored with warning {hexadecimal(reason)}"
        if reason is not None:
            passes = reason in _REASONS_THAT_PASS
            raise PeerError(f"STOW-RS failed with reason {hexadecimal(reason)}", permanent=not passes)
    passes = code in _PASSES or code >= 500 or 300 <= code < 400
    # A service that lets nobody in, or is not well, is no better with the next object.
    reached = code not in (401, 403, 404, 405, 429, 502, 503, 504)
    raise PeerError(f"STOW-RS answered HTTP {code}", permanent=not passes, reached=reached)


def _reasons(answer: httpx.Response, sequence: str, reason: str) -> dict[str, int]:
    """SOP instance UID → reason, of a sequence in the answer's data set (PS3.18 F.2); 0 where none is given."""
    try:
        items: Any = answer.json()
        items = (items[0] if isinstance(items, list) else items)[sequence]["Value"]
        return {
            str(item["00081155"]["Value"][0]): int(item.get(reason, {}).get("Value", [0])[0] or 0) for item in items
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {}


def _tls(service: Stow) -> ssl.SSLContext | bool:
    if not service.url.startswith("https:"):
        return True
    context = ssl.create_default_context(cafile=service.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if service.certificate is not None:
        context.load_cert_chain(service.certificate)
    return context
