"""The healthy thorax of the phantom: one function of position, in mm, evaluated at every voxel.

Axes: x grows to the patient's left, y to the back, z to the head; the origin lies in the mediastinum, a hand's
breadth below the carina. Every structure is a signed distance or an inequality, so the masks are exact at any spacing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from models.labels import LEFT, RIGHT
from models.phantom.shapes import capsule, smooth_minimum, smoothstep, superellipse

#: Labels that `anatomy` writes beside the HU.
OUTSIDE, RIGHT_LUNG, LEFT_LUNG, AIRWAY = 0, RIGHT, LEFT, 3

_AIR = -1000.0
_NOTHING = -9999.0


class Body(NamedTuple):
    """One patient. Lengths in mm, attenuations in HU."""

    half_width: float
    half_depth: float
    squareness: float
    apex: float
    middle: float
    fat: float
    muscle: float
    shoulders: float
    right_dome: float
    left_dome: float
    dome_height: float
    mediastinum: float
    heart_x: float
    heart_y: float
    heart_size: float
    heart_turn: float
    aorta: float
    trachea: float
    carina: float
    spine_y: float
    rib: float
    rib_pitch: float
    rib_slope: float
    breast: float
    gas_level: float
    table: float
    lung_hu: float
    gravity_hu: float
    blood_hu: float
    bone_hu: float
    fat_hu: float
    muscle_hu: float


def draw_body(rng: np.random.Generator) -> Body:
    """Draw one patient: build, posture, breath, contrast medium."""
    size = rng.uniform(0.88, 1.12)
    half_width = rng.uniform(122, 142) * size
    half_depth = half_width * rng.uniform(0.62, 0.75)
    right_dome = rng.uniform(-100, -55) * size
    return Body(
        half_width=half_width,
        half_depth=half_depth,
        squareness=rng.uniform(2.1, 2.6),
        apex=rng.uniform(98, 122) * size,
        middle=rng.uniform(-60, -25),
        fat=float(rng.choice([rng.uniform(6, 14), rng.uniform(14, 28), rng.uniform(28, 45)])),
        muscle=rng.uniform(16, 28),
        shoulders=rng.uniform(0.10, 0.35),
        right_dome=right_dome,
        left_dome=right_dome - rng.uniform(0, 20),
        dome_height=rng.uniform(32, 60),
        mediastinum=rng.uniform(25, 36),
        heart_x=rng.uniform(18, 30) * size,
        heart_y=-rng.uniform(18, 32) * size,
        heart_size=rng.uniform(0.88, 1.15) * size,
        heart_turn=rng.uniform(0.3, 0.8),
        aorta=rng.uniform(11.5, 16.5),
        trachea=rng.uniform(6.5, 10.0),
        carina=rng.uniform(0, 20),
        spine_y=half_depth * rng.uniform(0.62, 0.74),
        rib=rng.uniform(6.5, 9.0),
        rib_pitch=rng.uniform(24, 31) * size,
        rib_slope=rng.uniform(45, 85),
        breast=0.0 if rng.random() < 0.55 else rng.uniform(28, 55),
        gas_level=rng.uniform(-60, 25) if rng.random() < 0.7 else -999.0,
        table=rng.uniform(2, 14) if rng.random() < 0.85 else 999.0,
        lung_hu=rng.uniform(-890, -780),
        gravity_hu=rng.uniform(10, 60),
        blood_hu=float(rng.choice([rng.uniform(35, 50), rng.uniform(120, 380)])),
        bone_hu=rng.uniform(450, 900),
        fat_hu=rng.uniform(-115, -92),
        muscle_hu=rng.uniform(35, 62),
    )


@njit(parallel=True, nogil=True, fastmath=True, cache=True)
def anatomy(
    body: Body,
    origin: tuple[float, float, float],
    spacing: tuple[float, float, float],
    coarse: NDArray[np.float32],
    fine: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """HU and labels of the healthy thorax.

    Parameters
    ----------
    body
        The patient.
    origin, spacing
        Position of voxel (0, 0, 0) and voxel size, (z, y, x) in mm.
    coarse, fine
        Unit-variance noise of a few centimetres and a few millimetres: folds of the outline, texture of tissue.
    """
    depth, height, width = coarse.shape
    hu = np.empty(coarse.shape, np.float32)
    label = np.zeros(coarse.shape, np.uint8)
    for k in prange(depth):
        z = origin[0] + k * spacing[0]
        for j in range(height):
            y = origin[1] + j * spacing[1]
            for i in range(width):
                x = origin[2] + i * spacing[2]
                # The same noise field, read elsewhere, serves as displacement of each axis.
                dx = 2.2 * coarse[(k + depth // 3) % depth, j, (i + width // 2) % width]
                dy = 2.0 * coarse[(k + depth // 2) % depth, (j + height // 2) % height, i]
                hu[k, j, i], label[k, j, i] = _voxel(body, x + dx, y + dy, z, y, coarse[k, j, i], fine[k, j, i])
    return hu, label


@njit(nogil=True, fastmath=True, cache=True)
def _voxel(body, x, y, z, table_y, coarse, fine):  # type: ignore[no-untyped-def]
    skin = _skin(body, x, y, z)
    if skin >= 0:
        return _outside(body, x, table_y), OUTSIDE
    cavity, yc = _cavity(body, x, y, z)
    bone = _spine(body, x, y, z, fine)
    if bone > _NOTHING:
        return bone, OUTSIDE
    airway = _airway(body, x, y, z)
    if airway < 0 and z < body.apex + 60:
        return -985.0, AIRWAY
    if airway < 1.6:
        return 20.0, OUTSIDE
    if cavity >= 0:
        return _wall(body, x, y, z, yc, skin, cavity, coarse, fine), OUTSIDE
    dome = _dome(body, x, y) + 5.0 * coarse
    middle, tissue = _mediastinum(body, x, y, z, yc, coarse, fine)
    if middle <= 0 and z > dome - 25:
        return tissue, OUTSIDE
    if z <= dome:
        return _abdomen(body, x, y, z, dome, coarse, fine), OUTSIDE
    if cavity > -1.5:
        return 25.0, OUTSIDE
    lung = body.lung_hu + body.gravity_hu * y / body.half_depth + 16.0 * coarse + 20.0 * fine - 0.12 * z
    fissure = abs(z * 0.62 - y * 0.75 + 18.0 + 6.0 * coarse)
    if fissure < 1.0:
        lung += 130.0 * (1.0 - fissure)
    return lung, RIGHT_LUNG if x < 2 else LEFT_LUNG


@njit(nogil=True, fastmath=True, cache=True)
def _skin(body, x, y, z):  # type: ignore[no-untyped-def]
    """Signed distance to the skin: trunk, breasts, shoulders."""
    rise = smoothstep(40.0, 130.0, z)
    a = (body.half_width + body.muscle + body.fat) * (1.0 + body.shoulders * rise)
    b = (body.half_depth + body.muscle + 0.8 * body.fat) * (1.0 - 0.12 * rise)
    distance = superellipse(x, y - 2.0, a, b, 2.4)
    if body.breast > 1:
        r = body.breast
        q = math.sqrt(
            ((abs(x) - 0.55 * body.half_width) / (1.15 * r)) ** 2
            + ((y + 0.82 * b) / (0.8 * r)) ** 2
            + ((z + 45) / r) ** 2
        )
        distance = smooth_minimum(distance, (q - 1.0) * r, 14.0)
    return distance


@njit(nogil=True, fastmath=True, cache=True)
def _outside(body, x, y):  # type: ignore[no-untyped-def]
    """Air and the table: a curved carbon shell around foam."""
    top = body.half_depth + body.muscle + 0.8 * body.fat + body.table + 4.0 - (x / 230.0) ** 2 * 22.0
    depth = y - top
    if abs(x) < 215.0:
        if 0.0 <= depth < 3.0 or 24.0 <= depth < 27.0:
            return -260.0
        if 3.0 <= depth < 24.0:
            return -930.0
    return _AIR


@njit(nogil=True, fastmath=True, cache=True)
def _cavity(body, x, y, z):  # type: ignore[no-untyped-def]
    """Signed distance to the inner chest wall, and the y of the cavity's axis, which leans back towards the apex."""
    t = (z - body.middle) / (body.apex - body.middle)
    f = max(1.0 - max(t, 0.0) ** 2.3, 0.0) ** 0.62
    f = max(f, 0.02)
    yc = 10.0 * (1.0 - f)
    a = body.half_width * f
    b = body.half_depth * (0.35 * min(1.0, 1.6 * f) + 0.65 * f)
    distance = superellipse(x, y - yc, a, b, body.squareness)
    if t > 1:
        distance = max(distance, (t - 1.0) * (body.apex - body.middle))
    return distance, yc


