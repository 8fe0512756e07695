"""What networks run on: it agrees with torch in float32, and does without what is missing, aloud."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models import runtime
from models.phantom.draw import phantom
from models.registry import BUNDLES, Bundle, BundleError, list_bundles, load_bundle
from models.runtime import IR, CardMemoryError, NoIRError, OpenVinoRuntime, TorchRuntime, export, open_runtime
from models.segmenter import inference
from models.segmenter.inference import Segmentation, Segmenter
from models.training.sampling import normalise
from node.images.volume import read_volume

NAMES = ["lungs", "infection"]


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float(2 * (found & truth).sum() / max(found.sum() + truth.sum(), 1))


def in_float32(bundle: Bundle, _device: str | None = None) -> TorchRuntime:
    plain = TorchRuntime(bundle, "cpu")
    plain._type = None
    return plain


def fast_and_exact(
    monkeypatch: pytest.MonkeyPatch, hu: NDArray[np.int16], spacing: tuple[float, float, float]
) -> tuple[Segmentation, Segmentation]:
    """What this machine's runtime says, and what torch says in float32."""

    def segmented() -> Segmentation:
        return Segmenter(load_bundle("lungs"), load_bundle("infection"), "cpu")(hu, spacing)

    fast = segmented()
    monkeypatch.setattr(inference, "open_runtime", in_float32)
    exact = segmented()
    for side in (1, 2):
        assert dice(fast.lungs == side, exact.lungs == side) > 0.998
    return fast, exact


