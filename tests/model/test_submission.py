"""The file that is handed in: works without this package and computes what ours computes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moco.data.decode import resize_and_crop
from moco.data.manifest import Manifest
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import build_encoder
from moco.exchange.submission import render
from moco.settings.eval import EvalConfig
from moco.views.views import Views, recipe

CONFIG = EvalConfig(batch_size=4, calibration_bins=5, team_id=7, team_name="blue", email_address="a@b.example")
MANIFEST = Manifest(
    settings={},
    source={}, height=32, width=32, resize=None, classes=["cat", "dog", "eel"],
    mean=(0.48123, 0.45, 0.4), std=(0.2211, 0.21, 0.2), splits={}, duplicates_train_val=0,
)  # fmt: skip
AWKWARD = 'Bobby "); raise SystemExit(1) #\n\'\'\' """ \\ ünïcode {braces} %s'


@dataclass(frozen=True)
class Case:
    architecture: Architecture
    manifest: Manifest = MANIFEST
    config: EvalConfig = CONFIG
    image: tuple[int, int] = (32, 32)  # width, height


CASES = {
    "small-stem": Case(Architecture("small_resnet", "small", 4, 3)),
    "small-imagenet-stem": Case(Architecture("small_resnet", "imagenet", 6, 2)),
    "small-one-convolution": Case(Architecture("small_resnet", "small", 4, 2, convolutions=1)),
    "small-pyramid": Case(Architecture("small_resnet", "small", 4, 4, "pyramid")),
    "resnet18-small": Case(Architecture("resnet18", "small", 4, 2)),
    "resnet18-imagenet": Case(Architecture("resnet18", "imagenet", 4, 2)),
    "resized": Case(
        Architecture("small_resnet", "small", 4, 2), replace(MANIFEST, height=24, width=24, resize=24), image=(53, 37)
    ),
    "resized-up": Case(
        Architecture("resnet18", "imagenet", 4, 2), replace(MANIFEST, height=48, width=48, resize=48), image=(31, 40)
    ),
    "awkward-names": Case(
        Architecture("small_resnet", "small", 4, 2),
        replace(MANIFEST, classes=[AWKWARD, "it's", '"quoted"', "back\\slash"]),
        replace(CONFIG, team_name=AWKWARD, email_address='o\'neil@"x".example'),
    ),
}

# Stands for a scorer: knows the contract and cannot reach the package.
SCORER = """
import importlib.util, json, sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moco":
            raise ImportError("the scorer has no such package")

sys.meta_path.insert(0, Refuse())
refused = False
try:
    import moco
except ImportError:
    refused = True

import torch
from PIL import Image
torch.set_num_threads(1)
names = {}
for folder in sorted(Path(".").iterdir()):
    if not folder.is_dir():
        continue
    spec = importlib.util.spec_from_file_location("submission", folder / "submission.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.get_model()
    model.load_state_dict(torch.load(folder / "model_sub.pth", weights_only=True), strict=True)
    model.eval()
    x = module.eval_transform(Image.open(folder / "image.png"))
    with torch.no_grad():
        torch.save({"input": x, "logits": model(x.unsqueeze(0))}, folder / "result.pth")
    names[folder.name] = [module.team_id, module.team_name, module.email_address, module.class_names]
print(json.dumps({"names": names, "refused": refused, "loaded": "moco" in sys.modules}))
"""


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """As the scorer's process, so that sums are taken in the same order."""
    torch.set_num_threads(1)


def network(case: Case) -> nn.Module:
    """With weights and statistics of its own, as if trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = build_encoder(case.architecture, len(case.manifest.classes)).train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(4, 3, 32, 32))
        return model.eval()


def picture(case: Case) -> Image.Image:
    width, height = case.image
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All cases through one process (torch takes seconds to load), in a folder with nothing of ours."""
    root = tmp_path_factory.mktemp("scorer")
    for name, case in CASES.items():
        (root / name).mkdir()
        text = render(case.architecture, case.manifest, case.config)
        (root / name / "submission.py").write_text(text, encoding="utf-8")
        torch.save(network(case).state_dict(), root / name / "model_sub.pth")
        picture(case).save(root / name / "image.png")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCORER], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


def expected_input(case: Case) -> torch.Tensor:
    """What our own pipeline makes of the image."""
    image = picture(case)
    if case.manifest.resize is not None:
        image = resize_and_crop(image, case.manifest.resize)
    views = Views(
        recipe("v2", (0.2, 1.0), (0.1, 2.0)), case.manifest.height, case.manifest.mean, case.manifest.std,
        torch.device("cpu"),
    )  # fmt: skip
    return views.plain(torch.from_numpy(np.array(image))[None])[0]


def test_the_scorer_had_none_of_our_code(scored: tuple[Path, dict[str, Any]]) -> None:
    assert scored[1]["refused"] is True
    assert scored[1]["loaded"] is False
    for name in CASES:
        tree = ast.parse((scored[0] / name / "submission.py").read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {str(module).split(".")[0] for module in modules} <= {"__future__", "PIL", "torch", "torchvision"}


@pytest.mark.parametrize("name", CASES)
def test_model_loads_strictly_and_gives_the_same_bits(name: str, scored: tuple[Path, dict[str, Any]]) -> None:
    result = torch.load(scored[0] / name / "result.pth", weights_only=True)
    case = CASES[name]
    model = build_encoder(case.architecture, len(case.manifest.classes)).eval()
    model.load_state_dict(torch.load(scored[0] / name / "model_sub.pth", weights_only=True))
    with torch.no_grad():
        expected = model(result["input"].unsqueeze(0))
    assert torch.equal(result["logits"], expected)
    assert result["logits"].shape == (1, len(CASES[name].manifest.classes))


@pytest.mark.parametrize("name", CASES)
def test_transform_is_what_the_classifier_was_evaluated_on(name: str, scored: tuple[Path, dict[str, Any]]) -> None:
    found = torch.load(scored[0] / name / "result.pth", weights_only=True)["input"]
    assert found.shape == (3, CASES[name].manifest.height, CASES[name].manifest.width)
    torch.testing.assert_close(found, expected_input(CASES[name]), rtol=0, atol=1e-6)


def test_nothing_of_the_picture_is_cut_away(scored: tuple[Path, dict[str, Any]]) -> None:
    """Fault 8: every pixel, the outermost included, arrives at its place."""
    found = torch.load(scored[0] / "small-stem" / "result.pth", weights_only=True)["input"]
    back = found * torch.tensor(MANIFEST.std)[:, None, None] + torch.tensor(MANIFEST.mean)[:, None, None]
    pixels = np.array(picture(CASES["small-stem"]))
    assert np.array_equal((back * 255).round().permute(1, 2, 0).numpy().astype(np.uint8), pixels)


@pytest.mark.parametrize("name", CASES)
def test_names_arrive_as_they_are(name: str, scored: tuple[Path, dict[str, Any]]) -> None:
    config, classes = CASES[name].config, CASES[name].manifest.classes
    assert scored[1]["names"][name] == [config.team_id, config.team_name, config.email_address, classes]


def test_scorer_would_notice_weights_of_another_architecture(scored: tuple[Path, dict[str, Any]]) -> None:
    """The strict load above is a real check: the definition of one case refuses another's weights."""
    text = (scored[0] / "small-stem" / "submission.py").read_text(encoding="utf-8")
    scope: dict[str, Any] = {"__name__": "submission"}
    exec(compile(text, "submission.py", "exec"), scope)
    with pytest.raises(RuntimeError, match=r"Missing|size mismatch"):
        scope["get_model"]().load_state_dict(network(CASES["small-imagenet-stem"]).state_dict())