@njit(nogil=True, fastmath=True, cache=True)
def _wall(body, x, y, z, yc, skin, cavity, coarse, fine):  # type: ignore[no-untyped-def]
    """Chest wall from the skin inwards: skin, fat, muscle, scapula, ribs, sternum, clavicles."""
    if skin > -2.0:
        return 10.0
    hu = body.fat_hu + 10.0 * fine
    if skin < -body.fat * (0.85 + 0.15 * coarse):
        hu = body.muscle_hu + 7.0 * fine
        if coarse + 0.5 * fine > 1.2:
            hu = body.fat_hu + 25.0
    angle = math.atan2((y - yc) / body.half_depth, x / body.half_width)
    back, side = math.sin(angle), abs(math.cos(angle))
    if -40.0 < z < 110.0 and back > 0.25 and 0.45 < side < 0.93:
        plate = abs(cavity - (1.3 * body.rib + 12.0) - 5.0 * math.sin(0.03 * z))
        if plate < 3.2:
            hu = 0.9 * body.bone_hu if plate > 1.6 else 220.0
    if cavity < 2.2 * body.rib and z < body.apex + 10:
        front = 0.5 - 0.5 * back
        phase = (z + 0.9 * body.rib_slope * front * front) % body.rib_pitch - 0.5 * body.rib_pitch
        q = math.sqrt(((cavity - 0.62 * body.rib) / (0.55 * body.rib)) ** 2 + (phase / (0.85 * body.rib)) ** 2)
        if q < 1:
            hu = 95.0 if back < -0.8 else (body.bone_hu if q > 0.6 else 190.0 + 60.0 * fine)
        elif cavity < 1.25 * body.rib:
            hu = body.muscle_hu - 5.0 + 8.0 * fine
    if -95.0 < z < 60.0:
        q = math.sqrt((x / (15.0 if z < 20 else 24.0)) ** 2 + ((y - (yc - body.half_depth - 4.0)) / 6.5) ** 2)
        if q < 1:
            hu = 0.7 * body.bone_hu if q > 0.75 else 130.0 + 40.0 * fine
    if z > 30.0:
        collar = capsule(abs(x), y, z, 18.0, -0.6 * body.half_depth, 62.0, 0.95 * body.half_width, -15.0, 105.0)
        if collar < 6.5:
            hu = 0.9 * body.bone_hu if collar > 4.3 else 200.0
        head = math.sqrt((abs(x) - body.half_width - 28.0) ** 2 + (y - 5.0) ** 2 + (z - body.apex) ** 2)
        if head < 23.0:
            hu = 0.8 * body.bone_hu if head > 20.5 else 240.0
    return hu


