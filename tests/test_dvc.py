"""`dvc repro` and its relatives, on a copy of this project with a tiny dataset."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, tiny_params, write_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git and DVC repository after its first `dvc repro`, committed."""
    folder = new_workspace(tmp_path_factory.mktemp("workspace"))
    run(folder, "dvc", "repro")
    commit(folder)
    return folder


def new_workspace(folder: Path) -> Path:
    """A git and DVC repository in which nothing has run yet."""
    for name in ("src", ".dvc", "presets"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "tmp", "cache", "*.egg-info")
        )
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "labels").mkdir()
    (folder / "labels/README.md").touch()
    write_dataset(folder / "dataset")
    (folder / ".git/info").mkdir(parents=True)
    params = tiny_params()
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    run(folder, "git", "init", "-q", ".")
    (folder / ".git/info/exclude").write_text("dataset\nscratch\nbin\n")
    (folder / "bin").mkdir()
    script = folder / "bin/moco"  # the code of this copy, not the one installed
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/src" exec "{sys.executable}" -m moco.cli "$@"\n')
    script.chmod(0o755)
    return folder


def test_answers_in_the_form_itself_outlive_dvc_repro(workspace: Path) -> None:
    """DVC clears what a stage makes before it runs it, or brings it back from its cache without running anything."""
    form, params = workspace / "models/request/request.csv", workspace / "params.yaml"
    before, asked = params.read_text(), form.read_text()
    for changed in (before, before.replace("bandwidth: 0.8", "bandwidth: 0.7")):
        assert form.read_text().count(",,") == len(form.read_text().splitlines()) - 1
        answered = form.read_text().replace(",,", ",2,")
        form.write_text(answered)
        params.write_text(changed)
        said = run(workspace, "dvc", "repro", "request")
        kept = [path for path in (workspace / "labels").glob("reply-*.csv") if path.read_text() == answered]
        assert kept, said
    for path in (workspace / "labels").glob("reply-*.csv"):
        path.unlink()
    params.write_text(before)
    run(workspace, "dvc", "repro")
    assert form.read_text() == asked


def run(folder: Path, *command: str) -> str:
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org",
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def commit(folder: Path) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "--allow-empty", "-m", "state")


def stages_run(output: str) -> list[str]:
    """Those but `data`, which always runs: only it can tell whether the images have changed."""
    found = [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
    return [stage for stage in found if stage != "data"]


def edit(folder: Path, section: str, key: str, value: object) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def restore(folder: Path) -> None:
    run(folder, "git", "checkout", "-q", ".")
    run(folder, "dvc", "checkout", "-q")


def test_second_repro_runs_nothing(workspace: Path) -> None:
    assert stages_run(run(workspace, "dvc", "repro")) == []


@pytest.mark.fault("source-changed")
def test_images_changed_in_place_are_never_those_of_before(workspace: Path) -> None:
    """DVC's run cache once brought the manifest of the first version back, and the training saw it."""
    before = (workspace / "models/manifest.json").read_text()
    kept = shutil.copytree(workspace / "dataset", workspace.parent / "kept")
    image = workspace / "dataset/unlabeled/3.png"
    shutil.copy(workspace / "dataset/unlabeled/4.png", image)
    edit(workspace, "data", "resize", 16)
    run(workspace, "dvc", "repro", "data")
    edit(workspace, "data", "resize", None)
    assert stages_run(run(workspace, "dvc", "repro", "pretrain")) == ["pretrain"]
    after = json.loads((workspace / "models/manifest.json").read_text())["splits"]
    assert after["unlabeled"]["pixels"] != json.loads(before)["splits"]["unlabeled"]["pixels"]
    shutil.copy(kept / "unlabeled/3.png", image)
    output = run(workspace, "dvc", "repro", "pretrain")
    assert (workspace / "models/manifest.json").read_text() == before
    assert not stages_run(output) or "taken from runs/pretrain/" in output, "nothing is trained again"
    restore(workspace)


def test_changing_only_train_reruns_what_uses_it(workspace: Path) -> None:
    edit(workspace, "train", "lr", 0.2)
    assert sorted(stages_run(run(workspace, "dvc", "repro"))) == [
        "baseline",
        "eval",
        "eval_extra",
        "finetune",
        "request",
        "train",
        "train_extra",
    ]
    restore(workspace)


def test_fine_tuning_waits_for_the_classifier_whose_labels_it_takes(workspace: Path) -> None:
    assert "train_extra" not in run(workspace, "dvc", "dag", "--mermaid", "finetune")
    edit(workspace, "finetune", "classifier", "classifier_extra")
    assert "train_extra" in run(workspace, "dvc", "dag", "--mermaid", "finetune")
    assert stages_run(run(workspace, "dvc", "repro")) == ["finetune"]
    restore(workspace)


def test_machine_and_tracking_settings_rerun_nothing(workspace: Path) -> None:
    edit(workspace, "runtime", "threads", 2)
    edit(workspace, "tracking", "experiment", "other")
    assert stages_run(run(workspace, "dvc", "repro")) == []
    restore(workspace)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("src/moco/stages/eval.py", ["eval", "eval_extra"]),
        ("src/moco/methods/momentum_contrast.py", ["pretrain", "request"]),
        ("src/moco/cli/main.py", []),
    ],
)
def test_editing_code_reruns_the_stages_that_run_it(workspace: Path, file: str, expected: list[str]) -> None:
    """A comment changes no output: DVC then finds the later stages unchanged."""
    with (workspace / file).open("a") as source:
        source.write("# touched\n")
    assert sorted(stages_run(run(workspace, "dvc", "repro"))) == sorted(expected)
    restore(workspace)


