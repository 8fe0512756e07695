"""Install a model: a MONAI bundle as a ZIP file, or the published weights of lungmask's R231.

An archive is untrusted data: only the few files that make a bundle are unpacked, under their own names and up to a
size; weights must be safetensors with the sha256 in the metadata; and the network is built and run before the bundle is
put in place. OpenVINO IR, which is a program of its own and may compute something else than the weights, is never
taken from an archive but made here from the weights that were checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from models.configuration import data_format, inference_config, schema_metadata
from models.registry import (
    BUNDLES,
    MOST_JSON_BYTES,
    WEIGHTS,
    Bundle,
    BundleError,
    load_bundle,
    shown,
    verify,
)
from models.runtime import NoIRError, export

log = logging.getLogger(__name__)

#: Files taken from an archive, and their largest size in bytes: the bundle's own files, text and pictures. A bundle is
#: read into memory to be checked; no segmentation network of today comes near.
_WANTED = {
    re.compile(r"configs/(metadata|inference)\.json"): MOST_JSON_BYTES,
    re.compile(r"models/model\.safetensors"): 2_000_000_000,
    re.compile(r"docs/[\w-]{1,64}\.(md|png)|LICENSE", re.ASCII): 16 << 20,
}
#: Limits of an archive: files, bytes of its directory, bytes unpacked in all. Deflate reaches 1032 to 1; text and
#: weights stay far below the ratio allowed for files that are large enough to matter.
_MOST_FILES, _MOST_DIRECTORY, _MOST_BYTES = 1000, 1 << 20, 2_100_000_000
_MOST_RATIO, _RATIO_FROM = 100, 1 << 20
#: Bytes of a file of published weights; those of R231 have 120 MB.
_MOST_PICKLE = 500_000_000


def install(archive: Path, folder: Path) -> tuple[Bundle, list[str]]:
    """Install a MONAI bundle.

    Parameters
    ----------
    archive
        ZIP file of the bundle's folder, or of its content.
    folder
        Where installed models lie, each in a folder of its name.

    Returns
    -------
    Bundle, list of str
        The bundle in its place, and the archive's files that were left out.

    Raises
    ------
    BundleError
        The archive is unsafe, incomplete, not what its metadata say, or a model of that name is there already.
    """
    try:
        _check_directory(archive)
        with zipfile.ZipFile(archive) as opened:
            wanted, left_out = _chosen(opened)
            with _scratch(folder) as scratch:
                _unpack(opened, wanted, Path(scratch))
                return _put(Path(scratch), folder), left_out
    except _UNREADABLE as error:
        raise BundleError(f"{archive}: cannot be read as a ZIP file: {shown(error)}") from None
    except OSError as error:
        raise BundleError(f"{archive}: {error.strerror or error}; nothing was installed") from None


def import_r231(weights: Path, folder: Path, name: str = "lungs-r231") -> Bundle:
    """Make a bundle of the published weights of lungmask's R231 (`unet_r231-*.pth`) and install it.

    Raises
    ------
    BundleError
        The file holds anything but such weights, or a model of that name is there already.
    """
    import torch
    from safetensors.torch import save_file

    from models.networks.unet_r231 import UNetR231, published_state

    try:
        _check_pickle(weights)
        # Tensors alone: a pickle that names anything else is refused.
        state = torch.load(weights, map_location="cpu", weights_only=True)
        network = UNetR231()
        network.load_state_dict(published_state(state))
    except OSError as error:
        raise BundleError(f"{weights}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a pickle may hold anything, and fail wherever it is looked at
        raise BundleError(f"{weights}: not the weights of lungmask's R231: {shown(error)}") from None
    with _scratch(folder) as scratch:
        made = Path(scratch)
        for part in ("configs", "models", "docs"):
            (made / part).mkdir()
        save_file(network.state_dict(), made / WEIGHTS)
        digest = hashlib.sha256((made / WEIGHTS).read_bytes()).hexdigest()
        metadata = {"name": name, "sha256": digest} | schema_metadata(_R231_DESCRIPTION) | _R231
        running = inference_config("lungs", {"_target_": f"{UNetR231.__module__}.{UNetR231.__name__}"})
        for file, content in (("metadata.json", metadata), ("inference.json", running)):
            (made / "configs" / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (made / "docs" / "README.md").write_text(_R231_CARD, encoding="utf-8")
        return _put(made, folder)


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside the installed models, so that a bundle gets there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=folder, prefix=".new-", ignore_cleanup_errors=True)


#: What `zipfile` raises on archives that are damaged, or made to be.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def _check_directory(archive: Path) -> None:
    """Refuse an archive whose directory is too large: `zipfile` reads all of it before it returns the first entry.

    Records of the end of the directory are APPNOTE.TXT 4.3.14 to 4.3.16; that of ZIP64 overrides the other.
    """
    with archive.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - (1 << 16) - 98)
        file.seek(start)
        tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise zipfile.BadZipFile("it has no end of central directory")
    files, directory = struct.unpack_from("<HL", tail, at + 10)
    if at >= 20 and tail.startswith(b"PK\6\7", at - 20):
        at -= 76  # the record, whose size may vary, then its locator; nobody makes it longer
        if not tail.startswith(b"PK\6\6", max(0, at)) or struct.unpack_from("<Q", tail, at + 64) != (start + at,):
            raise zipfile.BadZipFile("the end of its central directory is not where it says")
        files, directory = struct.unpack_from("<QQ", tail, at + 32)
    if files > _MOST_FILES or directory > _MOST_DIRECTORY:
        raise BundleError(f"{archive}: holds {files} files, no bundle has over {_MOST_FILES}; nothing was installed")


def _chosen(archive: zipfile.ZipFile) -> tuple[dict[str, zipfile.ZipInfo], list[str]]:
    """Entries to unpack, by their name within the bundle, and names of the others; all were checked."""
    entries: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if problem := _problem(entry, path):
            raise BundleError(f"{archive.filename}: '{shown(entry.filename)}' {problem}; nothing was installed")
        if entry.is_dir():
            continue
        if path in entries:
            raise BundleError(f"{archive.filename}: '{shown(path)}' is there twice; nothing was installed")
        entries[path] = entry
    if len(entries) > _MOST_FILES:
        raise BundleError(f"{archive.filename}: holds {len(entries)} files, no bundle has over {_MOST_FILES}")
    tops = [path.parents[1] for path in entries if path.parts[-2:] == ("configs", "metadata.json")]
    if not tops:
        raise BundleError(f"{archive.filename}: no configs/metadata.json, so it is no MONAI bundle")
    top = min(tops, key=lambda path: len(path.parts))
    wanted, left_out = dict[str, zipfile.ZipInfo](), list[str]()
    for path, entry in entries.items():
        inner = str(path.relative_to(top)) if path.is_relative_to(top) else ""
        most = next((most for form, most in _WANTED.items() if form.fullmatch(inner)), None)
        if most is None:
            left_out.append(shown(path))
        elif entry.file_size > most:
            raise BundleError(f"{archive.filename}: {inner} has {entry.file_size:,} bytes, over {most:,}")
        else:
            wanted[inner] = entry
    if sum(entry.file_size for entry in wanted.values()) > _MOST_BYTES:
        raise BundleError(f"{archive.filename}: unpacks to more than {_MOST_BYTES:,} bytes; nothing was installed")
    if WEIGHTS.as_posix() not in wanted:
        pickles = [name for name in left_out if name.endswith((".pt", ".pth", ".ts", ".pkl"))]
        reason = f"; {pickles[0]} may hold code and is not read: save the weights as safetensors" if pickles else ""
        raise BundleError(f"{archive.filename}: no {WEIGHTS.as_posix()}{reason}")
    return wanted, left_out


def _problem(entry: zipfile.ZipInfo, path: PurePosixPath) -> str:
    """Why an entry is not safe to unpack; '' where it is."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in str(path) or not str(path).isprintable():
        return "would be written outside its folder, or has a name that no file should have"
    # Archives that were not made on Unix have no kind; APPNOTE.TXT 4.4.15 leaves it to the system.
    if kind not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
        return "is a link or a device, not a file"
    if entry.flag_bits & 0x1:
        return "is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in another way than ZIP's own"
    if entry.file_size > max(_RATIO_FROM, _MOST_RATIO * entry.compress_size):
        return f"is compressed more than {_MOST_RATIO} to 1"
    return ""


