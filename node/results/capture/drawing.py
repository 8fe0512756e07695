"""Slices and projections as pictures for a reader: patient's right at the left, front up, head up, true to scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from node.images.orientation import Orientation
from node.images.volume import Volume
from node.methods.outcome import Pictures
from node.results.capture.typesetting import MEDIUM, TEXT, write

#: mm kept around what is outlined in a picture, so that what is next to it (of lungs, chest wall and mediastinum) stays
#: in view.
MARGIN_MM = 25.0

#: Part of the colour in a tint; the grey shines through.
_TINT = 0.32


Side = Literal["front", "below"]


@dataclass(frozen=True)
class Flattened:
    """A box of the volume as seen from one side, its first row at the top."""

    #: Mean attenuation along the line of sight, from air to soft tissue, HU.
    grey: NDArray[np.float32]
    #: Tinted voxels along the line of sight.
    tinted: NDArray[np.int32]
    #: Where each of the outlined labels is.
    outlined: NDArray[np.bool_]

    @classmethod
    def empty(cls, rows: int, columns: int, labels: int) -> Flattened:
        """Nothing seen yet."""
        shape = rows, columns
        return cls(np.zeros(shape, np.float32), np.zeros(shape, np.int32), np.zeros((labels, *shape), np.bool_))

    def flipped(self) -> Flattened:
        """The same with its last row at the top."""
        return Flattened(self.grey[::-1], self.tinted[::-1], self.outlined[:, ::-1])


@dataclass(frozen=True)
class PatientView:
    """Volume and layers with axes from feet to head, front to back, patient's right to left."""

    hu: NDArray[np.int16]
    #: Labels, each outlined for itself, from 1.
    outlined: NDArray[np.uint8]
    tinted: NDArray[np.bool_]
    #: mm between planes along the three axes.
    spacing: tuple[float, float, float]
    #: z of the middle of every axial plane, mm, LPS.
    heights: NDArray[np.float64]
    #: How the method wants them drawn.
    pictures: Pictures

    @classmethod
    def of(cls, volume: Volume, pictures: Pictures) -> PatientView:
        """Views, not copies, of the volume and the layers."""
        orientation = Orientation.of(volume.affine)
        shape = np.array(volume.hu.shape)
        axis = orientation.axes[0]
        middle = np.repeat((shape - 1)[None] / 2, shape[axis], axis=0)
        middle[:, axis] = np.arange(shape[axis])
        heights = middle[:, ::-1] @ volume.affine[2, :3] + volume.affine[2, 3]
        return cls(
            hu=orientation.canonical(volume.hu),
            outlined=orientation.canonical(pictures.outlined.labels),
            tinted=orientation.canonical(pictures.tinted.labels) > 0,
            spacing=orientation.spacing(volume.spacing),
            heights=heights[::-1] if 0 in orientation.reversed_axes else heights,
            pictures=pictures,
        )

    @cached_property
    def labels(self) -> range:
        """Labels of what is outlined."""
        return range(1, 1 + int(self.outlined.max(initial=0)))

    @cached_property
    def box(self) -> tuple[slice, slice, slice]:
        """Index box of what is outlined with a margin; the whole volume where that is nothing."""
        ranges = []
        for axis in range(3):
            hit = np.flatnonzero(self.outlined.any(axis=tuple(other for other in range(3) if other != axis)))
            size, margin = self.outlined.shape[axis], round(MARGIN_MM / self.spacing[axis])
            ranges.append(
                slice(max(0, hit[0] - margin), min(size, hit[-1] + 1 + margin)) if hit.size else slice(0, size)
            )
        return ranges[0], ranges[1], ranges[2]

    @cached_property
    def planes(self) -> NDArray[np.intp]:
        """Axial planes that show what is outlined, from the feet up; all planes where that is nothing."""
        planes = np.flatnonzero(self.outlined.any(axis=(1, 2)))
        return planes if planes.size else np.arange(len(self.outlined))

    @cached_property
    def tinted_area(self) -> NDArray[np.intp]:
        """Tinted pixels on each axial plane."""
        return np.array([np.count_nonzero(plane) for plane in self.tinted])

    @cached_property
    def flattened(self) -> dict[Side, Flattened]:
        """What lies in the box as seen from the front and from below, each seen through the whole box."""
        hu, outlined, tinted = self.hu[self.box], self.outlined[self.box], self.tinted[self.box]
        planes, rows, columns = hu.shape
        front = Flattened.empty(planes, columns, len(self.labels))
        below = Flattened.empty(rows, columns, len(self.labels))
        # Plane by plane, for both at once: each plane is fetched from memory once.
        for k in range(planes):
            grey = np.clip(hu[k], -1000, 300)
            front.grey[k] = grey.mean(axis=0, dtype=np.float32)
            below.grey[:] += grey
            front.tinted[k] = np.count_nonzero(tinted[k], axis=0)
            below.tinted[:] += tinted[k]
            for label, across, down in zip(self.labels, front.outlined, below.outlined, strict=True):
                part = outlined[k] == label
                across[k] = part.any(axis=0)
                down |= part
        below.grey[:] /= planes
        # Head up: the first row of a picture from the front is the highest plane.
        return {"front": front.flipped(), "below": below}


