"""The network builder: definitions from elsewhere make a network of the table, or nothing happens at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import build as building
from models.build import NETWORKS, build, network_class
from models.registry import BUNDLES, BundleError, load_bundle

XCEPTION = "models.networks.xception_unet.XceptionUNet"
REAL = {"_target_": XCEPTION, "in_channels": 1, "out_channels": 3, "features": [8, 8, 8, 8, 8], "middle_blocks": 1}
EVIL = {"_target_": "models.networks.unet_r231.torch.os.system", "command": "true"}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ATTACKS: dict[str, Any] = {
    "attribute path": EVIL,
    "attribute path through MONAI": {"_target_": "monai.networks.nets.unet.torch.load", "f": "x"},
    "function of a trusted module": {"_target_": "models.networks.unet_r231.body_box", "hu": 1},
    "imported class of a trusted module": {"_target_": "models.networks.unet_r231.nn.Linear", "in_features": 1},
    "module": {"_target_": "models.networks.unet_r231"},
    "private class": {"_target_": "models.networks.xception_unet._Residual", "inputs": 1, "outputs": 1},
    "function that makes a network": {"_target_": "monai.networks.nets.resnet18"},
    "class outside the table": {"_target_": "monai.networks.nets.EfficientNetBN", "model_name": "efficientnet-b0"},
    "attribute of a class": {"_target_": f"{XCEPTION}.load_state_dict"},
    "builtin": {"_target_": "builtins.eval", "source": "1"},
    "path": {"_target_": "../networks/xception_unet.XceptionUNet"},
    "no target": {"in_channels": 1},
    "empty": {},
    "text": "models.networks",
    "list": [REAL],
    "null": None,
    "target of another type": REAL | {"_target_": 1},
    "target as a list": REAL | {"_target_": [XCEPTION]},
    "target as an object": REAL | {"_target_": REAL},
    "target as an expression": REAL | {"_target_": "$__import__('os').system"},
    "requires": REAL | {"_requires_": EVIL},
    "requires, as text": REAL | {"_requires_": "$1"},
    "mode": REAL | {"_mode_": "callable"},
    "debug mode": REAL | {"_mode_": "debug"},
    "disabled": REAL | {"_disabled_": True},
    "description": REAL | {"_desc_": "x"},
    "nested target": REAL | {"features": {"_target_": "os.system", "command": "true"}},
    "nested trusted target": REAL | {"features": REAL},
    "nested target in a list": REAL | {"features": [8, 8, EVIL, 8, 8]},
    "object": REAL | {"features": {}},
    "expression": REAL | {"in_channels": "$__import__('os').getpid()"},
    "expression in a list": REAL | {"features": [8, 8, "$8", 8, 8]},
    "reference": REAL | {"in_channels": "@network_def"},
    "macro": REAL | {"in_channels": "%metadata.json"},
    "expression as a key": REAL | {"$import os": 1},
    "reference as a key": REAL | {"@x": 1},
    "dotted key": REAL | {"in_channels.x": 1},
    "unknown keyword": REAL | {"colour": 1},
    "dunder": REAL | {"__class__": 1},
    "missing keyword": {"_target_": XCEPTION},
    "wrong type": REAL | {"features": "wide"},
    "huge number": REAL | {"middle_blocks": 10**9},
    "huge width": REAL | {"features": [10**9] * 5},
    "number with many digits": REAL | {"middle_blocks": 10**4000},
    "infinity": REAL | {"middle_blocks": float("inf")},
    "not a number": REAL | {"middle_blocks": float("nan")},
    "negative": REAL | {"middle_blocks": -(10**9)},
    "many weights of small numbers": REAL | {"features": [4096] * 5, "middle_blocks": 4096},
    "many modules of small numbers": REAL | {"features": [1, 1, 1, 2, 2], "middle_blocks": 4096},
    "long list": REAL | {"features": [8] * 100_000},
    "long text": REAL | {"features": "x" * 100_000},
    "deep list": REAL | {"features": nested(900)},
    "many arguments": REAL | {f"a{n}": 1 for n in range(100_000)},
    "weights from the network": {
        "_target_": "DenseNet121",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 1,
        "pretrained": True,
    },
}

#: What a network's construction has no business with.
FORBIDDEN = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "shutil.")
#: What networks are made of may import more of itself.
LIBRARIES = ("torch", "safetensors", "monai.networks", "models.networks")
seen: list[str] | None = None


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if seen is None:
        return
    if event.startswith(FORBIDDEN) or event in ("os.remove", "os.rename", "os.mkdir", "pickle.find_class"):
        seen.append(event)
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append(f"open to write {arguments[0]}")
    elif event == "import" and arguments[0] not in sys.modules and not arguments[0].startswith(LIBRARIES):
        seen.append(f"import {arguments[0]}")


sys.addaudithook(hook)


@contextmanager
def nothing_else_happens() -> Iterator[None]:
    """No command, connection, written file or first import; the audit hook (PEP 578) sees C code too."""
    global seen
    for target in NETWORKS:  # the table's own modules, so that what is imported later is something else
        network_class({"_target_": target})
    seen = []
    try:
        yield
        assert seen == []
    finally:
        seen = None


def test_the_hook_sees_what_it_is_for() -> None:
    global seen
    seen = []
    __import__("os").system("true")
    found, seen = seen, None
    assert found == ["os.system"]


@pytest.mark.parametrize("definition", ATTACKS.values(), ids=ATTACKS)
def test_attack_is_refused_and_nothing_is_run(definition: Any) -> None:
    with nothing_else_happens(), pytest.raises(BundleError, match="network_def") as caught:
        build(definition)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("definition", [one for one in ATTACKS.values() if one is not None])
def test_attack_in_a_bundle_is_refused(tmp_path: Path, definition: Any) -> None:
    bundle = load_bundle("lungs")
    (tmp_path / "models").symlink_to(bundle.path / "models")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps(bundle.metadata))
    (tmp_path / "configs" / "inference.json").write_text(json.dumps({"network_def": definition}))
    with nothing_else_happens(), pytest.raises(BundleError, match=r"inference\.json"):
        load_bundle(tmp_path).load()


SMALL: dict[str, dict[str, Any]] = {
    "AttentionUnet": {"channels": [4, 8], "strides": [2]},
    "BasicUNet": {"features": [4, 4, 4, 4, 4, 4]},
    "BasicUNetPlusPlus": {"features": [4, 4, 4, 4, 4, 4]},
    "DenseNet121": {"init_features": 4, "growth_rate": 4, "block_config": [1, 1]},
    "DenseNet169": {"init_features": 4, "growth_rate": 4, "block_config": [1, 1]},
    "DenseNet201": {"init_features": 4, "growth_rate": 4, "block_config": [1, 1]},
    "DynUNet": {
        "kernel_size": [3, [3, 3], 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 8, 8],
    },
    "FlexibleUNet": {"backbone": "efficientnet-b0", "in_channels": 3, "decoder_channels": [16, 8, 8, 4, 4]},
    "HighResNet": {},
    "MedNeXt": {"init_filters": 4},
    "SEResNet50": {"layers": [1, 1, 1, 1], "num_classes": 3},
    "SegResNet": {},
    "SegResNetDS": {"init_filters": 4, "norm": "instance"},
    "UNet": {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "batch", "act": "relu", "dropout": 0.1},
    "VNet": {"dropout_dim": 2},
    "EfficientNetUNet": {},
    "UNetR231": {},
    "XceptionUNet": {"features": [4, 4, 4, 4, 4], "middle_blocks": 1},
}


@pytest.mark.parametrize("target", NETWORKS)
def test_every_network_of_the_table_can_be_built_without_memory_and_runs(target: str) -> None:
    name = target.rpartition(".")[2]
    plain = {"in_channels": 1, "out_channels": 3}
    monai = "models." not in target
    definition = {"_target_": target, **({"spatial_dims": 2} if monai else {}), **plain, **SMALL[name]}
    if name == "SEResNet50":
        del definition["out_channels"]
    if name == "UNetR231":
        definition = {"_target_": target}
        assert type(build(definition, "meta")).__name__ == name  # its weights are many; the import's test runs it
        return
    network = build(definition).eval()
    assert type(network).__name__ == name
    channels = 3 if name == "FlexibleUNet" else 1
    image = torch.zeros(1, channels, 32, 32)
    # Weights take the places in a network without memory, and it computes the same: nothing of it is left behind.
    empty = build(definition, "meta").eval()
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(network.state_dict(), assign=True)
    if target.count(".") != 3:  # one spelling of MONAI's three is enough to run
        return
    with torch.inference_mode():
        first, second = network(image), empty(image)
    assert torch.equal(
        first[0] if isinstance(first, list) else first, second[0] if isinstance(second, list) else second
    )


def test_a_large_network_is_refused_before_it_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    convolution = torch.nn.Conv2d.reset_parameters
    monkeypatch.setattr(
        torch.nn.Conv2d,
        "reset_parameters",
        lambda self: (made.append(0 if self.weight.is_meta else self.weight.numel()), convolution(self))[1],
    )
    with pytest.raises(BundleError, match="weights"):
        build(REAL | {"features": [4096] * 5, "middle_blocks": 64})
    assert made
    assert sum(made) == 0


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
names = st.sampled_from(
    [
        "_target_",
        "_requires_",
        "_mode_",
        "_disabled_",
        "in_channels",
        "out_channels",
        "features",
        "middle_blocks",
        "spatial_dims",
        "channels",
        "strides",
        "act",
        "norm",
        "dropout",
        "kernel_size",
        "pretrained",
    ]
)
targets = st.sampled_from([*NETWORKS, EVIL["_target_"], "os.system", "subprocess.Popen", "builtins.exec"])
words = st.sampled_from(["relu", "batch", "instance", "$1", "@a", "%b", "os.system"])
numbers = st.integers(-1, 8)
values = st.recursive(
    plain | targets | words | numbers,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(names | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
likely = st.fixed_dictionaries(
    {"_target_": targets, "in_channels": numbers | values, "out_channels": numbers | values},
    optional={"spatial_dims": numbers, "channels": values, "strides": st.lists(numbers, max_size=4), "norm": words},
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values | likely | st.dictionaries(names, values, max_size=8))
def test_any_definition_is_a_network_of_the_table_or_refused(definition: Any) -> None:
    classes = {network_class({"_target_": target}) for target in NETWORKS}
    with nothing_else_happens(), suppress(BundleError):
        assert type(build(definition, "meta")) in classes


def test_the_rest_of_a_configuration_is_kept_and_never_looked_at(tmp_path: Path) -> None:
    bundle = load_bundle("lungs")
    (tmp_path / "models").symlink_to(bundle.path / "models")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps(bundle.metadata))
    own = json.loads((BUNDLES / "lungs" / "configs" / "inference.json").read_text())
    more = {"imports": ["$import os"], "run": ["$os.system('touch /nowhere')"], "evaluator": EVIL, "network": "@x"}
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(own | more))
    with nothing_else_happens():
        assert isinstance(load_bundle(tmp_path).load(), network_class(own["network_def"]))


def test_nothing_else_in_the_program_evaluates_names() -> None:
    """Text becomes a class in the builder, and where methods are loaded by the entry points of installed packages;
    pickles and expressions are read nowhere."""
    root = Path(building.__file__).parents[1]
    words = (
        "ConfigParser",
        "import_module(",
        "__import__(",
        " eval(",
        " exec(",
        "pickle.load",
        "yaml.load(",
        "locate(",
    )
    found = {
        (str(path.relative_to(root)), word)
        for folder in ("node", "models")
        for path in (root / folder).rglob("*.py")
        for word in words
        if word in path.read_text()
    }
    # A method is code that was installed beside the node, by the entry point that its package registers.
    assert found == {("models/build.py", "import_module("), ("node/methods/registry.py", "import_module(")}
    loads = [
        line.strip()
        for folder in ("node", "models")
        for path in (root / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if "torch.load(" in line or "np.load(" in line
    ]
    assert loads
    assert all("weights_only=True" in line or "allow_pickle=False" in line for line in loads)
