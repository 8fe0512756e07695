"""A whole node runs from the wheel alone, also in a folder that has other modules of our names."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import REPOSITORY, tool

from models.phantom.draw import phantom
from node.images.phantom_series import write_series

pytestmark = pytest.mark.timeout(300)

#: What a module of our name that lies in the working folder does when it is imported.
STRANGER = "raise SystemExit('imported {} from the working folder')\n"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("LUNGNODE")}
    done = subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment into which the wheel was installed; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = folder / "wheels"
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels, REPOSITORY, cwd=folder)
    made = folder / "environment"
    venv.create(made, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(made)}))
    # Behind its own packages. Links to checkouts, which other environments have in files *.pth, are not followed.
    (own / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    (wheel,) = wheels.iterdir()
    run(*pip, "--python", made / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return made


@pytest.fixture
def strange_folder(tmp_path: Path) -> Path:
    """A working folder in which a `node` and a `models` of somebody else lie."""
    for name in ("node", "models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(STRANGER.format(name))
    return tmp_path


@pytest.mark.peer
def test_demo_runs_from_the_wheel_in_a_folder_with_other_modules_of_our_names(
    environment: Path, strange_folder: Path
) -> None:
    tool("redis-server")
    write_series(phantom(3, severity=2, shape=(40, 48, 48), spacing=(5.0, 7.5, 7.5)), strange_folder / "ct", 3)
    said = run(environment / "bin" / "lungnode", "demo", "ct", "--out", "out", cwd=strange_folder)
    assert (strange_folder / "out" / "overlay.png").exists(), said
    log = (strange_folder / "out" / "node.log").read_text()
    assert "working folder" not in log


def test_wheel_brings_the_commented_settings(environment: Path, strange_folder: Path) -> None:
    settings = environment / "share" / "lungnode" / "node.yaml"
    assert settings.read_text() == (REPOSITORY / "config" / "node.yaml").read_text()
    assert "is good" in run(environment / "bin" / "lungnode", "config", "check", settings, cwd=strange_folder)
