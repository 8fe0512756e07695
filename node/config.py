"""`config/*.yaml` → typed `Settings`; every error names file, line, key and the fix.

`config/node.yaml` is the commented default. Secrets never stand in the file: a broker
URL that carries a password is read from `LUNGNODE_BROKER`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator
from pydicom import Dataset
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue

from node import method_settings
from node.method_settings import Found, Location, nearest
from node.methods import registry
from node.network import addresses as network
from node.results.forms import CAPTURE_FORMS, Profile, SegForm, SrForm

#: Where settings are looked for when no file is named: the environment first, then the working folder.
CONFIG_VARIABLE = "LUNGNODE_CONFIG"
DEFAULT_FILE = Path("config/node.yaml")

#: PS3.5 6.2, VR AE: 1 to 16 characters, no backslash or control characters; leading/trailing spaces do not count.
AETitle = Annotated[
    str,
    StringConstraints(pattern=r"^[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?$"),
    Field(examples=["LUNGNODE"]),
]
#: Version from which `listener.addresses` is 'enforce' where the settings do not say: for one release a node that was
#: upgraded warns of peers that call from elsewhere, so that the admin can enter their addresses.
ADDRESSES_ENFORCED_FROM = "0.3.0"

Port = Annotated[int, Field(ge=1, le=65535, examples=[11112])]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Listener(_Section):
    """Our own application entity, to which modalities and the PACS send."""

    ae_title: AETitle = "LUNGNODE"
    """our AE title, 1 to 16 characters"""
    host: str = "0.0.0.0"
    """address to listen on; 0.0.0.0 is every interface"""
    port: Port = 11112
    """TCP port to listen on"""
    accept: Literal["known", "any"] = "known"
    """'known' takes associations only from peers that may send; 'any' also takes AE titles that are no peer's"""
    addresses: Literal["warn", "enforce"] = "warn"
    """'enforce' refuses a peer without `addresses` that calls from elsewhere than its host, 'warn' only logs it"""
    max_associations: int = Field(32, ge=1, le=512, examples=[32])
    """associations at once; more are rejected with 'local limit exceeded'"""
    quiet_period_s: float = Field(30.0, gt=0, le=3600, examples=[30])
    """seconds without an instance after which a series whose end cannot be proved is closed"""
    disk_floor_mb: int = Field(1024, ge=0, examples=[1024])
    """free disk in MB below which C-STORE answers 0xA700 'out of resources'; below half, no association is taken"""
    transport: Literal["direct", "stock"] = "direct"
    """how bytes are read from the network; 'stock' is pynetdicom's own way, slower, should a sender need it"""


class Stow(_Section):
    """The DICOMweb service of a peer (PS3.18 10.5)."""

    url: str = Field(pattern=r"^https?://[^/\s@?#\\]+(/[^\s?#\\]*)?$", examples=["https://pacs.example/dicom-web"])
    """its address, up to but without /studies; credentials are read from the environment"""

    @field_validator("url", mode="before")
    @classmethod
    def _holds_no_credentials(cls, value: Any) -> Any:
        address = str(value).partition("://")[2].partition("/")[0]
        if "@" in address or "?" in str(value):
            raise ValueError("holds credentials, or a query, which may be some")
        return value

    insecure: bool = False
    """true sends the credentials over http:// too, in the clear; without it they go over https:// only"""
    ca: Path | None = None
    """PEM file of the authority that signed the service's certificate, where the system does not know it"""
    certificate: Path | None = None
    """PEM file with a certificate and key of our own, where the service asks for one"""