def test_experiments_and_comparisons_show_something(workspace: Path) -> None:
    run(workspace, "dvc", "exp", "run", "-n", "longer", "-S", "pretrain.epochs=3")
    shown = json.loads(run(workspace, "dvc", "exp", "show", "--json"))
    assert "longer" in json.dumps(shown)
    changed = json.loads(run(workspace, "dvc", "params", "diff", "--json"))
    assert changed["params.yaml"]["pretrain.epochs"]["new"] == 3
    metrics = json.loads(run(workspace, "dvc", "metrics", "diff", "--json"))
    assert metrics["reports/pretrain/metrics.json"]["images_seen"]["diff"] == 40
    run(workspace, "dvc", "plots", "show", "-o", "plots")
    page = (workspace / "plots/index.html").read_text()
    for words in ("contrastive loss", "kNN accuracy", "confusion on val", "reliability"):
        assert words in page
    shutil.rmtree(workspace / "plots")
    restore(workspace)


@pytest.mark.long
def test_queued_experiments_leave_their_logs_in_the_project_and_its_store(workspace: Path) -> None:
    """DVC runs them in folders that go when they end; relative paths in params.yaml would go with them."""
    before = set(workspace.glob("runs/*/*"))
    settings = ("tracking.uri=sqlite:///mlflow.db", f"data.path={workspace / 'dataset'}", "pretrain.temperature=0.3")
    changed = [word for setting in settings for word in ("-S", setting)]
    run(workspace, "dvc", "exp", "run", "--queue", "-n", "queued", *changed)
    run(workspace, "dvc", "exp", "run", "--run-all")
    assert "queued" in run(workspace, "dvc", "exp", "show", "--csv")
    logs = {path.parent.name: path / "metrics.jsonl" for path in set(workspace.glob("runs/*/*")) - before}
    assert set(logs) == {"pretrain", "train", "finetune", "eval", "request"}, "what a temperature reaches"
    with sqlite3.connect(workspace / "mlflow.db") as store:
        found = store.execute("SELECT value FROM tags WHERE key = 'dvc_experiment'").fetchall()
        states = store.execute("SELECT DISTINCT status FROM runs").fetchall()
        versions = store.execute("SELECT version FROM model_versions").fetchall()
    store.close()
    assert states == [("FINISHED",)] and len(versions) == 2, "MLflow has all: also what it looks up by itself"
    assert found == [("queued",)] * 7, "five stages, a second score, and their pipeline"
    restore(workspace)


def test_interrupted_pretraining_continues_on_the_next_repro(workspace: Path) -> None:
    edit(workspace, "pretrain", "epochs", 60)
    edit(workspace, "checkpoint", "every", 1)
    before = set((workspace / "runs/pretrain").iterdir())
    path = f"{workspace / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["dvc", "repro", "pretrain"], cwd=workspace, env={**os.environ, "PATH": path}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (new := set((workspace / "runs/pretrain").iterdir()) - before) or not list(new.pop().glob("*.sha256")):
        assert process.poll() is None, "pretraining ended too early"
    os.killpg(process.pid, 15)
    process.wait(timeout=120)
    edit(workspace, "checkpoint", "every", 100)  # housekeeping: still the same run
    output = run(workspace, "dvc", "repro", "pretrain")
    assert "continuing from" in output
    restore(workspace)
