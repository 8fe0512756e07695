"""What changes a whole lung, drawn into a phantom or into slices of a patient: lobes and lungs without air, and none.

Each function draws one finding from its generator into `hu` and `lungs`, in place. Lung without air is lung; fluid and
free gas in the pleural space are not, and leave the mask. All needs the sides alone, so a single slice will do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.phantom.grid import Array, Grid, depth_of

_Mask = NDArray[np.uint8]


def add_consolidated_lobe(rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, fine: Array) -> None:
    """Fill a lobe, or what lies on one side of a plane through a lung, often with bronchi that stay open."""
    side = _side(rng, lungs)
    place = np.array([0.62, -0.75, 0.0]) + rng.normal(0, 0.25, 3)
    score = sum(weight * grid.axis(i) for i, weight in enumerate(place)) * rng.choice((-1, 1)) + 4 * fine
    _without_air(rng, grid, hu, _top(lungs == side, score, rng.uniform(0.2, 0.65)), fine)


def add_white_lung(rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, fine: Array) -> None:
    """Take the air out of one lung, but for patches now and then."""
    of_side = lungs == _side(rng, lungs)
    share = 1.0 if rng.random() < 0.4 else rng.uniform(0.75, 0.97)
    score = ndimage.gaussian_filter(rng.standard_normal(hu.shape), [8 / s for s in grid.spacing])
    _without_air(rng, grid, hu, _top(of_side, score, share), fine)


def add_large_effusion(
    rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, fine: Array, share: float | None = None
) -> None:
    """Fill a part of one pleural space from the back, and press the air out of the lung beside it."""
    side = _side(rng, lungs)
    of_side = lungs == side
    share = rng.uniform(0.15, 0.75) if share is None else share
    # Fluid lies at the back, and rises along the chest wall.
    depth = depth_of(of_side, grid)
    score = grid.axis(1) - rng.uniform(0.1, 0.4) * grid.axis(0) - rng.uniform(0.2, 1.2) * depth + 1.5 * fine
    fluid = _top(of_side, score, share)
    beside = of_side & ~fluid & (score > score[fluid].min(initial=np.inf) - rng.uniform(3, 30))
    _without_air(rng, grid, hu, beside, fine)
    _remove(rng, hu, lungs, fluid, fine)


def add_pneumothorax(
    rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, fine: Array, share: float | None = None
) -> None:
    """Let a lung fall towards its hilum from the front, gas between it and the chest wall."""
    side = _side(rng, lungs)
    of_side = lungs == side
    share = float(rng.choice([rng.uniform(0.1, 0.35), rng.uniform(0.35, 0.85)])) if share is None else share
    score = _from_hilum(grid, of_side, side) - rng.uniform(0.4, 1.6) * grid.axis(1)
    gas = _top(of_side, score, share)
    rest = of_side & ~gas
    pressed = hu + rng.uniform(0, 250) * share
    if share > 0.6 and rng.random() < 0.6:
        pressed = np.maximum(hu, rng.uniform(0, 50) + 10 * fine)
    hu[rest] = np.maximum(hu, pressed)[rest]
    pleura = rest & (ndimage.distance_transform_edt(~gas, sampling=grid.spacing) < 1.6)
    hu[pleura] = np.maximum(hu[pleura], -450)
    hu[gas] = -1000 + 3 * fine[gas]
    lungs[gas] = 0
    if rng.random() < 0.25:
        # Fluid below the gas, with a level.
        level = _top(gas, np.broadcast_to(grid.axis(1), hu.shape), rng.uniform(0.05, 0.4))
        hu[level] = rng.uniform(0, 40) + 5 * fine[level]


def add_collapsed_lung(rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, fine: Array) -> None:
    """Leave of one lung a lump without air at the hilum, and fluid in its place."""
    side = _side(rng, lungs)
    of_side = lungs == side
    score = _from_hilum(grid, of_side, side)
    fluid = _top(of_side, score, rng.uniform(0.5, 0.85))
    _without_air(rng, grid, hu, of_side & ~fluid, fine)
    _remove(rng, hu, lungs, fluid, fine)


def remove_lung(rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, fine: Array) -> None:
    """Take one lung out: fluid and scar in its place, now and then gas above the fluid."""
    gone = lungs == _side(rng, lungs)
    _remove(rng, hu, lungs, gone, fine)
    if rng.random() < 0.25:
        gas = _top(gone, np.broadcast_to(-grid.axis(1), hu.shape), rng.uniform(0.1, 0.5))
        hu[gas] = -1000 + 3 * fine[gas]


#: All of the above, and how often each is drawn where they are drawn at random.
FINDINGS: dict[str, tuple[float, Callable[[np.random.Generator, Grid, Array, _Mask, Array], None]]] = {
    "consolidated lobe": (0.34, add_consolidated_lobe),
    "white lung": (0.12, add_white_lung),
    "large effusion": (0.22, add_large_effusion),
    "pneumothorax": (0.14, add_pneumothorax),
    "collapsed lung": (0.10, add_collapsed_lung),
    "absent lung": (0.08, remove_lung),
}


def _side(rng: np.random.Generator, lungs: _Mask) -> int:
    """One of the lungs that there are."""
    sides = [side for side in (1, 2) if (lungs == side).any()]
    return int(rng.choice(sides)) if sides else 1


def _top(inside: NDArray[np.bool_], score: Array, share: float) -> NDArray[np.bool_]:
    """So great a share of `inside`, its voxels of the highest score."""
    if not inside.any():
        return inside
    score = np.broadcast_to(score, inside.shape)
    top: NDArray[np.bool_] = inside & (score > np.quantile(score[inside], 1 - share))
    return top


def _from_hilum(grid: Grid, of_side: NDArray[np.bool_], side: int) -> Array:
    """Distance in mm from the middle of the lung's medial border."""
    if not of_side.any():
        return np.zeros(of_side.shape, np.float32)
    middle = [grid.axis(i).ravel()[np.nonzero(of_side)[i]].mean() for i in range(3)]
    x = grid.axis(2).ravel()[np.flatnonzero(of_side.any((0, 1)))]
    middle[2] = x.max() if side == 1 else x.min()
    distance: Array = np.sqrt(sum(((grid.axis(i) - middle[i]) ** 2 for i in range(3)), np.float32(0)))
    return distance


