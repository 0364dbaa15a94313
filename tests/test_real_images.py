"""The whole path on CIFAR-10 photographs, packed as the cluster's student_dataset.sqsh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, Moco

MAKER = ROOT.parent / "shared/data/make_cifar10"

pytestmark = [pytest.mark.slow, pytest.mark.real_images]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not MAKER.exists():
        if os.environ.get("MOCO_NO_SKIP"):
            pytest.fail("the CIFAR-10 maker must be beside the checkout here")
        pytest.skip("needs the CIFAR-10 maker beside the checkout")
    command = [sys.executable, str(MAKER), str(tmp_path), "--labelled", "1000", "--unlabelled", "4000"]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "presets/default.yaml").read_text())
    for section, values in yaml.safe_load((ROOT / "presets/cifar10.yaml").read_text()).items():
        params[section].update(values)
    params["data"]["mounted"] = ""
    params["pretrain"].update(minutes=0.5, width=16, stages=3)
    params["train"].update(views=1)
    params["runtime"].update(scratch=str(tmp_path / "scratch"))
    params["tracking"].update(uri="")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def test_squashed_photographs_become_a_classifier_that_any_scorer_confirms(moco: Moco, project: Path) -> None:
    done = moco("data")
    assert done.returncode == 0, done.stderr
    assert "is read as it is, without mounting it" in done.stderr, done.stderr
    manifest = json.loads((project / "models/manifest.json").read_text())
    assert [manifest["splits"][s]["count"] for s in ("unlabeled", "train", "val")] == [4000, 1000, 10000]
    assert (manifest["width"], len(manifest["classes"])) == (32, 10)
    for stage in ("pretrain", "train", "eval"):
        done = moco(stage)
        assert done.returncode == 0, done.stderr
    score = json.loads((project / "reports/eval/metrics.json").read_text())
    assert score["val_accuracy"] > 0.25, "half a minute of pretraining is far above chance, which is 0.1"
    sys.path.insert(0, str(ROOT / "tests/stages"))
    try:
        from test_pipeline import outside_score
    finally:
        sys.path.pop(0)
    right, total = outside_score(project, batch=256)
    assert right == round(score["val_accuracy"] * total)
    folder = project / "params.yaml"
    folder.write_text(folder.read_text().replace("source: squashfs", "source: folder").replace(
        "path: student_dataset.sqsh", "path: dataset"))  # fmt: skip
    assert moco("data").returncode == 0
    assert json.loads((project / "models/manifest.json").read_text())["digest"] == manifest["digest"]
