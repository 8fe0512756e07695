"""Procedural chest CT with exact masks: the demo's input, the tests' ground truth, and part of the training data.

A phantom is drawn from its seed alone: a patient (`anatomy`), vessel trees, pneumonia of a chosen severity, and the
imaging chain (point spread, correlated noise). Arrays are canonical, as everywhere in `models`: axis 0 from inferior
to superior, axis 1 from anterior to posterior, axis 2 from patient right to patient left.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from models.phantom import confounders
from models.phantom.anatomy import LEFT_LUNG, RIGHT_LUNG, anatomy, draw_body
from models.phantom.grid import Array, Grid, depth_of, textures
from models.phantom.pneumonia import add_pneumonia, septal_lines
from models.phantom.thorax import FINDINGS
from models.phantom.vessels import add_vessels

#: What a phantom may show besides: two patterns of pneumonia, then what is not pneumonia (`confounders`).
Extra = Literal["air bronchograms", "crazy paving", "nodules", "effusion", "atelectasis", "emphysema", "motion"]

#: How often each is drawn where they are drawn by the seed.
EXTRA_CHANCE: dict[Extra, float] = {
    "air bronchograms": 0.5,
    "crazy paving": 0.25,
    "nodules": 0.2,
    "effusion": 0.2,
    "atelectasis": 0.2,
    "emphysema": 0.2,
    "motion": 0.15,
}


@dataclass(frozen=True)
class Phantom:
    """A chest CT and the masks that are true of it, arrays [z, y, x] in canonical orientation.

    Attributes
    ----------
    hu
        int16, Hounsfield units, at least -1024.
    lungs
        uint8: 1 right lung, 2 left lung, diseased lung included; trachea and main bronchi are not lung.
    infection
        bool, inside the lungs.
    spacing
        Voxel size (z, y, x) in mm.
    """

    hu: NDArray[np.int16]
    lungs: NDArray[np.uint8]
    infection: NDArray[np.bool_]
    spacing: tuple[float, float, float]


def phantom(
    seed: int,
    *,
    shape: tuple[int, int, int] = (100, 192, 192),
    spacing: tuple[float, float, float] | None = None,
    severity: int | None = None,
    noise_hu: float | None = None,
    extras: Collection[Extra] | None = (),
    findings: Collection[str] = (),
) -> Phantom:
    """Draw a phantom.

    Parameters
    ----------
    seed
        The same seed and arguments give the same arrays.
    shape
        Voxels (z, y, x), at least 8 along each axis.
    spacing
        Voxel size (z, y, x) in mm; by default the one at which `shape` just covers the chest.
    severity
        0 healthy, 1 a few small lesions, 2 several, 3 most of the lungs; None draws it.
    noise_hu
        Standard deviation of the noise; None draws a dose and kernel.
    extras
        What else is to be seen; None draws each by `EXTRA_CHANCE`. The seed's patient, vessels and noise stay.
    findings
        What changes a whole lung: names of `thorax.FINDINGS`, drawn after all else.

    Raises
    ------
    ValueError
        For a severity outside 0 to 3, a shape below 8 voxels, a spacing that is not positive or an unknown extra.
    """
    _check(shape, spacing, severity, extras, findings)
    rng = np.random.default_rng(seed)
    more = np.random.default_rng([seed, 1])
    drawn = {extra: bool(more.random() < chance) for extra, chance in EXTRA_CHANCE.items()}
    shown = {extra for extra in drawn if (drawn[extra] if extras is None else extra in extras)}
    body = draw_body(rng)
    field = 2 * (body.half_width + body.muscle + body.fat) * rng.uniform(1.02, 1.28)
    top, bottom = body.apex + rng.uniform(8, 35), body.left_dome - 2.2 * body.dome_height - rng.uniform(0, 30)
    if spacing is None:
        spacing = ((top - bottom) / shape[0], field / shape[1], field / shape[2])
    centre = ((top + bottom) / 2, 8.0 + rng.uniform(-8, 8), rng.uniform(-8, 8))
    origin = (
        centre[0] - spacing[0] * (shape[0] - 1) / 2,
        centre[1] - spacing[1] * (shape[1] - 1) / 2,
        centre[2] - spacing[2] * (shape[2] - 1) / 2,
    )
    grid = Grid(shape, spacing, origin)
    coarse, medium, fine = textures(rng, grid, (28.0, 7.0, 2.5))
    hu, label = anatomy(body, origin, spacing, coarse, fine)
    lungs = np.where((label == RIGHT_LUNG) | (label == LEFT_LUNG), label, 0).astype(np.uint8)
    bronchi = add_vessels(rng, grid, hu, lungs, body.carina, min(body.blood_hu, 120.0))
    if rng.random() < 0.4:
        _add_dependent_density(rng, grid, hu, lungs, body.half_depth)
    if "emphysema" in shown:
        confounders.add_emphysema(more, grid, hu, lungs, textures(more, grid, (6.0,))[0])
    if "nodules" in shown:
        confounders.add_nodules(more, grid, hu, lungs, medium)
    if "atelectasis" in shown:
        confounders.add_atelectasis(more, grid, hu, lungs, body.half_depth)
    if "effusion" in shown:
        confounders.add_effusion(more, grid, hu, lungs, body.half_depth, fine)
    infection = add_pneumonia(
        rng,
        grid,
        hu,
        lungs,
        int(rng.choice(4, p=[0.2, 0.25, 0.35, 0.2])) if severity is None else severity,
        0.75 * medium + 0.5 * coarse + 0.45 * fine,
        fine,
        septa=septal_lines(textures(more, grid, (6.0,))[0]) if "crazy paving" in shown else None,
        bronchi=bronchi if "air bronchograms" in shown else None,
    )
    for finding in findings:
        FINDINGS[finding][1](np.random.default_rng([seed, 3]), grid, hu, lungs, fine)
        infection &= lungs > 0
    if "motion" in shown:
        confounders.add_motion(more, grid, hu, body.half_depth)
    return Phantom(_image(rng, grid, hu, noise_hu), lungs, infection, spacing)


def _check(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] | None,
    severity: int | None,
    extras: Collection[str] | None,
    findings: Collection[str],
) -> None:
    if len(shape) != 3 or min(shape) < 8:
        raise ValueError(f"a phantom needs at least 8 voxels along each of three axes, not {shape}")
    if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
        raise ValueError(f"spacing must be three positive numbers of mm, not {spacing}")
    if severity is not None and severity not in (0, 1, 2, 3):
        raise ValueError(f"severity must be 0, 1, 2 or 3, not {severity}")
    if unknown := set(extras or ()) - set(get_args(Extra)):
        raise ValueError(f"unknown extras {sorted(unknown)}; there are {', '.join(get_args(Extra))}")
    if unknown := set(findings) - set(FINDINGS):
        raise ValueError(f"unknown findings {sorted(unknown)}; there are {', '.join(FINDINGS)}")


def _add_dependent_density(
    rng: np.random.Generator, grid: Grid, hu: Array, lungs: NDArray[np.uint8], half_depth: float
) -> None:
    """Raise the lowest lung of a supine patient, which gravity makes denser: healthy, and often taken for disease."""
    depth = depth_of(lungs > 0, grid)
    rise = np.clip(1 - depth / rng.uniform(6, 14), 0, 1) * np.clip((grid.axis(1) - 0.45 * half_depth) / 20, 0, 1)
    share = rise * rng.uniform(0.1, 0.3) * (lungs > 0)
    hu += share * np.maximum(-300 - hu, 0)


def _image(rng: np.random.Generator, grid: Grid, hu: Array, noise_hu: float | None) -> NDArray[np.int16]:
    """Image the object: point spread, kernel, dose, then whole HU."""
    pixel = (grid.spacing[1] + grid.spacing[2]) / 2
    blur = rng.uniform(0.5, 0.9) / pixel
    hu = ndimage.gaussian_filter(hu, (0.3, blur, blur), truncate=2.5)
    if rng.random() < 0.35:
        hu += rng.uniform(0.3, 0.9) * (hu - ndimage.gaussian_filter(hu, (0, 1.0, 1.0), truncate=2.0))
    drawn = rng.uniform(*((8, 20), (20, 45), (45, 75))[int(rng.choice(3, p=[0.45, 0.4, 0.15]))])
    noise = fft.rfft2(rng.standard_normal(grid.shape, dtype=np.float32), workers=2)
    frequency = np.hypot(fft.fftfreq(grid.shape[1])[:, None], fft.rfftfreq(grid.shape[2])).astype(np.float32)
    peak = rng.uniform(0.12, 0.35)
    noise = fft.irfft2(
        noise * (np.sqrt(frequency / peak) * np.exp(-0.5 * (frequency / peak) ** 2)), s=grid.shape[1:], workers=2
    )
    hu += noise * ((drawn if noise_hu is None else noise_hu) / max(float(noise.std()), 1e-6))
    return np.rint(np.clip(hu, -1024, 3071)).astype(np.int16)
