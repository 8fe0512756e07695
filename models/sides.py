"""Right and left by anatomy: how the patient lies in the image, from spine, apices and heart.

A network that sees axial slices calls the lung at low columns the right one. That is so as long as the patient lies as
the image's position and orientation say; a prone patient registered as supine, or one with the feet first registered
as head first, has the right lung at high columns. The spine says which way the back is, the lungs, which are narrow at
the apex, where the head is, and the heart, which is on the left, has to agree before sides are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RIGHT, LEFT = 1, 2

#: The sketch that is looked at, mm (z, y, x).
_SKETCH_MM = (5.0, 3.0, 3.0)

#: Bone is denser, HU, and not as even as contrast medium in the heart: so much changes within a pixel of the sketch.
_BONE_HU, _BONE_CHANGE_HU = 220.0, 60.0
#: Share of the lungs' width, about its middle, in which spine and sternum lie; and how far beyond the lungs, mm.
_CORRIDOR, _BEYOND_MM = 0.4, 40.0
#: Rows and columns that are looked at, mm from the middle.
_REACH_MM = 200.0
#: The back has so many times the bone that the front has, each place by the square of how often it is there, and at
#: least so much.
_BONE_RATIO, _BONE_MM2 = 1.4, 10.0

#: The lungs are looked at so far from either end, shares of their height, which is at least so many mm.
_END, _HEIGHT_MM = (0.06, 0.18), 120.0
#: The base is so many times as wide as the apex; more where that is contrary to what the image says.
_WIDTH_RATIO, _CONTRARY_RATIO = 1.2, 1.25
#: Pixels of either lung in a slice that holds both.
_BOTH_PIXELS = 12

#: The tissue between the lungs lies so far, mm, to one side of the spine, where the heart is on that side.
_HEART_MM, _CLEARLY_MM = 3.0, 12.0
#: And is looked at in the slices that have most of it, from this quantile on.
_HEART_LEVEL, _HEART_SHARE = 0.6, 0.42

#: A lung of which less than this part lies on its side of the midline is the other one.
_ASTRAY = 0.15

#: One lung has at least this part of both where the pose can be seen.
_BOTH = 0.12

#: A lung below this volume, ml, and this part of the other, is not there: dust, or gas in a bronchus.
ABSENT_ML, _ABSENT_PART = 30.0, 0.05


@dataclass(frozen=True)
class Pose:
    """How a patient lies in a volume [z, y, x] that is to go from inferior to superior, anterior to posterior.

    Attributes
    ----------
    back
        1 where the spine is at high rows, -1 where it is at low rows, 0 where it is not clear.
    head
        1 where the apices are at high slices, -1 at low slices, 0 where it is not clear.
    heart_mm
        How far towards high columns the tissue between the lungs lies from the spine.
    """

    back: int
    head: int
    heart_mm: float

    @property
    def turned(self) -> bool:
        """Whether the patient is turned so that the right lung is at high columns.

        Where either spine or apices are not clear the heart has to say so too, else it must not say the contrary.
        """
        clear = self.back * self.head != 0
        return self.contrary and self.heart_mm < (_CLEARLY_MM if clear else -_HEART_MM)

    @property
    def flips(self) -> tuple[int, ...]:
        """Axes of the volume along which an axial slice is flipped to look as that of a patient who lies as usual."""
        if self.contrary and not self.turned:
            return ()
        return (1,) * (self.back < 0) + (2,) * self.turned

    @property
    def contrary(self) -> bool:
        """Whether spine and apices say that the right lung is at high columns."""
        return (self.back or 1) * (self.head or 1) < 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know about right and left, in sentences."""
        if self.turned:
            return ("Right and left follow the anatomy: the patient lies otherwise than the image orientation says.",)
        if self.contrary:
            return ("Check right and left: spine, lung apices and heart disagree.",)
        if self.heart_mm < -_CLEARLY_MM:
            return ("Check right and left: the heart lies on the right, or the images are mirrored.",)
        return ()