def _unpack(archive: zipfile.ZipFile, wanted: dict[str, zipfile.ZipInfo], scratch: Path) -> None:
    """Write the entries under their names; `zipfile` returns no more bytes than each declares, and checks the CRC."""
    for inner, entry in wanted.items():
        content = archive.read(entry)
        if len(content) != entry.file_size:
            raise BundleError(f"{archive.filename}: {inner} has another size than it says; nothing was installed")
        (scratch / inner).parent.mkdir(parents=True, exist_ok=True)
        (scratch / inner).write_bytes(content)


def _check_pickle(weights: Path) -> None:
    """Refuse weights too large to be read; torch's files are ZIP archives, whose entries it unpacks into memory."""
    size = weights.stat().st_size
    if zipfile.is_zipfile(weights):
        _check_directory(weights)
        with zipfile.ZipFile(weights) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    if size > _MOST_PICKLE:
        raise BundleError(f"it holds over {_MOST_PICKLE:,} bytes")


def _put(made: Path, folder: Path) -> Bundle:
    """Check a bundle and move it to its place."""
    bundle = load_bundle(made)
    place = folder / bundle.name
    if (BUNDLES / bundle.name).exists() or place.exists():
        raise BundleError(f"there is a model '{bundle.name}' already; give the new one another name, or remove {place}")
    if bundle.metadata.pop("openvino", None) is not None:  # of the archive's own IR, which was left behind
        (made / "configs" / "metadata.json").write_text(json.dumps(bundle.metadata, indent=2) + "\n", encoding="utf-8")
    verify(bundle)
    try:
        export(made)
    except NoIRError as reason:
        log.warning("the network '%s' will run on torch, several times slower: %s", bundle.name, reason)
    # The scratch folder is for its owner alone; a bundle is for the workers too.
    place.mkdir()
    for part in made.iterdir():
        shutil.move(part, place / part.name)
    return load_bundle(place)


