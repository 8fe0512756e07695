"""Documentation that drifts from the code fails here."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise

import typer.main
from conftest import REPOSITORY
from typer.core import TyperGroup

from node import __version__
from node.cli.main import app
from node.cli.render import STYLE
from node.methods.codes import QUALITY
from node.methods.pneumonia.codes import PRIVATE_CODES

README = (REPOSITORY / "README.md").read_text()


def commands() -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(group: TyperGroup, prefix: str) -> None:
        for name, command in group.commands.items():
            if isinstance(command, TyperGroup):
                walk(command, f"{prefix} {name}")
            else:
                found[f"{prefix} {name}"] = command.help or ""
                for parameter in command.params:
                    assert getattr(parameter, "help", ""), f"{prefix} {name}: {parameter.name} has no help"

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    walk(group, "lungnode")
    return found


def test_every_command_has_help_and_stands_in_the_readme_and_no_other_does() -> None:
    in_code = commands()
    assert all(in_code.values())
    in_readme = {match.strip() for match in re.findall(r"^\| `(lungnode(?: [a-z][a-z0-9-]+)+)", README, re.MULTILINE)}
    assert in_readme == set(in_code)


def test_links_lead_somewhere() -> None:
    for document in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("models/**/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_states_of_the_operation_guide_are_those_of_the_code() -> None:
    guide = (REPOSITORY / "docs" / "operation.md").read_text().split("## States")[1].split("##")[0]
    assert set(re.findall(r"^\| (\w[\w ]*?) \|", guide, re.MULTILINE)) - {"state"} == set(STYLE)


def test_faults_are_caused_by_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (REPOSITORY / "docs" / "reliability.md").read_text())
    rows = [line for line in (REPOSITORY / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")]
    assert all("::test_" in row for row in rows if not row.startswith("| fault"))
    for file, name in named:
        assert f"def {name}(" in (REPOSITORY / file).read_text(), f"{file} has no {name}"


def test_one_version_everywhere() -> None:
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_constraints_name_no_registry_and_pin_all_direct_dependencies() -> None:
    text = (REPOSITORY / "constraints.txt").read_text()
    assert "://" not in text
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in text.splitlines() if "==" in line}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.split(r"[><=;\[ ]", one)[0].lower() for one in wanted} <= pinned


def test_private_codes_of_the_results_page_are_those_of_the_code() -> None:
    page = (REPOSITORY / "docs" / "results.md").read_text()
    cells = [cell.strip() for line in page.splitlines() if re.match(r"\| \d{3} \|", line) for cell in line.split("|")]
    told = {code: meaning for code, meaning in pairwise(cells) if re.fullmatch(r"\d{3}", code)}
    assert told == PRIVATE_CODES | {QUALITY.value: QUALITY.meaning}
