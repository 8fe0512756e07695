"""Probability of infection → lesions: the components that are large enough to be one."""

from __future__ import annotations

import cc3d
import numpy as np
from numpy.typing import NDArray


def reached(probability: NDArray[np.floating], threshold: float) -> NDArray[np.bool_]:
    """Voxels whose probability is at least the threshold."""
    found: NDArray[np.bool_]
    if probability.dtype == np.float16 and threshold > 0:
        # Half floats from 0 up are in the order of their bits, which a CPU compares without converting them.
        found = probability.view(np.int16) >= np.float16(threshold).view(np.int16)
    else:
        found = probability >= threshold
    return found


def components(infection: NDArray[np.bool_], minimum_voxels: float) -> NDArray[np.uint16]:
    """Number the 26-connected components of at least this size from 1, the largest first; at most the largest 65,535.

    Parameters
    ----------
    infection
        Infected voxels [z, y, x].
    minimum_voxels
        Components of fewer voxels are left out.
    """
    labels, count = cc3d.connected_components(
        np.ascontiguousarray(infection), connectivity=26, return_N=True, binary_image=True
    )
    # Only the infected voxels, a few in a hundred, need to be looked at again.
    where = np.flatnonzero(infection)
    found = labels.ravel()[where]
    sizes = np.bincount(found, minlength=count + 1)
    by_size = np.argsort(-sizes[1:], kind="stable") + 1
    # A whole number of voxels may miss the limit by the rounding of a voxel's volume.
    kept = by_size[sizes[by_size] >= minimum_voxels * (1 - 1e-9)][: np.iinfo(np.uint16).max]
    new_label = np.zeros(count + 1, np.uint16)
    new_label[kept] = np.arange(1, len(kept) + 1)
    relabelled = np.zeros(infection.shape, np.uint16)
    relabelled.ravel()[where] = new_label[found]
    return relabelled