_R231 = {
    "version": "0.0",
    "role": "lungs",
    "dimensions": 2,
    "task": "Lungs on chest CT, right and left (lungmask U-net R231)",
    "intended_use": "Research use, not for diagnosis.",
    "license": "that of the weights' publishers (github.com/JoHof/lungmask)",
    "data_source": "as published: Hofmanninger et al. 2020, doi:10.1186/s41747-020-00173-2",
    "hu_range": [-1024.0, 600.0],
    "pixel_mm": 1.5,
    "stride": 16,
    "context": 0,
    "network_data_format": data_format(
        1,
        ["*", "*"],
        "logits of three classes; softmax",
        {"0": "background", "1": "right lung", "2": "left lung"},
    ),
    "held_out": [],
}

_R231_DESCRIPTION = "Segments the right and the left lung on chest CT, with the published weights of lungmask's R231."

_R231_CARD = """# Lungs on chest CT, right and left: lungmask U-net R231

**Research use, not for diagnosis.** Imported from the published weights; nothing was measured or trained here. See
Hofmanninger et al. 2020, doi:10.1186/s41747-020-00173-2, and their licence.

The network, its cropping to the body and its scaling are lungmask's. What is not: slices come to it in slabs of about
2.5 mm and pixels of 1.5 mm, not as they were scanned; masks are interpolated back smoothly, not by the nearest pixel;
and components are cleaned as for the other lung networks. Masks agree but for their outline.
"""