def axial(view: PatientView, plane: int, width: int, height: int) -> Image.Image:
    """Axial plane in the method's window, with its layers; exactly `width` by `height`."""
    rows, columns = view.box[1:]
    frame = _Frame(view.spacing[1:], (rows.stop - rows.start, columns.stop - columns.start), width, height)
    outline, tint = view.pictures.outlined.colour, view.pictures.tinted.colour
    centre, span = view.pictures.window
    grey = (view.hu[plane, rows, columns] - np.float32(centre - span / 2)) / np.float32(span)
    picture = frame.grey(grey)
    tinted = frame.mask(view.tinted[plane, rows, columns])
    _paint(picture, tinted, tint, _TINT)
    for label in view.labels:
        part = frame.mask(view.outlined[plane, rows, columns] == label)
        _paint(picture, _edge(part, 1), outline, 0.85)
    _paint(picture, _edge(tinted, 2), tint, 1.0)
    return _mark(frame.on_black(picture), frame, ("A", "P", "R", "L"))


def projection(view: PatientView, side: Side, width: int, height: int) -> Image.Image:
    """The patient from the front or from below: mean attenuation as grey, thickness of what is tinted as tint."""
    seen = view.flattened[side]
    along, rows = (1, 0) if side == "front" else (0, 1)
    frame = _Frame((view.spacing[rows], view.spacing[2]), seen.grey.shape, width, height)
    low, high = np.percentile(seen.grey, (1, 99))
    picture = frame.grey((seen.grey - low) / max(float(high - low), 1.0) * 0.85)
    thickness = seen.tinted * view.spacing[along]
    # 5 mm is seen, 60 mm and more is full.
    strength = np.where(thickness > 0, np.clip(0.25 + thickness / 80, 0, 1), 0)
    _paint(picture, frame.smooth(strength), view.pictures.tinted.colour, 1.0)
    for part in seen.outlined:
        _paint(picture, _edge(frame.mask(part), 1), view.pictures.outlined.colour, 0.85)
    letters = ("H", "F", "R", "L") if side == "front" else ("A", "P", "R", "L")
    return _mark(frame.on_black(picture), frame, letters)