def test_scores_as_torch_does_in_float32_on_a_phantom(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = phantom(3001, shape=(24, 128, 128), severity=3)
    fast, exact = fast_and_exact(monkeypatch, drawn.hu, drawn.spacing)
    infected, expected = (one.probability >= one.threshold for one in (fast, exact))
    assert dice(infected, drawn.infection) == pytest.approx(dice(expected, drawn.infection), abs=0.002)
    assert dice(infected, expected) > 0.99


@pytest.mark.data
def test_agrees_with_torch_in_float32_on_a_patient(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    volume = read_volume(sorted((data_dir / "ct-series/covid-ct-md/P001").glob("*.dcm")))
    # Every sixth slice: float32 is slow.
    hu, spacing = np.ascontiguousarray(volume.hu[::6]), (6 * volume.spacing[0], *volume.spacing[1:])
    infected, expected = (one.probability >= one.threshold for one in fast_and_exact(monkeypatch, hu, spacing))
    assert expected.any()
    assert dice(infected, expected) > 0.998
    assert infected.sum() == pytest.approx(expected.sum(), rel=0.005)


@pytest.mark.parametrize("name", list_bundles())
def test_bundles_come_with_the_ir_of_their_weights(name: str) -> None:
    assert isinstance(open_runtime(load_bundle(name), "cpu"), OpenVinoRuntime)


@pytest.mark.parametrize("kind", [open_runtime, in_float32])
def test_results_keep_their_order_and_shape(kind: type[TorchRuntime]) -> None:
    opened = kind(load_bundle("lungs"), "cpu")
    rng = np.random.default_rng(0)
    for side in (32, 48):
        slabs = rng.uniform(-1, 1, (11, 1, side, 32)).astype(np.float32)
        together = list(opened.run(iter(slabs)))
        assert [logits.shape for logits in together] == [(3, side, 32)] * 11
        alone = next(opened.run([slabs[7]]))
        np.testing.assert_allclose(together[7], alone, atol=1e-4)
    assert list(opened.run([])) == []


def test_neither_torch_nor_telemetry_is_loaded_for_openvino() -> None:
    script = (
        "import sys; from models.segmenter.inference import Segmenter; from models.registry import load_bundle;"
        "Segmenter(load_bundle('lungs'), load_bundle('infection'), 'cpu');"
        "print(sorted({'torch', 'monai', 'openvino'} & set(sys.modules)), sys.modules['openvino_telemetry'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("['openvino'] None\n", "")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(copytree(BUNDLES / "lungs", tmp_path / "lungs"))


def rewrite(folder: Path, **changes: object) -> None:
    file = folder / "configs" / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("file", IR, ids=str)
def test_a_changed_ir_is_refused(copy: Path, file: Path) -> None:
    (copy / file).write_bytes((copy / file).read_bytes() + b"\n")
    with pytest.raises(BundleError, match=r"model\.(xml|bin): sha256 is \w+, metadata\.json says \w+; restore it"):
        open_runtime(load_bundle(copy), "cpu")
    (copy / file).unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        open_runtime(load_bundle(copy), "cpu")


def falls_back(bundle: Bundle, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_runtime(bundle, "cpu"), TorchRuntime)
    assert reason in caplog.text


def test_torch_stands_in_without_ir(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(copy, openvino=None)
    falls_back(load_bundle(copy), caplog, "comes without OpenVINO IR")


def test_torch_stands_in_for_the_ir_of_other_weights(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(copy, openvino=load_bundle(copy).metadata["openvino"] | {"weights": "00"})
    falls_back(load_bundle(copy), caplog, "made of other weights")


def test_torch_stands_in_for_a_missing_openvino(
    copy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    falls_back(load_bundle(copy), caplog, "OpenVINO cannot be imported")


def test_export_makes_what_is_shipped(tmp_path: Path) -> None:
    copy = Path(copytree(BUNDLES / "infection", tmp_path / "infection"))
    for file in IR:
        (copy / file).unlink()
    rewrite(copy, openvino=None)
    export(copy)
    slab = np.random.default_rng(0).uniform(-1, 1, (3, 64, 96)).astype(np.float32)
    (made,), (shipped,) = (open_runtime(load_bundle(b), "cpu").run([slab]) for b in (copy, "infection"))
    np.testing.assert_allclose(made, shipped, atol=1e-3)


class Echo:
    """Gives back what it is given, and keeps it."""

    description = "echo"

    def __init__(self, *_: object) -> None:
        self.seen: list[NDArray[np.float32]] = []

    def run(self, slabs: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        for slab in slabs:
            self.seen.append(slab)
            yield slab


def test_context_is_the_slabs_below_and_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "open_runtime", Echo)
    bundle = load_bundle("infection")
    metadata = bundle.metadata | {"context": 2, "stride": 8, "hu_range": [0, 100]}
    network = inference._Network(Bundle("x", "1", "00", metadata, bundle.path), None)
    image = np.broadcast_to(np.arange(0, 60, 10, dtype=np.float32)[:, None, None], (6, 9, 20))
    (*out,) = network.run(image, range(1, 6), (slice(2, 9), slice(3, 8)))
    assert [slab.shape for slab in out] == [(5, 7, 5)] * 5
    # From inferior to superior, also outside the box; beyond the scan its last slab again.
    hu = [[round(float(channel[0, 0]) * 50 + 50) for channel in slab] for slab in out]
    assert hu == [
        [0, 0, 10, 20, 30],
        [0, 10, 20, 30, 40],
        [10, 20, 30, 40, 50],
        [20, 30, 40, 50, 50],
        [30, 40, 50, 50, 50],
    ]
    seen = network._runtime.seen[0]  # type: ignore[attr-defined]
    assert seen.shape == (5, 8, 8)
    assert (seen[:, 7:] == -1).all()
    assert (seen[:, :, 5:] == -1).all()


def test_networks_of_different_pixels_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The infection network says yes everywhere; what it says is brought to the lungs and no further."""

    class Yes(Echo):
        def run(self, slabs: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
            for slab in slabs:
                yield np.full_like(slab, 9.0)

    plain = runtime.open_runtime
    monkeypatch.setattr(inference, "open_runtime", lambda b, d: Yes() if b.name == "infection" else plain(b, d))
    lungs, infection = load_bundle("lungs"), load_bundle("infection")
    drawn = phantom(3001, shape=(40, 160, 160), severity=0)
    masks = []
    for pixel_mm in (1.5, 1.1, 2.6):
        other = Bundle(infection.name, "1", "00", infection.metadata | {"pixel_mm": pixel_mm}, infection.path)
        found = Segmenter(lungs, other, "cpu")(drawn.hu, drawn.spacing)
        assert not found.probability[found.lungs == 0].any()
        masks.append(found.probability >= found.threshold)
        assert dice(masks[-1], found.lungs > 0) > 0.97
    assert dice(masks[0], masks[1]) > 0.98


@pytest.mark.parametrize("fits", [1, 3, 8])
def test_batch_that_is_too_much_for_the_memory_goes_through_in_parts(fits: int) -> None:
    runtime = TorchRuntime(load_bundle("lungs"), "cpu")
    channels = int(load_bundle("lungs").metadata["network_data_format"]["inputs"]["image"]["num_channels"])
    slabs = [np.full((channels, 64, 64), value, np.float32) for value in np.linspace(-1, 1, 11)]
    whole = list(runtime.run(slabs))
    network = runtime._module

    def small(images: torch.Tensor) -> torch.Tensor:
        if len(images) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(images)

    runtime._module = small
    parts = list(runtime.run(slabs))
    assert len(parts) == len(slabs)
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=0.1)
    fits = 0
    with pytest.raises(CardMemoryError, match="even for one slab"):
        list(runtime.run(slabs))


def test_quantised_by_examples_it_agrees_with_itself(copy: Path) -> None:
    drawn = phantom(3004, shape=(8, 128, 128), severity=2)
    images = normalise(drawn.hu)[:, None, None]
    export(copy, list(images[::2]))
    bundle = load_bundle(copy)
    assert bundle.metadata["openvino"]["int8"] is True
    opened = open_runtime(bundle, "cpu")
    assert "int8" in opened.description
    fast, exact = (np.stack(list(one.run(images[1::2, 0]))) for one in (opened, in_float32(bundle)))
    assert np.abs(fast - exact).max() > 1e-3
    assert dice(fast.argmax(1) > 0, exact.argmax(1) > 0) > 0.95


def test_a_network_that_changes_with_the_size_of_its_input_stays_on_torch(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deep(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image * float(image.shape[2])

    monkeypatch.setattr(Bundle, "load", lambda *_: Deep())
    with pytest.raises(NoIRError, match="something else than torch"):
        export(copy)
