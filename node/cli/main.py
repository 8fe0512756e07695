"""The `lungnode` command: the one place that starts processes.

Each command reads the settings that `--config` or `LUNGNODE_CONFIG` names, else `config/node.yaml`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import MofNCompleteColumn
from rich.text import Text

from node import __version__
from node.cli import models
from node.config import CONFIG_VARIABLE, ConfigError, Peer, Settings, check, load, schema
from node.methods.registry import DEFAULT, MethodError
from node.terminal import err, fail, out, progress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from node.ledger.ledger import Ledger
    from node.ledger.views import SeriesView

app = typer.Typer(
    name="lungnode",
    help="A DICOM node that segments pneumonia infection on chest CT and sends the results back to the PACS.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,  # they hold patient data
)
config_app = typer.Typer(help="Check settings, and print their schema.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(models.models_app, name="models")
app.command()(models.evaluate)
app.command()(models.train)

Config = Annotated[Path | None, typer.Option("--config", "-c", help="Settings file.", envvar=CONFIG_VARIABLE)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"lungnode {__version__}")
        raise typer.Exit


#: Eager, so that no command need follow.
_Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
]


@app.callback()
def _main(version: _Version = False) -> None:
    from node import permissions
    from node.network.settings import configure
    from node.telemetry import logs

    permissions.keep_private()
    configure()
    logs.configure("WARNING")  # commands that run as services say more


@app.command()
def up(config: Config = None) -> None:
    """Run everything on this machine: broker, listener and workers. Ctrl-C stops cleanly."""
    from node.installation import Node
    from node.operations.broker import BrokerError, broker
    from node.operations.supervisor import Supervisor, stop_signal
    from node.telemetry import logs

    settings = _settings(config)
    logs.configure()
    Node.open(settings)
    me = settings.listener

    def started() -> None:
        up = Text.assemble((me.ae_title, "bold"), f" on port {me.port}; Ctrl-C stops it.")
        err.print(Text(f"lungnode {__version__} is up as ") + up)

    commands = {
        "listener": ["listen"],
        "analyse worker": ["work", "--queue", "analyse"],
        "deliver worker": ["work", "--queue", "deliver"],
    }
    try:
        with stop_signal() as stop, broker(settings) as url:
            Supervisor(commands, _environment(config, url)).run(stop, started)
    except BrokerError as error:
        fail(str(error))
    err.print("stopped; the ledger keeps what is still due.")


@app.command()
def listen(config: Config = None) -> None:
    """Receive series by C-STORE until stopped."""
    from node import permissions, tasks
    from node.delivery import commitment
    from node.installation import Node
    from node.intake import closing
    from node.methods import registry
    from node.operations.broker import BrokerError, broker
    from node.operations.supervisor import settle, stop_signal
    from node.telemetry import logs

    settings = _settings(config)
    logs.configure()
    try:
        with stop_signal() as stop, broker(settings) as url:
            tasks.app.conf.broker_url = url
            here = Node.open(settings)
            permissions.close(settings.data, everything=True)
            sweeper = tasks.Sweeper(here)
            sweeper.start()
            contexts, handlers = commitment.services(here.ledger, settings)
            listener = closing.intake(
                here,
                accepts=lambda method, closed: registry.find(method).accepts(closed),
                dispatch=lambda rows: tasks.dispatch("analyse", rows),
                contexts=contexts,
                handlers=handlers,
                reporters=commitment.reporters(settings),
            )
            listener.start()
            settle()
            stop.event.wait()
            listener.stop()
            sweeper.stop()
    except (BrokerError, OSError, ValueError) as error:
        fail(f"cannot listen on {settings.listener.host}:{settings.listener.port}: {error}")


@app.command()
def work(
    queue: Annotated[
        Literal["analyse", "deliver"] | None, typer.Option(help="Do only this work; both when left out.")
    ] = None,
    config: Config = None,
) -> None:
    """Analyse and deliver until stopped."""
    from node.operations.broker import BrokerError, broker
    from node.operations.supervisor import Supervisor, stop_signal
    from node.telemetry import logs

    settings = _settings(config)
    logs.configure()
    try:
        if queue is None:
            with stop_signal() as stop, broker(settings) as url:
                commands = {f"{name} worker": ["work", "--queue", name] for name in ("analyse", "deliver")}
                Supervisor(commands, _environment(config, url)).run(stop)
            return
        with broker(settings) as url:
            os.environ.update(_environment(config, url))
            _work_on(queue, url)
    except BrokerError as error:
        fail(str(error))


def _work_on(queue: str, url: str) -> None:
    """One Celery worker on one queue.

    Analysis runs in a child process, one at a time, so that a crash in a network or the kernel's out-of-memory killer
    takes the child and not the worker; delivery waits on the network, so threads serve it.
    """
    import structlog

    from node import tasks
    from node.delivery.stow import credentials_in_the_clear

    tasks.app.conf.broker_url = url
    if queue == "deliver":
        for peer, what, hint in credentials_in_the_clear(tasks.node().settings):
            structlog.get_logger(__name__).warning("credentials in the clear", peer=peer, what=what, hint=hint)
        # Not in the other worker, which forks: a child forked in the midst of a sweep inherits SQLite's locks for good.
        tasks.Sweeper(tasks.node()).start()
        # A thread for each peer, so that one that hangs delays nobody else's objects, and one to see that it does.
        threads = 1 + len(tasks.node().settings.peers_that_may("receive"))
        pool = ["--pool", "threads", "--concurrency", str(threads)]
    else:
        pool = ["--pool", "prefork", "--concurrency", "1"]
    arguments = [
        "--quiet",
        "worker",
        "--queues",
        queue,
        "--hostname",
        f"{queue}@%h",
        "--without-gossip",
        "--without-mingle",
        # Celery must not tell a broker that is gone that it goes: it would wait for it for ever.
        "--without-heartbeat",
    ]
    with suppress(SystemExit):
        tasks.app.worker_main([*arguments, *pool, "--loglevel", "WARNING"])


@app.command()
def analyse(
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="Folder of DICOM files.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the objects and the overlay PNG.")],
    as_json: Json = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; that of the settings when left out.")] = None,
    method: Annotated[str, typer.Option(help="Name of the method.")] = DEFAULT,
    config: Config = None,
) -> None:
    """Analyse the CT series in a folder, offline: the same objects as the node makes, and an overlay PNG."""
    from models.registry import BundleError
    from node.cli.folder import NothingToAnalyse, analyse_folder

    settings = _settings(config)
    with progress(err, "{task.description}") as bars:
        try:
            done = analyse_folder(folder, out_folder, settings, bars, method=method, device=device)
        except (NothingToAnalyse, MethodError, BundleError) as reason:
            bars.stop()
            fail(str(reason))
    if as_json:
        print(
            json.dumps([one.summary | {"acquisition": one.acquisition, "files": one.files} for one in done], indent=2)
        )
        return
    from node.cli.render import findings

    for one in done:
        out.print(findings(one.summary))
        for name in one.files:
            out.print(f"  {out_folder / name}", soft_wrap=True)


@app.command()
def send(
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, help="Folder of DICOM files, or one file.")],
    peer: Annotated[str, typer.Argument(help="Name of a peer in the settings, or AE@HOST:PORT.")],
    config: Config = None,
) -> None:
    """Send DICOM files to a peer by C-STORE."""
    from node.delivery.peer import Outgoing
    from node.delivery.push import push_all
    from node.network.associations import PeerError

    settings = _settings(config)
    target = _peer(settings, peer)
    items = Outgoing.below(folder)
    refused: list[str] = []
    with progress(err, "{task.description}", MofNCompleteColumn()) as bars:
        bar = bars.add_task(f"sending to {target.ae_title}", total=len(items))

        def sent(item: Outgoing, error: PeerError | None) -> None:
            bars.advance(bar)
            if error is not None:
                refused.append(f"{item.path.name}: {error}")

        try:
            push_all(items, target, settings.listener.ae_title, sent)
        except PeerError as error:
            bars.stop()
            fail(str(error))
    for line in refused:
        err.print(line)
    err.print(f"{len(items) - len(refused)} sent, {len(refused)} refused" if items else f"no DICOM files in {folder}")
    if refused or not items:
        raise typer.Exit(1)


@app.command()
def echo(
    peer: Annotated[str, typer.Argument(help="Name of a peer in the settings, or AE@HOST:PORT.")],
    config: Config = None,
) -> None:
    """Ask a peer whether it is there (C-ECHO)."""
    from node.network.associations import PeerError
    from node.network.associations import echo as c_echo

    settings = _settings(config)
    target = _peer(settings, peer)
    try:
        c_echo(target, settings.listener.ae_title)
    except PeerError as error:
        fail(str(error))
    out.print(f"{target.ae_title} at {target.host}:{target.port} answers")


@app.command()
def status(
    series: Annotated[str | None, typer.Argument(help="Number or UID of a series, for its timeline.")] = None,
    page: Annotated[int, typer.Option(min=1, help="Which page of the series, newest first.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Series on a page: 200; with --json, all of them.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Show what was received, what became of it, and what is still due."""
    from node.cli import render
    from node.files import retention
    from node.ledger import views
    from node.operations.broker import trouble

    ledger = _ledger(config)
    settings = _settings(config)
    for warning in () if as_json else (retention.pressure(settings), trouble(settings)):
        if warning:
            err.print(warning, style="yellow")
    if series is not None:
        one = views.find(ledger, series)
        if one is None:
            fail(f"no series {series}; `lungnode status` lists them")
        if as_json:
            print(json.dumps(views.as_json(one), indent=2))
        else:
            out.print(render.timeline(one))
        return
    if as_json and limit is None and page == 1:
        _print_json(views.every_series(ledger))
        return
    shown = views.page(ledger, page, limit or views.PAGE)
    if as_json:
        _print_json(shown.series)
    elif shown.series:
        out.print(render.table(shown.series))
        for peer in views.unreachable_peers(ledger):
            out.print(render.unreachable(peer), style="yellow")
    elif not shown.total:
        out.print(f"nothing received yet ({ledger.engine.url.database})", soft_wrap=True)
    if shown.note:
        (err if as_json else out).print(shown.note)