class Peer(_Section):
    """Another application entity: a PACS, a modality, a workstation."""

    ae_title: AETitle
    """the peer's AE title"""
    host: str = Field(examples=["127.0.0.1"])
    """the peer's host name or address"""
    port: Port
    """the peer's DICOM port"""
    addresses: tuple[str, ...] | Literal["any"] | None = Field(None, examples=[["192.0.2.7", "192.0.2.0/24"]])
    """addresses, networks (CIDR) and host names that it may call from, or 'any'; left out, those of its host"""

    @field_validator("addresses", mode="before")
    @classmethod
    def _one_address_needs_no_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and value != "any" else value

    may: tuple[Literal["send", "receive", "count"], ...] = ("send", "receive")
    """what the peer may do: 'send' series to us, 'receive' results from us, 'count' a series that it sent, by C-FIND"""
    stow: Stow | None = None
    """deliver by STOW-RS to this DICOMweb service instead of by C-STORE"""
    commitment: Literal["off", "on", "required"] = "off"
    """storage commitment: 'on' asks the peer to confirm what it took; 'required' counts it as failed without"""
    rejection_notes: bool = False
    """whether the peer hides objects that an IHE IOCM rejection note names; it gets one when late slices come"""

    @field_validator("commitment", mode="before")
    @classmethod
    def _yaml_says_true_for_on(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    takes: tuple[str, ...] | None = Field(None, examples=[["capture", "pdf"]])
    """the objects that the peer can store, whatever a route names: infection-seg, lung-seg, sr, capture, pdf; left
    out, all"""
    seg: SegForm = "binary"
    """form of its segmentations: binary, binary-all-frames (a frame for every slice), or labelmap"""
    sr: SrForm = "comprehensive-3d"
    """form of its structured report: comprehensive-3d, or comprehensive"""
    capture: Annotated[str, StringConstraints(pattern=f"^(?:{CAPTURE_FORMS.pattern})$")] = "key-images"
    """slices of its colour capture after the summary: key-images, every-slice, or every-N-mm such as every-5-mm"""


class Route(_Section):
    """Which series are analysed, and who gets which of the resulting objects."""

    name: str = Field(min_length=1, examples=["chest-ct"])
    """name of the route, shown in status and logs"""
    from_: tuple[str, ...] | Literal["any"] = Field("any", alias="from", examples=[["pacs"]])
    """peers (by name) whose series this route takes; 'any' for all"""
    when: dict[str, str | tuple[str, ...]] = Field(default_factory=dict, examples=[{"StationName": "CT1*"}])
    """DICOM keywords and the values they must have; '*' and '?' match as in file names, a list is 'one of'"""
    analysis: str = Field(registry.DEFAULT, examples=["pneumonia"])
    """name of the method that analyses: pneumonia, or another one that is installed"""
    to: dict[str, tuple[str, ...]] = Field(examples=[{"pacs": ["infection-seg", "lung-seg", "sr", "capture"]}])
    """peers (by name) and the objects that each gets: infection-seg, lung-seg, sr, capture, pdf (of pneumonia)"""
    urgent: bool = False
    """let these series overtake the rest; a Requested Procedure Priority of STAT or HIGH does so too"""
    tell_not_analysed: bool = True
    """send a 'not analysed, because …' report and capture when a chest CT cannot be analysed"""

    def takes(self, peer_names: Collection[str], header: Dataset) -> bool:
        """Whether this route takes a series that one of `peer_names` sent, judged by one instance's `header`."""
        if self.from_ != "any" and not set(self.from_) & set(peer_names):
            return False
        return all(_matches(header.get(keyword), wanted) for keyword, wanted in self.when.items())


class Worker(_Section):
    """The processes that analyse."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks run; 'auto' takes the GPU when there is one"""


class Retention(_Section):
    """How long files are kept. What a peer has yet to get is kept in any case, and so is what failed."""

    days: int | None = Field(30, ge=1, examples=[30])
    """days after which received series and results are dropped from disk; null keeps them forever"""
    warn_free_mb: int = Field(10240, ge=0, examples=[10240])
    """free disk in MB below which status and log warn, well before the listener refuses"""


class Settings(_Section):
    """Everything that an installation may set."""

    data: Path = Path("var")
    """folder for received series, results, the ledger and the embedded broker; relative to the working folder"""
    listener: Listener = Listener()
    """our own application entity"""
    peers: dict[str, Peer] = Field(default_factory=dict)
    """the other application entities, by a name of your choice"""
    routes: tuple[Route, ...] = ()
    """tried in order; the first that matches takes the series"""
    broker: str = Field("embedded", pattern=r"^(embedded|rediss?://.+)$", examples=["embedded"])
    """'embedded' starts a private redis-server on loopback; a redis:// URL uses yours"""
    worker: Worker = Worker()
    """the processes that analyse"""
    retention: Retention = Retention()
    """how long files are kept"""

    models: dict[str, str | dict[str, str]] = Field(
        default_factory=dict, examples=[{"pneumonia": {"lungs": "lungs-r231"}}]
    )
    """by method, the model of each role, as `lungnode models list` names them; your own lie in models/ below data"""

    @property
    def installed_models(self) -> Path:
        """Folder of the models that this installation brought in."""
        return self.data / "models"

    def peers_that_may(self, what: Literal["send", "receive", "count"]) -> dict[str, Peer]:
        """Peers by name that may `send` to us, `receive` from us, or `count` what they sent."""
        return {name: peer for name, peer in self.peers.items() if what in peer.may}

    def profile(self, peer_name: str, kinds: Collection[str]) -> Profile:
        """What a peer gets of these kinds, and in which form; all of them in the usual form when it is unknown."""
        peer = self.peers.get(peer_name)
        if peer is None:
            return Profile(tuple(kinds))
        taken = tuple(kind for kind in kinds if peer.takes is None or kind in peer.takes)
        return Profile(taken, peer.seg, peer.sr, peer.capture)

    def models_for(self, method: str) -> dict[str, str]:
        """Names of the models that a method is to use, by their roles; those that are not here are the default ones."""
        named = self.models.get(method, {})
        # Before there were other methods, the roles of pneumonia stood here by themselves.
        before = {role: name for role, name in self.models.items() if isinstance(name, str)}
        return (before if method == registry.DEFAULT else {}) | (named if isinstance(named, dict) else {})

    def peer_addresses(self, memory: Path | None = None) -> network.PeerAddresses:
        """Who may use which AE title; `memory` is a file that keeps what host names resolved to."""
        entries = [network.entry(name, peer.ae_title, peer.host, peer.addresses) for name, peer in self.peers.items()]
        return network.PeerAddresses(entries, enforce=self.listener.addresses == "enforce", memory=memory)

    def hints(self) -> list[str]:
        """What works and had better be decided or changed by an admin, in a sentence each."""
        enforced = self.listener.addresses == "enforce"
        found = [
            f"peers.{name}.addresses: not set, so it may call from what its host '{peer.host}' resolves to"
            f"{'' if enforced else ' (from elsewhere it is let in with a warning)'}. "
            "Enter its addresses, networks or host names."
            for name, peer in self.peers.items()
            if peer.addresses is None
        ]
        if not enforced:
            found.append(
                "listener.addresses: 'warn' lets a stranger use the AE title of a peer that has no addresses. Set "
                f"'enforce', which is the default from version {ADDRESSES_ENFORCED_FROM}."
            )
        if before := [role for role, name in self.models.items() if isinstance(name, str)]:
            told = ", ".join(f"{role}: {self.models[role]}" for role in before)
            found.append(
                f"models.{before[0]}: models are named by method now, and a later version will not read this form. "
                f"Write models: {{{registry.DEFAULT}: {{{told}}}}}."
            )
        return found

    def peer_names(self, ae_title: str) -> set[str]:
        """Names of all peers with this AE title."""
        return {name for name, peer in self.peers.items() if peer.ae_title == ae_title.strip()}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a settings file."""

    file: Path
    line: int
    key: str
    what: str
    hint: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.key}: {self.what}. {self.hint}"


class ConfigError(ValueError):
    """A settings file cannot be used; `problems` has each reason."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


def load(file: Path | None = None) -> Settings:
    """Read settings from `file`, else from `LUNGNODE_CONFIG`, else `config/node.yaml`, else take the defaults.

    Raises
    ------
    ConfigError
        When the file is missing, is not YAML, or holds a key or value that cannot be.
    """
    named = file or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    if named is None and not DEFAULT_FILE.exists():
        return _with_secrets(Settings())
    path = named or DEFAULT_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            [Problem(path, 0, "file", error.strerror or "cannot be read", "Name a file that exists.")]
        ) from None
    return _with_secrets(parse(text, path))


