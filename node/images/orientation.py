"""The canonical orientation that the networks are trained in, and the way back to the source grid.

Canonical axes of an array: 0 runs inferior → superior, 1 anterior → posterior, 2 patient right → patient left, that
is +z, +y, +x of the patient coordinate system (LPS, PS3.3 C.7.6.2.1.1). Axes are only permuted and reversed, never
resampled, so an oblique volume keeps its obliquity and a mask returns to its source voxels exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Orientation:
    """Which source axis becomes which canonical axis, and which are reversed."""

    #: Source array axis for each canonical axis.
    axes: tuple[int, int, int]
    #: Canonical axes that are reversed after the permutation.
    reversed_axes: tuple[int, ...]

    @classmethod
    def of(cls, affine: NDArray[np.float64]) -> Self:
        """Orientation of a volume with this affine (column, row, slice → LPS mm), the nearest along the axes."""
        # Columns to array axes (slice, row, column), rows to canonical axes (z, y, x), each of unit length.
        direction = affine[2::-1, 2::-1] / np.linalg.norm(affine[:3, :3], axis=0)[::-1]
        # Choose the three together, not axis by axis: at 45° two canonical axes would claim one source axis.
        axes = max(permutations(range(3)), key=lambda p: sum(abs(direction[n, p[n]]) for n in range(3)))
        return cls(
            axes=(axes[0], axes[1], axes[2]),
            reversed_axes=tuple(n for n in range(3) if direction[n, axes[n]] < 0),
        )

    def canonical(self, array: NDArray[Any]) -> NDArray[Any]:
        """View of a source array (slices, rows, columns) in canonical orientation."""
        return np.flip(array.transpose(self.axes), self.reversed_axes)

    def source(self, array: NDArray[Any]) -> NDArray[Any]:
        """View of a canonical array on the source grid; the inverse of `canonical`."""
        return np.flip(array, self.reversed_axes).transpose(np.argsort(self.axes))

    def spacing(self, source_spacing: tuple[float, float, float]) -> tuple[float, float, float]:
        """Spacing (mm) along the canonical axes from `Volume.spacing`."""
        z, y, x = (source_spacing[axis] for axis in self.axes)
        return z, y, x
