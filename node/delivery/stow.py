"""Delivery by STOW-RS (PS3.18 10.5): one POST for each object over a connection that is kept open.

Whatever a service answers, the outcome is that of one object: an answer is read up to a size and a time, credentials
go only where the settings say, and a redirect is not followed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import ssl
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final

import httpx

from node.config import Settings, Stow
from node.delivery.peer import SLOWEST_LINE, Outgoing
from node.network.associations import CONNECT_S, TIMEOUT_S, PeerError, hexadecimal

#: Bytes read from disk at a time.
_BLOCK = 1 << 20

#: Bytes of an answer, unpacked too, that are read: it speaks of one object, in less than 1 kB.
_MOST_ANSWER: Final = 1 << 20

#: HTTP statuses whose answer says more of the object (PS3.18 table 10.5.3-1); that of another is not read.
_SAY_MORE: Final = frozenset((200, 202, 409))

#: HTTP statuses after which the same object may well be taken: a timeout, a conflict with what the server is doing, too
#: many requests, a server or a proxy that is not well. 401 and 403 are credentials that an admin is about to correct,
#: 404 and 405 an address (no answer to a store, PS3.18 table 10.5.3-1), or a proxy whose service is being replaced.
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
        headers = {"Accept": "application/dicom+json", "Accept-Encoding": "identity"}
        if credentials := os.environ.get(credentials_variable(name)):
            if _in_the_clear(service) and not service.insecure:
                raise PeerError(f"{_REFUSAL}: {_hint(name)}", permanent=False, reached=False)
            headers["Authorization"] = credentials
        self._url = service.url.rstrip("/") + "/studies"
        self._deadline = _Deadline()
        timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_S)
        try:
            self._where = httpx.URL(service.url).host
            self._client = httpx.Client(headers=headers, timeout=timeout, verify=_tls(service), follow_redirects=False)
        except (OSError, ValueError, httpx.InvalidURL) as error:
            # An admin is about to correct it: files that were moved, or credentials that no header can hold.
            what = f"peers.{name}.stow.ca and certificate, or {credentials_variable(name)}, cannot be used"
            raise PeerError(f"{what} ({type(error).__name__})", permanent=False, reached=False) from None

    def __enter__(self) -> ByStow:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()
        self._deadline.close()

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
        most_s = CONNECT_S + TIMEOUT_S + 2 * size / SLOWEST_LINE
        request = self._client.build_request("POST", self._url, content=body(), headers=headers, timeout=timeout)
        request.extensions["trace"] = self._deadline.trace
        try:
            with self._deadline.of(most_s):
                answer = self._client.send(request, stream=True)
                try:
                    content = _content(answer) if answer.status_code in _SAY_MORE else b""
                finally:
                    answer.close()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            why = "its certificate cannot be checked" if "CERTIFICATE" in str(error) else "no connection"
            raise PeerError(f"{why}: {self._where}", permanent=False, reached=False) from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            what = f"{self._where} broke off or did not answer ({type(error).__name__})"
            if self._deadline.passed:
                what = f"{self._where} did not come to an end of its answer in {most_s:.0f} s"
            raise PeerError(what, permanent=False, reached=False) from None
        return _judge(answer.status_code, content, item)


def credentials_variable(name: str) -> str:
    """Variable of the environment that holds the Authorization header for a peer."""
    return f"LUNGNODE_STOW_{re.sub(r'[^A-Z0-9]', '_', name.upper())}"


def credentials_in_the_clear(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Peers whose credentials are set and whose service has no https: name, what comes of that, and what to do."""
    for name, peer in settings.peers_that_may("receive").items():
        if peer.stow is not None and _in_the_clear(peer.stow) and os.environ.get(credentials_variable(name)):
            if peer.stow.insecure:
                what = "its credentials go over plain http, as its setting stow.insecure says"
                yield name, what, f"give peers.{name}.stow.url as https:// where the service has it"
            else:
                yield name, _REFUSAL, _hint(name)


_REFUSAL: Final = "nothing is sent, as its credentials would go over plain http"


def _hint(name: str) -> str:
    variable = credentials_variable(name)
    return f"give peers.{name}.stow.url as https://, set peers.{name}.stow.insecure: true, or unset {variable}"


def _in_the_clear(service: Stow) -> bool:
    return not service.url.lower().startswith("https:")


class _Deadline:
    """Ends a request that takes longer in all than it may: httpx bounds each wait for a byte, not their sum.

    The connection is shut down from a thread of the timer, after which what waits for it ends with an error.
    """

    def __init__(self) -> None:
        self.passed = False
        self._connection: socket.socket | None = None

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """What httpcore reports: a duplicate of each new connection is kept, as TLS takes the first one over."""
        if event == "connection.connect_tcp.complete":
            self.close()
            self._connection = info["return_value"].get_extra_info("socket").dup()
            if self.passed:
                self._cut()

    @contextmanager
    def of(self, seconds: float) -> Iterator[None]:
        """Bound what is done meanwhile."""
        self.passed = False
        timer = threading.Timer(seconds, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def close(self) -> None:
        """Forget the connection; its owner closes its own handle."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _cut(self) -> None:
        self.passed = True
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)


def _content(answer: httpx.Response) -> bytes:
    """An answer's bytes, unpacked, up to a limit; empty where they are packed in a way that was not asked for.

    Raises
    ------
    PeerError
        It is larger. Whether the object was kept is not known, and it is sent again under the same UID.
    """
    packed = bytearray()
    for block in answer.iter_raw():
        packed += block
        if len(packed) > _MOST_ANSWER:
            break
    coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    content = bytes(packed)
    if coding in ("gzip", "x-gzip", "deflate"):  # some proxies pack whatever the client asks for
        try:
            content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, _MOST_ANSWER + 1)
        except zlib.error:
            return b""
    elif coding != "identity":
        return b""
    if max(len(packed), len(content)) > _MOST_ANSWER:
        raise PeerError(f"STOW-RS answered more than {_MOST_ANSWER >> 10} kB for one object", permanent=False)
    return content


def _judge(code: int, content: bytes, item: Outgoing) -> str:
    """What an answer says of the one object that was sent (PS3.18 tables 10.5.3-1 and 10.5.3-2)."""
    failures, warnings = _reasons(content, "00081198", "00081197"), _reasons(content, "00081199", "00081196")
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


def _reasons(content: bytes, sequence: str, reason: str) -> dict[str, int]:
    """SOP instance UID → reason, of a sequence in the answer's data set (PS3.18 F.2); 0 where none is given."""
    try:
        items: Any = json.loads(content)
        items = (items[0] if isinstance(items, list) else items)[sequence]["Value"]
        return {
            str(item["00081155"]["Value"][0]): _unsigned(item.get(reason, {}).get("Value", [0])[0] or 0)
            for item in items
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _unsigned(value: Any) -> int:
    """A value of VR US (PS3.5 6.2); 0 for what is none."""
    number = int(value)
    return number if 0 <= number <= 0xFFFF else 0


def _tls(service: Stow) -> ssl.SSLContext | bool:
    if not service.url.startswith("https:"):
        return True
    context = ssl.create_default_context(cafile=service.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if service.certificate is not None:
        context.load_cert_chain(service.certificate)
    return context
