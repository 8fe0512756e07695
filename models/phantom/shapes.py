"""Signed distances and blends in mm that the anatomy is made of, compiled for one point at a time."""

from __future__ import annotations

import math

from numba import njit


@njit(nogil=True, fastmath=True, cache=True)
def smoothstep(low, high, value):  # type: ignore[no-untyped-def]
    """0 below `low`, 1 above `high`, smooth between."""
    t = min(max((value - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


@njit(nogil=True, fastmath=True, cache=True)
def smooth_minimum(a, b, blend):  # type: ignore[no-untyped-def]
    """Union of two distances whose edge is rounded over `blend`."""
    h = max(blend - abs(a - b), 0.0) / blend
    return min(a, b) - 0.25 * h * h * blend


@njit(nogil=True, fastmath=True, cache=True)
def superellipse(x, y, a, b, n):  # type: ignore[no-untyped-def]
    """Distance to a superellipse, exact on the rim and nearly so beside it."""
    r = (abs(x / a) ** n + abs(y / b) ** n) ** (1.0 / n) + 1e-6
    return (r - 1.0) * math.sqrt(x * x + y * y + 1e-3) / r


@njit(nogil=True, fastmath=True, cache=True)
def capsule(x, y, z, ax, ay, az, bx, by, bz):  # type: ignore[no-untyped-def]
    """Distance to the segment from a to b."""
    vx, vy, vz = bx - ax, by - ay, bz - az
    wx, wy, wz = x - ax, y - ay, z - az
    t = (vx * wx + vy * wy + vz * wz) / (vx * vx + vy * vy + vz * vz + 1e-9)
    t = min(max(t, 0.0), 1.0)
    return math.sqrt((wx - t * vx) ** 2 + (wy - t * vy) ** 2 + (wz - t * vz) ** 2)
