"""Bundles by name: configuration, digest-checked weights, model card (MONAI bundle layout).

A bundle is a folder: `configs/metadata.json`, `configs/inference.json`, `models/model.safetensors`, `docs/README.md`.
Weights are data: only safetensors is read, and only after its sha256 agrees with the metadata. Of `inference.json` only
`network_def` is read, from which `models.build` makes the network; the rest is for MONAI's own commands and is never
evaluated here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: The bundles that come with the program.
BUNDLES = Path(__file__).parent / "bundles"

#: Limits of a bundle's JSON files (ours hold 8 kB): bytes, and nesting of objects and lists.
MOST_JSON_BYTES, _DEEPEST_JSON = 1 << 20, 32
#: Bytes of the header of safetensors, which names each tensor in about 100 bytes.
_MOST_HEADER_BYTES = 4 << 20
#: Whole numbers that a double holds exactly; none of a model's sizes comes near.
_MOST_NUMBER = 1 << 53

#: Allowed names and versions of a model. Both go into paths, terminals and DICOM objects (VR LO).
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,31}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BundleError(Exception):
    """A bundle is missing, broken, or not what its metadata says."""


@dataclass(frozen=True)
class ModelIdentity:
    """Names a model exactly, for the objects that its results go into."""

    name: str
    version: str
    #: sha256 of `model.safetensors`, hex.
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A model on disk, its weights verified when it was loaded.

    Attributes
    ----------
    name, version, sha256
        See `ModelIdentity`.
    metadata
        `configs/metadata.json`.
    path
        The bundle's folder.
    """

    name: str
    version: str
    sha256: str
    metadata: dict[str, Any]
    path: Path

    @property
    def identity(self) -> ModelIdentity:
        """Name, version and digest."""
        return ModelIdentity(self.name, self.version, self.sha256)

    def load(self, device: str | torch.device = "cpu") -> torch.nn.Module:
        """Build the network, in eval mode, with its weights.

        Raises
        ------
        BundleError
            The weights changed since, do not fit the network, or the configuration names anything but a network.
        """
        # torch takes seconds to import: processes that only name a model do without.
        from safetensors import SafetensorError
        from safetensors.torch import load as read_safetensors

        from models.build import build

        weights, file = verified(self.path / WEIGHTS, self.sha256), self.path / "configs" / "inference.json"
        try:
            network = build(_read_json(file).get("network_def") or {}, "meta")
        except BundleError as error:
            raise BundleError(f"{file}: {error}") from None
        if int.from_bytes(weights[:8], "little") > _MOST_HEADER_BYTES:
            raise BundleError(f"{self.path / WEIGHTS}: its header is larger than {_MOST_HEADER_BYTES:,} bytes")
        own = network.state_dict()
        try:
            # The network has no memory yet. Tensors of the file take the places of its own where the shapes agree, in
            # the network's precision, as files may be in half of it.
            state = {
                name: one.to(own[name].dtype) if name in own else one for name, one in read_safetensors(weights).items()
            }
            network.load_state_dict(state, assign=True)
        except (SafetensorError, RuntimeError) as error:
            raise BundleError(
                f"{self.path / WEIGHTS}: does not fit the network of inference.json: {shown(error)}"
            ) from None
        return network.eval().requires_grad_(False).to(device)


@dataclass(frozen=True)
class BuiltBundle(Bundle):
    """A bundle whose network has been built elsewhere; it runs on torch, as it is."""

    network: torch.nn.Module

    @classmethod
    def of(cls, bundle: Bundle, network: torch.nn.Module) -> BuiltBundle:
        """The bundle with this network in place of its own."""
        return cls(bundle.name, bundle.version, bundle.sha256, bundle.metadata, bundle.path, network)

    def load(self, device: str | torch.device = "cpu") -> torch.nn.Module:
        """The network, in eval mode, on the device."""
        return self.network.eval().requires_grad_(False).to(device)


#: The weights' place within a bundle.
WEIGHTS = Path("models") / "model.safetensors"

#: The places of its OpenVINO IR, where it has one.
IR = (Path("models") / "model.xml", Path("models") / "model.bin")


