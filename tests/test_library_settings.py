"""Settings of pydicom and pynetdicom: nothing is set by an import, and every process has the same."""

from __future__ import annotations

import subprocess
import sys

import pydicom
import pytest
from conftest import REPOSITORY
from pynetdicom import _config
from typer.testing import CliRunner

from node.cli.main import app
from node.network.settings import configure

IMPORTS = """
import importlib, pkgutil
import highdicom, pydicom, pynetdicom._config as network
def settings():
    reading = {name: repr(value) for name, value in vars(pydicom.config.settings).items()}
    own = {n: repr(v) for n, v in vars(pydicom.config).items() if isinstance(v, (bool, int, str)) and n[0] != "_"}
    return reading, own, {n: repr(v) for n, v in vars(network).items() if n.isupper()}
before = settings()
import node
for module in pkgutil.walk_packages(node.__path__, "node."):
    if "__main__" not in module.name and "migrations" not in module.name:
        importlib.import_module(module.name)
assert settings() == before, [(a, b) for a, b in zip(before, settings()) if a != b]
"""


def test_to_import_the_node_changes_no_setting_of_the_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_command_reads_dicom_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener, the workers and all else are commands, or children that a command forks."""
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.WARN)
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", False)
    monkeypatch.setattr(_config, "LOG_HANDLER_LEVEL", "standard")
    done = CliRunner().invoke(app, ["config", "schema"])
    assert done.exit_code == 0, done.output
    assert pydicom.config.settings.reading_validation_mode == pydicom.config.IGNORE
    assert _config.STORE_SEND_CHUNKED_DATASET
    assert _config.LOG_HANDLER_LEVEL == "none"


def test_to_configure_twice_is_to_configure_once() -> None:
    configure()
    configure()
    validate = _config.VALIDATORS["UI"]
    assert not hasattr(validate.__wrapped__, "cache_info")  # type: ignore[attr-defined]


def test_loggers_in_use_follow_a_later_configuration() -> None:
    code = (
        "import structlog\n"
        "from structlog.testing import capture_logs\n"
        "from node.telemetry import logs\n"
        "log = structlog.stdlib.get_logger('x')\n"
        "logs.configure(); log.info('first'); logs.configure()\n"
        "with capture_logs() as lines: log.info('second')\n"
        "assert [line['event'] for line in lines] == ['second'], lines\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=REPOSITORY)