@njit(nogil=True, fastmath=True, cache=True)
def _spine(body, x, y, z, fine):  # type: ignore[no-untyped-def]
    """HU of vertebra, disc or canal, or `_NOTHING`."""
    t = max((z - body.middle) / (body.apex - body.middle), 0.0)
    v = y - body.spine_y * (1.0 - 0.25 * min(t, 1.2))
    along = z % 23.0
    q = math.sqrt((x / 18.5) ** 2 + (v / 15.5) ** 2)
    if q < 1:
        if along < 4.5:
            return 75.0 + 6.0 * fine
        return 0.8 * body.bone_hu if q > 0.9 or along < 6.2 or along > 21.3 else 165.0 + 35.0 * fine
    canal = math.sqrt((x / 9.5) ** 2 + ((v - 24.0) / 8.0) ** 2)
    if canal < 1:
        return 18.0 + 4.0 * fine
    if canal < 1.42 and (along > 7 or abs(x) > 6):
        return 0.95 * body.bone_hu
    if 31.0 < v < 60.0 and abs(x) < 4.2 and along > 9:
        return 0.8 * body.bone_hu if abs(x) > 2 else 260.0
    process = abs(v - 25.0 - 0.15 * abs(x))
    if process < 4.5 and abs(x) < 36 and 9 < along < 18:
        return 0.85 * body.bone_hu if process > 2.2 else 240.0
    return _NOTHING


