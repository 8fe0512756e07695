"""Change a volume in ways that leave its lungs alone, and compare what a segmenter finds before and after.

What a hospital changes without changing the patient: the field of view and where the patient lies in it, the table, the
posture, the order of the slices. A change of the volume of a lung by more than `TOLERANCE` is a fault, whatever the
true volume is, so series without masks serve as well as phantoms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from scipy import ndimage

from models.phantom.draw import phantom
from models.phantom.thorax import FINDINGS
from models.registry import load_bundle
from models.segmenter.inference import LEFT, RIGHT, Segmenter
from models.training import datasets, surroundings

#: Part of a lung's volume by which it may differ.
TOLERANCE = 0.02
#: Lung below this holds air, HU.
AERATED_HU = -500
#: Part by which the volume of lung that holds air may differ from the known one.
KNOWN_TOLERANCE = 0.05
#: HU of the air that is put around a volume.
AIR_HU = -1000

Spacing = tuple[float, float, float]
Volume = NDArray[np.int16]


@dataclass(frozen=True)
class Change:
    """A change of the image [z, y, x] of voxels of a size (z, y, x) in mm, which they keep."""

    name: str
    apply: Callable[[Volume, Spacing], Volume]


def padded(hu: Volume, spacing: Spacing, field_mm: float, shift_mm: tuple[float, float] = (0.0, 0.0)) -> Volume:
    """The image in a field so wide, its middle moved (y, x) by so much, as far as the field allows; the rest is air."""
    shape = [max(n, round(field_mm / s)) for n, s in zip(hu.shape[1:], spacing[1:], strict=True)]
    wide = np.full((len(hu), *shape), AIR_HU, np.int16)
    low = [
        int(np.clip((n - m) // 2 + round(by / s), 0, n - m))
        for n, m, by, s in zip(shape, hu.shape[1:], shift_mm, spacing[1:], strict=True)
    ]
    inside = hu.clip(min=-1024)
    wide[:, low[0] : low[0] + hu.shape[1], low[1] : low[1] + hu.shape[2]] = inside
    return wide


def with_couch(hu: Volume, spacing: Spacing, *, front: bool = False) -> Volume:
    """The image with the flat couch of radiotherapy, two shells about foam, 530 mm wide, right below the patient."""
    image = hu[:, ::-1] if front else hu
    middle = image[len(image) // 2]
    tissue = ndimage.binary_opening(middle > -300, iterations=4)
    rows, columns = (np.flatnonzero(tissue.any(axis)) for axis in (1, 0))
    top = int(rows[-1]) + max(1, round(2 / spacing[1])) if len(rows) else image.shape[1] * 3 // 4
    centre = (columns[0] + columns[-1]) / 2 if len(columns) else image.shape[2] / 2
    x = np.abs(np.arange(image.shape[2]) - centre) * spacing[2] < 265
    changed = image.copy()
    for depth in range(max(0, min(image.shape[1] - top, round(50 / spacing[1])))):
        mm = depth * spacing[1]
        value = -150 if mm < 2.5 or mm > 47 else -930
        plane = changed[:, top + depth]
        plane[:, x] = np.maximum(plane[:, x], value)
    return changed[:, ::-1] if front else changed


def rotated(hu: Volume, degrees: float) -> Volume:
    """The image turned in its axial planes, of isotropic pixels, in a field that holds all of it."""
    turned: Volume = ndimage.rotate(hu.clip(min=-1024), degrees, (2, 1), order=1, cval=AIR_HU, prefilter=False)
    return turned


CHANGES = (
    Change("field 500 mm", lambda hu, mm: padded(hu, mm, 500)),
    Change("field 600 mm", lambda hu, mm: padded(hu, mm, 600)),
    Change("field 650 mm", lambda hu, mm: padded(hu, mm, 650)),
    Change("field 650 mm, couch", lambda hu, mm: with_couch(padded(hu, mm, 650), mm)),
    Change("field 650 mm, couch in front", lambda hu, mm: with_couch(padded(hu, mm, 650), mm, front=True)),
    Change("100 mm to the left", lambda hu, mm: padded(hu, mm, 650, (0, 100))),
    Change("100 mm to the right", lambda hu, mm: padded(hu, mm, 650, (0, -100))),
    Change("100 mm up", lambda hu, mm: padded(hu, mm, 650, (-100, 0))),
    Change("100 mm down", lambda hu, mm: padded(hu, mm, 650, (100, 0))),
    Change("turned by 15°", lambda hu, mm: rotated(hu, 15)),
    Change("turned by -15°", lambda hu, mm: rotated(hu, -15)),
    Change("prone called supine", lambda hu, mm: hu[:, ::-1, ::-1]),
    Change("feet first called head first", lambda hu, mm: hu[::-1, :, ::-1]),
)


def litres(lungs: NDArray[np.uint8], spacing: Spacing) -> dict[str, float]:
    """Volume of each lung in litres."""
    voxel = float(np.prod(spacing)) / 1e6
    return {name: np.count_nonzero(lungs == side) * voxel for side, name in ((RIGHT, "right"), (LEFT, "left"))}


def compare(
    find: Callable[[Volume, Spacing], NDArray[np.uint8]], hu: Volume, spacing: Spacing
) -> Iterator[tuple[str, dict[str, float]]]:
    """What is found in the volume as it is, in litres, and after each change, as a part of that."""
    before = litres(find(hu, spacing), spacing)
    yield "as it is", before
    for change in CHANGES:
        changed = np.ascontiguousarray(change.apply(hu, spacing))
        after = litres(find(changed, spacing), spacing)
        yield change.name, {side: after[side] / max(before[side], 1e-3) - 1 for side in before}


def known(seed: int, finding: str) -> tuple[Volume, NDArray[np.uint8], Spacing]:
    """A phantom with a finding of `thorax`, or a 'child', in a field of 500 mm with arms and a couch; image, lungs."""
    rng = np.random.default_rng([seed, 4])
    findings = [] if finding == "child" else [finding]
    drawn = phantom(seed, shape=(72, 160, 200), spacing=(330 / 72, 2.0, 2.0), severity=0, findings=findings)
    hu = padded(drawn.hu, drawn.spacing, 500).astype(np.float32)
    lungs = (padded(drawn.lungs.astype(np.int16) + AIR_HU, drawn.spacing, 500) - AIR_HU).astype(np.uint8)
    body = np.stack([datasets.body(plane) for plane in hu]) | (lungs > 0)
    surroundings.add_arms(rng, hu, body, drawn.spacing[1])
    surroundings.add_couch(rng, hu, body | (hu > -300), drawn.spacing[1])
    scale = rng.uniform(0.5, 0.7) if finding == "child" else 1.0
    z, y, x = drawn.spacing
    return np.rint(hu).clip(-1024, 3071).astype(np.int16), lungs, (scale * z, scale * y, scale * x)


def aerated(lungs: NDArray[np.uint8], hu: Volume, spacing: Spacing) -> dict[str, float]:
    """Litres of each lung that hold air."""
    return litres(np.where(hu < AERATED_HU, lungs, np.uint8(0)), spacing)


def read_series(folder: Path) -> tuple[Volume, Spacing]:
    """A DICOM series of axial slices, canonical, with its voxel size (z, y, x) in mm."""
    reader = SimpleITK.ImageSeriesReader()  # type: ignore[no-untyped-call]
    names = reader.GetGDCMSeriesFileNames(str(folder))  # type: ignore[no-untyped-call]
    reader.SetFileNames(names)  # type: ignore[no-untyped-call]
    image = reader.Execute()  # type: ignore[no-untyped-call]
    x, y, z = image.GetSpacing()
    return SimpleITK.GetArrayFromImage(image).astype(np.int16), (z, y, x)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("series", type=Path, nargs="*", help="folders of a DICOM series each")
    parser.add_argument("--phantoms", type=int, default=0, help="how many phantoms besides")
    parser.add_argument("--known", type=int, default=0, help="how many phantoms of each finding, of known volume")
    parser.add_argument("--lungs", default="lungs", help="bundle, or its folder")
    parser.add_argument("--out", type=Path, help="JSON lines to write")
    given = parser.parse_args()
    segmenter = Segmenter(load_bundle(given.lungs), load_bundle("infection"), "cpu")

    def cases() -> Iterator[tuple[str, Volume, Spacing]]:
        for folder in given.series:
            yield folder.name, *read_series(folder)
        for seed in range(4000, 4000 + given.phantoms):
            drawn = phantom(seed, shape=(100, 192, 192), severity=seed % 3)
            yield f"phantom {seed}", drawn.hu, drawn.spacing

    failed = trials = 0
    for name, hu, spacing in cases():
        for change, parts in compare(segmenter.lungs, hu, spacing):
            first = change == "as it is"
            bad = not first and max(abs(part) for part in parts.values()) > TOLERANCE
            failed, trials = failed + bad, trials + (not first)
            shown = "  ".join(
                f"{side} {part:.2f} l" if first else f"{side} {part:+.1%}" for side, part in parts.items()
            )
            print(f"{name:16} {change:30} {shown} {'FAULT' if bad else ''}", flush=True)
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"case": name, "change": change, **parts}) + "\n")
    print(f"{failed} of {trials} changes are faults")
    for finding in (*FINDINGS, "child") if given.known else ():
        errors = []
        for seed in range(5000, 5000 + given.known):
            hu, truth, spacing = known(seed, finding)
            found = segmenter.lungs(hu, spacing)
            true, seen = aerated(truth, hu, spacing), aerated(found, hu, spacing)
            error = {side: (seen[side] - true[side]) / sum(true.values()) for side in true}
            whole = (
                2
                * np.count_nonzero((found == truth) & (truth > 0))
                / (np.count_nonzero(found) + np.count_nonzero(truth))
            )
            errors.append(max(abs(sum(error.values())), *(abs(part) for part in error.values())))
            shown = "  ".join(f"{side} {true[side]:.2f} l {error[side]:+.1%}" for side in true)
            print(
                f"{finding:18} {seed} {shown} Dice {whole:.3f} {'FAULT' if errors[-1] > KNOWN_TOLERANCE else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
