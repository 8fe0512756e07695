"""Commands for those who train, measure and bring models: `lungnode evaluate`, `train` and `models`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import MofNCompleteColumn
from rich.table import Table
from rich.text import Text

from node.config import CONFIG_VARIABLE, ConfigError, load
from node.methods import registry
from node.terminal import err, fail, out, progress

if TYPE_CHECKING:  # torch takes seconds to import, and every command of the node imports this module
    from models.registry import Bundle
    from models.training.evaluate import Figure

Task = Literal["lungs", "infection"]
TaskArgument = Annotated[Task, typer.Argument(help="Which of the two networks.")]
Data = Annotated[Path, typer.Option(help="Folder that holds slices/, the public data.", envvar="LUNGNODE_DATA")]

Config = Annotated[Path | None, typer.Option("--config", "-c", help="Settings file.", envvar=CONFIG_VARIABLE)]

models_app = typer.Typer(help="List, check and bring in models.", no_args_is_help=True)


def evaluate(
    task: TaskArgument,
    data: Data,
    bundle: Annotated[
        str | None, typer.Option(help="Name or folder of a model; the shipped one when left out.")
    ] = None,
    pictures: Annotated[
        Path, typer.Option(help="Folder for the worst, median and best case of each data set, as PNG.")
    ] = Path("evaluation"),
    seed: Annotated[int, typer.Option(help="The seed that training was run with: it decides who was held out.")] = 0,
    reference: Annotated[
        bool,
        typer.Option("--reference", help="Measure the network alone, in torch and float32, as for its card."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a model on patients that were held out of its training, as a node here would run it."""
    from models.registry import BundleError, load_bundle
    from models.training.evaluate import cases_of, figures_of, held_out
    from models.training.pictures import draw_cases
    from models.training.shipped import shipped_cases

    _require_data(data)
    try:
        measured = load_bundle(bundle or task)
        _, patients = held_out(task, data, seed)
        with progress(err, "{task.description}", MofNCompleteColumn()) as bars:
            found = (cases_of if reference else shipped_cases)(task, measured, patients)
            cases = list(bars.track(found, len(patients), description="measuring"))
    except BundleError as error:
        fail(str(error))
    figures = figures_of(cases)
    drawn = []
    for source in sorted({case.patient.source for case in cases if f"Dice {task}" in case.values}):
        drawn.append(pictures / f"{task}-{source}.png")
        draw_cases([case for case in cases if case.patient.source == source], f"Dice {task}", drawn[-1])
    if as_json:
        print(json.dumps({"model": asdict(measured.identity), "figures": [asdict(one) for one in figures]}, indent=2))
    else:
        out.print(_table(measured, figures))
    for file in drawn:
        err.print(str(file), soft_wrap=True)


def train(
    task: TaskArgument,
    data: Data,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates; or give --minutes.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Time to train; or give --steps.")] = None,
    seed: Annotated[int, typer.Option(help="Decides who is held out, and all chance.")] = 0,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for weights and curve; build/training/TASK when left out."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="More than one stall each other on busy cores.")] = 1,
) -> None:
    """Train one of the two networks on the public data and on phantoms; a run that was stopped goes on."""
    if (steps is None) == (minutes is None):
        fail("give either --steps or --minutes")
    _require_data(data)
    import torch

    from models.training.pictures import draw_curve
    from models.training.train import train as run

    torch.set_num_threads(threads)
    folder = out_folder or Path("build/training") / task
    weights = run(task, data, folder, seed=seed, steps=steps, minutes=minutes)
    out.print(f"weights: {weights}", soft_wrap=True)
    try:
        draw_curve(folder / "curve.jsonl", folder / "curve.png")
    except ImportError:
        err.print("no picture of the run: install matplotlib, or `pip install lungnode[training]`")
    except ValueError as error:
        err.print(f"no picture of the run: {error}", soft_wrap=True)
    else:
        out.print(f"curve: {folder / 'curve.png'}", soft_wrap=True)


@models_app.command("list")
def models_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    config: Config = None,
) -> None:
    """List the models: version, digest, licence and what was measured of them."""
    from models.registry import BundleError, list_bundles, load_bundle, shown

    folder = _installed(config)
    rows: list[dict[str, str]] = []
    for name in list_bundles(folder):
        try:
            bundle = load_bundle(name, folder)
        except BundleError as error:
            rows.append(
                {"name": name, "role": "", "version": "", "digest": f"wrong: {error}", "licence": "", "measured": ""}
            )
            continue
        about = bundle.metadata
        rows.append(
            {
                "name": bundle.name,
                "role": str(about.get("role", "not stated")),
                "version": bundle.version,
                "digest": f"ok, {bundle.sha256[:12]}",
                "licence": shown(about.get("license", "not stated")),
                "measured": "; ".join(_headlines(about)) or "nothing",
            }
        )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("model", "role", "version", "digest", "licence", "measured")
    for row in rows:
        table.add_row(*map(Text, row.values()), style="red" if row["digest"].startswith("wrong") else None)
    out.print(table)