class _Frame:
    """Where and how large a plane is drawn in a rectangle: true to scale, centred."""

    def __init__(self, spacing: tuple[float, ...], shape: tuple[int, int], width: int, height: int) -> None:
        extent = shape[0] * spacing[0], shape[1] * spacing[1]
        #: Pixels of the picture per mm.
        self.scale = min(height / extent[0], width / extent[1])
        self.size = max(1, round(extent[1] * self.scale)), max(1, round(extent[0] * self.scale))
        self.canvas = width, height
        self.corner = (width - self.size[0]) // 2, (height - self.size[1]) // 2

    def grey(self, plane: NDArray[np.floating]) -> Image.Image:
        """Plane of 0 to 1 as a grey picture in RGB, resampled."""
        levels = Image.fromarray((np.clip(plane, 0, 1) * 255).astype(np.uint8))
        return levels.resize(self.size, Image.Resampling.BICUBIC).convert("RGB")

    def mask(self, plane: NDArray[np.bool_]) -> Image.Image:
        """Mask resampled with a smooth border, 0 or 255."""
        return self.smooth(plane).point(lambda level: 255 if level >= 128 else 0)

    def smooth(self, plane: NDArray[np.floating] | NDArray[np.bool_]) -> Image.Image:
        """Plane of 0 to 1 resampled linearly, 0 to 255."""
        levels = Image.fromarray((np.asarray(plane, np.float32) * 255).round().astype(np.uint8))
        return levels.resize(self.size, Image.Resampling.BILINEAR)

    def on_black(self, picture: Image.Image) -> Image.Image:
        """The picture on its canvas."""
        canvas = Image.new("RGB", self.canvas)
        canvas.paste(picture, self.corner)
        return canvas


def _edge(mask: Image.Image, width: int) -> Image.Image:
    """Line of `width` pixels just inside the border of a mask, with soft edges."""
    edge = Image.new("L", mask.size)
    box = mask.getbbox()
    if box is None:
        return edge
    # A border of two pixels lets the softened line run out; a mask that the picture cuts off has no line there.
    part = np.pad(np.asarray(mask.crop(box)) > 0, 2, mode="edge")
    outside = np.zeros_like(part)
    outside[:2] = outside[-2:] = outside[:, :2] = outside[:, -2:] = True
    outside[:2] &= box[1] > 0
    outside[-2:] &= box[3] < mask.height
    outside[:, :2] &= box[0] > 0
    outside[:, -2:] &= box[2] < mask.width
    part &= ~outside
    line = part & ~ndimage.binary_erosion(part, iterations=width, border_value=1)
    soft = np.clip(ndimage.gaussian_filter(line.astype(np.float32), 0.6) * 1.6, 0, 1)
    edge.paste(Image.fromarray((soft * 255).astype(np.uint8)), (box[0] - 2, box[1] - 2))
    return edge


def _paint(picture: Image.Image, where: Image.Image, colour: tuple[int, int, int], strength: float) -> None:
    """Lay a colour over the picture, as opaque as `where` (0 to 255) times `strength`."""
    if where.getbbox() is not None:
        picture.paste(colour, mask=where.point(lambda level: round(level * strength)))


def _mark(image: Image.Image, frame: _Frame, letters: tuple[str, str, str, str]) -> Image.Image:
    """Burn in the directions at top, bottom, left and right, and a scale bar of 5 cm where it has room."""
    draw = ImageDraw.Draw(image)
    width, height = image.size
    size = max(13, min(20, width // 26))
    top, bottom, left, right = letters
    for letter, place, anchor in (
        (top, (width / 2, 6), "ma"),
        (bottom, (width / 2, height - 6), "md"),
        (left, (8, height / 2), "lm"),
        (right, (width - 8, height / 2), "rm"),
    ):
        write(draw, place, letter, size, TEXT, anchor, weight=MEDIUM, edge=2)
    bar = round(50 * frame.scale)
    if 30 <= bar <= width // 3:
        x, y = width - 14 - bar, height - 12
        for colour, thick in (((0, 0, 0), 5), (TEXT, 2)):
            for line in ((x, y, x + bar, y), (x, y - 4, x, y + 4), (x + bar, y - 4, x + bar, y + 4)):
                draw.line(line, colour, thick)
        write(draw, (x + bar / 2, y - 6), "5 cm", 13, TEXT, "md", edge=2)
    return image
