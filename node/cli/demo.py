"""`lungnode demo`: a whole node on this machine, a CT sent through it over real DICOM, and what comes back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from pydicom import dcmread
from pynetdicom import evt
from pynetdicom.presentation import AllStoragePresentationContexts, build_context
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.text import Text

from models.phantom.draw import phantom
from node.cli import render
from node.config import CONFIG_VARIABLE, Peer, load
from node.delivery.peer import Outgoing
from node.delivery.push import push_all
from node.identity import application_entity
from node.images.phantom_series import write_series
from node.installation import Node
from node.intake.store import CANNOT_UNDERSTAND
from node.ledger import views
from node.ledger.views import SeriesView
from node.network.associations import VERIFICATION, PeerError, echo
from node.operations.supervisor import LUNGNODE
from node.paths import InvalidUIDError, valid_uid, within
from node.terminal import cell, progress

#: The phantom of the demo: a thorax with ground glass and consolidation in both lungs.
SEED = 7

#: A file that says that a folder is a demo's own.
MARK = "made-by-lungnode-demo"

#: Seconds that the whole journey may take before the demo gives up, and to wait for the node to start.
GIVE_UP_S = 900.0
START_S = 60.0


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why."""


def run(folder: Path | None, out: Path, console: Console) -> None:
    """Send the CT in `folder`, or a phantom, through a node in `out`, and show the journey and the findings."""
    out = out.resolve()
    _make_room(out, folder)
    items = _series(folder, out / "phantom", console)
    settings_file = _settings(out)
    settings = load(settings_file)
    with _archive(settings.peers["archive"], out / "archive"), _node(settings_file, out / "node.log") as node:
        me = Peer(ae_title=settings.listener.ae_title, host="127.0.0.1", port=settings.listener.port)
        _wait_for_echo(me, node, out / "node.log")
        console.print(f"node {me.ae_title} listens on port {me.port}, log in {_short(out / 'node.log')}")
        _send(items, me, console)
        here = Node.open(settings)
        series = _follow(here, console)
    _show(series, out, console)


