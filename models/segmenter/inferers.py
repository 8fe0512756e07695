"""MONAI inferers that run a bundle as the node does: what `inference.json` names for `python -m monai.bundle run`.

The node itself never reads that part of the file. Our networks see slices of one pixel size and thickness, and their
masks are cleaned in three dimensions; an inferer does both, by the code that the node uses. MONAI builds the network,
and torch runs it. On a CPU the node runs it on OpenVINO, in int8 or bfloat16: a few voxels of the outline may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.utils import affine_to_spacing
from monai.inferers.inferer import Inferer
from monai.utils.type_conversion import convert_to_dst_type
from numpy.typing import NDArray

from models.registry import BuiltBundle, Bundle, load_bundle
from models.segmenter.single import InfectionFinder, LungFinder

#: From HU and spacing (z, y, x) in mm to a mask.
_Finder = Callable[[NDArray[np.int16], tuple[float, float, float]], NDArray[Any]]


class LungInferer(Inferer):
    """Right and left lung of a volume.

    Parameters
    ----------
    bundle_root
        Folder of the lung model's bundle.
    """

    def __init__(self, bundle_root: str) -> None:
        self._bundle = _bundle(bundle_root)

    def __call__(self, inputs: torch.Tensor, network: Any, *_: Any, **__: Any) -> torch.Tensor:
        """Labels [1, 1, z, y, x] of HU [1, 1, z, y, x] in canonical orientation, with its affine (a MetaTensor)."""
        built = BuiltBundle.of(self._bundle, network)
        return _mask(LungFinder(built, inputs.device.type), inputs)


class InfectionInferer(Inferer):
    """Infection in the lungs of a volume; the lungs are found first.

    Parameters
    ----------
    bundle_root
        Folder of the infection model's bundle.
    lungs
        The bundle of the lungs: the name of one that comes with the program, or a folder.
    """

    def __init__(self, bundle_root: str, lungs: str = "lungs") -> None:
        self._bundle = _bundle(bundle_root)
        self._lungs = load_bundle(lungs)

    def __call__(self, inputs: torch.Tensor, network: Any, *_: Any, **__: Any) -> torch.Tensor:
        """See `LungInferer`; 1 where there is infection."""
        built = BuiltBundle.of(self._bundle, network)
        return _mask(InfectionFinder(self._lungs, built, inputs.device.type), inputs)


def _bundle(root: str) -> Bundle:
    # Resolved, since '.' would name the folder of all bundles.
    return load_bundle(Path(root).resolve())


def _mask(find: _Finder, inputs: Any) -> torch.Tensor:
    """Run a finder on a batch of one volume."""
    if inputs.ndim != 5 or tuple(inputs.shape[:2]) != (1, 1):
        raise ValueError(f"one volume [1, 1, z, y, x] at a time, not {tuple(inputs.shape)}")
    z, y, x = (float(size) for size in affine_to_spacing(inputs.affine[0]))
    values = inputs[0, 0].detach().cpu().numpy()
    hu = np.rint(values).clip(*_INT16).astype(np.int16)
    found = torch.from_numpy(find(hu, (z, y, x)).astype(np.uint8))[None, None]
    # With the affine and the history of the input, by which MONAI brings it back to the source grid.
    mask: torch.Tensor = convert_to_dst_type(found, inputs, dtype=found.dtype)[0]
    return mask


_INT16 = (np.iinfo(np.int16).min, np.iinfo(np.int16).max)
