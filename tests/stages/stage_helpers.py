"""Running and interrupting stages, and scoring what they leave as an outsider."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from conftest import Moco
from moco.training.supervised import SupervisedStep

# A scorer that knows nothing of this project: submission.py, model_sub.pth and the dataset folder.
SCORER = """
import sys, torch
from pathlib import Path
from PIL import Image
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moco":
            raise ImportError("the scorer has no moco")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
from submission import get_model, eval_transform, team_id, team_name, email_address
model = get_model()
model.load_state_dict(torch.load(Path(sys.argv[1]) / "model_sub.pth", weights_only=True))
model.eval()
data = Path(sys.argv[2])
labels = torch.load(data / "val_label_tensor.pt", weights_only=True)
right = 0
with torch.no_grad():
    for first in range(0, len(labels), int(sys.argv[3])):
        part = range(first, min(first + int(sys.argv[3]), len(labels)))
        images = [eval_transform(Image.open(data / "val" / f"{i}.png").convert("RGB")) for i in part]
        right += int((model(torch.stack(images)).argmax(1) == labels[list(part)]).sum())
print(right, len(labels))
"""


@contextmanager
def signalled(step: int) -> Iterator[None]:
    """SIGTERM comes while fine-tuning is in this step."""
    call = SupervisedStep.__call__

    def interrupted(self: SupervisedStep, indices: Any, images: Tensor, fraction: float, number: int) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, indices, images, fraction, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupervisedStep, "__call__", interrupted)
        yield


def run_all(moco: Moco, *stages: str) -> None:
    for stage in stages:
        done = moco(stage)
        assert done.returncode == 0, f"{stage}: {done.stderr}"


def outside_score(project: Path, batch: int, folder: str = "models/classifier") -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCORER, folder, "dataset", str(batch)],
        cwd=project, capture_output=True, text=True, check=True,
    )  # fmt: skip
    right, total = done.stdout.split()
    return int(right), int(total)
