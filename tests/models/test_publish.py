"""A bundle is written whole: weights, digest, threshold, calibration, and a card that says what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.build import build
from models.calibration import LesionCalibration
from models.configuration import inference_config, schema_metadata
from models.registry import load_bundle
from models.training.crossvalidate import read_out_of_fold
from models.training.datasets import phantoms
from models.training.publish import Material, publish
from models.training.train import PLANS

NETWORK = {
    "_target_": "models.networks.xception_unet.XceptionUNet",
    "in_channels": 3,
    "out_channels": 1,
    "features": [4, 4, 4, 4, 4],
    "middle_blocks": 1,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    plan = replace(PLANS["infection"], network=NETWORK, context=1, shares={"covid-seg-20": 0.5, "phantom": 0.5})
    torch.manual_seed(0)
    save_file(build(NETWORK).state_dict(), folder / "trained.safetensors")
    drawn = phantoms([2, 3, 5], slices=8)
    real = [replace(one, id=f"real_{one.id}", source="covid-seg-20", licence="CC BY-NC-SA 4.0") for one in drawn]
    outside = [replace(real[0], id="outside", source="medseg-9")]
    # Networks that find what is dense in the lungs: some of it infection, some not.
    dense = [(one, np.where(one.hu > -500, 0.95, 0.0) * (one.lungs > 0)) for one in real]
    return publish(
        "infection",
        folder / "trained.safetensors",
        "9.9.9",
        Material(drawn, [*real, *outside, *drawn], dense),
        limits=["Misses what is small."],
        notes="## Whole series\n\nTried on one.",
        plan=plan,
        floor=0.05,
        folder=folder / "bundle",
    )


def test_the_bundle_loads_and_says_what_it_needs(published: Path) -> None:
    bundle = load_bundle(published)
    assert (bundle.name, bundle.version) == ("infection", "9.9.9")
    assert bundle.metadata["context"] == 1
    assert 0 < bundle.metadata["threshold"] < 1
    assert bundle.metadata["license"].startswith("CC BY-NC-SA 4.0")
    calibration = LesionCalibration.of(bundle.metadata)
    assert calibration is not None
    assert calibration.floor == 0.05
    of_folds = {one["measure"]: one for one in bundle.metadata["cross_validation"]}
    assert 0.1 < of_folds["Dice infection"]["mean"] < 1
    assert of_folds["Dice infection"]["patients"] == 2
    assert {one["source"] for one in bundle.metadata["held_out"]} == {"covid-seg-20", "medseg-9", "phantom"}
    assert bundle.load()(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 32, 32)
    running = json.loads((published / "configs" / "inference.json").read_text())
    assert running == inference_config("infection", NETWORK)
    assert bundle.metadata.keys() > schema_metadata("").keys()
    assert "Ma et al. 2020" in bundle.metadata["data_source"]


def test_the_card_says_it_all_and_shows_phantoms_alone(published: Path) -> None:
    card = (published / "docs" / "README.md").read_text()
    parts = dict(part.split("\n", 1) for part in card.split("\n## ")[1:])
    assert "not for diagnosis" in card
    assert "| medseg-9 | Dice infection" in parts["Outside test"]
    assert "medseg-9" not in parts["Held-out figures"]
    assert "| covid-seg-20 | Dice infection | 0." in parts["Cross-validation"]
    assert "each with 1 neighbours on either side" in card
    assert "| calibrated |" in parts["Probability of a lesion"]
    assert "Misses what is small." in parts["Known limits"]
    assert "Tried on one." in parts["Whole series"]
    for picture in ("cases.png", "reliability.png"):
        assert picture in card
        assert (published / "docs" / picture).stat().st_size < 400_000


def test_probabilities_out_of_fold_are_those_of_known_patients(tmp_path: Path) -> None:
    (patient,) = phantoms([2], slices=8)
    chance = np.full(patient.hu.shape, 0.25, np.float16)
    np.savez(tmp_path / "fold-0.npz", **{patient.id: chance})
    ((found, read),) = read_out_of_fold([tmp_path / "fold-0.npz"], [patient])
    assert found is patient
    assert np.array_equal(read, chance)
    np.savez(tmp_path / "fold-1.npz", **{patient.id: chance[:4]})
    with pytest.raises(ValueError, match=r"fold-1\.npz: phantom_2_None"):
        read_out_of_fold([tmp_path / "fold-1.npz"], [patient])
