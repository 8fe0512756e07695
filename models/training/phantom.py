"""Procedural chest CT with exact masks: the demo's input, the tests' ground truth, and part of the training data.

A phantom is drawn from its seed alone: a patient (`anatomy`), vessel trees, pneumonia of a chosen severity, and the
imaging chain (point spread, correlated noise). Arrays are canonical, as everywhere in `models`: axis 0 from inferior
to superior, axis 1 from anterior to posterior, axis 2 from patient right to patient left.
"""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import fft, ndimage

from models.training.anatomy import LEFT_LUNG, RIGHT_LUNG, anatomy, draw_body

#: A lesion is labelled only where it is denser than the lung it replaces by so much (median): a reader must see it.
VISIBLE_CONTRAST_HU = 90.0
#: Lesion islands below this are dropped from the mask, as no reader draws them.
MINIMUM_LESION_MM3 = 100.0

_Array = NDArray[np.float32]


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

    Raises
    ------
    ValueError
        For a severity outside 0 to 3, a shape below 8 voxels or a spacing that is not positive.
    """
    _check(shape, spacing, severity)
    rng = np.random.default_rng(seed)
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
    grid = _Grid(shape, spacing, origin)
    coarse, medium, fine = _textures(rng, grid, (28.0, 7.0, 2.5))
    hu, label = anatomy(body, origin, spacing, coarse, fine)
    lungs = np.where((label == RIGHT_LUNG) | (label == LEFT_LUNG), label, 0).astype(np.uint8)
    _add_vessels(rng, grid, hu, lungs, body.carina, min(body.blood_hu, 120.0))
    if rng.random() < 0.4:
        _add_dependent_density(rng, grid, hu, lungs, body.half_depth)
    level = int(rng.choice(4, p=[0.2, 0.25, 0.35, 0.2])) if severity is None else severity
    infection = _add_pneumonia(rng, grid, hu, lungs, level, 0.75 * medium + 0.5 * coarse + 0.45 * fine, fine)
    return Phantom(_image(rng, grid, hu, noise_hu), lungs, infection, spacing)


@dataclass(frozen=True)
class _Grid:
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]

    def axis(self, i: int) -> _Array:
        """Positions in mm along axis `i`, shaped to broadcast over the volume."""
        line = self.origin[i] + self.spacing[i] * np.arange(self.shape[i], dtype=np.float32)
        return line.reshape([-1 if j == i else 1 for j in range(3)]).astype(np.float32)

    def positions(self, voxels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Voxel indices [n, 3] in mm."""
        place: NDArray[np.float64] = np.asarray(self.origin) + voxels * np.asarray(self.spacing)
        return place


def _check(shape: tuple[int, int, int], spacing: tuple[float, float, float] | None, severity: int | None) -> None:
    if len(shape) != 3 or min(shape) < 8:
        raise ValueError(f"a phantom needs at least 8 voxels along each of three axes, not {shape}")
    if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
        raise ValueError(f"spacing must be three positive numbers of mm, not {spacing}")
    if severity is not None and severity not in (0, 1, 2, 3):
        raise ValueError(f"severity must be 0, 1, 2 or 3, not {severity}")


def _textures(rng: np.random.Generator, grid: _Grid, lengths_mm: tuple[float, ...]) -> list[_Array]:
    """Smooth unit-variance noise of the given correlation lengths, from one field of white noise."""
    spectrum = fft.rfftn(rng.standard_normal(grid.shape, dtype=np.float32), workers=2)
    frequency = [fft.fftfreq(n, s).astype(np.float32) for n, s in zip(grid.shape[:2], grid.spacing[:2], strict=True)]
    frequency.append(fft.rfftfreq(grid.shape[2], grid.spacing[2]).astype(np.float32))
    square = frequency[0][:, None, None] ** 2 + frequency[1][:, None] ** 2 + frequency[2] ** 2
    fields = []
    for length in lengths_mm:
        field = fft.irfftn(spectrum * np.exp(-2 * (np.pi * length / 2) ** 2 * square), s=grid.shape, workers=2)
        field -= field.mean()
        fields.append((field / max(float(field.std()), 1e-6)).astype(np.float32))
    return fields