@models_app.command("verify")
def models_verify(
    name: Annotated[str | None, typer.Argument(help="One model; all when left out.")] = None, config: Config = None
) -> None:
    """Check digests, build every network and run it once."""
    from models.registry import BundleError, list_bundles, load_bundle, verify

    folder = _installed(config)
    wrong = 0
    for one in [name] if name else list_bundles(folder):
        try:
            bundle = load_bundle(one, folder)
            verify(bundle)
        except BundleError as error:
            wrong += 1
            err.print(f"{one}: {error}", style="red", soft_wrap=True)
        else:
            out.print(f"{bundle.name} {bundle.version}: digest ok, loads, runs")
    if wrong:
        raise typer.Exit(1)


@models_app.command("install")
def models_install(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.zip", help="MONAI bundle as a ZIP file.", exists=True, dir_okay=False)
    ],
    config: Config = None,
) -> None:
    """Install a MONAI bundle of your own, for the settings to name under models."""
    from models.install import install
    from models.registry import BundleError

    try:
        bundle, left_out = install(file, _installed(config))
    except BundleError as error:
        fail(str(error))
    for one in left_out:
        err.print(f"left out, not needed: {one}", soft_wrap=True)
    _tell_installed(bundle)


@models_app.command("import-r231")
def models_import_r231(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.pth", help="Weights of lungmask's R231.", exists=True, dir_okay=False)
    ],
    name: Annotated[str, typer.Option(help="What to call the model.")] = "lungs-r231",
    config: Config = None,
) -> None:
    """Make a lung model of the published weights of lungmask's U-net R231."""
    from models.install import import_r231
    from models.registry import BundleError

    try:
        _tell_installed(import_r231(file, _installed(config), name))
    except BundleError as error:
        fail(str(error))


def _installed(config: Path | None) -> Path:
    try:
        return load(config).installed_models
    except ConfigError as error:
        fail(str(error))


def _tell_installed(bundle: Bundle) -> None:
    from models.roles import role_of

    role = role_of(bundle.metadata)
    out.print(f"{bundle.name} {bundle.version} is in {bundle.path}", soft_wrap=True)
    for name in registry.names():
        try:
            roles = registry.find(name).roles
        except registry.MethodError:
            continue  # somebody else's package, which is no reason to fail here
        for key in (key for key, wanted in roles.items() if wanted.name == role):
            told = f"To analyse with it, set in the settings: models: {{{name}: {{{key}: {bundle.name}}}}}"
            out.print(told, soft_wrap=True)


def _headlines(metadata: dict[str, Any]) -> list[str]:
    """Dice of each data set, cross-validated where that was done; nothing where figures have another form."""
    from models.registry import shown

    try:
        figures = [*metadata.get("cross_validation", ()), *metadata.get("held_out", ())]
        dice = {
            shown(one["source"], 40): float(one["mean"])
            for one in reversed(figures)
            if one["measure"] in ("Dice lungs", "Dice infection")
        }
    except (KeyError, TypeError, ValueError):
        return []
    return [f"Dice {value:.2f} on {source}" for source, value in dice.items()]


def _table(bundle: Bundle, figures: list[Figure]) -> Table:
    table = Table("data set", "measure", "value", "95 % interval", "of", title=f"{bundle.name} {bundle.version}")
    for index, one in enumerate(figures):
        alone = one.patients == 1 and not one.trials
        what = one.measure.split()[0] + "s" if one.trials else ""
        table.add_row(
            one.source,
            one.measure,
            f"{one.mean:.3f}",
            "one patient only" if alone else f"{one.low:.3f} to {one.high:.3f}",
            f"{one.trials} {what} of {one.patients} patients" if one.trials else f"{one.patients} patients",
            end_section=index + 1 < len(figures) and figures[index + 1].source != one.source,
        )
    return table


def _require_data(data: Path) -> None:
    if not (data / "slices").is_dir():
        fail(f"no data at {data / 'slices'}: --data or LUNGNODE_DATA must name the folder that holds slices/")
