"""Settings with defaults: what `moco config` prints, keys that have moved, what runs keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import Moco, assert_one_line_error, tiny_params, write_params
from moco.settings.kinds import flatten
from moco.settings.pretrain import PretrainConfig
from moco.settings.reading import load, parse
from moco.settings.schema import MOVED, Config, docs


def test_a_section_needs_none_of_its_settings() -> None:
    assert PretrainConfig(encoder="resnet18") == PretrainConfig(encoder="resnet18", queue=4096)


def test_config_prints_a_parameter_file_of_all_settings(moco: Moco, project: Path) -> None:
    done = moco("config")
    assert parse(done.stdout, Path("printed")) == load(project / "params.yaml")
    assert len(yaml.safe_load(done.stdout)["pretrain"]) == len(flatten(PretrainConfig(), ""))
    assert all(doc in done.stdout for doc in docs().values())


def test_config_says_where_a_value_comes_from(moco: Moco, project: Path) -> None:
    (project / "params.yaml").write_text("data:\n  path: there\npretrain:\n  lr: 0.5\n")
    assert [
        line.split("#")[1].split(")")[0].strip() for line in moco("config", "pretrain.lr").stdout.splitlines()[1:]
    ] == ["(params.yaml:4"]
    lines = moco("config", "data").stdout.splitlines()
    assert "(params.yaml:2)" in next(line for line in lines if line.startswith("  path: "))
    assert "(default)" in next(line for line in lines if line.startswith("  resize: "))
    assert "pretrain:" not in lines


def test_config_of_an_unknown_name_names_the_nearest(moco: Moco, project: Path) -> None:
    assert_one_line_error(moco("config", "pretrain.temprature"), "pretrain.temperature", "E-PARAMS-KEY")


def test_config_hides_passwords(moco: Moco, project: Path) -> None:
    write_params(project, tracking__uri="http://me:geheim12@host:5000")
    done = moco("config")
    assert "geheim12" not in done.stdout and "host:5000" in done.stdout


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_every_key_that_has_moved_is_named_with_its_new_name(moco: Moco, project: Path, old: str, new: str) -> None:
    params: dict[str, Any] = tiny_params()
    section, key = old.split(".")
    params[section][key] = 1
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    assert_one_line_error(moco("data"), "params.yaml", f"{old} is now {new} (line ", "E-PARAMS-MOVED")
    assert new in flatten(Config(), "")


@pytest.fixture
def pretrained(moco: Moco, project: Path) -> Path:
    """The folder of a complete run."""
    for stage in ("data", "pretrain"):
        assert moco(stage).returncode == 0
    return next((project / "runs/pretrain").iterdir())


def test_a_run_keeps_all_settings_that_it_had(pretrained: Path, project: Path) -> None:
    assert load(pretrained / "params.yaml") == load(project / "params.yaml")


@pytest.mark.parametrize(
    "change",
    [
        {"monitor__every": 7},
        {"monitor__log_every": 3},
        {"monitor__neighbours": 2},
        {"monitor__holdout": 0.5},
        {"checkpoint__every": 9, "checkpoint__keep": 1, "checkpoint__max_rollbacks": 3},
    ],
)
def test_what_changes_no_result_is_no_reason_to_train_again(
    moco: Moco, project: Path, pretrained: Path, change: dict[str, Any]
) -> None:
    before = (project / "models/encoder.pth").read_bytes()
    write_params(project, **change)
    assert "made already" in moco("pretrain").stderr
    assert (project / "models/encoder.pth").read_bytes() == before
    assert list((project / "runs/pretrain").iterdir()) == [pretrained]


def test_what_changes_a_result_is_a_reason(moco: Moco, project: Path, pretrained: Path) -> None:
    write_params(project, pretrain__temperature=0.3)
    assert "made already" not in moco("pretrain").stderr
    assert len(list((project / "runs/pretrain").iterdir())) == 2
