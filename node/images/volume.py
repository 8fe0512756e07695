"""DICOM series → `Volume`: an array in HU with its geometry and the way back to every source instance.

Only geometry and pixels live here; patient and study attributes stay in the files that `Volume.sources` names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from node.images.frames import Frame, decode_frames, read_frames
from node.images.geometry import VolumeError, regular_grid, require_same_planes
from node.text import uid

#: Voxels of a volume, at most, for which memory is taken: 4 GiB as int16. The largest that scanners make are some 2,000
#: slices of 1024 x 1024.
MOST_VOXELS = 1 << 31

__all__ = ["FileError", "SourceSlice", "Volume", "VolumeError", "read_volume"]


_T = TypeVar("_T", str, tuple[int, int])


class FileError(OSError):
    """A file cannot be read, now or ever; the message names it, in the spool by its SOP instance UID."""


@dataclass(frozen=True)
class SourceSlice:
    """The instance (and frame) that one slice of a `Volume` came from."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    #: 1-based frame number in an enhanced multi-frame instance, else None.
    frame: int | None
    #: Image Position (Patient) of the slice, mm, LPS (PS3.3 C.7.6.2.1.1).
    position: tuple[float, float, float]


@dataclass(frozen=True)
class Volume:
    """A CT series as one regular grid.

    Slices are sorted along the slice normal (row cosine × column cosine), whatever their order on disk or by
    instance number; rows and columns stay as stored, so `hu[k]` is exactly the pixel matrix of `sources[k]`.
    """

    #: int16 HU, shape (slices, rows, columns).
    hu: NDArray[np.int16]
    #: 4x4, voxel index (column i, row j, slice k, 1) → patient LPS mm (PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1).
    affine: NDArray[np.float64]
    #: One per slice, in the order of `hu`.
    sources: tuple[SourceSlice, ...]
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between (slices, rows, columns), in the order of `hu`'s axes."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(k), float(j), float(i)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0


def read_volume(paths: Sequence[Path]) -> Volume:
    """Read a CT series as one regular volume in HU.

    Headers are read and judged before any pixel is decoded; then files are decoded one by one into the array, so
    memory stays near that of the int16 array and one file.

    Parameters
    ----------
    paths
        All files of one series, in any order: CT images, or enhanced multi-frame CT.

    Returns
    -------
    Volume
        Slices sorted along the normal; rows and columns as stored.

    Raises
    ------
    VolumeError
        The files are not one regular CT volume: a gap, uneven spacing, duplicate positions, gantry tilt, more than
        one orientation, matrix, pixel spacing, frame of reference or series, a file that is no CT image, one whose
        pixels cannot be decoded or take more than its header says, or more voxels than `MOST_VOXELS`.
        Nothing is returned in part.
    FileError
        A file cannot be read.
    """
    by_path = {}
    for path in paths:
        with _named(path):
            by_path[path] = read_frames(path)
    frames = [frame for of_file in by_path.values() for frame in of_file]
    if not frames:
        raise VolumeError("no files: a series needs at least one image")
    first = frames[0]
    _require_one_series(frames)
    order, affine = regular_grid(
        [frame.position for frame in frames], first.orientation, first.pixel_spacing, first.thickness
    )
    if not first.frame_of_reference_uid:
        raise VolumeError("no Frame of Reference UID: result objects could not be placed in the patient")
    sorted_frames = [frames[n] for n in order]
    place = {(frame.path, frame.number): k for k, frame in enumerate(sorted_frames)}

    if len(frames) * first.matrix[0] * first.matrix[1] > MOST_VOXELS:
        size = f"{len(frames)} slices of {first.matrix[0]} x {first.matrix[1]}"
        raise VolumeError(f"{size} pixels are more than any volume that can be analysed")
    hu = np.empty((len(frames), *first.matrix), np.int16)
    for path, of_file in by_path.items():
        with _named(path):
            for frame, slice_hu in zip(of_file, decode_frames(path, of_file), strict=True):
                hu[place[frame.path, frame.number]] = slice_hu
    return Volume(
        hu=hu,
        affine=affine,
        sources=tuple(
            SourceSlice(f.path, f.sop_class_uid, f.sop_instance_uid, f.number, f.position) for f in sorted_frames
        ),
        study_instance_uid=first.study_instance_uid,
        series_instance_uid=first.series_instance_uid,
        frame_of_reference_uid=first.frame_of_reference_uid,
    )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file the system could not read."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else type(error).__name__
        raise FileError(f"{path.name} cannot be read ({why})") from error


def _require_one_series(frames: Sequence[Frame]) -> None:
    """Refuse files that differ in what all slices of a volume share."""
    _require_same("studies", [frame.study_instance_uid for frame in frames], uid)
    _require_same("series", [frame.series_instance_uid for frame in frames], uid)
    _require_same("frames of reference", [frame.frame_of_reference_uid for frame in frames], uid)
    _require_same("matrix sizes", [frame.matrix for frame in frames], lambda matrix: f"{matrix[0]} x {matrix[1]}")
    require_same_planes([frame.orientation for frame in frames], [frame.pixel_spacing for frame in frames])


def _require_same(what: str, values: Iterable[_T], shown: Callable[[_T], str]) -> None:
    different = sorted(set(values))
    if len(different) > 1:
        raise VolumeError(f"{len(different)} {what} in one series: {', '.join(map(shown, different[:3]))}")
