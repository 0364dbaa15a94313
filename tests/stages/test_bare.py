"""On a machine that has PyTorch and little else, such as a rented GPU, the stages run with the metric log alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, assert_one_line, write_params

ABSENT = ("mlflow", "dvc", "docker", "psutil", "matplotlib", "sklearn", "ruamel")
# Python runs a module of this name at its start: modules of the packages above are then not found.
HIDE = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else self.finder.find_spec(name, path, target)
sys.meta_path = [Without(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
def test_the_stages_need_neither_mlflow_nor_dvc(project: Path) -> None:
    (project / "hide").mkdir()
    (project / "hide/sitecustomize.py").write_text(HIDE)
    environment = {**os.environ, "PYTHONPATH": f"{project / 'hide'}:{ROOT / 'src'}", "MLFLOW_TRACKING_URI": ""}
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    for stage in ("data", "pretrain", "train", "finetune", "baseline", "eval", "report"):
        done = subprocess.run(
            [sys.executable, "-m", "moco.cli", stage], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{stage}: {done.stderr}"
    logs = {path.parent.parent.name: path for path in project.glob("runs/*/*/metrics.jsonl")}
    assert set(logs) == {"pretrain", "train", "finetune", "baseline", "eval"}
    for log in logs.values():
        assert json.loads(log.read_text().splitlines()[-1])["status"] == "FINISHED"
    assert not (project / "mlflow.db").exists()
    probe = subprocess.run([sys.executable, "-c", "import mlflow"], env=environment, capture_output=True, check=False)
    assert probe.returncode == 1, "what is said to be hidden is"
    changed = [sys.executable, "-m", "moco.cli", "request", "--budget", "3"]  # which needs ruamel.yaml
    done = subprocess.run(changed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert_one_line(done.stderr, "ruamel is not installed here")
