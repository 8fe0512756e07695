"""Pneumonia of the phantom: ground glass, crazy paving, consolidation, air bronchograms, and the mask of what shows."""

from __future__ import annotations

import cc3d
import numpy as np
from numpy.typing import NDArray

from models.phantom.grid import Array, Box, Grid, depth_of, ramp

#: A lesion is labelled only where it is denser than the lung it replaces by so much (median): a reader must see it.
VISIBLE_CONTRAST_HU = 90.0
#: Lesion islands below this are dropped from the mask, as no reader draws them.
MINIMUM_LESION_MM3 = 100.0


def add_pneumonia(
    rng: np.random.Generator,
    grid: Grid,
    hu: Array,
    lungs: NDArray[np.uint8],
    severity: int,
    edge: Array,
    fine: Array,
    *,
    septa: Array | None = None,
    bronchi: NDArray[np.uint8] | None = None,
) -> NDArray[np.bool_]:
    """Fill lesions into the lungs and return their visible extent.

    Ground glass is a veil over the vessels; consolidation hides them and reaches the density of the chest wall.

    Parameters
    ----------
    septa
        0 to 1, `septal_lines`: thickened septa within ground glass, crazy paving.
    bronchi
        0 to 255, as `vessels.add_vessels` returns it: what stays open within consolidation, air bronchograms.
    """
    mask = np.zeros(grid.shape, bool)
    inside = np.argwhere(lungs > 0)
    if severity == 0 or len(inside) == 0:
        return mask
    centres = _lesion_centres(rng, grid, lungs, inside, int(rng.integers(*((1, 5), (4, 11), (9, 22))[severity - 1])))
    glass_hu = rng.uniform(-650, -380)
    share_solid = rng.uniform(0.1, 0.6)
    for number, centre in enumerate(centres):
        solid = rng.random() < share_solid or (number == 0 and severity == 3)
        radius = rng.uniform(*((9, 18), (10, 26), (14, 38))[severity - 1])
        box, veil = _blob(rng, grid, centre, radius, edge)
        veil *= lungs[box] > 0
        before = hu[box].copy()
        target = np.clip(glass_hu + rng.normal(0, 70), -700, -280) + 30 * fine[box]
        hu[box] += veil * np.maximum(target - hu[box], 0)
        if solid:
            core = ramp(0.75, 0.95, veil) if rng.random() < 0.5 else veil
            hu[box] += core * (rng.uniform(-40, 55) + 12 * fine[box] - hu[box])
            if bronchi is not None:
                hu[box] += core * (bronchi[box] / np.float32(255)) * (-940 - hu[box])
        elif septa is not None:
            hu[box] += veil * septa[box] * np.maximum(-130 - hu[box], 0)
        extent = veil > 0.5
        if extent.any() and np.median((hu[box] - before)[extent]) > VISIBLE_CONTRAST_HU:
            mask[box] |= extent
    kept: NDArray[np.bool_] = cc3d.dust(mask, int(np.ceil(MINIMUM_LESION_MM3 / np.prod(grid.spacing))), connectivity=6)
    return kept.astype(bool)


def septal_lines(field: Array) -> Array:
    """A mesh of lines, 0 to 1: where smooth noise, read in two places, crosses zero."""
    lines = np.exp(-((field / 0.25) ** 2))
    depth, height, width = (n // 2 for n in field.shape)
    mesh: Array = np.maximum(lines, np.roll(lines, (depth, height, width), (0, 1, 2)))
    return mesh


def _lesion_centres(
    rng: np.random.Generator, grid: Grid, lungs: NDArray[np.uint8], inside: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Centres [n, 3] in mm, most of them near the pleura, at the back and at the base."""
    depth = depth_of(lungs > 0, grid)[lungs > 0]
    place = grid.positions(inside)
    weight = np.exp(
        -depth / rng.uniform(4, 18)
        + rng.uniform(0, 1.4) * place[:, 1] / 90
        - rng.uniform(-0.3, 0.9) * place[:, 0] / 100
    )
    # The pleura of the chest wall, not of the mediastinum.
    weight *= np.exp(rng.uniform(0, 4) * np.hypot(place[:, 1] / 95, place[:, 2] / 130))
    if rng.random() < 0.2:
        weight *= lungs[lungs > 0] == rng.integers(1, 3)
    if not weight.any():
        weight = np.ones_like(weight)
    return place[rng.choice(len(place), min(count, len(place)), p=weight / weight.sum())]


def _blob(
    rng: np.random.Generator, grid: Grid, centre: NDArray[np.float64], radius: float, edge: Array
) -> tuple[Box, Array]:
    """Box around one lesion and its opacity (0 to 1) there: a flattened ellipsoid with a ragged edge."""
    box = grid.box(centre, 2.2 * radius)
    z, y, x = grid.offsets(box, centre)
    # Lesions spread along the chest wall: flat along the line from the lung's axis outwards.
    outward = np.array([0.0, centre[1], centre[2] - np.sign(centre[2]) * 60.0])
    outward /= np.linalg.norm(outward) + 1e-6
    along = y * outward[1] + x * outward[2]
    square = z * z + y * y + x * x
    flat = rng.uniform(0.5, 1.0)
    field = np.exp(-0.6 * (square - along**2 + (along / flat) ** 2) / radius**2) + rng.uniform(0.06, 0.22) * edge[box]
    soft = rng.uniform(0.06, 0.22)
    return box, ramp(0.5 - soft, 0.5 + soft, field)
