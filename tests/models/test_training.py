"""Sampling keeps image and mask together, training goes on where it stopped, figures are what they say."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from models.networks.efficientnet_unet import EfficientNetUNet
from models.registry import IR, load_bundle
from models.runtime import _openvino
from models.training import datasets, evaluate, train
from models.training.datasets import Patient, phantoms, stack
from models.training.sampling import Slices
from models.training.shipped import shipped_cases
from node.cli.main import app


@pytest.fixture(scope="module")
def patients() -> Sequence[Patient]:
    return phantoms([2, 3, 5], slices=8)


#: A network of no depth, to see that training goes on, not how well.
SMALL = train.Plan(
    {"_target_": "models.networks.xception_unet.XceptionUNet", "in_channels": 3, "out_channels": 1}
    | {"features": [4, 4, 8, 8, 8], "middle_blocks": 1},
    crop=64,
    batch=2,
    learning_rate=1e-3,
    shares={"phantom": 1.0},
    context=1,
)


def test_flips_and_poses_keep_the_sides_true(patients: Sequence[Patient]) -> None:
    dark = []
    for image, target in islice(Slices("lungs", patients, {"phantom": 1.0}, 256, 3), 40):
        assert image.shape == target.shape == (1, 256, 256)
        assert -1 <= image.min() <= image.max() <= 1
        assert set(np.unique(target)) <= {0, 1, 2}
        columns = torch.arange(256).expand(1, 256, 256)
        if (target == 1).sum() > 500 and (target == 2).sum() > 500:
            assert columns[target == 1].float().mean() < columns[target == 2].float().mean()
            lungs, rest = image[target > 0].median(), image[:, 60:200, 60:200][target[:, 60:200, 60:200] == 0].mean()
            dark.append(bool(lungs < rest))
    assert np.mean(dark) > 0.75, "the mask must lie on what is dark, but where a lung was drawn without air"


def test_a_patient_without_a_mask_is_refused(patients: Sequence[Patient]) -> None:
    bare = Patient("bare", "phantom", "own", patients[0].hu, None, patients[0].infection)
    with pytest.raises(ValueError, match="bare has no mask of lungs"):
        next(iter(Slices("lungs", [bare], {"phantom": 1.0}, 64, 0)))


def test_training_learns_stops_and_goes_on(patients: Sequence[Patient], tmp_path: Path) -> None:
    weights = train.fit("infection", patients, tmp_path, seed=1, minutes=0.03, plan=SMALL)
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert first["step"] > 0
    before = load_file(weights)
    train.fit("infection", patients, tmp_path, seed=1, steps=first["step"] + 10, plan=SMALL)
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert second["step"] == first["step"] + 10
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] > first["step"]
    assert all(0 < point["loss"] < 3 for point in curve)
    after = load_file(weights)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_neighbours_come_with_a_slice_in_order(patients: Sequence[Patient]) -> None:
    patient = replace(patients[0], slab=2)
    seen = stack(patient, 3, 1)
    assert np.array_equal(seen, patient.hu[[1, 3, 5]])
    assert np.array_equal(stack(patient, 0, 1), patient.hu[[0, 0, 2]])
    assert np.array_equal(stack(patient, len(patient.hu) - 1, 2, 1), patient.hu[[-3, -2, -1, -1, -1]])
    for image, target in islice(Slices("infection", [patient], {"phantom": 1.0}, 128, 3, 1), 20):
        assert image.shape == (3, 128, 128)
        assert target.shape == (1, 128, 128)


def test_imagenet_weights_fit_the_encoder() -> None:
    network = EfficientNetUNet(1, 1)
    before = network.blocks[3].depthwise[0].weight.clone()
    train.begin_with_imagenet(network)
    assert not torch.equal(before, network.blocks[3].depthwise[0].weight)
    with pytest.raises(ValueError, match="do not fit"):
        network.load_imagenet({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)})


# The commands


def lines(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    assert result.exit_code == exit_code, result.output
    return result.stdout


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of public data that holds none; what is learnt from and measured on are a few small phantoms."""
    (tmp_path / "data" / "slices").mkdir(parents=True)
    lungs = replace(SMALL, network=SMALL.network | {"in_channels": 1, "out_channels": 3}, context=0)
    monkeypatch.setitem(train.PLANS, "lungs", lungs)
    monkeypatch.setattr(train, "patients_of", lambda task, folder: [])
    monkeypatch.setattr(evaluate, "patients_of", lambda task, folder: [])
    monkeypatch.setattr(train, "TRAINING_PHANTOMS", range(1000, 1001))
    monkeypatch.setattr(train, "CHANGED_PHANTOMS", range(1100, 1101))
    monkeypatch.setattr(evaluate, "VALIDATION_PHANTOMS", range(0))
    monkeypatch.setattr(evaluate, "TEST_PHANTOMS", range(3000, 3002))
    monkeypatch.setattr(evaluate, "TEST_CHANGED", range(0))
    # As thin as they may be, and drawn once for all commands of a test.
    monkeypatch.setattr(datasets, "phantoms", cache(lambda seeds, **_: phantoms(seeds, slices=8)))
    return tmp_path / "data"


