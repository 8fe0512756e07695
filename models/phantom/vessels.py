"""Arteries, veins and airways of the phantom's lungs: trees in mm, drawn as partial volumes."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.phantom.anatomy import LEFT_LUNG, RIGHT_LUNG
from models.phantom.grid import Array, Grid


def add_vessels(
    rng: np.random.Generator, grid: Grid, hu: Array, lungs: NDArray[np.uint8], carina: float, blood_hu: float
) -> NDArray[np.uint8]:
    """Draw arteries, veins and airways: trees that divide each lung's volume again and again, from its hilum.

    Returns the share of air in each voxel, 0 to 255, of bronchi a few divisions further out than those that aerated
    lung shows, and a little wider, as consolidated lung holds them open.
    """
    cover = np.zeros(grid.shape, np.uint8)
    walls, lumen, held_open = (np.zeros_like(cover) for _ in range(3))
    origin, spacing = np.asarray(grid.origin), np.asarray(grid.spacing)
    for side, sign in ((RIGHT_LUNG, -1), (LEFT_LUNG, 1)):
        inside = np.argwhere(lungs[::2, ::2, ::2] == side) * 2
        if len(inside) < 50:
            continue
        for count, root in ((1400, (-6.0, 4.0, sign * 48.0)), (1000, (-33.0, 10.0, sign * 45.0))):
            leaves = grid.positions(inside[rng.integers(0, len(inside), count)]) + rng.uniform(-2, 2, (count, 3))
            _draw_capsules(cover, _tree(rng, leaves, np.array(root), rng.uniform(0.38, 0.5)), 0.0, origin, spacing)
        leaves = grid.positions(inside[rng.integers(0, len(inside), 400)])
        bronchi = _tree(rng, leaves, np.array([carina - 29.0, 9.0, sign * 36.0]), 0.45)
        _draw_capsules(held_open, bronchi[bronchi[:, 6] > 0.65], 0.4, origin, spacing)
        bronchi = bronchi[bronchi[:, 6] > 1.0]
        _draw_capsules(walls, bronchi, 0.9, origin, spacing)
        _draw_capsules(lumen, bronchi, 0.0, origin, spacing)
    for mask, target, opacity in ((walls, -150.0, 0.8), (cover, blood_hu, 1.0), (lumen, -960.0, 1.0)):
        where = (mask > 0) & (lungs > 0)
        share = mask[where] * (opacity / 255)
        hu[where] += share * (target - hu[where])
    return held_open


def _tree(
    rng: np.random.Generator, leaves: NDArray[np.float64], root: NDArray[np.float64], leaf_radius: float
) -> Array:
    """Segments [n, 7] (both ends in mm, radius) of a tree that serves every leaf; radii follow Murray's law."""
    segments: list[list[float]] = []
    stack = [(leaves, root, 0.14)]
    while stack:
        points, start, reach = stack.pop()
        count = len(points)
        end = start + reach * (points.mean(0) - start)
        bend = (start + end) / 2 + 0.07 * np.linalg.norm(end - start) * rng.standard_normal(3)
        radius = leaf_radius * count**0.385
        segments += [[*start, *bend, radius], [*bend, *end, 0.96 * radius]]
        if count <= 2:
            continue
        spread = points.std(0) * rng.standard_normal(3)
        order = points[np.argsort(points @ (spread * points.std(0)))]
        cut = min(max(int(rng.uniform(0.3, 0.7) * count), 1), count - 1)
        stack += [(half, end, 0.45 * rng.uniform(0.8, 1.2)) for half in (order[:cut], order[cut:])]
    return np.asarray(segments, np.float32)


@njit(nogil=True, cache=True)
def _draw_capsules(cover, segments, grow, origin, spacing):  # type: ignore[no-untyped-def]
    """Composite the segments' partial volumes (0 to 255) into `cover` by maximum."""
    voxel = spacing.mean()
    for n in range(len(segments)):
        a, b, radius = segments[n, 0:3], segments[n, 3:6], segments[n, 6] + grow
        opacity = min(1.0, (2 * radius / voxel) ** 1.3)
        rim = max(radius, 0.5 * voxel)
        margin = rim + 0.6 * voxel
        low = np.empty(3, np.int64)
        high = np.empty(3, np.int64)
        for axis in range(3):
            low[axis] = max(int((min(a[axis], b[axis]) - margin - origin[axis]) / spacing[axis]), 0)
            last = int((max(a[axis], b[axis]) + margin - origin[axis]) / spacing[axis]) + 2
            high[axis] = min(max(last, 0), cover.shape[axis])
        v = b - a
        square = (v * v).sum() + 1e-9
        for k in range(low[0], high[0]):
            z = origin[0] + k * spacing[0] - a[0]
            for j in range(low[1], high[1]):
                y = origin[1] + j * spacing[1] - a[1]
                for i in range(low[2], high[2]):
                    x = origin[2] + i * spacing[2] - a[2]
                    t = min(max((z * v[0] + y * v[1] + x * v[2]) / square, 0.0), 1.0)
                    distance = np.sqrt((z - t * v[0]) ** 2 + (y - t * v[1]) ** 2 + (x - t * v[2]) ** 2)
                    share = min((rim - distance) / voxel + 0.5, 1.0) * opacity * 255
                    if share > cover[k, j, i]:
                        cover[k, j, i] = np.uint8(share)
