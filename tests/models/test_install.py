"""What is brought from elsewhere is data: checked, run once, in place whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import stat
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from models import install as installing
from models.install import import_r231, install
from models.networks.unet_r231 import HU_RANGE, UNetR231, body_box, published_state
from models.phantom.draw import phantom
from models.registry import BUNDLES, IR, WEIGHTS, BundleError, list_bundles, load_bundle, verify
from models.runtime import NoIRError, OpenVinoRuntime, open_runtime
from node import terminal
from node.cli.main import app

RUNNER = CliRunner()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A hospital's bundle: the shipped one under another name."""
    folder = Path(shutil.copytree(BUNDLES / "lungs", tmp_path / "ours"))
    rename(folder, "ours")
    return folder


def rename(folder: Path, name: str, **changes: object) -> None:
    file = folder / "configs" / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name": name} | changes))


def zipped(folder: Path, inside: str = "", **more: bytes) -> Path:
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in folder.rglob("*"):
            if path.is_file():
                archive.write(path, f"{inside}{path.relative_to(folder)}")
        for name, content in more.items():
            archive.writestr(name, content)
    return file


def nothing_in(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("inside", ["", "ours-1.0/"])
def test_a_bundle_is_installed_without_its_code(own: Path, tmp_path: Path, inside: str) -> None:
    more = {f"{inside}scripts/net.py": b"import os", f"{inside}models/model.pt": b"pickle", "__MACOSX/x": b""}
    bundle, left_out = install(zipped(own, inside, **more), tmp_path / "models")
    assert bundle.name == "ours"
    assert bundle.path == tmp_path / "models" / "ours"
    assert set(more) <= set(left_out)
    assert not list(bundle.path.rglob("*.p[yt]"))
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["ours"]
    assert "ours" in list_bundles(tmp_path / "models")
    assert load_bundle("ours", tmp_path / "models").identity == bundle.identity
    with pytest.raises(BundleError, match="there is a model 'ours' already"):
        install(zipped(own), tmp_path / "models")


def test_what_comes_without_openvino_gets_it(own: Path, tmp_path: Path) -> None:
    for file in IR:
        (own / file).unlink()
    rename(own, "ours", openvino=None)
    bundle, _ = install(zipped(own), tmp_path / "models")
    assert isinstance(open_runtime(bundle, "cpu"), OpenVinoRuntime)


def test_an_ir_of_the_archive_is_never_taken(own: Path, tmp_path: Path) -> None:
    """The weights are another network than the IR, whose digests the metadata give: what analyses is the weights."""
    weights = {name: -value if name.startswith("head.") else value for name, value in load_file(own / WEIGHTS).items()}
    save_file(weights, own / WEIGHTS)
    digest = hashlib.sha256((own / WEIGHTS).read_bytes()).hexdigest()
    record = json.loads((own / "configs" / "metadata.json").read_text())["openvino"] | {"weights": digest}
    rename(own, "ours", sha256=digest, openvino=record)
    bundle, left_out = install(zipped(own), tmp_path / "models")
    assert {"models/model.xml", "models/model.bin"} <= set(left_out)
    assert all((bundle.path / part).read_bytes() != (own / part).read_bytes() for part in IR)
    image = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(1, 64, 64)
    (found,) = open_runtime(bundle, "cpu").run([image])
    with torch.inference_mode():
        expected = bundle.load()(torch.from_numpy(image)[None])[0].numpy()
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.99


def test_an_ir_that_cannot_be_made_is_not_taken_from_the_archive_either(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_path: Path) -> None:
        raise NoIRError("it cannot")

    monkeypatch.setattr(installing, "export", fails)
    bundle, _ = install(zipped(own), tmp_path / "models")
    assert "openvino" not in bundle.metadata
    assert not [part for part in IR if (bundle.path / part).exists()]
    verify(bundle)


def entry(name: str, *, mode: int = 0, flags: int = 0, kind: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.external_attr, made.flag_bits, made.compress_type = mode << 16, flags, kind
    return made


def attacked(own: Path, attack: str) -> Path:
    """The hospital's bundle with one entry that no bundle has."""
    file = zipped(own)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as archive:
        warnings.simplefilter("ignore")  # of the name that is there twice
        match attack:
            case "link":
                archive.writestr(entry("docs/a.md", mode=stat.S_IFLNK | 0o777), "/etc/passwd")
            case "device":
                archive.writestr(entry("docs/a.md", mode=stat.S_IFCHR | 0o666), "")
            case "pipe":
                archive.writestr(entry("docs/a.md", mode=stat.S_IFIFO | 0o666), "")
            case "link that looks like a folder":
                archive.writestr(entry("docs/", mode=stat.S_IFLNK | 0o777), "")
            case "twice":
                archive.writestr("configs/inference.json", "{}")
            case "twice by its slashes":
                archive.writestr("configs//inference.json", "{}")
            case "bzip2":
                archive.writestr(entry("docs/a.md", kind=zipfile.ZIP_BZIP2), "x")
            case "lzma":
                archive.writestr(entry("docs/a.md", kind=zipfile.ZIP_LZMA), "x")
            case "bomb":
                archive.writestr(entry("docs/a.md", kind=zipfile.ZIP_DEFLATED), bytes(8 << 20))
            case "bomb that is not taken":
                archive.writestr(entry("other.bin", kind=zipfile.ZIP_DEFLATED), bytes(8 << 20))
            case "large configuration":
                archive.writestr(entry("docs/../configs/x", kind=zipfile.ZIP_STORED), bytes(2 << 20))
            case "control characters":
                archive.writestr("docs/\x1b[2J.md", "x")
            case "no name":
                archive.writestr("//", "x")
            case "many":
                for n in range(1001):
                    archive.writestr(f"{n}", "")
    if attack == "encrypted":
        content = bytearray(file.read_bytes())
        for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            content[content.index(signature) + at] |= 1
        file.write_bytes(content)
    elif attack in ("size", "damaged"):
        with zipfile.ZipFile(file) as archive:
            first = archive.getinfo("configs/inference.json")
        content, at = bytearray(file.read_bytes()), first.header_offset + 30 + len(first.filename) + 1
        if attack == "damaged":
            content[at] ^= 0xFF
        else:  # says in its directory that it is a byte shorter
            where = content.rindex(first.filename.encode()) - 46 + 24
            content[where : where + 4] = struct.pack("<L", first.file_size - 1)
        file.write_bytes(content)
    elif attack == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    elif attack == "large directory":
        content = bytearray(file.read_bytes())
        content[-10:-6] = struct.pack("<L", 1 << 30)
        file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    "attack",
    [
        "link",
        "device",
        "pipe",
        "link that looks like a folder",
        "twice",
        "twice by its slashes",
        "bzip2",
        "lzma",
        "bomb",
        "bomb that is not taken",
        "large configuration",
        "control characters",
        "no name",
        "many",
        "encrypted",
        "size",
        "damaged",
        "cut",
        "large directory",
    ],
)
def test_hostile_archive_is_refused_before_anything_is_written(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    file = attacked(own, attack)
    written: list[str] = []
    if attack not in ("size", "damaged"):  # these are seen while an entry is read
        monkeypatch.setattr(installing, "_unpack", lambda *_: written.append("x"))
    with pytest.raises(BundleError) as caught:
        install(file, tmp_path / "models")
    assert str(caught.value).replace("\n", "").isprintable()
    assert not written
    assert nothing_in(tmp_path / "models")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_archive_is_refused_or_what_it_was(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    """Bytes of the directory and of the last entries changed: a message or the same files, never another error."""
    file = tmp_path / "a.zip"
    contents = {"configs/metadata.json": b"{}", "models/model.safetensors": bytes(1000), "docs/README.md": b"x" * 500}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    bytes_ = bytearray(file.read_bytes())
    for at, value in changes:
        bytes_[-min(at, len(bytes_))] = value
    file.write_bytes(bytes_)
    with pytest.raises(BundleError):  # whole as well: these metadata are none
        install(file, tmp_path / "models")
    assert nothing_in(tmp_path / "models")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:/evil"])
def test_no_file_leaves_its_folder(own: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="outside its folder"):
        install(zipped(own, "", **{name: b"x"}), tmp_path / "models")
    assert nothing_in(tmp_path / "models")
    assert not list(tmp_path.rglob("evil"))


def test_an_archive_may_not_swell(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "_MOST_BYTES", 1000)
    with pytest.raises(BundleError, match="unpacks to more than 1,000 bytes"):
        install(zipped(own), tmp_path / "models")
    monkeypatch.setattr(installing, "_MOST_FILES", 2)
    with pytest.raises(BundleError, match="no bundle has over 2"):
        install(zipped(own), tmp_path / "models")
    assert nothing_in(tmp_path / "models")


def test_what_is_no_bundle_is_refused(own: Path, tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(BundleError, match="cannot be read as a ZIP file"):
        install(tmp_path / "text.zip", tmp_path / "models")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="no MONAI bundle"):
        install(zipped(tmp_path / "empty"), tmp_path / "models")
    for name in ("lungs", "../x", "Upper", ""):
        rename(own, name)
        with pytest.raises(BundleError, match="a model"):
            install(zipped(own), tmp_path / "models")
    rename(own, "ours", hu_range=[1])
    with pytest.raises(BundleError, match="inference needs"):
        install(zipped(own), tmp_path / "models")
    rename(own, "ours", sha256="0" * 64, hu_range=[-1000, 400])
    with pytest.raises(BundleError, match="sha256"):
        install(zipped(own), tmp_path / "models")
    (own / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"model\.pt may hold code.*safetensors"):
        install(zipped(own, "", **{"models/model.pt": b"x"}), tmp_path / "models")
    assert nothing_in(tmp_path / "models")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {sys.prefix}/evil-was-here",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"last.weight": Evil()}, protocol=2))
    with pytest.raises(BundleError, match="not the weights of lungmask's R231"):
        import_r231(tmp_path / "evil.pth", tmp_path / "models")
    assert not (Path(sys.prefix) / "evil-was-here").exists()
    torch.save({"down_path.0.block.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(BundleError, match="not the weights of lungmask's R231"):
        import_r231(tmp_path / "part.pth", tmp_path / "models")
    with pytest.raises(ValueError, match="6 classes"):
        published_state({"last.weight": torch.zeros(6, 64, 1, 1)})
    with pytest.raises(ValueError, match="no part of lungmask"):
        published_state({"encoder.weight": torch.zeros(1)})
    assert nothing_in(tmp_path / "models")


def test_published_weights_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/data/0", bytes(2_000_000))
    monkeypatch.setattr(installing, "_MOST_PICKLE", 1_000_000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(BundleError, match="over 1,000,000 bytes"):
        import_r231(bomb, tmp_path / "models")
    (tmp_path / "large.pth").write_bytes(bytes(2_000_000))
    with pytest.raises(BundleError, match="over 1,000,000 bytes"):
        import_r231(tmp_path / "large.pth", tmp_path / "models")


@pytest.mark.parametrize("state", [[], {"last.weight": 1}, {1: 2}, {"last.weight": torch.zeros(1)}, "x", None])
def test_published_weights_of_any_kind_are_refused_in_words(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "any.pth")
    with pytest.raises(BundleError, match="not the weights of lungmask's R231"):
        import_r231(tmp_path / "any.pth", tmp_path / "models")


def test_r231_is_what_lungmask_computes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lungmask = pytest.importorskip("lungmask.resunet", reason="pip install lungmask compares R231 with the original")
    utils = pytest.importorskip("lungmask.utils")
    torch.manual_seed(0)
    theirs = lungmask.UNet(n_classes=3, padding=True, depth=5, up_mode="upsample", batch_norm=True, residual=False)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    theirs.eval()
    torch.save(theirs.state_dict(), tmp_path / "unet_r231-random.pth")
    bundle = import_r231(tmp_path / "unet_r231-random.pth", tmp_path / "models")
    assert "cuts each slice to what it shows" in caplog.text
    network = bundle.load()
    assert isinstance(network, UNetR231)

    hu = phantom(4, shape=(8, 190, 230), severity=1).hu[3:4]
    boxed, boxes = utils.preprocess(hu.astype(np.float32), [256, 256])
    assert [[rows.start, columns.start, rows.stop, columns.stop] for rows, columns in map(body_box, hu)] == [
        list(map(int, box)) for box in boxes
    ]
    unit = torch.from_numpy((boxed + 1024) / 1624)[:, None].float()
    low, high = HU_RANGE
    scaled = torch.from_numpy((np.clip(hu, low, high).astype(np.float32) - low) / (high - low) * 2 - 1)[:, None]
    with torch.inference_mode():
        original = theirs(unit)
        assert torch.allclose(torch.log_softmax(network.segment(unit), 1), original, atol=1e-4)
        found = network(scaled).argmax(1).numpy()
    masks = [utils.reshape_mask(m, b, hu.shape[1:]) for m, b in zip(original.argmax(1).numpy(), boxes, strict=True)]
    assert (found == np.array(masks)).mean() > 0.97, "but for the outline, which is not put back by nearest pixels"


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_r231_takes_what_shows_no_body_and_cannot_be_traced() -> None:
    rows, columns = body_box(np.full((64, 80), -1000.0, np.float32))
    assert (rows, columns) == (slice(0, 64), slice(0, 80))
    with pytest.raises(RuntimeError, match="a trace of it would be wrong"):
        torch.jit.trace(UNetR231().eval(), torch.zeros(1, 1, 32, 32))


def test_the_commands(own: Path, tmp_path: Path) -> None:
    settings = tmp_path / "node.yaml"
    settings.write_text(f"data: {tmp_path / 'var'}\n")

    def lines(*arguments: str, exit_code: int = 0) -> str:
        result = RUNNER.invoke(app, ["models", *arguments, "-c", str(settings)], env={"COLUMNS": "200"})
        assert result.exit_code == exit_code, result.output
        return result.output

    assert "models: {pneumonia: {lungs: ours}}" in lines("install", str(zipped(own)))
    listed = {row["name"]: row for row in json.loads(lines("list", "--json"))}
    assert {"lungs", "infection", "ours"} <= set(listed)
    assert listed["ours"]["digest"].startswith("ok, ")
    assert "Dice 0." in listed["infection"]["measured"]
    assert "CC BY-NC-SA" in listed["lungs"]["licence"]
    assert lines("verify", "ours").strip().endswith("digest ok, loads, runs")
    with (tmp_path / "var" / "models" / "ours" / WEIGHTS).open("ab") as file:
        file.write(b"x")
    assert "wrong: " in lines("list")
    assert "sha256" in lines("verify", "ours", exit_code=1)
    assert "already" in lines("install", str(zipped(own)), exit_code=1)


def test_a_list_shows_no_control_characters_and_takes_no_markup(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for console in (terminal.out, terminal.err):
        monkeypatch.setattr(console, "_width", 400)  # whatever the width when the module was imported
    hostile = "\x1b]0;owned\x07[red]x[/blue]\n"
    figures = [{"source": hostile, "measure": "Dice lungs", "mean": 0.5}, {"source": "y", "measure": "Dice lungs"}]
    shutil.copytree(own, tmp_path / "var" / "models" / "ours")
    rename(tmp_path / "var" / "models" / "ours", "ours", license=hostile, held_out=figures[:1])
    shutil.copytree(own, tmp_path / "var" / "models" / "other")
    rename(tmp_path / "var" / "models" / "other", "other", held_out=figures, cross_validation=None)
    shutil.copytree(own, tmp_path / "var" / "models" / "third")
    rename(tmp_path / "var" / "models" / "third", hostile)
    settings = tmp_path / "node.yaml"
    settings.write_text(f"data: {tmp_path / 'var'}\n")
    for command, code in (("list", 0), ("verify", 1)):
        result = RUNNER.invoke(app, ["models", command, "-c", str(settings)])
        assert result.exit_code == code, result.output
        assert "[red]x[/blue]" in result.output
        assert result.output.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["lungs", "infection"])
def test_the_shipped_models_run(name: str) -> None:
    verify(load_bundle(name))


@pytest.mark.parametrize("file", ["model.xml", "model.bin"])
def test_verify_finds_damage_to_what_runs_on_a_cpu(tmp_path: Path, file: str) -> None:
    shutil.copytree(BUNDLES / "infection", tmp_path / "mine")
    with (tmp_path / "mine" / "models" / file).open("ab") as damaged:
        damaged.write(b"x")
    with pytest.raises(BundleError, match=rf"{file}: sha256 is .*; restore it from the release"):
        verify(load_bundle("mine", tmp_path))