def test_train_writes_weights_and_a_curve_and_goes_on(data: Path, tmp_path: Path) -> None:
    command = ("train", "lungs", "--data", str(data), "--out", str(tmp_path / "run"))

    told = lines(*command, "--steps", "3")
    assert f"weights: {tmp_path / 'run' / 'model.safetensors'}" in told
    assert f"curve: {tmp_path / 'run' / 'curve.png'}" in told
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines(*command, "--steps", "5")
    lines(*command, "--steps", "5")

    curve = [json.loads(line)["step"] for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert curve == [3, 5]


def test_train_and_evaluate_say_what_they_lack(data: Path, tmp_path: Path) -> None:
    lines("train", "lungs", "--data", str(data), exit_code=1)
    lines("train", "lungs", "--data", str(data), "--steps", "3", "--minutes", "1", exit_code=1)
    lines("train", "lungs", "--data", str(tmp_path / "elsewhere"), "--steps", "3", exit_code=1)
    lines("evaluate", "lungs", "--data", str(data), "--bundle", "nobodys", exit_code=1)


def test_evaluate_measures_what_a_node_runs(data: Path, tmp_path: Path) -> None:
    """A model whose OpenVINO IR computes something else than its weights: a CPU runs the IR."""
    shipped = load_bundle("lungs")
    copy = tmp_path / "copy"
    shutil.copytree(shipped.path, copy, copy_function=shutil.copyfile)
    openvino = _openvino()
    opset = openvino.opset13
    xml, weights = (copy / part for part in IR)
    model = openvino.Core().read_model(shipped.path / IR[0])
    logits = model.outputs[0].get_node().input_value(0)
    wrong = openvino.Model([opset.negative(logits)], model.get_parameters())
    openvino.save_model(wrong, xml)
    record = shipped.metadata["openvino"] | {
        part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in (xml, weights)
    }
    metadata = json.dumps(shipped.metadata | {"openvino": record})
    (copy / "configs" / "metadata.json").write_text(metadata)
    command = ("evaluate", "lungs", "--data", str(data), "--pictures", str(tmp_path / "seen"), "--json")

    def dice(*more: str) -> float:
        figures = json.loads(lines(*command, "--bundle", str(copy), *more))["figures"]
        return {one["measure"]: one["mean"] for one in figures}["Dice lungs"]

    assert dice() < 0.5
    assert dice("--reference") > 0.9


def test_evaluate_measures_infection_in_the_lungs_that_are_found() -> None:
    (drawn,) = phantoms([5], slices=12)
    empty = replace(drawn, id="no lungs", hu=np.full_like(drawn.hu, 40))
    ill, none = shipped_cases("infection", load_bundle("infection"), [drawn, empty], "cpu")
    assert drawn.infection is not None
    assert 0 < (ill.found > 0).sum() < 3 * drawn.infection.sum()
    assert not none.found.any()


def test_evaluate_tells_figures_and_draws_cases(data: Path, tmp_path: Path) -> None:
    command = ("evaluate", "lungs", "--data", str(data), "--pictures", str(tmp_path / "seen"))

    told = json.loads(lines(*command, "--json"))
    assert told["model"]["name"] == "lungs"
    figures = {(one["source"], one["measure"]): one for one in told["figures"]}
    dice = figures["phantom", "Dice lungs"]
    assert 0.9 < dice["low"] <= dice["mean"] <= dice["high"] <= 1
    assert dice["patients"] == 2
    assert (tmp_path / "seen" / "lungs-phantom.png").read_bytes().startswith(b"\x89PNG")

    table = lines(*command)
    assert f"{dice['mean']:.3f}" in table
    assert "95 % interval" in table