@njit(nogil=True, fastmath=True, cache=True)
def _airway(body, x, y, z):  # type: ignore[no-untyped-def]
    """Signed distance to the lumen of trachea and main bronchi."""
    c, r = body.carina, body.trachea
    distance = 1e3
    if z > c:
        distance = math.sqrt((x - 2.0 * math.sin(0.02 * z)) ** 2 + (y - 4.0 + 0.1 * (z - c)) ** 2) - r
    right = capsule(x, y, z, 0.0, 4.0, c + 3.0, -34.0, 8.0, c - 30.0) - 0.78 * r
    left = capsule(x, y, z, 0.0, 4.0, c + 3.0, 44.0, 10.0, c - 28.0) - 0.70 * r
    return min(distance, min(right, left))


@njit(nogil=True, fastmath=True, cache=True)
def _mediastinum(body, x, y, z, yc, coarse, fine):  # type: ignore[no-untyped-def]
    """Signed distance to the mediastinum and the HU within it: fat, heart, great vessels, oesophagus."""
    t = (y - yc) / body.half_depth
    level = body.mediastinum * (1.0 - 0.18 * smoothstep(10.0, 90.0, z) + 0.25 * math.exp(-(((z + 5.0) / 35.0) ** 2)))
    column = abs(x - 2.0) - level * (0.30 + 0.75 * math.exp(-(((t - 0.12) / 0.42) ** 2))) - 2.4 * coarse
    heart = _heart(body, x, y, z)
    vessel = _great_vessels(body, x, y, z)
    spine = math.sqrt(x * x + (y - body.spine_y) ** 2) - 24.0
    distance = smooth_minimum(column, heart - 4.0, 10.0)
    distance = smooth_minimum(distance, min(vessel - 1.5, spine), 6.0)
    hu = -85.0 + 14.0 * fine if 0.8 * coarse + 0.7 * fine > -0.35 else 30.0 + 8.0 * fine
    if distance > -1.8:
        hu = 0.0
    if heart < 3:
        hu = -70.0 if heart > 0 else (45.0 + 5.0 * fine if heart > -9 else body.blood_hu - 8.0 + 5.0 * fine)
    if vessel < 0:
        hu = 45.0 if vessel > -1.6 else body.blood_hu
    if ((x - 8.0) / 8.0) ** 2 + ((y - body.spine_y + 27.0) / 6.0) ** 2 < 1:
        hu = 35.0
    return distance, hu


@njit(nogil=True, fastmath=True, cache=True)
def _heart(body, x, y, z):  # type: ignore[no-untyped-def]
    """Signed distance to the heart, an ellipsoid whose apex points left and forward."""
    cos, sin, s = math.cos(body.heart_turn), math.sin(body.heart_turn), body.heart_size
    dx, dy, dz = x - body.heart_x, y - body.heart_y, z - body.right_dome - 16.0
    u, v = dx * cos - dy * sin, dx * sin + dy * cos
    return (math.sqrt((u / (60.0 * s)) ** 2 + (v / (44.0 * s)) ** 2 + (dz / (50.0 * s)) ** 2) - 1.0) * 44.0 * s


