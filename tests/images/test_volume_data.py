"""Reading real series and real files from other makers' archives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from node.images.volume import VolumeError, read_volume

pytestmark = pytest.mark.data


@pytest.fixture
def zoo(data_dir: Path) -> Path:
    return data_dir / "dicom-zoo"


def test_p001_agrees_with_simpleitk_voxel_for_voxel(data_dir):
    volume = read_volume(sorted((data_dir / "ct-series/covid-ct-md/P001").glob("*.dcm")))
    assert volume.hu.shape == (148, 512, 512)
    assert volume.spacing == pytest.approx((2.0, 0.748046875, 0.748046875))
    assert volume.hu.min() == -1024
    assert 1000 < volume.hu.max() < 3072

    # SimpleITK sorts by its own rule, along the same normal.
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(volume.sources[0].path.parent)))
    other = reader.Execute()
    assert (SimpleITK.GetArrayViewFromImage(other) == volume.hu).all()
    for index in ((0, 0, 0), (511, 0, 0), (0, 511, 147), (100, 200, 50)):
        point = other.TransformIndexToPhysicalPoint(index)
        assert (volume.affine @ (*index, 1))[:3] == pytest.approx(point, abs=1e-3)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("gantrytilting", "gantry tilt of 14.0°"),
        ("sliceincrement", "gap at z = 28.11 mm: 10.00 mm between slices, expected 5.00"),
        ("sliceorientation", "MR Image Storage is not a CT image"),
        ("slicecount", "MR Image Storage is not a CT image"),
        ("notavolume", "single slice without Slice Thickness"),
    ],
)
def test_series_that_are_no_volume_are_refused(zoo, folder, message):
    paths = list((zoo / "icometrix+dicom2nifti/tests/data/failing" / folder / "001").glob("*.dcm"))
    assert paths
    with pytest.raises(VolumeError, match=message):
        read_volume(paths)


#: Transfer syntax in the file name → most and mean difference in HU, between -1024 and 3000, that its loss makes.
#: The 8-bit and 12-bit JPEG files were written with slopes of 32 and 2, and quantised besides.
SYNTAXES = {
    "DeflatedExplicitVRLittleEndian": (0, 0),
    "JPEGLSLossless": (0, 0),
    "JPEG2000LosslessOnly": (0, 0),
    "JPEGProcess14SV1": (0, 0),
    "JPEGProcess14": (0, 0),
    "RLELossless": (0, 0),
    "JPEGLSLossy": (1, 1),
    "JPEG2000": (5, 1),
    "JPEGProcess2_4": (36, 4),
    "JPEGProcess6_8": (36, 4),
    "JPEGProcess10_12": (36, 4),
    "JPEGProcess1": (502, 19),
}


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_twelve_transfer_syntaxes_of_one_slice_agree(zoo, syntax):
    folder = zoo / "cornerstonejs+cornerstoneWADOImageLoader/examples/test-images"

    def read(name: str) -> np.ndarray:
        volume = read_volume(list(folder.glob(f"CTImage.dcm_{name}TransferSyntax*")))
        return np.clip(volume.hu[0].astype(int), -1024, 3000)

    difference = np.abs(read(syntax) - read("RLELossless"))
    most, mean = SYNTAXES[syntax]
    assert difference.max() <= most
    assert difference.mean() <= mean


def test_enhanced_multi_frame_syntaxes_agree(zoo):
    folder = zoo / "cornerstonejs+dicomParser/testImages/encapsulated/multi-frame"
    volumes = {
        name: read_volume([folder / f"CT0012.{name}.dcm"])
        for name in (
            "not_fragmented_no_bot_rle",
            "not_fragmented_no_bot_jpeg_ls.80",
            "fragmented_no_bot_jpeg_lossless.70",
            "fragmented_no_bot_jpeg_lossless.57",
        )
    }
    first = volumes["not_fragmented_no_bot_rle"]
    assert first.hu.shape == (2, 512, 512)
    assert first.spacing == pytest.approx((10, 0.388672, 0.388672))
    # Row cosines point to the right, so the normal points to the feet: the upper frame comes first.
    assert [(s.frame, s.position[2]) for s in first.sources] == [(2, -149.0), (1, -159.0)]
    for volume in volumes.values():
        assert (volume.hu == first.hu).all()


def test_legacy_converted_enhanced_agrees_with_simpleitk(zoo):
    path = zoo / "QIICR+dcmqi/data/segmentations/23x38x3/multiframe/mf.dcm"
    volume = read_volume([path])
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.7))
    assert [source.position[2] for source in volume.sources] == [-177.75, -175.25, -172.75]
    frames = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
    for k, source in enumerate(volume.sources):
        assert source.frame is not None
        # All three frames of this file are alike, so the order is checked by position above.
        assert (volume.hu[k] == frames[source.frame - 1]).all()


@pytest.mark.parametrize(("view", "step"), [("axial", (0, 0, 1)), ("coronal", (0, 1, 0)), ("sagittal", (-1, 0, 0))])
def test_reformats_of_one_patient_have_their_own_normals(zoo, view, step):
    path = zoo / "SaltyJoke+Image-Registration/data-sample/A098752" / view
    for file in path.glob("19001231-*.dcm"):
        volume = read_volume([file])
        assert volume.affine[:3, 2] / volume.spacing[0] == pytest.approx(step, abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # pydicom warns of what is wrong with these files; here they must get past it
def test_files_of_every_other_kind_are_read_or_refused(zoo):
    """Each file by itself: a volume or a `VolumeError`, nothing else."""
    read, refusals = [], []
    for path in sorted(zoo.glob("pydicom+pydicom/src/pydicom/data/test_files/*.dcm")):
        try:
            read_volume([path])
            read.append(path.name)
        except VolumeError as error:
            refusals.append(str(error))
    assert "CT_small.dcm" in read
    assert len(refusals) > 50
    assert not [refusal for refusal in refusals if str(zoo) in refusal]
