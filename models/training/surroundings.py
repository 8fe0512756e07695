"""What lies around the patient in the field of view: arms, couch, mattress, clothes, tubes, and air that is not clean.

Drawn into slices [z, y, x] of a phantom or a patient, in place, from a generator; never into the body.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.phantom.grid import Array


def add_arms(
    rng: np.random.Generator, hu: Array, body: NDArray[np.bool_], pixel_mm: float, *, up: bool | None = None
) -> None:
    """One or two arms beside the body, with or without air between; `up`: the upper half of the slices alone.

    Parameters
    ----------
    hu
        float32 [z, y, x].
    body
        The trunk, the same shape; arms touch it at most.
    pixel_mm
        In-plane pixel size.
    """
    if not body.any():
        return
    columns, rows = np.flatnonzero(body.any((0, 1))), np.flatnonzero(body.any((0, 2)))
    up = bool(rng.random() < 0.3) if up is None else up
    y, x = np.ogrid[: hu.shape[1], : hu.shape[2]]
    for side in (-1, 1):
        if rng.random() < 0.15:
            continue
        radius, flat = rng.uniform(28, 58) / pixel_mm, rng.uniform(0.8, 1.25)
        gap = rng.uniform(-12, 30) / pixel_mm
        edge = columns[0] if side < 0 else columns[-1]
        centre_x = edge + side * (gap + radius * flat)
        centre_y = rows[0] + (rows[-1] - rows[0]) * rng.uniform(0.25, 0.85)
        drift = rng.uniform(-25, 25, 2) / pixel_mm
        bone = rng.uniform(8, 13) / pixel_mm / radius
        for k in range(len(hu)):
            along = k / max(len(hu) - 1, 1)
            if up and along < 0.55:
                continue
            q = np.sqrt(
                ((x - centre_x - along * drift[0]) / (radius * flat)) ** 2
                + ((y - centre_y - along * drift[1]) / (radius / flat)) ** 2
            )
            place = (q < 1) & ~body[k]
            arm = np.where(q > 0.8, -100.0, np.where(q > bone, 50.0, np.where(q > 0.7 * bone, 800.0, 150.0)))
            hu[k][place] = arm[place] + rng.normal(0, 12, int(place.sum()))


def add_couch(rng: np.random.Generator, hu: Array, body: NDArray[np.bool_], pixel_mm: float) -> None:
    """A table below the patient: flat or curved, shells about foam, a mattress above at times, rails at its sides."""
    if not body.any():
        return
    rows = np.flatnonzero(body.any((0, 2)))
    columns = np.flatnonzero(body.any((0, 1)))
    y, x = np.ogrid[: hu.shape[1], : hu.shape[2]]
    across = (x - (columns[0] + columns[-1]) / 2 - rng.normal(0, 15)) * pixel_mm
    half = rng.uniform(170, 280)
    curve = 0.0 if rng.random() < 0.5 else rng.uniform(10, 60)
    gap = rng.uniform(-1, 4) if rng.random() < 0.6 else rng.uniform(4, 40)
    depth = (y - rows[-1]) * pixel_mm - gap + curve * (across / half) ** 2
    shell, thick = rng.uniform(1, 5), rng.uniform(12, 70)
    shell_hu, foam_hu = rng.uniform(-700, 150), rng.uniform(-995, -800)
    wide = np.abs(across) < half
    foam = wide & (depth > 0) & (depth < thick)
    hard = foam & ((depth < shell) | (depth > thick - shell) | (np.abs(across) > half - shell))
    mattress = (np.abs(across) < 0.9 * half) & (depth <= 0) & (depth > -rng.uniform(5, 60)) & (rng.random() < 0.4)
    soft_hu = rng.uniform(-985, -850)
    for plane, inside in zip(hu, body, strict=True):
        for where, value in ((mattress, soft_hu), (foam, foam_hu), (hard, shell_hu)):
            place = where & ~inside
            plane[place] = np.maximum(plane[place], value)


def add_clutter(rng: np.random.Generator, hu: Array, body: NDArray[np.bool_], pixel_mm: float) -> None:
    """Clothes or a blanket about the body, tubes and cables beside it."""
    height, width = hu.shape[1:]
    y, x = np.ogrid[:height, :width]
    folds = ndimage.gaussian_filter(rng.standard_normal((height, width)), 12 / pixel_mm)
    folds /= max(float(folds.std()), 1e-6)
    if rng.random() < 0.6:
        away_mm, thick, value = rng.uniform(2, 25), rng.uniform(0.8, 4), rng.uniform(-950, -300)
        for plane, inside in zip(hu, body, strict=True):
            away = ndimage.distance_transform_edt(~inside) * pixel_mm + 4 * folds
            plane[~inside & (np.abs(away - away_mm) < thick)] = value
    for _ in range(rng.integers(0, 5)):
        radius, wall = rng.uniform(1, 9), rng.uniform(0.5, 2.5)
        off = np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width)) * pixel_mm
        value = rng.uniform(-300, 1500)
        for plane, inside in zip(hu, body, strict=True):
            plane[~inside & (off < radius) & (off > radius - wall - 1)] = value


def add_dirty_air(rng: np.random.Generator, hu: Array, body: NDArray[np.bool_]) -> None:
    """Another level of air outside, with noise or streaks, as scanners and reconstructions have it."""
    outside = ~body & (hu < -900)
    level = rng.uniform(-1024, -960)
    smooth = ndimage.gaussian_filter(rng.standard_normal(hu.shape), (0, rng.uniform(0.5, 4), rng.uniform(0.5, 30)))
    hu[outside] = level + rng.uniform(0, 40) * (smooth / max(float(smooth.std()), 1e-6))[outside]