def check(file: Path) -> tuple[Settings, list[str]]:
    """Read settings as `load` does, check the models that they name too, and say what had better be changed.

    Models are no part of `load`: a node must start, and install a model, that lacks one.

    Raises
    ------
    ConfigError
        As for `load`, or a model is missing, damaged or of another role than it is named for.
    """
    settings = load(file)
    text = file.read_text(encoding="utf-8")
    lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader), ()))
    _raise(file, lines, method_settings.of_bundles(settings))
    return settings, settings.hints()


def parse(text: str, file: Path = Path("settings.yaml")) -> Settings:
    """Check the YAML `text` that came from `file`; raises `ConfigError`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "not YAML"
        line = mark.line + 1 if mark else 1
        hint = "Check the indentation, and quote values that hold ':' or '#'."
        raise ConfigError([Problem(file, line, "yaml", what, hint)]) from None
    lines = dict(_lines(node, ()))
    try:
        settings = Settings.model_validate({} if values is None else values)
    except ValidationError as error:
        raise ConfigError([_problem(file, lines, dict(e)) for e in error.errors()]) from None
    _raise(file, lines, _cross_checks(settings))
    return settings


def schema() -> dict[str, Any]:
    """JSON schema of the settings, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Settings.model_json_schema(by_alias=True),
    }


