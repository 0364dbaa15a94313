"""Passwords, tokens and keys reach neither messages nor logs nor MLflow, in whatever form they come."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import write_params
from moco.cluster.finding import warn
from moco.errors import UserError
from moco.params import load
from moco.redaction import redact, redact_tree
from moco.tracking import origin
from moco.tracking.metric_log import MetricLog
from moco.tracking.store import explain

SECRET = "S3cretS3cret"
KEY = "AKIAS3CRETS3CRETS3CR"
FORMS = [
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BSERVER%3Dh%3BUID%3Dsa%3BPWD%3D{SECRET}%3B",
    f"mssql+pyodbc:///?odbc_connect=DRIVER=x;UID=sa;PWD={SECRET}", f"mysql://h/db?PWD={SECRET}&x=1",
    f"mysql://h/db?passwd={SECRET}", f"postgresql://h/db?user=u&password={SECRET}&x=1", f"http://h/x?token={SECRET}",
    f"http://u:{SECRET}@h:5000", f"http://u:{SECRET}/w@h", f"http://u:{SECRET}@w@h says no", f"http://{SECRET}@h/x",
    f"postgresql%3A%2F%2Fu%3A{SECRET}%40h", f"password%3D{SECRET}%26x", f"pwd%253D{SECRET}%253B",
    f"DRIVER={{x}};UID=sa;PWD=two {SECRET} words;SERVER=h", f"DRIVER={{x}};PWD={{a;{SECRET}}};SERVER=h",
    f"password: {SECRET}", f'{{"password": "a {SECRET} b"}}', f"{{'db_password': '{SECRET}'}}",
    f"AWS_SECRET_ACCESS_KEY={SECRET}", f"aws_access_key_id: {KEY}", f"key {KEY} is not known", f"AccountKey={SECRET};x",
    f"https://b/o?X-Amz-Signature={SECRET}&y=1", f"https://b/o?sv=1&sig={SECRET}&se=1", f"api_key={SECRET}",
    f"Authorization: Basic {SECRET}==", f"Authorization: Bearer {SECRET}", f"{{'Authorization': 'Basic {SECRET}='}}",
    f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
]  # fmt: skip
HARMLESS = [
    "sqlite:////home/u@x/mlflow.db: cannot be opened", "models:/moco-classifier@champion", "http://host:5000/x?y=1",
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", "params.yaml, line 3: unknown key 'token'",
    "pretrain.key_momentum=0.999", "git@github.com:a/b", "3 passes: 12 min", "design=3", "runs/train/KEY-2",
]  # fmt: skip


def assert_hidden(text: str) -> None:
    assert SECRET not in text and KEY not in text, text


@pytest.mark.fault("secrets", len(FORMS))
@pytest.mark.parametrize("form", FORMS)
def test_no_output_shows_a_secret(form: str, tmp_path: Path, project: Path) -> None:
    """The log's params and tags are what MLflow gets; stderr shows UserErrors, warnings and doctor's findings."""
    assert_hidden(redact(form))
    assert_hidden(str(UserError(f"tracking.uri: '{form}' is not known", "")))
    assert_hidden(explain(RuntimeError(f"cannot read {form}"), form))
    assert_hidden(warn("mlflow", form, form).line())
    log = MetricLog(tmp_path / "run/metrics.jsonl")
    log.write("start", stage="s", name="n", params={"a": form, "b": [form]}, tags={"image": form}, dataset={"s": form})
    log.close()
    assert_hidden(log.path.read_text())
    write_params(project, tracking__uri=form, data__path=form)
    assert_hidden(origin.params_text(load(project / "params.yaml")))


def test_what_is_no_secret_stays_as_it_is() -> None:
    for text in HARMLESS:
        assert redact(text) == text
    tree = {"pretrain.lr": 0.1, "token": SECRET, "deep": [{"password": SECRET, "user": "u"}], "none": None}
    assert redact_tree(tree) == {
        "pretrain.lr": 0.1, "token": "...", "deep": [{"password": "...", "user": "u"}], "none": None,
    }  # fmt: skip


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(project: Path) -> Path:
    """A project under git, whose remote's password DVC wrote into .dvc/config, with secrets lying about."""
    for name in (".dvc", "src/moco", "labels"):
        (project / name).mkdir(parents=True)
    for name in (".dvc/config", "src/moco/used.py", "dvc.yaml", "notes.txt", "src/settings.ini"):
        (project / name).write_text("first = 1\n")
    git(project, "init", "-q")
    git(project, "add", "-A", ":!dataset")
    git(project, "commit", "-q", "-m", "one")
    (project / ".dvc/config").write_text(f"['remote \"store\"']\n    password = {SECRET}\n")
    for name in ("notes.txt", "src/settings.ini", "src/.env", "src/id_rsa", "untracked.txt"):
        (project / name).write_text(f"{SECRET}\n")
    (project / "src/moco/used.py").write_text("first = 2  # ours\n")
    (project / "src/moco/fresh.py").write_text("token = token.strip()\n")
    (project / "dvc.yaml").write_text("stages: {}\n")
    return project


def recorded(project: Path) -> Any:
    from moco.data.manifest import Manifest

    write_params(project, tracking__uri=f"http://u:{SECRET}@127.0.0.1:9")
    manifest = Manifest({"name": "n"}, {}, 4, 4, None, ["a"], (0.0,) * 3, (1.0,) * 3, {}, 0)  # type: ignore[arg-type]
    return origin.origin(load(project / "params.yaml"), manifest, torch.device("cpu"))


@pytest.mark.fault("secrets")
def test_the_patch_holds_sources_alone(repository: Path) -> None:
    found = recorded(repository)
    patch = found.files["changes.patch"].decode()
    assert "+first = 2  # ours" in patch and "+token = token.strip()" in patch and "+stages: {}" in patch
    for name in ("config", "settings.ini", ".env", "id_rsa", "notes.txt", "untracked.txt"):
        assert name not in patch, name
    assert_hidden(json.dumps([found.tags, found.dataset, found.pipeline]))
    for content in found.files.values():
        assert_hidden(content.decode())
    assert yaml.safe_load(found.files["params.yaml"])["tracking"]["uri"] == "http://127.0.0.1:9"


@pytest.mark.fault("secrets", 3)
@pytest.mark.parametrize("line", [f'PASSWORD = "{SECRET}"', f'store = "postgresql://u:{SECRET}@h/d"', f"use({KEY!r})"])
def test_a_source_with_a_password_in_it_is_not_recorded_and_this_is_told(repository: Path, line: str) -> None:
    (repository / "src/moco/used.py").write_text(f"first = 2\n{line}\n")
    found = recorded(repository)
    assert "changes.patch" not in found.files
    assert "src/moco/used.py" in found.tags["patch_left_out"]
    assert_hidden(json.dumps(found.tags))
