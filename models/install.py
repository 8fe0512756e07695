"""Bring a model of one's own: a MONAI bundle as a ZIP file, or the published weights of lungmask's R231.

What comes from elsewhere is data and nothing else: only the few files that a bundle is read from are taken out of an
archive, under their own names and up to a size; weights are safetensors whose sha256 the metadata give; and before a
bundle is in place its network has been built and run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from models.registry import BUNDLES, WEIGHTS, Bundle, BundleError, data_format, load_bundle, verify
from models.runtime import NoIRError, export

log = logging.getLogger(__name__)

#: What is taken of an archive: the bundle's own files, OpenVINO's form of the network, words and pictures.
_WANTED = re.compile(
    r"configs/(metadata|inference)\.json|models/model\.(safetensors|xml|bin)|docs/[\w-]+\.(md|png)|LICENSE"
)
#: A bundle is read into memory to be checked; no segmentation network of today comes near.
_MOST_BYTES = 2_000_000_000
_MOST_FILES = 1000
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def install(archive: Path, folder: Path) -> tuple[Bundle, list[str]]:
    """Install a MONAI bundle.

    Parameters
    ----------
    archive
        ZIP file of the bundle's folder, or of what is in it.
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
        with zipfile.ZipFile(archive) as opened, _scratch(folder) as scratch:
            left_out = _unpack(opened, Path(scratch))
            return _put(Path(scratch), folder), left_out
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise BundleError(f"{archive}: cannot be read as a ZIP file: {error}") from None
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
        # Tensors alone: a pickle that names anything else is refused.
        state = torch.load(weights, map_location="cpu", weights_only=True)
        network = UNetR231()
        network.load_state_dict(published_state(state))
    except OSError as error:
        raise BundleError(f"{weights}: cannot be read ({error.strerror})") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, AttributeError, EOFError) as error:
        raise BundleError(f"{weights}: not the weights of lungmask's R231: {str(error).splitlines()[0]}") from None
    with _scratch(folder) as scratch:
        made = Path(scratch)
        for part in ("configs", "models", "docs"):
            (made / part).mkdir()
        save_file(network.state_dict(), made / WEIGHTS)
        metadata = _R231 | {"name": name, "sha256": hashlib.sha256((made / WEIGHTS).read_bytes()).hexdigest()}
        definition = {"network_def": {"_target_": f"{UNetR231.__module__}.{UNetR231.__name__}"}}
        for file, content in (("metadata.json", metadata), ("inference.json", definition)):
            (made / "configs" / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (made / "docs" / "README.md").write_text(_R231_CARD, encoding="utf-8")
        return _put(made, folder)


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside the installed models, so that a bundle gets there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=folder, prefix=".new-", ignore_cleanup_errors=True)


def _unpack(archive: zipfile.ZipFile, scratch: Path) -> list[str]:
    """Write the wanted files; returns the names of the others."""
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    paths = [PurePosixPath(entry.filename.replace("\\", "/")) for entry in entries]
    if bad := [str(path) for path in paths if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]]:
        raise BundleError(f"{archive.filename}: {bad[0]!r} would be written outside its folder; nothing was installed")
    if len(entries) > _MOST_FILES:
        raise BundleError(f"{archive.filename}: holds {len(entries)} files, no bundle has over {_MOST_FILES}")
    tops = [path.parents[1] for path in paths if path.parts[-2:] == ("configs", "metadata.json")]
    if not tops:
        raise BundleError(f"{archive.filename}: no configs/metadata.json, so it is no MONAI bundle")
    top = min(tops, key=lambda path: len(path.parts))
    left_out, spent = [], 0
    for entry, path in zip(entries, paths, strict=True):
        inner = str(path.relative_to(top)) if path.is_relative_to(top) else ""
        if not _WANTED.fullmatch(inner):
            left_out.append(str(path))
            continue
        with archive.open(entry) as source:
            # Read up to the limit and a byte more: an entry may be larger than it says.
            content = source.read(_MOST_BYTES - spent + 1)
        spent += len(content)
        if spent > _MOST_BYTES:
            raise BundleError(f"{archive.filename}: unpacks to more than {_MOST_BYTES:,} bytes; nothing was installed")
        (scratch / inner).parent.mkdir(parents=True, exist_ok=True)
        (scratch / inner).write_bytes(content)
    if not (scratch / WEIGHTS).exists():
        pickles = [name for name in left_out if name.endswith((".pt", ".pth", ".ts", ".pkl"))]
        reason = f"; {pickles[0]} may hold code and is not read: save the weights as safetensors" if pickles else ""
        raise BundleError(f"{archive.filename}: no {WEIGHTS.as_posix()}{reason}")
    return left_out


def _put(made: Path, folder: Path) -> Bundle:
    """Check a bundle and move it to its place."""
    bundle = load_bundle(made)
    if not _NAME.fullmatch(bundle.name):
        raise BundleError(f"a model's name is lower-case letters, digits, '.', '-' and '_', not {bundle.name!r}")
    place = folder / bundle.name
    if (BUNDLES / bundle.name).exists() or place.exists():
        raise BundleError(f"there is a model '{bundle.name}' already; give the new one another name, or remove {place}")
    verify(bundle)
    if not bundle.metadata.get("openvino"):
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
    "data_source": ["as published: Hofmanninger et al. 2020, doi:10.1186/s41747-020-00173-2"],
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

_R231_CARD = """# Lungs on chest CT, right and left: lungmask U-net R231

**Research use, not for diagnosis.** Imported from the published weights; nothing was measured or trained here. See
Hofmanninger et al. 2020, doi:10.1186/s41747-020-00173-2, and their licence.

The network, its cropping to the body and its scaling are lungmask's. What is not: slices come to it in slabs of about
2.5 mm and pixels of 1.5 mm, not as they were scanned; masks are interpolated back smoothly, not by the nearest pixel;
and components are cleaned as for the other lung networks. Masks agree but for their outline.
"""
