"""Classifiers in MLflow's registry: loaded and served without this project (test_gate.py: which is champion)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import Moco, write_params
from server_helpers import free_port

STORE = "sqlite:///mlflow.db"
libraries = pytest.mark.filterwarnings("default")  # MLflow and its libraries deprecate things among themselves


@pytest.fixture
def registered(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two classifiers, of which the first is the better one."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for lr in (50.0, 1e-9):  # which learns nothing
        write_params(project, tracking__uri=STORE, tracking__offline=True, train__lr=lr)
        for stage in ("data", "pretrain", "train")[0 if lr == 50.0 else 2 :]:
            assert moco(stage).returncode == 0
    assert not (project / "mlflow.db").exists(), "offline is offline"
    assert moco("sync").returncode == 0
    return project


# Only what the model's requirements bring may be imported: everything else is hidden.
ALONE = """
import importlib.machinery, importlib.metadata, re, sys
from pathlib import Path
wanted, todo = set(), [re.split("[=<>~!; \\\\[]", line)[0] for line in Path(sys.argv[1]).read_text().split()]
while todo:
    name = re.sub("[-_.]+", "-", todo.pop()).lower()
    if name in wanted: continue
    wanted.add(name)
    try: needs = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError: continue
    todo += [re.split("[=<>~!; \\\\[(]", need)[0] for need in needs if "extra ==" not in need]
packages = importlib.metadata.packages_distributions()
class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        owners = packages.get(name.split(".")[0])
        if owners and not {re.sub("[-_.]+", "-", owner).lower() for owner in owners} & wanted: return None
        return super().find_spec(name, path, target)
sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, Only]
assert "moco" in packages
import mlflow, numpy as np
try: import moco
except ModuleNotFoundError: pass
else: raise AssertionError("moco is there")
mlflow.set_tracking_uri("sqlite:///mlflow.db")
model = mlflow.pyfunc.load_model("models:/moco-classifier@champion")
found = model.predict(np.load("images.npy"))
print(found.to_json(orient="records"))
"""


@pytest.mark.slow
@libraries
def test_the_champion_is_the_better_one_and_works_without_this_project(registered: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{registered}/mlflow.db")
    versions = {int(v.version): v for v in client.search_model_versions("name = 'moco-classifier'")}
    accuracy = {number: float(v.tags["best_held_out_accuracy"]) for number, v in versions.items()}
    assert accuracy[1] > accuracy[2], "else this test shows nothing"
    aliases = client.get_registered_model("moco-classifier").aliases
    assert {name: int(number) for name, number in aliases.items()} == {"champion": 1, "candidate": 2}
    assert versions[1].tags["champion_gate"].startswith("moved: there was none; held-out accuracy")
    assert versions[2].tags["champion_gate"].startswith("kept: 10 held-out images are too few")

    folder = Path(client.download_artifacts(versions[1].run_id, "classifier", str(registered)))
    model = Path(versions[1].source.removeprefix("file://"))
    files = {path.name for path in model.rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith((".pkl", ".pickle"))] and "model_sub.pth" in files
    assert (model / "artifacts/model_sub.pth").read_bytes() == (folder / "model_sub.pth").read_bytes()

    images = np.stack([np.asarray(Image.open(registered / f"dataset/val/{i}.png")) for i in range(5)])
    np.save(registered / "images.npy", images)
    words = [sys.executable, "-c", ALONE, str(model / "requirements.txt")]
    done = subprocess.run(words, cwd=registered, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 5 and all(abs(sum(row["probabilities"]) - 1) < 1e-5 for row in rows)
    assert [row["label"] for row in rows] == scored(folder, images)


@pytest.mark.slow
@libraries
def test_registering_that_was_cut_off_before_it_wrote_the_decision_down(registered: Path, moco: Moco) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{registered}/mlflow.db")
    client.delete_model_version_tag("moco-classifier", "1", "champion_gate")
    for state in (registered / "runs/train").glob("*/mlflow.json"):
        state.unlink()  # all is sent again
    assert moco("sync").returncode == 0
    assert len(client.search_model_versions("name = 'moco-classifier'")) == 2
    assert client.get_model_version("moco-classifier", "1").tags["champion_gate"].startswith("moved: ")
    assert client.get_model_version_by_alias("moco-classifier", "champion").version == 1


def scored(folder: Path, images: np.ndarray) -> list[str]:
    """By submission.py, as the scorer uses it."""
    import torch

    from moco.stages.eval import load_network, load_submission

    submission: Any = load_submission(folder / "submission.py", "")
    network = load_network(submission, folder / "model_sub.pth", "")
    with torch.no_grad():
        logits = network(torch.stack([submission.eval_transform(Image.fromarray(image)) for image in images]))
    return [submission.class_names[int(label)] for label in logits.argmax(1)]


@pytest.mark.slow
@libraries
def test_mlflow_serves_it_over_http(registered: Path) -> None:
    port = free_port()
    words = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/moco-classifier@champion"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it calls uvicorn by name
    server = subprocess.Popen(
        [*words, "--env-manager", "local", "--port", str(port)], cwd=registered, start_new_session=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": STORE, "PATH": path},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    images = [np.asarray(Image.open(registered / f"dataset/val/{i}.png")).tolist() for i in range(2)]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps({"inputs": images}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    rows = json.loads(answer.read())["predictions"]
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, 15)
        server.wait()
    assert len(rows) == 2 and set(rows[0]) == {"label", "probabilities"} and len(rows[0]["probabilities"]) == 5