def _without_air(rng: np.random.Generator, grid: Grid, hu: Array, where: NDArray[np.bool_], fine: Array) -> None:
    """Lung as dense as muscle, with or without contrast medium, its edge soft and its bronchi open at times."""
    if not where.any():
        return
    share = np.clip(
        ndimage.gaussian_filter(where.astype(np.float32), [rng.uniform(0.3, 2.5) / s for s in grid.spacing]), 0, 1
    )
    target = np.float32(
        rng.choice([rng.uniform(15, 60), rng.uniform(60, 120), rng.uniform(-150, 15)], p=[0.55, 0.2, 0.25])
    )
    solid = target + np.float32(rng.uniform(3, 15)) * fine
    if rng.random() < 0.5:
        dots = ndimage.gaussian_filter(
            rng.standard_normal(hu.shape).astype(np.float32), [2.0 / s for s in grid.spacing]
        )
        limit = np.quantile(dots[where], rng.uniform(0.93, 0.995))
        solid = np.where(dots > limit, np.float32(rng.uniform(-950, -400)), solid)
    hu += share * where * np.maximum(solid - hu, 0)


def _remove(rng: np.random.Generator, hu: Array, lungs: _Mask, where: NDArray[np.bool_], fine: Array) -> None:
    """What is no lung any more: fluid, or exudate and scar that are denser."""
    hu[where] = float(rng.choice([rng.uniform(-5, 25), rng.uniform(25, 50)], p=[0.8, 0.2])) + 5 * fine[where]
    lungs[where] = 0
