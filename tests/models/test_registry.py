"""Bundles: what is loaded is what was recorded, and nothing in a bundle runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from models.registry import BUNDLES, WEIGHTS, BundleError, ModelIdentity, list_bundles, load_bundle


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLES / "lungs", tmp_path / "lungs"))


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_both_models_are_installed() -> None:
    assert {"lungs", "infection"} <= set(list_bundles())


@pytest.mark.parametrize("name", ["lungs", "infection"])
def test_a_bundle_is_complete(name: str) -> None:
    bundle = load_bundle(name)
    assert bundle.identity == ModelIdentity(name, bundle.version, bundle.sha256)
    assert hashlib.sha256((bundle.path / WEIGHTS).read_bytes()).hexdigest() == bundle.sha256
    assert (bundle.path / WEIGHTS).stat().st_size < 10_000_000
    card = (bundle.path / "docs" / "README.md").read_text()
    assert "not for diagnosis" in card
    assert "95 % interval" in card
    assert bundle.metadata["data_source"]
    assert bundle.metadata["held_out"]


@pytest.mark.parametrize("name", ["lungs", "infection"])
def test_the_network_is_ready_to_infer(name: str) -> None:
    bundle = load_bundle(name)
    network = bundle.load()
    assert not network.training
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    with torch.inference_mode():
        out = network(torch.zeros(1, 2 * bundle.metadata.get("context", 0) + 1, 64, 96))
    assert out.shape == (1, len(bundle.metadata["network_data_format"]["outputs"]["pred"]["channel_def"]), 64, 96)


def test_a_path_is_as_good_as_a_name(copy: Path) -> None:
    assert load_bundle(copy).identity == load_bundle("lungs").identity


def test_changed_weights_are_refused(copy: Path) -> None:
    good = load_bundle(copy)
    weights = bytearray((copy / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (copy / WEIGHTS).write_bytes(weights)
    with pytest.raises(BundleError) as caught:
        load_bundle(copy)
    for part in (str(copy / WEIGHTS), good.sha256, hashlib.sha256(weights).hexdigest()):
        assert part in str(caught.value)
    with pytest.raises(BundleError, match="sha256"):
        good.load()


def test_missing_weights_and_unknown_names(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(copy)
    with pytest.raises(BundleError, match=r"no bundle 'kidneys'.*installed: .*lungs"):
        load_bundle("kidneys")


def test_metadata_without_a_digest(copy: Path) -> None:
    file = copy / "configs" / "metadata.json"
    file.write_text('{"name": "lungs", "version": "1"}')
    with pytest.raises(BundleError, match="'sha256' is missing"):
        load_bundle(copy)
    file.write_text("{")
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        load_bundle(copy)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a": ' + "[" * 40 + "]" * 40 + "}",
        '{"a": ' * 40 + "1" + "}" * 40,
        '{"a": "' + "x" * 1_100_000 + '"}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 4000 + "}",
        '{"a": ' + "9" * 5000 + "}",
        '{"a": "\\ud800"}, 1',
        "[]",
        "1",
        '{"\xff": 1}',
    ],
)
@pytest.mark.parametrize("file", ["metadata.json", "inference.json"])
def test_json_that_breaks_readers_is_refused_in_words(copy: Path, file: str, text: str) -> None:
    (copy / "configs" / file).write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=file.replace(".", r"\.")):
        load_bundle(copy).load()


@pytest.mark.parametrize("key", ["name", "version", "sha256"])
@pytest.mark.parametrize("value", ["\x1b[2Jx", "[red]x[/]", "a/b", "..", "", "x" * 100, 1, None, ["x"], "Ä", "x\n"])
def test_names_that_stand_on_terminals_and_in_objects_are_plain(copy: Path, key: str, value: object) -> None:
    rewrite(copy / "configs" / "metadata.json", **{key: value})
    with pytest.raises(BundleError, match=f"a model's {key} is") as caught:
        load_bundle(copy)
    assert str(caught.value).isprintable()


def test_header_of_weights_is_bounded(copy: Path) -> None:
    (copy / WEIGHTS).write_bytes((90_000_000).to_bytes(8, "little") + b"{}")
    rewrite(copy / "configs" / "metadata.json", sha256=hashlib.sha256((copy / WEIGHTS).read_bytes()).hexdigest())
    with pytest.raises(BundleError, match="header is larger than"):
        load_bundle(copy).load()


def test_weights_of_another_network(copy: Path) -> None:
    definition = json.loads((copy / "configs" / "inference.json").read_text())["network_def"]
    rewrite(copy / "configs" / "inference.json", network_def=definition | {"middle_blocks": 1})
    with pytest.raises(BundleError, match="does not fit the network"):
        load_bundle(copy).load()
