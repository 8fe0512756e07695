"""From which addresses a peer may call: an AE title alone proves nothing, for anybody can write it into a request.

A peer's addresses are networks (CIDR), single addresses and host names. Names are looked up in the background, and the
last good answer counts for as long as the resolver is down, also over a restart: whoever accepts connections never
waits for DNS, and a known peer is not refused because a name server is away.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import structlog

log = structlog.stdlib.get_logger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Seconds between two look-ups of all names.
REFRESH_S: Final = 300.0

#: Seconds after which names are looked up again early because a peer called from an address that nobody knew of: it
#: may have moved. At least so long, for a stranger could ask for it again and again.
REFRESH_EARLY_S: Final = 10.0

#: Seconds that an address counts after it was last among the answers: some name servers give one of several at a time.
KEPT_S: Final = 3600.0

#: Seconds that `start` waits for the first answers.
FIRST_S: Final = 2.0

#: RFC 1123 2.1; underscores are no host names, and yet names of hosts in Windows networks and of containers.
_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})(?:\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?\Z")

_LOOPBACK: Final[tuple[Address, ...]] = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))

#: own: one of the peer's addresses · warned: none of them, and let in nevertheless for one release · elsewhere: none
#: of them · unresolved: its names could not be looked up yet · unknown: the AE title is no peer's
Standing = Literal["own", "warned", "elsewhere", "unresolved", "unknown"]


class AddressError(ValueError):
    """An entry is neither an address nor a network nor a host name; `hint` says what to write."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True)
class Entry:
    """The addresses that one peer may call from."""

    #: Name of the peer in the settings.
    peer: str
    ae_title: str
    networks: tuple[Network, ...]
    names: tuple[str, ...]
    #: Whether the settings name the addresses; otherwise they are those of the peer's `host`.
    explicit: bool
    anywhere: bool = False


def parse(text: str) -> Network | None:
    """The network that an entry of `addresses` stands for, a single address being one too; None for a host name.

    Raises
    ------
    AddressError
        It is none of them.
    """
    text = text.strip()
    if text.lower() == "any":
        raise AddressError(
            "'any' is no address", "Write `addresses: any`, without a list, to let it call from anywhere."
        )
    with suppress(ValueError):
        return _plain(ipaddress.ip_network(text))
    within = None
    with suppress(ValueError):
        within = ipaddress.ip_network(text, strict=False)
    if within is not None:
        hint = f"Write {within} for the whole network, or {text.partition('/')[0]} for the one address."
        raise AddressError(f"'{text}' is an address within a network", hint)
    numeric = re.fullmatch(r"[0-9.]+|.*[:/].*", text)
    if numeric or not _NAME.match(text):
        hint = "Write an address (192.0.2.7, 2001:db8::7), a network (192.0.2.0/24) or a host name (ct1.example)."
        raise AddressError("is no address, network or host name", hint)
    return None


def entry(peer: str, ae_title: str, host: str, addresses: Sequence[str] | Literal["any"] | None) -> Entry:
    """A peer's entry; raises `AddressError` for an address that is none."""
    if addresses == "any":
        return Entry(peer, ae_title, (), (), explicit=True, anywhere=True)
    given = (host,) if addresses is None else tuple(addresses)
    networks, names = list[Network](), list[str]()
    for one in given:
        try:
            network = parse(one)
        except AddressError:
            if addresses is not None:
                raise
            network = None  # a host that cannot be looked up says so in the log
        if network is None:
            names.append(one.strip().rstrip("."))
        else:
            networks.append(network)
    return Entry(peer, ae_title, tuple(networks), tuple(names), explicit=addresses is not None)