def pose_of(lungs: NDArray[np.uint8], hu: NDArray[np.float32], spacing: tuple[float, float, float]) -> Pose:
    """How the patient lies, from the lungs [z, y, x], HU of the same shape, and the voxel size (z, y, x) in mm."""
    step = [max(1, round(wanted / mm)) for wanted, mm in zip(_SKETCH_MM, spacing, strict=True)]
    cut = (slice(None, None, step[0]), slice(None, None, step[1]), slice(None, None, step[2]))
    lungs, hu = lungs[cut], hu[cut]
    z_mm, y_mm, x_mm = (mm * n for mm, n in zip(spacing, step, strict=True))
    inside = lungs > 0
    sizes = [np.count_nonzero(lungs == side) for side in (RIGHT, LEFT)]
    if min(sizes) <= _BOTH * sum(sizes):
        return Pose(0, 0, 0.0)
    planes = np.flatnonzero(inside.sum((1, 2)) * y_mm * x_mm > 500)
    if len(planes) < 3:
        return Pose(0, 0, 0.0)
    columns = np.array([np.flatnonzero(inside[k].any(0))[[0, -1]] for k in planes])
    # Bone by rows from the middle of the lungs and columns from the middle of the corridor: as often as it is there.
    reach = round(_REACH_MM / y_mm), round(_REACH_MM / x_mm)
    often = np.zeros((2 * reach[0] + 1, 2 * reach[1] + 1))
    bones = []
    for k, (first, last) in zip(planes, columns, strict=True):
        rows = np.nonzero(inside[k])[0]
        centre, middle = int(rows.mean()), int((first + last) // 2)
        half = min(reach[1], int(_CORRIDOR / 2 * (last - first)))
        beyond = round(_BEYOND_MM / y_mm)
        top, bottom = max(0, int(rows.min()) - beyond, centre - reach[0]), int(rows.max()) + beyond + 1
        start = max(0, middle - half)
        part = hu[k, top : min(bottom, centre + reach[0] + 1), start : middle + half + 1]
        if min(part.shape) < 3:
            continue
        change = np.hypot(*np.gradient(part))
        y, x = np.nonzero((part > _BONE_HU) & (change > _BONE_CHANGE_HU))
        np.add.at(often, (y + top - centre + reach[0], x + start - middle + reach[1]), 1 / len(planes))
        bones.append((y + top > centre, x + start))
    # The spine is in the same place in most slices, ribs and the edge of the heart are not.
    front, behind = (float((part**2).sum()) * y_mm * x_mm for part in (often[: reach[0]], often[reach[0] + 1 :]))
    direction = 0
    if max(front, behind) > _BONE_MM2:
        direction = int(behind > _BONE_RATIO * front) - int(front > _BONE_RATIO * behind)
    both = ((lungs[planes] == RIGHT).sum((1, 2)) > _BOTH_PIXELS) & ((lungs[planes] == LEFT).sum((1, 2)) > _BOTH_PIXELS)
    head = _head(columns[both], z_mm)
    if direction:
        places = np.concatenate([x[back == (direction > 0)] for back, x in bones])
        heart_mm = float(_heart(inside, hu, planes, columns, float(np.median(places)), direction) * x_mm)
    else:
        heart_mm = 0.0
    return Pose(direction, head, heart_mm)


def _head(columns: NDArray[np.intp], z_mm: float) -> int:
    """Where the apices are: 1 at high slices, -1 at low ones, 0 unknown.

    `columns` are the first and last one of the lungs in each slice that holds both: at the base, where one alone may
    reach further down, one alone says nothing.
    """
    if len(columns) * z_mm < _HEIGHT_MM:
        return 0
    widths = (columns[:, 1] - columns[:, 0] + 1).astype(float)
    low, high = (int(np.ceil(share * len(columns))) for share in _END)
    bottom, top = float(np.median(widths[low:high])), float(np.median(widths[len(widths) - high : len(widths) - low]))
    return int(bottom > _WIDTH_RATIO * top) - int(top > _CONTRARY_RATIO * bottom)


def _heart(
    inside: NDArray[np.bool_],
    hu: NDArray[np.float32],
    planes: NDArray[np.intp],
    columns: NDArray[np.intp],
    spine: float,
    direction: int,
) -> float:
    """Pixels towards high columns from the spine to the middle of the tissue between the lungs, in front of it."""
    offsets, weights = [], []
    for k, (first, last) in zip(planes, columns, strict=True):
        rows = np.flatnonzero(inside[k].any(1))
        centre = int(np.nonzero(inside[k])[0].mean())
        half = slice(int(rows[0]), centre) if direction > 0 else slice(centre + 1, int(rows[-1]) + 1)
        lung = inside[k, half, first : last + 1]
        # Between lung and lung in each row, so that neither chest wall nor liver counts.
        between = np.maximum.accumulate(lung, 1) & np.maximum.accumulate(lung[:, ::-1], 1)[:, ::-1] & ~lung
        tissue = between & (hu[k, half, first : last + 1] > -100)
        at = np.nonzero(tissue)[1]
        # Where the liver rises between the lungs it is no heart.
        if len(at) and len(at) < _HEART_SHARE * lung.size:
            offsets.append(at.mean() + first - spine)
            weights.append(len(at))
    if not offsets:
        return 0.0
    # Where there is most of it: the heart, not the vessels above.
    level = np.array(weights) >= np.quantile(weights, _HEART_LEVEL)
    return float(np.mean(np.array(offsets)[level]))


def settled(label: NDArray[np.uint8], body: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The label [z, y, x] with each lung on its side of the body's midline, by place in the image.

    A side of which nearly all lies beyond the midline is the other one; both then change places.
    """
    planes = np.flatnonzero(label.any((1, 2)))
    across: NDArray[np.bool_] = np.any(body[planes], axis=1)
    width = label.shape[2]
    first, last = across.argmax(1), width - 1 - across[:, ::-1].argmax(1)
    if not len(planes) or not across.any():
        return label
    midline: NDArray[np.float64] = np.asarray((first + last) / 2)
    low = np.arange(width)[None] < midline.reshape(-1, 1)
    names = np.arange(3, dtype=np.uint8)
    for side in (RIGHT, LEFT):
        columns = np.count_nonzero(label[planes] == side, axis=1)
        here = columns[low].sum() if side == RIGHT else columns.sum() - columns[low].sum()
        if columns.any() and here < _ASTRAY * columns.sum():
            names[side] = RIGHT + LEFT - side
    if names[RIGHT] == RIGHT and names[LEFT] == LEFT:
        return label
    changed: NDArray[np.uint8] = names[label]
    return changed


def absent(volumes_ml: tuple[float, float]) -> tuple[bool, bool]:
    """Whether the right and the left lung are not there, from their volumes."""
    right, left = (one < ABSENT_ML and one < _ABSENT_PART * other for one, other in (volumes_ml, volumes_ml[::-1]))
    return right, left
