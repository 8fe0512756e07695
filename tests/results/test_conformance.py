"""The DICOM conformance statement says what the code does; one that drifts fails here."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conformance import limits, tables
from conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "conformance.md"

#: A table stands between a comment with its name and an empty line.
TABLE = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)\n\n", re.DOTALL)


def test_tables_of_the_conformance_statement_are_those_of_the_code(tmp_path: Path) -> None:
    made = tables(tmp_path)
    if os.environ.get("LUNGNODE_CONFORMANCE") == "write":
        PAGE.write_text(TABLE.sub(lambda found: f"<!-- table: {found[1]} -->\n{made[found[1]]}\n\n", PAGE.read_text()))
    told = dict(TABLE.findall(PAGE.read_text()))
    assert set(told) == set(made)
    for name, table in made.items():
        assert told[name] == table, f"the table {name} has drifted; renew it with LUNGNODE_CONFORMANCE=write"


def test_a_drift_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    told = dict(TABLE.findall(PAGE.read_text()))
    assert limits() == told["limits"]
    monkeypatch.setattr("node.network.associations.MAX_PDU", 16384)
    assert limits() != told["limits"]