@app.command()
def retry(
    series: Annotated[
        str | None, typer.Argument(help="Number or UID of a series, as `lungnode status` shows it.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything that failed, was refused or waits.")] = False,
    config: Config = None,
) -> None:
    """Try again, now, what failed, was refused, or waits for its next attempt."""
    from node.ledger import views

    ledger = _ledger(config)
    if everything == (series is not None):
        fail("name a series, or --all")
    one = views.find(ledger, series) if series else None
    if series and one is None:
        fail(f"no series {series}; `lungnode status` lists them")
    count = sum(ledger.retry(row) for row in ([one.id] if one else ledger.series_ids()))
    out.print(f"{count} will be tried again now" if count else "nothing failed, was refused or waits")


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A CT series; a phantom when left out.")
    ] = None,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that the demo makes.")] = Path(
        "demo-out"
    ),
) -> None:
    """Send a CT through a whole node on this machine, and show what comes back."""
    from node.cli.demo import DemoError, run

    try:
        run(folder, out_folder, out)
    except DemoError as error:
        fail(str(error))


@app.command()
def phantom(
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the DICOM files.")],
    seed: Annotated[int, typer.Option(help="The same seed makes the same series.")] = 1,
) -> None:
    """Write a procedural thorax phantom with infection as a CT series, to try a connection without a patient."""
    from models.phantom.draw import phantom as make
    from node.images.phantom_series import write_series

    paths = write_series(make(seed, severity=2), out_folder, seed)
    out.print(f"{len(paths)} slices in {out_folder}")


