"""The house rules: imports in one direction, DVC's dependencies, documentation."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from moco.settings.reading import parse
from moco.settings.schema import Config, docs
from moco.stages import identity

SOURCE = ROOT / "src"
MODULES = identity.modules()
# A module may import from its own level's package and from every level below.
LEVELS = [
    {"moco.redaction"},
    {"moco", "moco.errors"},
    {"moco.environment", "moco.safe_path"},
    {"moco.files", "moco.memory", "moco.cores"},
    {"moco.settings", "moco.holder", "moco.csv_files"},
    {"moco.data", "moco.model", "moco.selection"},
    {"moco.training", "moco.submission"},
    {"moco.tracking"},
    {"moco.stages", "moco.cluster"},
    {"moco.labelling"},
    {"moco.cli_options"},
    {"moco.cli_cluster", "moco.cli_runs"},
    {"moco.cli"},
]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def package(module: str) -> str:
    """'moco.data' for 'moco.data.cache', 'moco.cli' for 'moco.cli'."""
    return ".".join(module.split(".")[:2])


def imports(module: str) -> set[str]:
    return identity.imports(module, MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    for other in imports(module):
        same = package(other) == package(module)
        assert same or level[package(other)] < level[package(module)], f"{module} imports {other}"


def test_data_and_model_do_not_know_each_other() -> None:
    for module in MODULES:
        others = {package(other) for other in imports(module)}
        if package(module) == "moco.model":
            assert others <= {"moco.model"}, f"{module}: the model knows neither files nor settings"
        if package(module) == "moco.data":
            assert not {"moco.model", "moco.selection"} & others, module
        if package(module) == "moco.selection":
            assert others <= {"moco.selection"}, f"{module}: a choice knows tensors alone"


def test_only_tracking_imports_mlflow() -> None:
    for module, path in MODULES.items():
        if package(module) != "moco.tracking":
            assert not re.search(r"^\s*(import|from) mlflow", path.read_text(), re.M), module


def test_dvc_yaml_lists_what_the_identity_says() -> None:
    """`make dvc` writes it."""
    done = subprocess.run([sys.executable, ROOT / "tools/dvc_yaml.py", "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_dvc_stage_depends_on_the_code_it_runs_and_the_defaults_it_takes(stage: str) -> None:
    name = "eval" if stage == "eval_extra" else stage
    declared = {path for path in STAGES[stage]["deps"] if path.startswith("src/")}
    assert declared >= {f"src/{path}" for path in identity.code_of(name)}
    sections = {key.partition(".")[0] for key in identity.SETTINGS[name]}
    assert declared >= {f"src/moco/settings/{section}.py" for section in sections}
    assert not declared & {f"src/moco/settings/{name}.py" for name in ("monitor", "checkpoint", "runtime", "tracking")}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_dvc_and_the_stage_itself_look_at_the_same_settings_and_inputs(stage: str) -> None:
    """Else a change while the stage is at work would go unseen, or be refused in vain."""
    name = "eval" if stage == "eval_extra" else stage
    assert set(STAGES[stage]["params"]) == set(identity.SETTINGS[name])
    inputs = {path for path in STAGES[stage].get("deps", ()) if not path.startswith("src/")}
    scored = set() if name != "eval" else {f"models/classifier{stage.removeprefix('eval')}"}
    assert inputs == set(identity.INPUTS[name]) | scored


def test_every_public_thing_has_a_docstring() -> None:
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), module
        for node in tree.body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            assert not public or ast.get_docstring(node) or len(node.body) <= 6, f"{module}.{node.name}"


def test_readme_names_every_command_and_section() -> None:
    readme = (ROOT / "README.md").read_text()
    from typer.main import get_command

    from moco.cli import app

    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for words in [f"{name} {inner}" for inner in getattr(command, "commands", ())] or [name]:
            assert f"`moco {words}" in readme, words
    for section in yaml.safe_load((ROOT / "params.yaml").read_text()):
        assert f"`{section}`" in readme, section


def test_the_parameter_file_has_the_defaults_with_what_they_are() -> None:
    text = (ROOT / "presets/default.yaml").read_text()
    assert parse(text, Path("default.yaml")) == Config()
    explained = dict(re.findall(r"^ +(\w+): [^#\n]*?  # (.*)$", text, re.M))
    assert 40 < len(explained) < 60
    assert set(explained.values()) <= set(docs().values()) | {"images that the project draws"}


def test_dvc_finds_every_key_that_it_names() -> None:
    """It ends with an error where a key is missing in params.yaml, whatever the default is."""
    params = yaml.safe_load((ROOT / "presets/default.yaml").read_text())
    for stage in STAGES.values():
        for key in stage["params"]:
            section, _, name = key.partition(".")
            assert section in params and (not name or name in params[section]), key


def test_locks_hold_hashes_and_no_index() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert "--hash=sha256:" in text
        assert "://" not in text and "--index" not in text and "--extra-index" not in text, path


def test_the_package_is_importable_without_mlflow_and_dvc() -> None:
    """Nothing outside tracking needs them, so that GPU machines without them can run every stage."""
    for module, path in MODULES.items():
        assert importlib.util.find_spec(module) is not None
        if module != "moco.tracking.classifier_model":  # which MLflow copies and runs; nothing here imports it
            assert not re.search(r"^(import|from) (mlflow|dvc|docker)", path.read_text(), re.M), module
        assert "moco.tracking.classifier_model" not in imports(module)


def test_every_error_code_is_listed_with_cause_and_cure() -> None:
    """docs/troubleshooting.md lists exactly the codes of the source, each once."""
    raised = {code for path in MODULES.values() for code in re.findall(r'"(E-[A-Z0-9-]+)"', path.read_text())}
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    listed = re.findall(r"^\| `(E-[A-Z0-9-]+)` \| .+ \| .+ \|$", text, re.MULTILINE)
    assert sorted(listed) == sorted(raised)
