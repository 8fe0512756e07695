"""Models say what they are for: nothing is inferred from the number of channels or from a position."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from models.registry import BUNDLES, BundleError, load_bundle, verify
from models.roles import INFECTION, LUNGS, Role
from node.analysis import run
from node.cli.main import app
from node.config import Settings
from node.methods.pneumonia.method import METHOD


def copy(folder: Path, of: str = "lungs", **changes: Any) -> Path:
    """A shipped bundle under the name 'ours', with other metadata; a change to None takes a key away."""
    made = Path(shutil.copytree(BUNDLES / of, folder / "ours"))
    file = made / "configs" / "metadata.json"
    metadata = json.loads(file.read_text()) | {"name": "ours"} | changes
    file.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))
    return made


def test_shipped_models_have_the_roles_of_their_method() -> None:
    for name, role in METHOD.roles.items():
        role.require(load_bundle(role.default))
        assert (name, load_bundle(role.default).metadata["role"]) == (role.name, role.name)


@pytest.mark.parametrize(
    ("of", "changes", "role", "told"),
    [
        ("lungs", {}, INFECTION, "is a model of lungs, not of infection"),
        # By its channels it could be one of infection; it says that it is not.
        ("infection", {"role": "nodules"}, INFECTION, "is a model of nodules, not of infection"),
        # From before roles were recorded: the settings' word counts, and the rest must fit.
        ("lungs", {"role": None}, INFECTION, "needs 'threshold'"),
        ("lungs", {"role": None, "threshold": 0.5, "minimum_lesion_mm3": 9}, INFECTION, "3 channels in 2 dimensions"),
        ("lungs", {"dimensions": 3}, LUNGS, "3 channels in 3 dimensions, not 3 in 2"),
        ("infection", {"minimum_lesion_mm3": 0}, INFECTION, "minimum_lesion_mm3 must be positive"),
        ("infection", {"threshold": None}, INFECTION, "needs 'threshold'"),
    ],
)
def test_a_model_of_another_role_is_refused(
    tmp_path: Path, of: str, changes: dict[str, Any], role: Role, told: str
) -> None:
    with pytest.raises(BundleError, match=told):
        role.require(load_bundle(copy(tmp_path, of, **changes)))


def test_a_model_from_before_roles_were_recorded_still_runs(tmp_path: Path) -> None:
    bundle = load_bundle(copy(tmp_path, role=None, dimensions=None))
    LUNGS.require(bundle)
    with pytest.raises(BundleError, match="'role' is missing"):
        verify(bundle)


def test_a_role_that_only_another_method_knows_is_no_fault(tmp_path: Path) -> None:
    verify(load_bundle(copy(tmp_path, "infection", role="nodules", threshold=None)))


def test_an_analysis_names_the_model_that_does_not_fit() -> None:
    settings = Settings.model_validate({"models": {"pneumonia": {"infection": "lungs"}}})
    with pytest.raises(BundleError, match="model 'lungs' is a model of lungs, not of infection"):
        run.models_of("pneumonia", settings)
    assert list(run.models_of("pneumonia", Settings())) == ["lungs", "infection"]


def test_the_list_of_models_says_what_each_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = json.loads(CliRunner().invoke(app, ["models", "list", "--json"]).stdout)
    assert {row["name"]: row["role"] for row in rows} == {"lungs": "lungs", "infection": "infection"}
