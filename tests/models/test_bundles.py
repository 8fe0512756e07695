"""The bundles that come with the program are complete: MONAI runs them, and they give the masks that a node gives."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from numpy.typing import NDArray

from models.build import build
from models.configuration import REQUIRED_PACKAGES, inference_config
from models.install import import_r231
from models.networks.unet_r231 import UNetR231
from models.phantom.draw import phantom
from models.registry import BUNDLES, BundleError, load_bundle
from models.segmenter.inference import Segmenter
from node.images.orientation import Orientation
from node.images.phantom_series import write_series
from node.methods.pneumonia.pipeline import analyse

#: Of the voxels of a mask, how many may differ. MONAI runs the network in torch; a node's CPU runs it on OpenVINO, of
#: the lungs in int8 and of infection with weights of 16 bits, and where a probability is near one half they round to
#: different sides. Of all voxels at least 99.9 % agree as well, but most of those are outside the body.
TOLERANCE = 0.01

#: What MONAI's schema of 2024-07-25 requires: key → type.
REQUIRED = {
    "schema": str,
    "version": str,
    "monai_version": str,
    "pytorch_version": str,
    "numpy_version": str,
    "required_packages_version": dict,
    "task": str,
    "description": str,
    "authors": str,
    "copyright": str,
    "network_data_format": dict,
}

#: Keys that it leaves out or types.
OPTIONAL = {"data_source": str, "intended_use": str}

#: What it requires of each input and output of the network.
TENSOR = {"type": str, "format": str, "num_channels": int, "spatial_shape": list, "dtype": str, "value_range": list}

bundles = pytest.mark.parametrize("name", ["lungs", "infection"])


@cache
def series(folder: Path) -> tuple[Path, NDArray[np.generic], NDArray[np.generic]]:
    """A phantom as DICOM slices, and the lungs and the infection that a node finds in it, [z, y, x], canonical."""
    made = folder / "slices"
    made.mkdir()
    files = write_series(phantom(3001, shape=(32, 96, 96), severity=3), made, 3001)
    segmenter = Segmenter(load_bundle("lungs"), load_bundle("infection"), "cpu")
    minimum = load_bundle("infection").metadata["minimum_lesion_mm3"]
    volume, found = analyse(files, segmenter, minimum_lesion_mm3=minimum)
    canonical = Orientation.of(volume.affine).canonical
    return made, canonical(found.lungs), canonical(found.lesions > 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


def monai_run(name: str, image: Path, out: Path) -> NDArray[np.generic]:
    """The mask that `python -m monai.bundle run` writes, [z, y, x], canonical."""
    nibabel = pytest.importorskip("nibabel", reason="pip install lungnode[bundle]")
    pytest.importorskip("fire", reason="pip install lungnode[bundle]")
    bundle = BUNDLES / name
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(bundle / "configs/inference.json")]
    command += ["--bundle_root", str(bundle), "--image", str(image), "--output_dir", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.iterdir()
    mask = nibabel.load(file)
    assert mask.get_data_dtype() == np.uint8
    # To right, front and head, as NIfTI counts; canonical arrays are the other way about in x and y.
    upright = np.asarray(nibabel.as_closest_canonical(mask).dataobj)
    return upright[::-1, ::-1].transpose(2, 1, 0)


def assert_alike(found: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    different = np.count_nonzero(found != expected)
    assert np.count_nonzero(expected) > 500
    assert different <= TOLERANCE * np.count_nonzero(expected)
    assert different <= 0.001 * expected.size


def test_monai_finds_the_infection_that_a_node_finds(folder: Path) -> None:
    slices, _, expected = series(folder)
    assert_alike(monai_run("infection", slices, folder / "infection"), expected)


def test_monai_finds_the_lungs_that_a_node_finds_on_the_grid_of_the_file(folder: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="pip install lungnode[bundle]")
    _, expected, _ = series(folder)
    drawn = phantom(3001, shape=(32, 96, 96), severity=3)
    dz, dy, dx = drawn.spacing
    # Rows to the head, columns to the back, slices to the right: no axis where MONAI's or ours would have it.
    turned = drawn.hu[:, :, ::-1]
    affine = np.array([[0, 0, dx, 0], [0, -dy, 0, 0], [dz, 0, 0, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(turned), affine), folder / "turned.nii.gz")

    assert_alike(monai_run("lungs", folder / "turned.nii.gz", folder / "lungs"), expected)

    written = nibabel.load(folder / "lungs" / "turned_lungs.nii.gz")
    assert written.shape == turned.shape
    assert np.allclose(written.affine, affine)


@bundles
def test_the_configuration_is_the_one_that_is_written_and_has_what_monai_requires(name: str) -> None:
    pytest.importorskip("nibabel", reason="pip install lungnode[bundle]")
    from monai.bundle.workflows import ConfigWorkflow

    file = BUNDLES / name / "configs" / "inference.json"
    own = json.loads(file.read_text())
    assert own == inference_config(name, own["network_def"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of every configuration that it reads
        workflow = ConfigWorkflow(str(file), workflow_type="infer", logging_file=False, bundle_root=str(BUNDLES / name))
        workflow.initialize()
        assert workflow.check_properties() == []


@bundles
def test_metadata_are_as_the_schema_of_monai_has_them(name: str) -> None:
    metadata = load_bundle(name).metadata
    assert {key: type(metadata.get(key)) for key in REQUIRED} == REQUIRED
    assert {key: type(metadata.get(key)) for key in OPTIONAL} == OPTIONAL
    ends = metadata["network_data_format"]
    for tensor in (*ends["inputs"].values(), *ends["outputs"].values()):
        assert {key: type(tensor.get(key)) for key in TENSOR} == TENSOR


def test_weights_that_a_user_imports_become_a_bundle_as_complete(tmp_path: Path) -> None:
    names = (
        ("down.", "down_path.", ".block."),
        ("reduce.", "up_path.", ".up.1."),
        ("up.", "up_path.", ".conv_block.block."),
    )
    published = {}
    for name, value in UNetR231().state_dict().items():
        own, theirs, middle = next((one for one in names if name.startswith(one[0])), ("head.", "last.", ""))
        level, _, rest = name.removeprefix(own).partition(".") if middle else ("", "", name.removeprefix(own))
        published[f"{theirs}{level}{middle}{rest}"] = value
    torch.save(published, tmp_path / "unet_r231-random.pth")

    bundle = import_r231(tmp_path / "unet_r231-random.pth", tmp_path / "models")

    own = json.loads((bundle.path / "configs" / "inference.json").read_text())
    assert own == inference_config("lungs", {"_target_": "models.networks.unet_r231.UNetR231"})
    assert {key: type(bundle.metadata.get(key)) for key in REQUIRED | OPTIONAL} == REQUIRED | OPTIONAL


def test_the_packages_that_a_bundle_names_are_those_of_the_extra() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extra = [one.split("#")[0].strip() for one in project["optional-dependencies"]["bundle"]]
    assert extra == [f"{package}>={version}" for package, version in REQUIRED_PACKAGES.items()]
    for name in ("lungs", "infection"):
        assert load_bundle(name).metadata["required_packages_version"].items() >= REQUIRED_PACKAGES.items()


def test_the_node_builds_the_network_alone() -> None:
    """What MONAI would evaluate, the builder refuses as soon as it stands where a network stands."""
    own: dict[str, Any] = inference_config("lungs", {"_target_": "models.networks.unet_r231.UNetR231"})
    for key in ("network", "inferer", "preprocessing", "evaluator"):
        with pytest.raises(BundleError, match="network_def"):
            build(own[key] if isinstance(own[key], dict) else {"_target_": own[key]}, "meta")
