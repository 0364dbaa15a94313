"""The same commit, parameters, data and threads: the same bits, wherever the project lies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, write_dataset, write_params

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.fault("determinism")
def test_two_clones_make_the_same_classifier(tmp_path: Path) -> None:
    found = []
    for name in ("one", "another place"):
        clone = tmp_path / name
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
        write_dataset(clone / "dataset")
        write_params(clone, pretrain__augmentation="v2", finetune__pool=1, runtime__threads=2)
        environment = {**os.environ, "PYTHONPATH": str(clone / "src")}
        code = "import moco, pathlib; print(pathlib.Path(moco.__file__).parent)"
        used = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert used.stdout.strip() == str(clone / "src/moco")
        for stage in ("data", "pretrain", "train", "finetune"):
            words = [sys.executable, "-m", "moco.cli", stage]
            done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        files = ("models/encoder.pth", "models/classifier/model_sub.pth", "models/finetuned/model_sub.pth")
        found.append([(clone / file).read_bytes() for file in files])
    assert found[0] == found[1]
