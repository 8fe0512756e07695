"""Where the patient is in a CT: the trunk, filled, without table, air around, and what lies beside it.

Found by density on a sketch of some millimetres, slice by slice, since lungs and trachea are closed off in an axial
slice but not in space. A lung that the field of view cuts open stays inside: what touches the edge of the field is
outside only where it is as thin as free air.
"""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.resample import shrink

#: Pixels of the sketch, mm, and how many there are about along its longer side; a slice of it each so many mm.
_FINE_MM, _COARSE_MM = 2.0, 4.0
_SIDE = 128
_STEP_MM = 5.0

#: Tissue is denser than this, HU: a table's thin shells are not, over the sketch's pixels; skin over fat is.
_TISSUE_HU = -400.0
#: Free air is in the median at most so much denser, HU, than the thinnest hundredth of the sketch, and between these:
#: aerated lung is denser.
_FREE_ABOVE, _FREE_HU = 45.0, (-960.0, -900.0)
#: What is denser than free air by so much more is no foam either: where it meets the edge of the field several times it
#: is lung, unless there is free air between.
_FOAM_ABOVE = 40.0
#: What no scanner measures: the padding outside the circle of reconstruction, HU.
_PADDING_HU = -1020.0

#: Air at the edge of so few pixels of the sketch says nothing.
_RIM_PIXELS = 40

#: A link up to so wide, mm, between the trunk and what lies beside it is cut.
_LINK_MM = 16.0

#: In a slice, parts of the patient that are at least so large beside the largest one are kept: two legs, not an arm.
_PART = 0.4

#: Around the trunk, mm: the mask and its box reach so far beyond the skin.
_MARGIN_MM = 6.0


