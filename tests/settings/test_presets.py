"""Switching params.yaml between presets."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, Moco, assert_one_line_error
from moco.settings import presets
from moco.settings.reading import load
from moco.settings.schema import Config


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy(ROOT / "presets/default.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(project: Path) -> Config:
    return load(project / "params.yaml")


@pytest.mark.parametrize("name", presets.names(ROOT / "presets"))
def test_every_preset_is_a_valid_parameter_file(moco: Moco, project: Path, name: str) -> None:
    assert moco("preset", name).returncode == 0
    settings(project)


def test_switching_keeps_the_comments_and_changes_nothing_else(moco: Moco, project: Path) -> None:
    before = (project / "params.yaml").read_text()
    assert moco("preset", "cifar10").returncode == 0
    after = (project / "params.yaml").read_text()
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-"]
    wanted = yaml.safe_load((project / "presets/cifar10.yaml").read_text())
    added = [line for line in changed if line[0] == "+"]
    assert 0 < len(added) <= sum(map(len, wanted.values()))
    assert {line[2:].partition(":")[0].strip() for line in changed} <= {key for each in wanted.values() for key in each}
    assert all("#" in line for line in added), "every new line has its explanation"
    plain = {section: {**yaml.safe_load(before)[section], **keys} for section, keys in wanted.items()}
    assert yaml.safe_load(after) == {**yaml.safe_load(before), **plain}
    assert moco("preset", "default").returncode == 0
    assert (project / "params.yaml").read_text() == before


def test_nyu_preset_has_the_jobs_of_the_original(moco: Moco, project: Path) -> None:
    assert moco("preset", "nyu").returncode == 0
    found = settings(project)
    assert (found.pretrain.encoder, found.pretrain.queue, found.pretrain.dim) == ("resnet50", 2048, 128)
    assert (found.pretrain.momentum, found.pretrain.temperature) == (0.999, 0.2)
    assert (found.pretrain.batch_norm, found.pretrain.splits, found.pretrain.epochs) == ("split", 2, 100)
    assert found.pretrain.lr * found.pretrain.batch_size / 256 == pytest.approx(0.06), "fault 1: scaled with 512"
    assert found.train.lr * found.train.batch_size / 256 == pytest.approx(30)
    assert [share * found.train.epochs for share in found.train.milestones] == pytest.approx([60, 80, 120, 160])
    assert found.finetune.lr * found.finetune.batch_size / 256 == pytest.approx(3e-5)
    assert [share * found.finetune.epochs for share in found.finetune.milestones] == pytest.approx([60, 80])
    assert found.data.classes == 800


def test_moco_cifar10_preset_is_the_setting_of_its_authors(moco: Moco, project: Path) -> None:
    assert moco("preset", "moco_cifar10").returncode == 0
    found = settings(project).pretrain
    assert (found.encoder, found.stem, found.batch_size, found.epochs) == ("resnet18", "small", 512, 200)
    assert (found.queue, found.momentum, found.temperature, found.loss) == (4096, 0.99, 0.1, "asymmetric")
    assert (found.batch_norm, found.splits, found.schedule, found.warmup) == ("split", 8, "cosine", 0)
    assert (found.sgd_momentum, found.weight_decay) == (0.9, 5e-4)
    assert found.lr * found.batch_size / 256 == pytest.approx(0.06)


def test_changes_of_ones_own_are_not_lost(moco: Moco, project: Path) -> None:
    text = (project / "params.yaml").read_text().replace("epochs: 320", "epochs: 321")
    (project / "params.yaml").write_text(text)
    assert_one_line_error(moco("preset", "cifar10"), "changes of your own", "--force")
    assert (project / "params.yaml").read_text() == text
    assert moco("preset", "cifar10", "--force").returncode == 0


def test_unknown_preset_names_the_nearest(moco: Moco, project: Path) -> None:
    assert_one_line_error(moco("preset", "cifar"), "did you mean 'cifar10'")
    assert "nyu" in moco("preset").stdout


def test_preset_with_an_unknown_key_is_refused(moco: Moco, project: Path) -> None:
    (project / "presets/mine.yaml").write_text("pretrain:\n  epoch: 3\n")
    assert_one_line_error(moco("preset", "mine"), "mine.yaml", "pretrain.epoch", "did you mean 'epochs'")
