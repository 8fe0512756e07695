"""What a network takes for pneumonia, or misses pneumonia for: drawn into a phantom, and never called infection.

Each function draws one finding from its generator into `hu`, in place. An effusion is not lung, so it leaves the mask
of the lungs; atelectasis, nodules and emphysema are lung.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.phantom.anatomy import LEFT_LUNG, RIGHT_LUNG
from models.phantom.grid import Array, Grid, depth_of, ramp

_Mask = NDArray[np.uint8]


def add_nodules(rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, edge: Array) -> None:
    """Draw a nodule or a few, many metastases, or one mass; smooth, lobulated or spiculated, some calcified."""
    fewest, most, largest = [(1, 3, 9.0), (4, 19, 7.0), (1, 1, 22.0)][rng.choice(3, p=[0.6, 0.3, 0.1])]
    ragged = rng.uniform(0, 0.25)
    for centre in _places(rng, grid, depth_of(lungs > 0, grid) > 2.0, int(rng.integers(fewest, most + 1))):
        radius = rng.uniform(0.5 if largest > 9 else 0.25, 1.0) * largest
        calcified = radius < 5 and rng.random() < 0.2
        target = rng.uniform(180, 600) if calcified else rng.uniform(0, 60)
        box = grid.box(centre, 1.6 * radius + 2 * max(grid.spacing))
        z, y, x = grid.offsets(box, centre)
        distance = np.sqrt(z * z + y * y + x * x) + ragged * radius * edge[box]
        share = np.clip((radius - distance) / grid.spacing[1] + 0.5, 0, 1) * (lungs[box] > 0)
        hu[box] += share * np.maximum(target - hu[box], 0)


def add_effusion(rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, half_depth: float, fine: Array) -> None:
    """Fill the lowest part of one or both pleural cavities of a supine patient, and squeeze the lung beside it."""
    back = ramp(0.0, rng.uniform(0.5, 0.9) * half_depth, grid.axis(1))
    fluid_hu, squeezed_hu = rng.uniform(2, 25), rng.uniform(25, 75)
    sides = [(RIGHT_LUNG,), (LEFT_LUNG,), (RIGHT_LUNG, LEFT_LUNG)][rng.choice(3, p=[0.3, 0.25, 0.45])]
    for side in sides:
        of_side = lungs == side
        heights = grid.axis(0)[of_side.any((1, 2))]
        if not len(heights):
            continue
        low, high = float(heights.min()), float(heights.max())
        thickness = rng.uniform(8, 48) * back * ramp(low, high, high - (grid.axis(0) - low) * rng.uniform(0.7, 1.3))
        # From the hindmost lung of each column forwards.
        hindmost = grid.shape[1] - 1 - np.argmax(of_side[:, ::-1], axis=1, keepdims=True)
        depth = grid.spacing[1] * (hindmost + 0.5) + grid.origin[1] - grid.axis(1)
        fluid = of_side & (depth < thickness)
        beside = rng.uniform(0, 0.5) * thickness
        squeezed = (of_side & ~fluid) * ramp(0, 3, thickness + beside - depth) * (beside > 2)
        hu += squeezed * np.maximum(squeezed_hu + 10 * fine - hu, 0)
        hu[fluid] = fluid_hu + 5 * fine[fluid]
        lungs[fluid] = 0


def add_atelectasis(rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, half_depth: float) -> None:
    """Draw plates of collapsed lung near the base, and at times a dense strip along the back."""
    depth = depth_of(lungs > 0, grid)
    if rng.random() < 0.4:
        strip = ramp(0, 4, rng.uniform(5, 13) - depth) * ramp(0.55 * half_depth, 0.8 * half_depth, grid.axis(1))
        strip *= (lungs > 0) * ramp(0, 60, rng.uniform(-80, 60) - grid.axis(0))
        hu += strip * np.maximum(rng.uniform(-150, 45) - hu, 0)
    base = (depth > 0) * np.exp(-(grid.axis(0) - grid.axis(0).min()) / 35)
    for centre in _places(rng, grid, base, int(rng.integers(1, 5))):
        normal = rng.normal(size=3) * (1.0, 0.5, 0.5)
        normal /= np.linalg.norm(normal)
        half, reach = rng.uniform(0.8, 2.4), rng.uniform(14, 42)
        box = grid.box(centre, reach)
        z, y, x = grid.offsets(box, centre)
        off = np.abs(z * normal[0] + y * normal[1] + x * normal[2])
        along = np.sqrt(z * z + y * y + x * x)
        # A plate thinner than a voxel is fainter, not thicker.
        voxel = float(np.mean(grid.spacing))
        share = np.clip((max(half, voxel / 2) - off) / voxel + 0.5, 0, 1) * min(2 * half / voxel, 1.0)
        share = share * ramp(0, 0.4 * reach, reach - along) * (lungs[box] > 0)
        hu[box] += share * np.maximum(rng.uniform(-150, 40) - hu[box], 0)


def add_emphysema(rng: np.random.Generator, grid: Grid, hu: Array, lungs: _Mask, holes: Array) -> None:
    """Punch centrilobular holes, more towards the apex, and blow bullae with a thin wall under the pleura."""
    inside = lungs > 0
    heights = grid.axis(0)[inside.any((1, 2))]
    if not len(heights):
        return
    upper = ramp(float(heights.min()) - rng.uniform(0, 250), float(heights.max()), grid.axis(0))
    share = rng.uniform(0.5, 1.0) * ramp(rng.uniform(-0.4, 0.6), 1.3, holes) * upper * inside
    hu += share * np.minimum(-985 - hu, 0)
    rim = np.exp(-depth_of(inside, grid) / 5) * inside * upper
    for centre in _places(rng, grid, rim, int(rng.integers(0, 7))):
        radius = rng.uniform(5, 24)
        box = grid.box(centre, radius + 2 * max(grid.spacing))
        z, y, x = grid.offsets(box, centre)
        distance = np.sqrt(z * z + y * y + x * x) + 0.1 * radius * holes[box]
        lung = inside[box]
        hu[box] = np.where(lung & (distance < radius), -990.0, hu[box])
        wall = lung & (np.abs(distance - radius) < 0.6 * grid.spacing[1])
        hu[box] = np.where(wall, np.maximum(hu[box], -720.0), hu[box])


def add_motion(rng: np.random.Generator, grid: Grid, hu: Array, half_depth: float) -> None:
    """Let the patient breathe and the heart beat: a fainter second image, displaced, below the hila.

    The back lies still. The masks stay those of the stronger image.
    """
    middle = float(grid.axis(0).mean())
    weight = rng.uniform(0.25, 0.45) * ramp(0, 70, middle + rng.uniform(-30, 50) - grid.axis(0))
    weight = weight * ramp(0, 0.4 * half_depth, 0.85 * half_depth - grid.axis(1))
    rows = _moved(grid, 0, rng.uniform(3, 11))
    columns = _moved(grid, 1, rng.choice([-1, 1]) * rng.uniform(1, 6))
    moved = hu[rows][:, columns]
    hu += weight * (moved - hu)


def _moved(grid: Grid, axis: int, by_mm: float) -> NDArray[np.int64]:
    """Where along an axis the image that is displaced by `by_mm` reads, at least a voxel away."""
    step = max(1, round(abs(by_mm) / grid.spacing[axis])) * int(np.sign(by_mm))
    return np.clip(np.arange(grid.shape[axis]) + step, 0, grid.shape[axis] - 1)


def _places(
    rng: np.random.Generator, grid: Grid, weight: NDArray[np.floating] | NDArray[np.bool_], count: int
) -> NDArray[np.float64]:
    """Up to `count` places [n, 3] in mm, drawn by weight."""
    chance = weight.ravel().astype(np.float64).cumsum()
    if chance[-1] <= 0:
        return np.zeros((0, 3))
    drawn = np.searchsorted(chance, rng.uniform(0, chance[-1], count), side="right")
    return grid.positions(np.stack(np.unravel_index(drawn, grid.shape), -1))
