"""The whole analysis on a box-shaped patient, stored in many orientations, with thresholds in place of networks."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from ct_series import write_series
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from models.labels import LEFT, RIGHT
from models.registry import ModelIdentity
from node.images.volume import VolumeError
from node.methods.outcome import plain
from node.methods.pneumonia import pipeline
from node.methods.pneumonia.outcome import outcome_of
from node.methods.pneumonia.pipeline import AnalysisError

analyse = functools.partial(pipeline.analyse, minimum_lesion_mm3=100.0)

MM = 8.0
#: Voxels along x, y, z; the box is centred on the origin of the patient coordinate system.
EXTENT = np.array([30, 20, 30])
LESION_VOXELS = 5 * 5 * 5
LUNG_VOXELS = 10 * 14 * 24


def within(points, low, high):
    return np.logical_and.reduce([(a > b) & (a < c) for a, b, c in zip(points, low, high, strict=True)])


def attenuation(points) -> NDArray[np.int_]:
    """HU at LPS points: two lungs, and at the bottom and front of the right one a lesion."""
    hu = np.full(points[0].shape, 40)
    hu[within(points, (-98, -58, -98), (-18, 58, 98))] = -850
    hu[within(points, (18, -58, -98), (98, 58, 98))] = -850
    hu[within(points, (-78, -58, -98), (-38, -18, -58))] = -250
    return hu


def write_patient(folder, row, column, pose=None, slices=slice(None)):
    """Store the patient with these row and column directions; `pose` turns patient and grid together."""
    pose = np.eye(3) if pose is None else pose
    row, column = np.array(row, float), np.array(column, float)
    normal = np.cross(row, column)
    counts = [int(abs(EXTENT @ direction)) for direction in (normal, column, row)]
    k, j, i = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * MM for n in counts], indexing="ij")
    points = [row[axis] * i + column[axis] * j + normal[axis] * k for axis in range(3)]
    stored = attenuation(points) + 1024
    first = np.stack(points)[:, :, 0, 0].T @ pose.T
    return write_series(
        folder,
        [tuple(position) for position in first][slices],
        stored[slices],
        orientation=(*(pose @ row), *(pose @ column)),
        pixel_spacing=(MM, MM),
    )


@dataclass
class Thresholds:
    """Segments by attenuation, and tells right from left by the canonical axis alone."""

    identities: tuple[ModelIdentity, ...] = (ModelIdentity("thresholds", "1", "00"),)
    keep: float = 1.0
    seen: list[tuple[tuple[int, ...], tuple[float, ...]]] = field(default_factory=list)

    def __call__(self, hu, spacing, progress=None):
        self.seen.append((hu.shape, spacing))
        assert hu.dtype == np.int16
        assert hu.flags.c_contiguous
        progress("lungs", 1.0)
        lungs = (hu < -100).astype(np.uint8)
        lungs[..., hu.shape[2] // 2 :] *= LEFT
        lungs[round(len(lungs) * self.keep) :] = 0
        probability = np.where((hu > -400) & (lungs > 0), 0.75, 0.125).astype(np.float32)
        probability[lungs == 0] = 0
        return Segmented(lungs, probability)


@dataclass
class Segmented:
    lungs: NDArray[np.uint8]
    probability: NDArray[np.float32]
    threshold: float = 0.5
    timings: dict[str, float] = field(default_factory=lambda: {"lungs": 0.25})
    calibration: None = None
    notes: tuple[str, ...] = ()


X, Y, Z = np.eye(3)
ORIENTATIONS = {
    "axial, head first supine": (X, Y),
    "axial, turned half around": (-X, -Y),
    "axial, mirrored rows: normal to the feet": (-X, Y),
    "axial, mirrored columns: normal to the feet": (X, -Y),
    "axial, transposed": (Y, X),
    "coronal": (X, -Z),
    "coronal from behind": (-X, -Z),
    "sagittal": (Y, -Z),
    "sagittal, feet up": (-Y, Z),
}


@pytest.mark.parametrize(("row", "column"), ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("oblique", [0, 9])
def test_findings_do_not_depend_on_how_the_series_was_stored(tmp_path, row, column, oblique):
    pose = Rotation.from_euler("xyz", (oblique, oblique / 2, -oblique), degrees=True).as_matrix()
    segmenter = Thresholds()
    volume, findings = analyse(write_patient(tmp_path, row, column, pose), segmenter)

    shape, spacing = segmenter.seen[0]
    assert shape == (30, 20, 30)
    assert spacing == pytest.approx((MM, MM, MM), rel=1e-6)
    assert findings.lungs.shape == findings.lesions.shape == volume.hu.shape

    voxel_ml = MM**3 / 1000
    assert findings.right.volume_ml == pytest.approx(LUNG_VOXELS * voxel_ml)
    assert findings.left.volume_ml == pytest.approx(LUNG_VOXELS * voxel_ml)
    assert findings.right.infected_ml == pytest.approx(LESION_VOXELS * voxel_ml)
    assert findings.left.infected_ml == 0
    assert findings.left.mean_hu == pytest.approx(-850)
    (lesion,) = findings.lesion_list
    assert (lesion.side, lesion.probability, lesion.mean_hu) == ("right", 0.75, -250)
    # On the source grid the mask lies on the lesion's own voxels,
    assert (findings.lesions == 1).sum() == LESION_VOXELS
    assert set(volume.hu[findings.lesions == 1]) == {-250}
    # and in the patient where the lesion was put.
    k, j, i = np.argwhere(findings.lesions == 1).mean(axis=0)
    assert pose.T @ (volume.affine @ (i, j, k, 1))[:3] == pytest.approx((-60, -36, -76), abs=1e-3)
    for side, sign in ((RIGHT, -1), (LEFT, 1)):
        k, j, i = np.argwhere(findings.lungs == side).mean(axis=0)
        assert (pose.T @ (volume.affine @ (i, j, k, 1))[:3])[0] == pytest.approx(sign * 56, abs=1e-3)

    # The rules judge axial slices, lowest first, whatever the stack.
    assert findings.scan.consecutive.positive_slices == 5
    assert findings.scan.consecutive.longest_run_mm == pytest.approx(5 * MM, rel=1e-6)
    assert findings.scan.intensity.ratio == pytest.approx(LESION_VOXELS / (2 * LUNG_VOXELS))
    assert findings.scan.noisy_or.probability == 0.75
    assert len(findings.scan.open_lung.dark_pixels) == 30
    assert findings.scan.open_lung.kept[0] == 3
    assert findings.notes == ()


def test_progress_timings_and_models(tmp_path):
    told = []
    _, findings = analyse(write_patient(tmp_path, X, Y), Thresholds(), lambda stage, done: told.append((stage, done)))
    assert told == [
        ("read", 0.0),
        ("read", 1.0),
        ("segment", 0.0),
        ("lungs", 1.0),
        ("segment", 1.0),
        ("measure", 0.0),
        ("measure", 1.0),
        ("judge", 0.0),
        ("judge", 1.0),
    ]
    assert set(findings.timings) == {"read", "segment", "measure", "judge", "segment: lungs"}
    assert findings.timings["segment: lungs"] == 0.25
    assert findings.models == (ModelIdentity("thresholds", "1", "00"),)


@pytest.mark.parametrize(
    ("slices", "notes"),
    [
        (slice(0, 20), ["highest"]),
        (slice(5, 30), ["lowest"]),
        (slice(5, 20), ["lowest", "highest"]),
    ],
)
def test_lungs_that_are_cut_off_are_noted(tmp_path, slices, notes):
    _, findings = analyse(write_patient(tmp_path, X, Y, slices=slices), Thresholds())
    assert list(findings.notes) == [
        f"The lungs reach the {note} slice: part of them may not have been scanned." for note in notes
    ]


def test_lungs_missing_or_implausible_are_refused(tmp_path):
    paths = write_patient(tmp_path, X, Y)
    with pytest.raises(AnalysisError, match="no lungs found"):
        analyse(paths, Thresholds(keep=0))
    with pytest.raises(AnalysisError, match=r"implausible lungs: 143 ml, expected 200 to 12000"):
        analyse(paths, Thresholds(keep=4 / 30))
    assert issubclass(AnalysisError, VolumeError)


def test_a_missing_lung_is_noted(tmp_path):
    class OneLung(Thresholds):
        def __call__(self, hu, spacing, progress=None):
            segmented = super().__call__(hu, spacing, progress)
            segmented.lungs[segmented.lungs == LEFT] = 0
            segmented.notes = ("Check right and left.",)
            return segmented

    _, findings = analyse(write_patient(tmp_path, X, Y), OneLung())
    assert findings.notes == ("Check right and left.", "No left lung was found.")
    assert findings.left.volume_ml == 0


def test_summary_is_json_and_holds_what_was_found(tmp_path):
    volume, findings = analyse(write_patient(tmp_path, X, Y), Thresholds())
    said = plain(outcome_of(volume, findings))
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert said["geometry"]["shape"] == [30, 20, 30]
    assert said["geometry"]["series_instance_uid"] == volume.series_instance_uid
    assert said["lungs"]["both"]["infected_share"] == LESION_VOXELS / (2 * LUNG_VOXELS)
    assert said["lungs"]["left"]["infected_mean_hu"] is None
    (lesion,) = said["lesions"]
    assert lesion["box"] == [3, 8, 3, 8, 5, 10]
    assert lesion["key_sop_instance_uid"] == volume.sources[lesion["key_slice"]].sop_instance_uid
    assert said["scan"]["consecutive"]["minimum_run"] == 15
    assert said["scan"]["intensity"]["grade"] == "Mild"
    assert said["scan"]["open_lung"]["kept"] == list(findings.scan.open_lung.kept)
    assert said["models"] == [{"name": "thresholds", "version": "1", "sha256": "00"}]
    assert said["notes"] == []
