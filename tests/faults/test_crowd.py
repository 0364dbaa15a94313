"""Ten pipelines at once in ten workspaces that share an MLflow server, a DVC cache and the decoded images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, tiny_params, write_dataset
from server_helpers import MlflowServer, postgres

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]
COUNT = 10
MADE = {"models", "runs", "reports", ".dvc", ".git"}  # by a project, in its folder


def workspace(folder: Path, shared: Path, uri: str, seed: int) -> Path:
    """A git checkout with DVC, whose pipeline ends after `eval`."""
    folder.mkdir()
    for name in ("src", "dvc.yaml", ".gitignore"):
        source, target = ROOT / name, folder / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")) if (
            source.is_dir()
        ) else shutil.copy(source, target)
    params = tiny_params(
        data__path=str(shared / "dataset"), runtime__scratch=str(shared / "scratch"), pretrain__seed=seed,
        tracking__uri=uri, pretrain__epochs=2 + seed % 3,
    )  # fmt: skip
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for words in (
        ["git", "init", "--quiet"], ["dvc", "init", "--quiet"],
        ["dvc", "cache", "dir", "--local", str(shared / "cache")],
        ["git", "add", "--all"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "begin"],
    ):  # fmt: skip
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    """MLflow on PostgreSQL."""
    with postgres() as store:
        found = MlflowServer(store, tmp_path / "artifacts")
        found.start()
        yield found
        found.kill()


@pytest.mark.fault("crowd", COUNT)
def test_ten_pipelines_at_once_end_as_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: MlflowServer
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shared = tmp_path / "shared"
    write_dataset(shared / "dataset")
    (shared / "scratch").mkdir()
    places = [workspace(tmp_path / f"workspace {seed}", shared, server.uri, seed) for seed in range(COUNT)]
    running = [
        subprocess.Popen(["dvc", "repro", "--quiet", "eval"], cwd=place, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, "PYTHONPATH": str(place / "src")})
        for place in places
    ]  # fmt: skip
    for process in running:
        _, said = process.communicate(timeout=1500)
        assert process.returncode == 0, said[-3000:]
    assert len([path for path in (shared / "scratch").glob("moco-cache-*/*") if path.is_dir()]) == 1
    for place in places:
        subprocess.run(["moco", "sync"], cwd=place, check=True, capture_output=True)
    client = server.client()
    (experiment,) = client.search_experiments(filter_string="name = 'moco-pipeline'")
    runs = [run for run in client.search_runs([experiment.experiment_id], max_results=1000)
            if run.info.run_name.startswith("pretrain-")]  # fmt: skip
    assert len(runs) == COUNT and {run.info.status for run in runs} == {"FINISHED"}
    for seed, place in enumerate(places):
        alone = tmp_path / f"alone-{seed}"
        shutil.copytree(place, alone, ignore=lambda folder, _, top=place: MADE if Path(folder) == top else ())
        for stage in ("data", "pretrain", "train"):
            environment = {**os.environ, "PYTHONPATH": str(alone / "src"), "MLFLOW_TRACKING_URI": ""}
            words = [sys.executable, "-m", "moco.cli", stage]
            subprocess.run(words, cwd=alone, env=environment, check=True, capture_output=True)
        weights = "models/classifier/model_sub.pth"
        assert (place / weights).read_bytes() == (alone / weights).read_bytes(), f"seed {seed}"
        (mine,) = [run for run in runs if run.data.params["pretrain.seed"] == str(seed)]
        written = json.loads((place / "reports/pretrain/metrics.json").read_text())
        assert mine.data.metrics["loss"] == written["loss"]