def group(address: str) -> str:
    """What counts as one caller where callers are counted: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        plain = _address(address)
    except ValueError:
        return address
    if plain.version == 4:
        return str(plain)
    return str(ipaddress.ip_network((plain, 64), strict=False))


def shown(address: str) -> str:
    """An address as it stands in the log: without scope, and IPv4 where IPv6 only wraps it."""
    try:
        return str(_address(address))
    except ValueError:
        return address


class PeerAddresses:
    """Who may use the AE title of which peer.

    Parameters
    ----------
    entries
        All peers. Where several share an AE title, the addresses of each count.
    enforce
        Refuse a peer whose settings have no `addresses` and that calls from elsewhere than its `host`; else it is let
        in, with a warning. Addresses that the settings name are enforced in any case.
    memory
        File that keeps the last good answers over a restart.
    """

    def __init__(self, entries: Iterable[Entry], *, enforce: bool, memory: Path | None = None) -> None:
        self._entries: dict[str, list[Entry]] = {}
        for one in entries:
            self._entries.setdefault(one.ae_title.strip(), []).append(one)
        self._enforce = enforce
        self._memory = memory
        names = {name for peers in self._entries.values() for peer in peers for name in peer.names}
        self._names = {name: _Name() for name in sorted(names)}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._looked_at = -REFRESH_S
        self._remember()

    def __bool__(self) -> bool:
        return bool(self._entries)

    def check(self, ae_title: str, address: str, own_address: str = "") -> tuple[Standing, str]:
        """How a caller stands to the AE title that it uses, and the peer's name. Never waits.

        `own_address` is the address of ours that it called: who calls from that very address is on this machine.
        """
        peers = self._entries.get(ae_title)
        if not peers:
            return "unknown", ""
        try:
            forms = _forms(address, own_address)
        except ValueError:
            forms = ()
        for peer in peers:
            if peer.anywhere or any(one in network for network in peer.networks for one in forms):
                return "own", peer.peer
            if any(one in self._names[name].seen for name in peer.names for one in forms):
                return "own", peer.peer
        if any(peer.names for peer in peers):
            self._wake.set()
        lenient = [peer.peer for peer in peers if not peer.explicit]
        if lenient and not self._enforce:
            return "warned", lenient[0]
        unresolved = [peer.peer for peer in peers if any(not self._names[name].seen for name in peer.names)]
        return ("unresolved", unresolved[0]) if unresolved else ("elsewhere", (lenient or [peers[0].peer])[0])

    def start(self) -> None:
        """Look names up from now on, from a thread of its own; waits a moment for the first answers."""
        if not self._names:
            return
        self._stopping.clear()
        self._thread = threading.Thread(target=self._work, name="addresses", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + FIRST_S
        for name in self._names.values():
            name.asked.wait(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Look nothing up any more; what is under way ends by itself."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while not self._stopping.is_set():
            for name, state in self._names.items():
                if not state.under_way:
                    state.under_way = True
                    # A thread each, as one name whose server does not answer takes half a minute.
                    threading.Thread(target=self._look_up, args=(name, state), name="look-up", daemon=True).start()
            self._looked_at = time.monotonic()
            self._wake.wait(REFRESH_S)
            self._stopping.wait(max(0.0, self._looked_at + REFRESH_EARLY_S - time.monotonic()))
            self._wake.clear()

    def _look_up(self, name: str, state: _Name) -> None:
        now = time.monotonic()
        try:
            answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found = {_address(str(one[4][0])) for one in answers}
        except (OSError, UnicodeError, ValueError) as error:
            found = set[Address]()
            if not state.failing:
                self._warn(name, state, error)
        state.failing = not found
        with self._lock:
            if found:
                before = set(state.seen)
                fresh = {one: at for one, at in state.seen.items() if now - at < KEPT_S}
                state.seen = {**fresh, **dict.fromkeys(found, now)}
                if set(state.seen) != before:
                    self._write()
            state.under_way = False
        state.asked.set()

    def _warn(self, name: str, state: _Name, error: Exception) -> None:
        peers = sorted({one.peer for peers in self._entries.values() for one in peers if name in one.names})
        hint = f"check the name with `getent hosts {name}`, or enter addresses in peers.{peers[0]}.addresses"
        log.warning(
            "host name of a peer cannot be looked up",
            peer=peers[0],
            host=name,
            error=type(error).__name__,
            counts="the addresses that it had last" if state.seen else "none, so the peer cannot be recognised",
            hint=hint,
        )

    def _remember(self) -> None:
        """Take the answers of the last run, until there are better ones."""
        if self._memory is None:
            return
        with suppress(OSError, ValueError, AttributeError, TypeError):
            for name, addresses in json.loads(self._memory.read_text(encoding="utf-8")).items():
                if name in self._names:
                    self._names[name].seen = {_address(one): time.monotonic() for one in addresses}

    def _write(self) -> None:
        if self._memory is None:
            return
        answers: Mapping[str, list[str]] = {
            name: sorted(map(str, state.seen)) for name, state in self._names.items() if state.seen
        }
        draft = self._memory.with_suffix(".part")
        with suppress(OSError):  # it is looked up again after the next start
            draft.write_text(json.dumps(answers), encoding="utf-8")
            draft.replace(self._memory)


@dataclass
class _Name:
    #: Addresses, and when each was last among the answers (monotonic seconds). Replaced as a whole, never changed.
    seen: dict[Address, float] = field(default_factory=dict)
    asked: threading.Event = field(default_factory=threading.Event)
    under_way: bool = False
    failing: bool = False


def _address(text: str) -> Address:
    """An address without its scope; IPv4 where IPv6 only wraps it (RFC 4291 2.5.5.2)."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _forms(address: str, own_address: str) -> tuple[Address, ...]:
    """All addresses that a caller's address stands for: IPv4 and IPv6 have a loopback each, and 'localhost' is both."""
    plain = _address(address)
    here = plain in _LOOPBACK or (own_address and plain == _address(own_address))
    return (plain, *_LOOPBACK) if here else (plain,)


def _plain(network: Network) -> Network:
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.ip_network((mapped, network.prefixlen - 96))
    return network
