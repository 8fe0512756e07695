"""Writes docs/reference/: the commands from the typer app, the settings from the pydantic schema.

Run it (`make docs` does) when a command or a setting changes; a test compares what it would write with what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from typer.core import TyperGroup

from node.cli.main import app
from node.config import schema

FOLDER = Path(__file__).parent / "reference"


def pages() -> dict[str, str]:
    """Text of each page, by the name of its file."""
    return {"commands.md": "\n".join(_commands()), "settings.md": "\n".join(_settings())}


def _commands() -> Iterator[str]:
    yield "# Commands\n"
    yield "What `lungnode COMMAND --help` says. `--config` defaults to `config/node.yaml` of the working folder.\n"
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    yield from _group(root, "lungnode")


def _group(group: TyperGroup, path: str) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        here = f"{path} {name}"
        if isinstance(command, TyperGroup):
            yield from _group(command, here)
            continue
        arguments = [_name(one) for one in command.params if one.param_type_name == "argument"]
        yield f"## {here}\n"
        yield f"{command.help}\n"
        yield f"    {' '.join([here, *arguments, '[OPTIONS]'])}\n"
        rows = [_parameter(one) for one in command.params]
        if rows:
            yield "| parameter | default | what it is |\n|---|---|---|"
            yield "\n".join(rows) + "\n"


def _parameter(one: Any) -> str:
    help_text = one.help + (f" Environment: `{one.envvar}`." if one.envvar else "")
    default = "" if one.default is None or one.default is False else f"`{one.default}`"
    return f"| `{_name(one)}` | {'required' if one.required else default} | {_cell(help_text)} |"


def _name(one: Any) -> str:
    """The option's names, or the argument as usage lines write it."""
    if one.param_type_name == "option":
        return ", ".join(one.opts)
    name = str(one.metavar or one.name.upper()).strip("[]")
    return name if one.required else f"[{name}]"


def _settings() -> Iterator[str]:
    whole = schema()
    yield "# Settings\n"
    yield "Keys of the settings file, `config/node.yaml`. `lungnode config check FILE` names line, key and hint of a"
    yield "mistake; `lungnode config schema` prints the JSON schema, for editors.\n"
    yield from _section("Settings", whole, whole)
    for name, section in whole["$defs"].items():
        if "properties" in section:
            yield from _section(name, section, whole)


def _section(name: str, section: dict[str, Any], whole: dict[str, Any]) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{section.get('description', '').strip()}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for key, value in section["properties"].items():
        required = key in section.get("required", ())
        default = "required" if required else _default(value)
        yield f"| `{key}` | {_cell(_kind(value, whole))} | {_cell(default)} | {_cell(value.get('description', ''))} |"
    yield ""


def _default(value: dict[str, Any]) -> str:
    """What stands in a cell for a default; a section's own is told in its table."""
    default = value.get("default", {})
    return "" if isinstance(default, dict) else f"`{json.dumps(default)}`"


def _kind(value: dict[str, Any], whole: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        target = whole["$defs"][name]
        return f"[{name}](#{name.lower()})" if "properties" in target else _kind(target, whole)
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(one, whole) for one in value["anyOf"]))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if value.get("type") == "array":
        items = value.get("items") or next(iter(value.get("prefixItems", [])), {})
        return f"list of {_kind(items, whole)}"
    if value.get("type") == "object":
        return f"name: {_kind(value.get('additionalProperties') or {}, whole)}"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    return words.get(value.get("type", ""), value.get("type", "any")) + _bounds(value)


def _bounds(value: dict[str, Any]) -> str:
    low, high = value.get("minimum", value.get("exclusiveMinimum")), value.get("maximum", value.get("exclusiveMaximum"))
    above = "above" if "exclusiveMinimum" in value else "from"
    words = [f"{above} {low}"] * (low is not None) + [f"to {high}"] * (high is not None)
    return f" {' '.join(words)}" if words else ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
