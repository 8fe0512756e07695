"""Settings: the default file works, and every error names file, line, key and the fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from pydicom import Dataset

from node.config import AETitle, ConfigError, Problem, Route, Settings, check, load, parse, schema

PEER = "peers:\n  pacs: {ae_title: PACS, host: localhost, port: 104}\n"


def problem(text: str) -> Problem:
    with pytest.raises(ConfigError) as caught:
        parse(text, Path("node.yaml"))
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_default_file_works_and_states_the_defaults() -> None:
    settings = load(REPOSITORY / "config" / "node.yaml")
    bare = Settings()
    # A new installation enforces what one that is upgraded only warns of.
    assert settings.listener == bare.listener.model_copy(update={"addresses": "enforce"})
    assert settings.worker == bare.worker
    assert (settings.data, settings.broker) == (bare.data, bare.broker)
    assert settings.routes[0].to == {"pacs": ("infection-seg", "lung-seg", "sr", "capture")}


def test_empty_file_is_the_defaults() -> None:
    assert parse("") == Settings()


@pytest.mark.parametrize(
    ("text", "line", "key", "what", "hint"),
    [
        ("listener:\n  prot: 104\n", 2, "listener.prot", "unknown key", "Did you mean 'port'?"),
        ("listner:\n  port: 104\n", 1, "listner", "unknown key", "Did you mean 'listener'?"),
        (
            "listener:\n  ae_title: A\n  port: high\n",
            3,
            "listener.port",
            "valid integer",
            "for instance 11112",
        ),
        ("listener:\n  port: 70000\n", 2, "listener.port", "65535", "TCP port"),
        (
            "listener:\n  ae_title: SEVENTEENLETTERSX\n",
            2,
            "listener.ae_title",
            "pattern",
            "1 to 16 characters",
        ),
        (
            "peers:\n  pacs:\n    ae_title: PACS\n    port: 104\n",
            2,
            "peers.pacs.host",
            "is missing",
            "host name",
        ),
        (
            PEER + "routes:\n- name: a\n  to:\n    pax: [sr]\n",
            6,
            "routes.0.to.pax",
            "no peer",
            "Did you mean 'pacs'?",
        ),
        (
            PEER + "routes:\n- name: a\n  to:\n    pacs: [gsps]\n",
            6,
            "routes.0.to.pacs.0",
            "'sr'",
            "infection-seg",
        ),
        (
            PEER + "routes:\n- name: a\n  when: {StationNam: X}\n  to: {pacs: [sr]}\n",
            5,
            "routes.0.when.StationNam",
            "not a DICOM keyword",
            "Did you mean 'StationName'?",
        ),
        ("broker: redis://:secret@host/0\n", 1, "broker", "holds a password", "LUNGNODE_BROKER"),
        ("listener: [\n", 2, "yaml", "", "indentation"),
    ],
)
def test_error_names_line_key_and_fix(text: str, line: int, key: str, what: str, hint: str) -> None:
    found = problem(text)
    assert (found.line, found.key) == (line, key)
    assert what in found.what
    assert hint in found.hint
    assert str(found).startswith(f"node.yaml:{line}: {key}: ")


def test_secrets_stay_out_of_messages() -> None:
    assert "secret" not in str(problem("broker: redis://:secret@host/0\n"))


def test_peer_that_may_not_receive_is_no_destination() -> None:
    text = "peers:\n  ct: {ae_title: CT, host: h, port: 104, may: [send]}\nroutes:\n- {name: a, to: {ct: [sr]}}\n"
    assert problem(text).what == "peer 'ct' may not receive"


def test_environment_brings_urls_with_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNGNODE_BROKER", "redis://:secret@host/0")
    assert load(REPOSITORY / "config" / "node.yaml").broker == "redis://:secret@host/0"


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml:0: file: No such file"):
        load(Path("nowhere.yaml"))


def test_schema_describes_every_key() -> None:
    definitions = schema()
    for part in (definitions, *definitions["$defs"].values()):
        assert all("description" in value for value in part["properties"].values()), part["title"]


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20))
def test_ae_titles_are_those_of_the_standard(title: str) -> None:
    standard = len(title) <= 16 and "\\" not in title and title == title.strip() != ""
    try:
        TypeAdapter(AETitle).validate_python(title)
    except ValidationError:
        assert not standard
    else:
        assert standard


@pytest.mark.parametrize(
    ("when", "names", "taken"),
    [
        ({}, ["ct1"], True),
        ({}, ["other"], False),
        ({"Modality": "CT"}, ["ct1"], True),
        ({"Modality": ["MR", "CT"]}, ["ct1"], True),
        ({"Modality": "MR"}, ["ct1"], False),
        ({"StationName": "CT*"}, ["ct1"], True),
        ({"ImageType": "AXIAL"}, ["ct1"], True),
        ({"Modality": "CT", "BodyPartExamined": "*"}, ["ct1"], False),
        ({"SeriesNumber": "4"}, ["ct1"], True),
    ],
)
def test_route_takes_by_peer_and_tags(when: dict[str, str], names: list[str], taken: bool) -> None:
    header = Dataset()
    header.Modality, header.StationName, header.ImageType, header.SeriesNumber = "CT", "CT01", ["ORIGINAL", "AXIAL"], 4
    route = Route.model_validate({"name": "r", "from": ["ct1"], "when": when, "to": {}})
    assert route.takes(names, header) is taken


ROUTE = PEER + "routes:\n- name: a\n"


@pytest.mark.parametrize(
    ("text", "line", "key", "what", "hint"),
    [
        (
            ROUTE + "  analysis: pneumonai\n  to: {pacs: [sr]}\n",
            5,
            "routes.0.analysis",
            "no method is called 'pneumonai'; installed: pneumonia",
            "Did you mean 'pneumonia'?",
        ),
        (
            ROUTE + "  to: {pacs: [emphysema-seg]}\n",
            5,
            "routes.0.to.pacs.0",
            "'emphysema-seg' is no object of the method pneumonia",
            "Name one of infection-seg, lung-seg, sr, capture, pdf.",
        ),
        (
            PEER.replace("104}", "104, takes: [srr]}"),
            2,
            "peers.pacs.takes.0",
            "'srr' is no object of any method here",
            "Did you mean 'sr'?",
        ),
        (
            "models:\n  pneumonia:\n    lung: lungs\n",
            3,
            "models.pneumonia.lung",
            "the method pneumonia needs no model 'lung'",
            "Did you mean 'lungs'?",
        ),
        ("models: {lung: lungs}\n", 1, "models.lung", "needs no model 'lung'", "Did you mean 'lungs'?"),
        (
            "models:\n  pneumonai: {lungs: lungs}\n",
            2,
            "models.pneumonai",
            "no method is called 'pneumonai'",
            "Did you mean 'pneumonia'?",
        ),
    ],
)
def test_methods_their_objects_and_their_models_are_checked(
    text: str, line: int, key: str, what: str, hint: str
) -> None:
    test_error_names_line_key_and_fix(text, line, key, what, hint)


def written(folder: Path, text: str) -> Path:
    file = folder / "node.yaml"
    file.write_text(f"data: {folder / 'var'}\n{text}")
    return file


@pytest.mark.parametrize(
    ("text", "line", "key", "what"),
    [
        ("models: {infection: lungs}\n", 2, "models.infection", "is a model of lungs, not of infection"),
        ("models:\n  pneumonia:\n    lungs: infection\n", 4, "models.pneumonia.lungs", "is a model of infection"),
        ("models:\n  pneumonia: {lungs: ours}\n", 3, "models.pneumonia.lungs", "no bundle 'ours'"),
    ],
)
def test_a_model_of_another_role_is_refused_before_a_patient_s_series(
    tmp_path: Path, text: str, line: int, key: str, what: str
) -> None:
    file = written(tmp_path, text)
    load(file)  # the node starts: the model may be installed yet
    with pytest.raises(ConfigError) as caught:
        check(file)
    (found,) = caught.value.problems
    assert (found.line, found.key) == (line, key)
    assert what in found.what
    assert "lungnode models list" in found.hint


def test_models_of_the_old_form_are_those_of_pneumonia_with_a_hint(tmp_path: Path) -> None:
    settings, hints = check(written(tmp_path, "models: {lungs: lungs, infection: infection}\n"))
    assert settings.models_for("pneumonia") == {"lungs": "lungs", "infection": "infection"}
    assert settings.models_for("another") == {}
    (hint,) = (one for one in hints if one.startswith("models"))
    assert "models: {pneumonia: {lungs: lungs, infection: infection}}" in hint
    settings, hints = check(written(tmp_path, "models: {pneumonia: {lungs: lungs}}\n"))
    assert settings.models_for("pneumonia") == {"lungs": "lungs"}
    assert not any(one.startswith("models") for one in hints)


def test_checking_settings_imports_no_network() -> None:
    code = "import sys; from node.config import check; from pathlib import Path; check(Path('config/node.yaml'))"
    code += "; print(sorted({'torch', 'monai', 'openvino', 'highdicom', 'numba', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