def _raise(file: Path, lines: Mapping[Location, int], found: Iterable[Found]) -> None:
    """Raise `ConfigError` where something was found."""
    problems = [Problem(file, _line(lines, location), _dotted(location), what, hint) for location, what, hint in found]
    if problems:
        raise ConfigError(problems)


def _matches(value: Any, wanted: str | tuple[str, ...]) -> bool:
    """Whether any value of an attribute matches any of the patterns; an absent attribute matches none."""
    values = [] if value is None else list(value) if isinstance(value, MultiValue) else [value]
    patterns = (wanted,) if isinstance(wanted, str) else wanted
    return any(fnmatchcase(str(one), pattern) for one in values for pattern in patterns)


def _with_secrets(settings: Settings) -> Settings:
    url = os.environ.get("LUNGNODE_BROKER")
    return settings.model_copy(update={"broker": url}) if url else settings


def _cross_checks(settings: Settings) -> Iterator[Found]:
    """What no single value shows: names that must exist elsewhere, secrets in the file."""
    if urlsplit(settings.broker).password:
        hint = "Take the URL out of the file and set it in the environment as LUNGNODE_BROKER."
        yield ("broker",), "holds a password", hint
    for name, peer in settings.peers.items():
        if peer.addresses == ():
            hint = "Name at least one, or leave the key out to take those of its host."
            yield ("peers", name, "addresses"), "names no address", hint
        for n, address in enumerate(peer.addresses if isinstance(peer.addresses, tuple) else ()):
            try:
                network.parse(address)
            except network.AddressError as error:
                yield ("peers", name, "addresses", n), str(error), error.hint
    yield from method_settings.of_peers(settings)
    yield from method_settings.of_models(settings)
    seen: set[str] = set()
    for n, route in enumerate(settings.routes):
        if route.name in seen:
            yield (
                ("routes", n, "name"),
                f"'{route.name}' names two routes",
                "Give each route a name of its own.",
            )
        seen.add(route.name)
        for m, name in enumerate(() if route.from_ == "any" else route.from_):
            yield from _peer_check(settings, ("routes", n, "from", m), name, "send")
        yield from method_settings.of_route(settings, n, route)
        for name, kinds in route.to.items():
            yield from _peer_check(settings, ("routes", n, "to", name), name, "receive")
            takes = settings.peers[name].takes if name in settings.peers else None
            if takes is not None and kinds and not set(kinds) & set(takes):
                hint = f"Name an object that it takes, or add one to peers.{name}.takes."
                yield ("routes", n, "to", name), f"peer '{name}' takes none of these objects", hint
        for keyword in route.when:
            if tag_for_keyword(keyword) is None:
                near = nearest(keyword, (entry[4] for entry in DicomDictionary.values()))
                yield (
                    ("routes", n, "when", keyword),
                    "is not a DICOM keyword",
                    near or "Use a keyword of PS3.6, such as StationName.",
                )


