"""What classifiers see is a setting of the classifier: it can change without pretraining again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from stage_helpers import run_all

from conftest import ROOT, Moco, assert_one_line_error, tiny_params, write_params
from moco.encoders.small_resnet import SmallResNet
from moco.exchange.classifier_files import read_classifier
from moco.methods.step import build_model
from moco.settings import presets
from moco.settings import reading as params


def bits(path: Path) -> bytes:
    return path.read_bytes()


def test_the_features_change_without_pretraining_again(moco: Moco, project: Path) -> None:
    write_params(project, train__features="last")
    run_all(moco, "data", "pretrain", "train")
    encoder, last = bits(project / "models/encoder.pth"), bits(project / "models/classifier/model_sub.pth")
    assert read_classifier(Path("models/classifier")).weights["fc.weight"].shape[1] == 4 << 3
    changes = {"train__features": "pyramid", "request__strategy": "margin", "finetune__epochs": 1}
    write_params(project, **changes)
    run_all(moco, "request")  # by the classifier that is there
    assert "train.features is last there and pyramid here" in moco("finetune").stderr
    run_all(moco, "train", "request", "finetune", "eval")
    assert bits(project / "models/encoder.pth") == encoder and bits(project / "models/classifier/model_sub.pth") != last
    for folder in ("models/classifier", "models/finetuned"):
        found = read_classifier(Path(folder))
        assert found.weights["fc.weight"].shape[1] == (4 << 3) + 4 * (4 << 2), "the quarters of the stage between"
    write_params(project, **changes, finetune__start="encoder")
    run_all(moco, "finetune")
    assert read_classifier(Path("models/finetuned")).architecture.features == "pyramid"


def test_an_encoder_file_that_has_the_setting_gives_the_same_classifier(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    found = bits(project / "models/classifier/model_sub.pth")
    path = project / "models/encoder.pth"
    state = torch.load(path, weights_only=True)
    for features in ("pyramid", "last"):
        state["architecture"]["features"] = state["settings"]["pretrain.features"] = features
        torch.save(state, path)
        done = moco("train")
        assert done.returncode == 0 and "other settings" not in done.stderr, done.stderr
        assert bits(project / "models/classifier/model_sub.pth") == found


def test_a_parameter_file_with_the_old_key_says_where_it_is_now(moco: Moco, project: Path) -> None:
    old = tiny_params()
    old["pretrain"] = {"features": "pyramid", **old["pretrain"]}
    del old["train"]["features"]
    (project / "params.yaml").write_text(yaml.safe_dump(old, sort_keys=False))
    line = (project / "params.yaml").read_text().splitlines().index("  features: pyramid") + 1
    assert_one_line_error(moco("data"), "params.yaml", f"train.features (line {line})", "E-PARAMS-MOVED")


@pytest.mark.parametrize(("preset", "pyramid"), [("default", False), ("cifar10", True)])
def test_presets_begin_with_the_weights_that_they_always_had(preset: str, pyramid: bool, tmp_path: Path) -> None:
    """The features once decided how many random numbers the last layer takes before the first weights are drawn."""
    (tmp_path / "params.yaml").write_text(presets.render(ROOT / "presets", preset))
    config = params.load(tmp_path / "params.yaml")
    assert config.train.features == ("pyramid" if pyramid else "last")
    section = config.pretrain
    torch.manual_seed(section.seed)
    expected = SmallResNet(1, section.width, section.stages, 1, pyramid, section.convolutions).state_dict()
    found = build_model(section).query_encoder.state_dict()
    for name in expected:
        assert name.startswith("fc.") or torch.equal(found[name], expected[name]), name