@config_app.command("check")
def config_check(file: Annotated[Path, typer.Argument(help="Settings file.")]) -> None:
    """Check a settings file and the models that it names; each error names line, key and fix, each hint what to set."""
    from node.delivery.stow import credentials_in_the_clear

    try:
        settings, hints = check(file)
    except ConfigError as error:
        fail(str(error))
    for peer, what, hint in credentials_in_the_clear(settings):
        err.print(f"peer {peer}: {what}: {hint}", style="yellow", soft_wrap=True)
    for hint in hints:
        err.print(hint, style="yellow", soft_wrap=True)
    out.print(
        f"{file} is good: {settings.listener.ae_title} on port {settings.listener.port}, "
        f"{len(settings.peers)} peers, {len(settings.routes)} routes",
        highlight=False,
        soft_wrap=True,
    )
    for hint in settings.hints():
        out.print(f"hint: {hint}", highlight=False, soft_wrap=True, markup=False, style="yellow")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the settings, for editors."""
    print(json.dumps(schema(), indent=2))


def _settings(config: Path | None) -> Settings:
    try:
        return load(config)
    except ConfigError as error:
        fail(str(error))


def _ledger(config: Path | None) -> Ledger:
    """The installation's ledger, which must be there: a look at it makes nothing."""
    from sqlalchemy.exc import OperationalError

    from node.files import retention
    from node.installation import LEDGER
    from node.ledger.ledger import Ledger

    settings = _settings(config)
    file = settings.data / LEDGER
    if not file.exists():
        fail(f"no ledger at {file}: nothing was received yet, or --config or the working folder is another's")
    ledger = Ledger(f"sqlite:///{file}")
    try:
        ledger.migrate()
    except OperationalError as error:
        hint = retention.pressure(settings) or "look at its file system, and at what else has it open"
        fail(f"the ledger cannot be opened now ({error.orig}), what it holds is kept: {hint}")
    return ledger


def _print_json(series: Iterable[SeriesView]) -> None:
    """Print a JSON array, one series after the other: there may be very many."""
    from node.ledger.views import as_json

    separator = "["
    for one in series:
        print(separator, json.dumps(as_json(one), indent=2), sep="\n")
        separator = ","
    print("]" if separator == "," else "[]")


def _environment(config: Path | None, broker_url: str) -> dict[str, str]:
    """What a child process needs to have the same settings; the broker's password travels here, not in arguments."""
    named = {CONFIG_VARIABLE: str(config.resolve())} if config else {}
    return {**named, "LUNGNODE_BROKER": broker_url}


def _peer(settings: Settings, name: str) -> Peer:
    if name in settings.peers:
        return settings.peers[name]
    ae_title, _, address = name.partition("@")
    host, _, port = address.rpartition(":")
    if not (ae_title and host and port.isdigit()):
        known = ", ".join(settings.peers) or "none"
        fail(f"no peer '{name}' in the settings (there: {known}), and it is not AE@HOST:PORT")
    return Peer(ae_title=ae_title, host=host, port=int(port))
