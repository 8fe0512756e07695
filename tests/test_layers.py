"""Data flows one way: a package never imports one that stands later on the path of a series."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

#: Stage → its place on the path; stages of one place may import each other.
STAGES = {"intake": 0, "methods": 1, "analysis": 1, "results": 2, "delivery": 3}

#: Stages that do not know each other.
STRANGERS = {"results", "delivery"}

#: What puts the stages together; no stage imports it.
ABOVE = ("tasks", "cli", "console")

#: What every stage may import: it knows no stage itself.
FOUNDATION = (
    "config.py",
    "identity.py",
    "installation.py",
    "paths.py",
    "permissions.py",
    "terminal.py",
    "text.py",
    "files",
    "images",
    "ledger",
    "network",
    "telemetry",
)

#: Modules of a stage that hold names only, which settings are checked by.
LIGHT = ("node.results.forms", "node.methods.registry")


def modules(folder: str) -> Iterator[tuple[str, str]]:
    """Each module below a folder, and each that it imports, also within functions and for types."""
    whole = REPOSITORY / folder
    for file in [whole] if whole.suffix else sorted(whole.rglob("*.py")):
        parts = file.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield from ((name, target) for target in imported(file))


def imported(file: Path) -> Iterator[str]:
    for statement in ast.walk(ast.parse(file.read_text())):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                whole = f"{statement.module}.{alias.name}"
                path = REPOSITORY.joinpath(*whole.split("."))
                yield whole if path.is_dir() or path.with_suffix(".py").exists() else statement.module


def package(module: str) -> str:
    """The package of the node that a module is in; '' for others."""
    parts = module.split(".")
    return parts[1] if parts[0] == "node" and len(parts) > 1 else ""


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_none_that_stands_later(stage: str) -> None:
    wrong = []
    for module, target in modules(f"node/{stage}"):
        of = package(target)
        later = STAGES.get(of, 0) > STAGES[stage] or {of, stage} == STRANGERS
        if (later or of in ABOVE) and target not in LIGHT:
            wrong.append(f"{module} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("part", FOUNDATION)
def test_the_foundation_knows_no_stage(part: str) -> None:
    found = [
        f"{module} imports {target}"
        for module, target in modules(f"node/{part}")
        if package(target) in (*STAGES, *ABOVE) and target not in LIGHT
    ]
    assert found == []


def test_every_part_of_the_node_has_its_place() -> None:
    """A new package is a stage, part of the foundation, or put above the stages on purpose."""
    parts = {
        path.name
        for path in (REPOSITORY / "node").iterdir()
        if (path.is_dir() and (path / "__init__.py").exists()) or path.suffix == ".py"
    }
    above = {"__init__.py", "__main__.py", "cli", "method_settings.py", "operations", "recording.py", "tasks.py"}
    assert parts - {"console"} == {*STAGES, *FOUNDATION, *above}


def test_models_import_nothing_of_the_node() -> None:
    assert [
        f"{module} imports {target}" for module, target in modules("models") if target.split(".")[0] == "node"
    ] == []


def test_what_a_node_runs_needs_no_training_code() -> None:
    """`models.training` needs packages of an extra: of `models`, only itself imports it, and the drawing of phantoms,
    which the demo and `lungnode phantom` use, does without."""
    assert [
        f"{module} imports {target}"
        for module, target in modules("models")
        if target.startswith("models.training") and not module.startswith("models.training")
    ] == []


def test_results_know_no_method() -> None:
    """Neither by an import nor by a word: what is said of an organ is the method's."""
    own = ("node.methods.outcome", "node.methods.codes", "node.methods.registry")
    known = [
        f"{module} imports {target}"
        for module, target in modules("node/results")
        if package(target) == "methods" and target not in own
    ]
    assert known == []
    words = ("lung", "infect", "pneumon", "chest", "lesion")
    for file in sorted((REPOSITORY / "node/results").rglob("*.py")):
        texts = [
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and not is_docstring(node, file)
        ]
        plain = " ".join(texts).lower().replace("lungnode", "")
        assert [word for word in words if word in plain] == [], file.name


def is_docstring(constant: ast.Constant, file: Path) -> bool:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            if isinstance(first, ast.Expr) and first.value.lineno == constant.lineno:  # type: ignore[attr-defined]
                return True
    return False


def test_what_settings_are_checked_by_imports_no_network() -> None:
    """`config check` and each command start in a moment: no torch, no highdicom, before there is work for them."""
    heavy = {"torch", "monai", "openvino", "highdicom", "numba", "scipy"}
    for module in ("node/config.py", "node/results/forms.py", "node/methods/registry.py", "node/methods/outcome.py"):
        tops = {target.split(".")[0] for target in imported(REPOSITORY / module)}
        assert not tops & heavy, module