def load_bundle(name_or_path: str | Path, installed: Path | None = None) -> Bundle:
    """Find a bundle and verify its weights.

    Parameters
    ----------
    name_or_path
        A name of `list_bundles`, or a bundle's folder.
    installed
        Folder of the bundles that this installation brought in, if there is one.

    Raises
    ------
    BundleError
        There is no such bundle, it is incomplete, or the digest of the weights is not the recorded one.
    """
    # A name is looked up among the installed bundles first: a folder of that name in the working folder must not win.
    homes = [BUNDLES, installed] if installed else [BUNDLES]
    path = next((home / name_or_path for home in homes if (home / name_or_path).is_dir()), Path(name_or_path))
    file = path / "configs" / "metadata.json"
    if not file.is_file():
        known = ", ".join(list_bundles(installed)) or "none"
        raise BundleError(f"no bundle '{name_or_path}': {file} is missing; installed: {known}")
    metadata = _read_json(file)
    try:
        name, version, digest = (metadata[key] for key in ("name", "version", "sha256"))
    except KeyError as error:
        raise BundleError(f"{file}: {error} is missing") from None
    for what, value, form in (("name", name, _NAME), ("version", version, _VERSION), ("sha256", digest, _DIGEST)):
        if not isinstance(value, str) or not form.fullmatch(value):
            raise BundleError(f"{file}: a model's {what} is {form.pattern}, not '{shown(value)}'")
    verified(path / WEIGHTS, digest)
    return Bundle(name, version, digest, metadata, path)


def list_bundles(installed: Path | None = None) -> tuple[str, ...]:
    """Names of the bundles that come with the program, and of those in the folder `installed`, sorted."""
    homes = [BUNDLES, installed] if installed else [BUNDLES]
    return tuple(sorted(file.parents[1].name for home in homes for file in home.glob("[!.]*/configs/metadata.json")))


def verify(bundle: Bundle) -> None:
    """Build a bundle's network and run it on a small image.

    Raises
    ------
    BundleError
        It does not load or run, or its output is not as the metadata say; or they lack a key that inference needs; or
        its OpenVINO IR, if it has one, is not the one that they name.
    """
    import torch

    file = bundle.path / "configs" / "metadata.json"
    try:
        context, stride = int(bundle.metadata.get("context", 0)), int(bundle.metadata["stride"])
        channels = int(bundle.metadata["network_data_format"]["outputs"]["pred"]["num_channels"])
        low, high = (float(value) for value in bundle.metadata["hu_range"])
        sizes = [float(bundle.metadata["pixel_mm"]), high - low, stride, context + 1, channels]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BundleError(f"{file}: inference needs {shown(error)}") from None
    if min(sizes) <= 0 or max(context, stride, channels) > 64:
        raise BundleError(f"{file}: sizes must be positive, and context, stride and channels at most 64")
    _require_role(bundle)
    if isinstance(record := bundle.metadata.get("openvino"), dict):
        for part in IR:
            verified(bundle.path / part, str(record.get(part.name)))
    image = torch.full((1, 2 * context + 1, 4 * stride, 4 * stride), -1.0)
    image[..., stride:-stride, stride:-stride] = 0.0
    network = bundle.load()
    try:
        with torch.inference_mode():
            logits = network(image)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise BundleError(f"{bundle.path}: the network does not run: {shown(error)}") from None
    if tuple(logits.shape) != (1, channels, *image.shape[2:]) or not bool(torch.isfinite(logits).all()):
        raise BundleError(f"{bundle.path}: the network gives {tuple(logits.shape)}, or numbers that are none")


def _require_role(bundle: Bundle) -> None:
    """A bundle must name its role, and fit it."""
    from models.roles import ROLES, role_of

    said = role_of(bundle.metadata)
    if said is None:
        file = bundle.path / "configs" / "metadata.json"
        raise BundleError(f'{file}: \'role\' is missing; add what the model finds, such as "role": "lungs"')
    if said in ROLES:  # another role belongs to an installed method, which checks it itself
        ROLES[said].require(bundle)


def verified(file: Path, expected: str) -> bytes:
    """Bytes of a bundle's file with this sha256, read once, so that the bytes checked are the bytes used.

    Raises
    ------
    BundleError
        It cannot be read, or has another digest.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}); restore it from the release") from None
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise BundleError(f"{file}: sha256 is {found}, metadata.json says {expected}; restore it from the release")
    return content


def shown(value: object, most: int = 200) -> str:
    """Foreign text for a terminal or a log: one line, printable characters only, cut at `most`."""
    text = "".join(one if one.isprintable() else "?" for one in str(value)[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a bundle, within limits of size and depth, and with finite numbers only."""
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_JSON_BYTES + 1)
        if len(text) > MOST_JSON_BYTES:
            raise BundleError(f"{file}: is larger than {MOST_JSON_BYTES:,} bytes")
        content = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except OSError as error:
        raise BundleError(f"{file}: cannot be read as JSON: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: cannot be read as JSON: {shown(error)}") from None
    if not isinstance(content, dict):
        raise BundleError(f"{file}: must hold one JSON object")
    level: list[Any] = [content]
    for _ in range(_DEEPEST_JSON):
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        level = [one for one in level if isinstance(one, dict | list)]
    if level:
        raise BundleError(f"{file}: holds objects or lists more than {_DEEPEST_JSON} deep")
    return content


def _whole(text: str) -> int:
    if len(text) > 17 or abs(number := int(text)) > _MOST_NUMBER:
        raise ValueError("a whole number is larger than 2^53")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is not finite")
    return number