def _make_room(out: Path, folder: Path | None) -> None:
    """An empty folder; one that is not of an earlier demo is left alone."""
    if folder is not None and folder.resolve().is_relative_to(out):
        raise DemoError(f"the CT lies in {out}, which the demo would clear; choose another --out")
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise DemoError(f"{out} is not empty and not of a demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("Made by `lungnode demo`, which clears this folder when it runs again.\n")


def _series(folder: Path | None, made: Path, console: Console) -> list[Outgoing]:
    if folder is None:
        with console.status("making a phantom thorax …"):
            write_series(phantom(SEED, severity=3), made, SEED)
    items = Outgoing.below(folder or made)
    if not items:
        raise DemoError(f"no DICOM files in {folder}")
    return items


def _settings(out: Path) -> Path:
    """A settings file like an installation's own, with free ports and everything in `out`."""
    listener, archive = _free_port(), _free_port()
    settings = {
        "data": str(out / "node"),
        "listener": {"ae_title": "LUNGNODE", "host": "127.0.0.1", "port": listener, "accept": "any"},
        "peers": {"archive": {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive, "may": ["receive"]}},
        "routes": [{"name": "demo", "to": {"archive": ["infection-seg", "lung-seg", "sr", "capture"]}}],
    }
    file = out / "node.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


@contextmanager
def _archive(peer: Peer, folder: Path) -> Iterator[None]:
    """A small storage SCP that keeps what it receives, as a PACS would."""
    folder.mkdir()

    def keep(event: evt.Event) -> int:
        request: Any = event.request
        try:
            path = within(folder, f"{valid_uid(str(request.AffectedSOPInstanceUID))}.dcm")
        except InvalidUIDError:
            return CANNOT_UNDERSTAND
        path.write_bytes(event.encoded_dataset())
        return 0x0000

    entity = application_entity(peer.ae_title)
    entity.supported_contexts = [*AllStoragePresentationContexts, build_context(VERIFICATION)]
    server = entity.start_server((peer.host, peer.port), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    try:
        yield
    finally:
        if server is not None:
            server.shutdown()


@contextmanager
def _node(settings_file: Path, log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`lungnode up`, stopped at the end as by Ctrl-C."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*LUNGNODE, "up"],
            env={**os.environ, CONFIG_VARIABLE: str(settings_file), "LUNGNODE_BROKER": ""},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for_echo(me: Peer, node: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and node.poll() is None:
        # A plain connection first: a refused one costs nothing, a refused association waits.
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((me.host, me.port)) == 0:
                break
        threading.Event().wait(0.2)
    try:
        echo(me, "DEMO")
    except PeerError as error:
        said = "\n".join(log_file.read_text().splitlines()[-5:])
        raise DemoError(f"the node did not start: {error}\n{said}") from None


def _send(items: list[Outgoing], me: Peer, console: Console) -> None:
    refused: list[PeerError] = []
    with progress(console, "{task.description}", MofNCompleteColumn()) as bars:
        bar = bars.add_task("C-STORE to LUNGNODE", total=len(items))

        def sent(_item: Outgoing, error: PeerError | None) -> None:
            bars.advance(bar)
            if error is not None:
                refused.append(error)

        push_all(items, me, "DEMO", sent)
    console.print(f"sent {len(items) - len(refused)} of {len(items)} instances by C-STORE")
    if refused:
        raise DemoError(f"the node refused {len(refused)} instances: {refused[0]}")


def _follow(here: Node, console: Console) -> SeriesView:
    """Print each event as it happens, until nothing more is due."""
    deadline, shown = time.monotonic() + GIVE_UP_S, 0
    quiet = time.monotonic() + here.settings.listener.quiet_period_s + START_S
    with console.status("waiting for the series to be closed …") as spinner:
        while time.monotonic() < deadline:
            everything = views.all_series(here.ledger)
            events = sorted((event for series in everything for event in series.events), key=lambda one: one.id)
            for event in events[shown:]:
                line = Text.assemble(
                    (f"  +{event.at - events[0].at:5.1f} s ", "dim"), (f"{event.stage:9} ", "bold"), cell(event.text)
                )
                console.print(line)
                spinner.update(cell(f"{event.stage}: {event.text}"))
            shown = len(events)
            states = {series.state for series in everything}
            analysed = [series for series in everything if series.analyses]
            if everything and not states & {"waiting", "running", "delivering"}:
                if analysed:
                    return analysed[0]
                if time.monotonic() > quiet:
                    return everything[0]
            threading.Event().wait(0.1)
    raise DemoError(f"nothing came back in {GIVE_UP_S:.0f} s; see the log")


def _show(series: SeriesView, out: Path, console: Console) -> None:
    if not series.analyses:
        raise DemoError(series.verdict)
    for number, analysis in enumerate(series.analyses, 1):
        console.print()
        if analysis.summary is not None:
            console.print(render.findings(analysis.summary))
        else:
            console.print(cell(analysis.about(analysis.reason), "yellow"))
        console.print()
        for made in analysis.objects:
            received = within(out / "archive", f"{valid_uid(made.sop_instance_uid)}.dcm")
            if not received.exists():
                continue
            console.print(f"{made.kind:14} {_short(received)}", soft_wrap=True)
            if made.kind == "capture":
                picture = out / (f"overlay-{number}.png" if number > 1 else "overlay.png")
                _picture(received, picture)
                console.print(f"{'picture':14} {_short(picture)}", soft_wrap=True)
    state = series.state
    if state not in ("delivered", "not analysed"):
        raise DemoError(f"the journey ended as '{state}'; see {out / 'node.log'}")


def _picture(capture: Path, png: Path) -> None:
    """The delivered capture as one PNG: its summary frame, and key slices beside it."""
    frames = dcmread(capture).pixel_array
    frames = frames if frames.ndim == 4 else frames[None]
    side = frames.shape[1]
    rest = [frames[1 + n] for n in np.linspace(0, len(frames) - 2, min(6, len(frames) - 1)).round().astype(int)]
    tile = side * 2 // 3
    montage = Image.new("RGB", (side + 3 * tile, 2 * tile) if rest else (side, side))
    montage.paste(Image.fromarray(frames[0]), (0, (montage.height - side) // 2))
    for n, frame in enumerate(rest):
        picture = Image.fromarray(frame).resize((tile, tile), Image.Resampling.LANCZOS)
        montage.paste(picture, (side + n % 3 * tile, n // 3 * tile))
    montage.save(png)


def _short(path: Path) -> str:
    """A path as one would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