@dataclass(frozen=True)
class Body:
    """The trunk in a volume [z, y, x].

    Attributes
    ----------
    rows, columns
        Box of the trunk in the plane, in the volume's voxels, over all slices.
    width_mm
        Median over the slices of the trunk's extent from right to left; None where the field of view cuts it.
    """

    rows: slice
    columns: slice
    width_mm: float | None
    _sketch: NDArray[np.bool_]
    _step: int
    _shape: tuple[int, int, int]

    def mask(
        self, slab: int, spans: tuple[tuple[float, float], tuple[float, float]], matrix: tuple[int, int]
    ) -> NDArray[np.bool_]:
        """The trunk [z, y, x] on slabs of so many slices, and a matrix over these spans of rows and columns, voxels."""
        slabs = np.arange(-(-self._shape[0] // slab)) * slab + (slab - 1) / 2
        place = [(slabs / self._step + 0.5).astype(np.intp).clip(max=len(self._sketch) - 1)]
        for (start, stop), n, size, coarse in zip(spans, matrix, self._shape[1:], self._sketch.shape[1:], strict=True):
            voxels = start + (np.arange(n) + 0.5) * (stop - start) / n
            place.append((voxels * coarse / size).astype(np.intp).clip(max=coarse - 1))
        found: NDArray[np.bool_] = self._sketch[place[0]][:, place[1][:, None], place[2]]
        return found


def find_body(hu: NDArray[np.int16], spacing: tuple[float, float, float]) -> Body:
    """Find the trunk in HU [z, y, x] of voxels of this size (z, y, x), mm; where there is none, it is all there is."""
    step = max(1, round(_STEP_MM / spacing[0]))
    height, width = hu.shape[1] * spacing[1], hu.shape[2] * spacing[2]
    pixel = float(np.clip(max(height, width) / _SIDE, _FINE_MM, _COARSE_MM))
    matrix = max(1, round(height / pixel)), max(1, round(width / pixel))
    sketch = shrink(np.ascontiguousarray(hu[::step]), 1, matrix)
    pixels = matrix[0] / height, matrix[1] / width
    trunk = _trunk(sketch, pixels)
    shape = (hu.shape[0], hu.shape[1], hu.shape[2])
    if not trunk.any():
        whole = np.ones_like(trunk)
        return Body(slice(0, shape[1]), slice(0, shape[2]), None, whole, step, shape)
    across = trunk.any(1)
    extents = across.sum(1)
    grown = _grown(trunk, max(1, round(_MARGIN_MM * max(pixels))))
    sides = []
    for axis, n, m in ((1, shape[1], matrix[0]), (2, shape[2], matrix[1])):
        hit = np.flatnonzero(grown.any(axis=tuple(i for i in range(3) if i != axis)))
        sides.append(slice(int(hit[0] * n / m), min(n, int(np.ceil((hit[-1] + 1) * n / m)))))
    edges = _padding(sketch)
    edges[:, [0, -1]] = True
    cut = (trunk & ndimage.binary_dilation(edges)).any((1, 2))[extents > 0].mean() > 0.1
    width_mm = None if cut else float(np.median(extents[extents > 0])) / pixels[1]
    return Body(sides[0], sides[1], width_mm, grown, step, shape)


def _trunk(sketch: NDArray[np.float32], pixels: tuple[float, float]) -> NDArray[np.bool_]:
    """The trunk [z, y, x] in a sketch, given its pixels (y, x) per mm."""
    # No air at the very edge: what is outside there has to be known to be.
    tissue = sketch > _TISSUE_HU
    padding = _padding(sketch)
    shown = sketch[:, ~padding]
    level = float(np.clip(np.percentile(shown, 1) + _FREE_ABOVE, *_FREE_HU)) if shown.size else _FREE_HU[0]
    filled = np.empty(tissue.shape, bool)
    for plane, values, solid in zip(filled, sketch, tissue, strict=True):
        plane[:] = ~_free_air(values, solid, padding, level)
    reach = max(1, round(_LINK_MM / 2 * max(pixels)))
    parts = _large_parts(_opened(filled, reach))
    label = cc3d.connected_components(parts, connectivity=6)
    sizes = np.bincount(label.ravel())
    sizes[0] = 0
    if not sizes.any():
        return np.zeros(tissue.shape, bool)
    trunk = label == np.argmax(sizes)
    # What opening took off its edge: skin, the rim of a thin part.
    return _grown(trunk, 1) & filled


def _padding(sketch: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Pixels [y, x] that are padding in all slices, about the circle of reconstruction."""
    empty = sketch.max(0) <= _PADDING_HU
    corners = np.zeros_like(empty)
    corners[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    found: NDArray[np.bool_] = ndimage.binary_propagation(corners & empty, mask=empty)
    return found


def _free_air(
    hu: NDArray[np.float32], solid: NDArray[np.bool_], padding: NDArray[np.bool_], level: float
) -> NDArray[np.bool_]:
    """Pixels [y, x] outside everything: padding, and air that reaches the edge of the field and is not cut lung.

    `level` is what free air is below, HU.
    """
    air = ~solid & ~padding
    label, count = ndimage.label(air)
    if not count:
        return padding & ~solid
    edge = ndimage.binary_dilation(padding) if padding.any() else np.zeros_like(padding)
    edge[[0, -1], :] = edge[:, [0, -1]] = True
    rows, columns = np.nonzero(edge & ~padding)
    # Along the edge, once around the middle of the field.
    order = np.argsort(np.arctan2(rows - hu.shape[0] / 2 + 0.5, columns - hu.shape[1] / 2 + 0.5), kind="stable")
    rows, columns = rows[order], columns[order]
    around = label[rows, columns]
    outside = np.zeros(count + 1, bool)
    outside[around] = True
    middle = np.array([np.flatnonzero(solid.any(axis)).mean() for axis in (1, 0)]) if solid.any() else np.zeros(2)
    parts = [int(part) for part in np.unique(around) if part]
    sizes = np.bincount(label.ravel())
    # Of many pixels some do for a median.
    typical = {part: float(np.median(hu[label == part][:: 1 + sizes[part] // 500])) for part in parts}
    # Not the rim of the padding, where a pixel is half tissue.
    free = np.isin(around, [part for part in parts if typical[part] < level and sizes[part] >= _RIM_PIXELS])
    for part in parts:
        if typical[part] < level:
            continue
        first, count_between = _arc(around == part)
        between = np.roll(free, -first)[:count_between]
        ends = np.array([[rows[i % len(rows)], columns[i % len(rows)]] for i in (first, first + count_between - 1)])
        if typical[part] > level + _FOAM_ABOVE:
            outside[part] = bool(between.any())
        else:
            outside[part] = not _lies_within(label == part, around == part, ends.astype(float), middle)
    outside[0] = False
    found: NDArray[np.bool_] = outside[label] | (padding & ~solid)
    return found


def _arc(here: NDArray[np.bool_]) -> tuple[int, int]:
    """First place and length of the shortest stretch of a closed line that holds all of the places."""
    places = np.flatnonzero(here)
    gaps = np.diff(places, append=places[0] + len(here))
    widest = int(np.argmax(gaps))
    return int(places[(widest + 1) % len(places)]), len(here) - int(gaps[widest]) + 1


def _lies_within(
    part: NDArray[np.bool_], here: NDArray[np.bool_], ends: NDArray[np.float64], middle: NDArray[np.float64]
) -> bool:
    """Whether air as thin as foam, at the edge of the field, is lung that the field cuts.

    It then meets the edge in one place, and lies on the patient's side of the line between the ends of that place: the
    gap between back and table meets the edge twice, the foam of a table lies beyond.

    Parameters
    ----------
    part
        The air [y, x].
    here
        Whether it is at each place along the edge.
    ends
        First and last place (y, x) of the stretch of the edge that it meets.
    middle
        (y, x) of the patient.
    """
    length = _arc(here)[1]
    if here.sum() < 0.8 * length:
        return False
    start, stop = ends
    for i, size in enumerate(part.shape):
        if start[i] == stop[i] and start[i] in (0, size - 1):
            return True  # along one side of the field
    line = stop - start
    centre = np.mean(np.nonzero(part), axis=1)
    sides = [line[1] * (place - start)[0] - line[0] * (place - start)[1] for place in (centre, middle)]
    return bool(sides[0] * sides[1] > 0)


def _opened(filled: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Opening of each slice [z, y, x] by an octagon; beyond the edge of the field the patient goes on."""
    around = ((0, 0), (reach, reach), (reach, reach))
    core = ~_grown(np.pad(~filled, around, mode="edge"), reach)
    return _grown(core, reach)[:, reach:-reach, reach:-reach] & filled


def _large_parts(opened: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of each slice its largest part and those nearly as large: not the arms beside the trunk."""
    kept = np.zeros_like(opened)
    for plane, into in zip(opened, kept, strict=True):
        label, count = ndimage.label(plane)
        if count:
            sizes = np.bincount(label.ravel())
            sizes[0] = 0
            into[:] = (sizes >= _PART * sizes.max())[label] & plane
    return kept


def _grown(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """The mask [z, y, x] and what lies in its slices within so many pixels, an octagon."""
    for step in range(by):
        grown = mask.copy()
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        # Squares and diamonds in turn.
        across = grown if step % 2 else mask
        wide = grown.copy()
        wide[:, :, 1:] |= across[:, :, :-1]
        wide[:, :, :-1] |= across[:, :, 1:]
        mask = wide
    return mask