def _add_vessels(
    rng: np.random.Generator, grid: _Grid, hu: _Array, lungs: NDArray[np.uint8], carina: float, blood_hu: float
) -> None:
    """Draw arteries, veins and airways: trees that divide each lung's volume again and again, from its hilum."""
    cover = np.zeros(grid.shape, np.uint8)
    walls, lumen = np.zeros_like(cover), np.zeros_like(cover)
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
        bronchi = bronchi[bronchi[:, 6] > 1.0]
        _draw_capsules(walls, bronchi, 0.9, origin, spacing)
        _draw_capsules(lumen, bronchi, 0.0, origin, spacing)
    for mask, target, opacity in ((walls, -150.0, 0.8), (cover, blood_hu, 1.0), (lumen, -960.0, 1.0)):
        where = (mask > 0) & (lungs > 0)
        share = mask[where] * (opacity / 255)
        hu[where] += share * (target - hu[where])


def _tree(
    rng: np.random.Generator, leaves: NDArray[np.float64], root: NDArray[np.float64], leaf_radius: float
) -> _Array:
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


def _add_dependent_density(
    rng: np.random.Generator, grid: _Grid, hu: _Array, lungs: NDArray[np.uint8], half_depth: float
) -> None:
    """Raise the lowest lung of a supine patient, which gravity makes denser: healthy, and often taken for disease."""
    depth = ndimage.distance_transform_edt(lungs > 0, sampling=grid.spacing).astype(np.float32)
    rise = np.clip(1 - depth / rng.uniform(6, 14), 0, 1) * np.clip((grid.axis(1) - 0.45 * half_depth) / 20, 0, 1)
    share = rise * rng.uniform(0.1, 0.3) * (lungs > 0)
    hu += share * np.maximum(-300 - hu, 0)


def _add_pneumonia(
    rng: np.random.Generator,
    grid: _Grid,
    hu: _Array,
    lungs: NDArray[np.uint8],
    severity: int,
    edge: _Array,
    fine: _Array,
) -> NDArray[np.bool_]:
    """Fill lesions into the lungs and return their visible extent.

    Ground glass is a veil over the vessels; consolidation hides them and reaches the density of the chest wall.
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
            core = _smoothstep(0.75, 0.95, veil) if rng.random() < 0.5 else veil
            hu[box] += core * (rng.uniform(-40, 55) + 12 * fine[box] - hu[box])
        extent = veil > 0.5
        if extent.any() and np.median((hu[box] - before)[extent]) > VISIBLE_CONTRAST_HU:
            mask[box] |= extent
    kept: NDArray[np.bool_] = cc3d.dust(mask, int(np.ceil(MINIMUM_LESION_MM3 / np.prod(grid.spacing))), connectivity=6)
    return kept.astype(bool)


def _lesion_centres(
    rng: np.random.Generator, grid: _Grid, lungs: NDArray[np.uint8], inside: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Centres [n, 3] in mm, most of them near the pleura, at the back and at the base."""
    depth = ndimage.distance_transform_edt(lungs > 0, sampling=grid.spacing)[lungs > 0]
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
    rng: np.random.Generator, grid: _Grid, centre: NDArray[np.float64], radius: float, edge: _Array
) -> tuple[tuple[slice, slice, slice], _Array]:
    """Box around one lesion and its opacity (0 to 1) there: a flattened ellipsoid with a ragged edge."""
    reach = 2.2 * radius
    low = [max(int((c - reach - o) / s), 0) for c, o, s in zip(centre, grid.origin, grid.spacing, strict=True)]
    high = [int((c + reach - o) / s) + 2 for c, o, s in zip(centre, grid.origin, grid.spacing, strict=True)]
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    z, y, x = (grid.axis(i)[tuple(box[j] if j == i else slice(None) for j in range(3))] - centre[i] for i in range(3))
    # Lesions spread along the chest wall: flat along the line from the lung's axis outwards.
    outward = np.array([0.0, centre[1], centre[2] - np.sign(centre[2]) * 60.0])
    outward /= np.linalg.norm(outward) + 1e-6
    along = y * outward[1] + x * outward[2]
    square = z * z + y * y + x * x
    flat = rng.uniform(0.5, 1.0)
    field = np.exp(-0.6 * (square - along**2 + (along / flat) ** 2) / radius**2) + rng.uniform(0.06, 0.22) * edge[box]
    soft = rng.uniform(0.06, 0.22)
    return box, _smoothstep(0.5 - soft, 0.5 + soft, field)


def _image(rng: np.random.Generator, grid: _Grid, hu: _Array, noise_hu: float | None) -> NDArray[np.int16]:
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


def _smoothstep(low: float, high: float, value: _Array) -> _Array:
    t = np.clip((value - low) / (high - low), 0, 1)
    step: _Array = (t * t * (3 - 2 * t)).astype(np.float32)
    return step
