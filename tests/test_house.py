"""The house rules: DVC's dependencies, documentation. import-linter checks the direction of imports (pyproject)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from moco.runs import identity
from moco.settings.reading import parse
from moco.settings.schema import Config, docs

SOURCE = ROOT / "src"
MODULES = identity.modules()
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


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

    from moco.cli.main import app

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


def test_nothing_imports_mlflow_dvc_or_docker_before_it_is_needed() -> None:
    """So that GPU machines without them can run every stage: the whole package is imported while they are missing."""
    code = (
        "import importlib, sys\n"
        "for name in ('mlflow', 'dvc', 'docker'): sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    # MLflow copies and runs the one; the other is the command itself.
    others = sorted(MODULES.keys() - {"moco.tracking.classifier_model", "moco.cli.__main__"})
    done = subprocess.run([sys.executable, "-c", code, *others], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]


def test_every_error_code_is_listed_with_cause_and_cure() -> None:
    """docs/troubleshooting.md lists exactly the codes of the source, each once."""
    raised = {code for path in MODULES.values() for code in re.findall(r'"(E-[A-Z0-9-]+)"', path.read_text())}
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    listed = re.findall(r"^\| `(E-[A-Z0-9-]+)` \| .+ \| .+ \|$", text, re.MULTILINE)
    assert sorted(listed) == sorted(raised)
