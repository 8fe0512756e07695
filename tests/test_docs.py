"""Documentation that drifts from the code fails here."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import REPOSITORY
from typer.core import TyperGroup

from node import __version__
from node.cli.main import app
from node.cli.render import STYLE
from node.config import schema
from node.ledger.transitions import diagram
from node.methods.codes import QUALITY
from node.methods.pneumonia.codes import PRIVATE_CODES


def reference() -> Any:
    """The module docs/reference.py."""
    found = importlib.util.spec_from_file_location("reference", REPOSITORY / "docs" / "reference.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


README = (REPOSITORY / "README.md").read_text()


def commands() -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(group: TyperGroup, prefix: str) -> None:
        assert group.help, f"{prefix} has no help"
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


def test_reference_pages_are_those_of_the_code() -> None:
    for name, text in reference().pages().items():
        assert (REPOSITORY / "docs" / "reference" / name).read_text() == text, f"{name} drifted; run `make docs`"


def test_reference_names_every_command_and_every_setting() -> None:
    pages = reference().pages()
    assert set(re.findall(r"^## (lungnode .*)$", pages["commands.md"], re.MULTILINE)) == set(commands())
    for section in [schema(), *schema()["$defs"].values()]:
        for key, value in section.get("properties", {}).items():
            assert value["description"], key
            assert re.search(rf"^\| `{key}` \| [^|]", pages["settings.md"], re.MULTILINE), key


def test_site_builds_without_a_warning_and_asks_for_nothing_outside_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        asked_for = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"([^\"]+)", page.read_text())
        assert asked_for
        assert [one for one in asked_for if "//" in one] == [], page.name


def test_links_lead_somewhere() -> None:
    for document in (
        REPOSITORY / "README.md",
        *(REPOSITORY / "docs").glob("**/*.md"),
        *REPOSITORY.glob("models/**/*.md"),
    ):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_states_of_the_operation_guide_are_those_of_the_code() -> None:
    guide = (REPOSITORY / "docs" / "operation.md").read_text().split("## States")[1].split("##")[0]
    assert set(re.findall(r"^\| (\w[\w ]*?) \|", guide, re.MULTILINE)) - {"state"} == set(STYLE)


@pytest.mark.parametrize(("page", "head"), [("reliability.md", "fault"), ("security.md", "threat")])
def test_rows_name_tests_that_exist(page: str, head: str) -> None:
    tables = re.split(r"\n\n+", (REPOSITORY / "docs" / page).read_text())
    rows = [line for table in tables if table.startswith(f"| {head} |") for line in table.splitlines()[2:]]
    assert rows
    assert all("::test_" in row for row in rows)
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", "\n".join(rows)):
        assert f"def {name}(" in (REPOSITORY / file).read_text(), f"{file} has no {name}"


def test_one_version_everywhere() -> None:
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_constraints_name_no_registry_and_pin_all_direct_dependencies() -> None:
    text = (REPOSITORY / "constraints.txt").read_text()
    assert "://" not in text
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in text.splitlines() if "==" in line}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for extra in set(extras) - {"bench"} for one in extras[extra])]
    assert {re.split(r"[><=;\[ ]", one)[0].lower() for one in wanted} - {"lungnode"} <= pinned


def test_private_codes_of_the_results_page_are_those_of_the_code() -> None:
    page = (REPOSITORY / "docs" / "results.md").read_text()
    cells = [cell.strip() for line in page.splitlines() if re.match(r"\| \d{3} \|", line) for cell in line.split("|")]
    told = {code: meaning for code, meaning in pairwise(cells) if re.fullmatch(r"\d{3}", code)}
    assert told == PRIVATE_CODES | {QUALITY.value: QUALITY.meaning}


def test_architecture_draws_the_states_of_the_table_and_names_files_that_exist() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert re.search(r"```mermaid\n(.*?)```", page, re.DOTALL)[1].strip() == diagram().strip()  # type: ignore[index]
    named = set(re.findall(r"`((?:node|models|tests)/[\w./-]*)`", page))
    assert len(named) > 30
    assert not [name for name in named if not (REPOSITORY / name).exists()]
    # Each package of the node has its line.
    packages = {f"node/{path.name}/" for path in (REPOSITORY / "node").iterdir() if (path / "__init__.py").exists()}
    assert packages <= {name if name.endswith("/") else f"{name}/" for name in named}