def _peer_check(settings: Settings, location: Location, name: str, what: Literal["send", "receive"]) -> Iterator[Found]:
    if name not in settings.peers:
        near = nearest(name, settings.peers)
        yield location, f"no peer is named '{name}'", near or f"Add '{name}' under peers."
    elif what not in settings.peers[name].may:
        yield location, f"peer '{name}' may not {what}", f"Add '{what}' to peers.{name}.may."


def _lines(node: yaml.Node | None, at: Location) -> Iterator[tuple[Location, int]]:
    if node is None:
        return
    yield at, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            for location, line in _lines(value, (*at, key.value)):
                # A key's own line is where its name stands, also when its value begins below.
                yield location, (key.start_mark.line + 1 if location == (*at, key.value) else line)
    elif isinstance(node, yaml.SequenceNode):
        for n, value in enumerate(node.value):
            yield from _lines(value, (*at, n))


def _line(lines: Mapping[Location, int], location: Location) -> int:
    """Line of the location, or of the nearest part of it that is in the file."""
    while location and location not in lines:
        location = location[:-1]
    return lines.get(location, 1)


def _dotted(location: Location) -> str:
    return ".".join(map(str, location)) or "file"


def _problem(file: Path, lines: Mapping[Location, int], error: dict[str, Any]) -> Problem:
    raw: Location = tuple(error["loc"])
    location = tuple(part for n, part in enumerate(raw) if n == 0 or _in_file(lines, raw, n))
    field = _field(location)
    kind, key = error["type"], _dotted(location)
    if kind == "extra_forbidden":
        names = _section_keys(location[:-1])
        near = nearest(str(location[-1]), names)
        return Problem(file, _line(lines, location), key, "unknown key", near or f"Known here: {', '.join(names)}.")
    meaning = f"Expected {field['description']}" if field.get("description") else "See config/node.yaml"
    example = f", for instance {field['examples'][0]!r}." if field.get("examples") else "."
    if kind == "missing":
        return Problem(file, _line(lines, location), key, "is missing", f"Add it. {meaning}{example}")
    what = str(error["msg"])
    return Problem(file, _line(lines, location), key, what[:1].lower() + what[1:], meaning + example)


def _in_file(lines: Mapping[Location, int], raw: Location, n: int) -> bool:
    """Pydantic adds names of union members to a location; only the last part may be absent from the file."""
    return raw[: n + 1] in lines or (
        n == len(raw) - 1 and not str(raw[n]).startswith(("tuple[", "literal[", "str", "dict["))
    )


def _section(location: Location) -> dict[str, Any]:
    """JSON schema of the section at `location`."""
    whole = Settings.model_json_schema(by_alias=True)
    here: Any = whole
    for part in location:
        if isinstance(part, int):
            here = here.get("items", {})
        else:
            here = here.get("properties", {}).get(part, here.get("additionalProperties", {}))
        if not isinstance(here, dict):  # additionalProperties: false
            return {}
        # A section that may be left out is one of two schemas, the other of which is null.
        references = [one["$ref"] for one in (here, *here.get("anyOf", ())) if "$ref" in one]
        if references:
            here = {
                **whole["$defs"][references[0].rsplit("/", 1)[1]],
                **{k: v for k, v in here.items() if k not in ("$ref", "anyOf")},
            }
    return dict(here)


def _section_keys(location: Location) -> list[str]:
    return sorted(_section(location).get("properties", {}))


def _field(location: Location) -> dict[str, Any]:
    """Schema of the value at `location`, or of the nearest enclosing one that is described."""
    for end in range(len(location), 0, -1):
        found = _section(location[:end])
        if found.get("description"):
            return found
    return {}