@njit(nogil=True, fastmath=True, cache=True)
def _great_vessels(body, x, y, z):  # type: ignore[no-untyped-def]
    """Signed distance to aorta, superior caval vein, pulmonary arteries and veins."""
    r, back = body.aorta, body.spine_y - 18.0
    distance = 1e3
    if z < 40:
        distance = math.sqrt((x - 24.0) ** 2 + (y - back) ** 2) - 0.85 * r
        if z > -45:
            distance = min(distance, math.sqrt((x + 10.0 - 0.1 * z) ** 2 + (y + 28.0 + 0.1 * z) ** 2) - r)
    arch = capsule(x, y, z, -6.0, -32.0, 40.0, 10.0, -4.0, 50.0)
    arch = min(arch, capsule(x, y, z, 10.0, -4.0, 50.0, 24.0, back, 40.0))
    distance = min(distance, arch - 0.9 * r)
    if z > -40:
        distance = min(distance, math.sqrt((x + 24.0) ** 2 + (y + 18.0) ** 2) - 8.0)
    trunk = capsule(x, y, z, 14.0, -32.0, -20.0, 14.0, -10.0, -2.0) - 13.0
    arteries = min(
        capsule(x, y, z, 14.0, -10.0, -2.0, 52.0, 8.0, 4.0), capsule(x, y, z, 12.0, -10.0, -6.0, -50.0, 2.0, -10.0)
    )
    veins = capsule(x, y, z, -45.0, 8.0, -34.0, 48.0, 12.0, -30.0)
    return min(distance, min(trunk, min(arteries - 10.0, veins - 11.0)))


@njit(nogil=True, fastmath=True, cache=True)
def _dome(body, x, y):  # type: ignore[no-untyped-def]
    """Height z of the diaphragm; it falls off towards the costophrenic recess."""
    a, b = body.half_width, body.half_depth
    right = 1.0 - ((x + 0.52 * a) / (0.62 * a)) ** 2 - ((y + 12.0) / (0.95 * b)) ** 2
    left = 1.0 - ((x - 0.52 * a) / (0.60 * a)) ** 2 - ((y + 8.0) / (0.95 * b)) ** 2
    return max(
        body.right_dome + body.dome_height * (max(right, -1.2) - 1.0),
        body.left_dome + body.dome_height * (max(left, -1.2) - 1.0),
    )


@njit(nogil=True, fastmath=True, cache=True)
def _abdomen(body, x, y, z, dome, coarse, fine):  # type: ignore[no-untyped-def]
    """HU below the diaphragm: liver, stomach and colon with gas, spleen, fat."""
    if z > dome - 3.0:
        return 45.0
    a, b = body.half_width, body.half_depth
    if x < 0.25 * a + 8.0 * coarse and y < 0.75 * b:
        return 58.0 + 5.0 * fine + 4.0 * coarse
    stomach = math.sqrt(
        ((x - 0.48 * a) / (0.36 * a)) ** 2 + ((y + 8.0) / (0.5 * b)) ** 2 + ((z - body.left_dome + 38.0) / 32.0) ** 2
    )
    if stomach < 1:
        return -960.0 if stomach < 0.93 and y < body.gas_level else 30.0 + 6.0 * fine
    spleen = math.sqrt(
        ((x - 0.68 * a) / (0.22 * a)) ** 2
        + ((y - 0.5 * b) / (0.32 * b)) ** 2
        + ((z - body.left_dome + 45.0) / 42.0) ** 2
    )
    if spleen < 1:
        return 50.0 + 4.0 * fine
    if (x - 24.0) ** 2 + (y - body.spine_y + 18.0) ** 2 < (0.85 * body.aorta) ** 2:
        return body.blood_hu
    if coarse > 1.3 and y < 0:
        return -900.0
    return body.fat_hu + 20.0 + 12.0 * fine
