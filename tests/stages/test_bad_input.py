"""What users get wrong: one clear line each, exit code 1, nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from conftest import ROOT, Moco, assert_one_line_error, tiny_params, write_dataset, write_params
from moco.data.cache import caches
from moco.settings.data import DataConfig
from moco.settings.eval import EvalConfig
from moco.settings.reading import load, parse
from moco.settings.schema import Config
from moco.settings.train import TrainConfig
from moco.tracking.metric_log import read_events


def edit_params(project: Path, edit: Callable[[dict[str, dict[str, object]]], None]) -> None:
    params = tiny_params()
    edit(params)
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.mark.fault("bad-params")
@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("pretrain", "tempreature", 0.2, ("pretrain.tempreature", "unknown key", "temperature")),
        ("pretrain", "queue", 10**11, ("pretrain.queue", "GiB", "E-MEMORY-QUEUE")),
        ("pretrain", "temperature", 1e-300, ("pretrain.temperature", "at least 0.001")),
        ("pretrain", "dim", 10**9, ("pretrain.dim", "at most 65536")),
        ("request", "bandwidth", 1e-300, ("request.bandwidth", "at least 1e-06 and at most 1e+06")),
        ("runtime", "threads", 100000, ("runtime.threads", "at most 1024")),
        ("pretrain", "epochs", "many", ("pretrain.epochs", "whole number", "'many'")),
        ("pretrain", "epochs", 0, ("pretrain.epochs", "at least 1")),
        ("pretrain", "batch_size", 2.5, ("pretrain.batch_size", "whole number")),
        ("pretrain", "lr", "fast", ("pretrain.lr", "a number")),
        ("pretrain", "lr", float("nan"), ("pretrain.lr", "a number")),
        ("pretrain", "schedule", "cosin", ("pretrain.schedule", "did you mean 'cosine'")),
        ("pretrain", "crop_scale", [1.0, 0.2], ("pretrain.crop_scale", "smaller number comes first")),
        ("pretrain", "crop_scale", 0.2, ("pretrain.crop_scale", "a list")),
        ("pretrain", "crop_scale", [0.2], ("pretrain.crop_scale", "2 numbers")),
        ("pretrain", "encoder", "resnet5", ("pretrain.encoder", "did you mean 'resnet50'")),
        ("pretrain", "batch_norm", "sync", ("pretrain.batch_norm", "several processes")),
        ("train", "refit", "yes please", ("train.refit", "true or false")),
        ("runtime", "device", "gpu", ("runtime.device", "auto")),
        ("tracking", "registered_model", "classifier-1.0", ("tracking.registered_model", "must be a name without")),
        ("tracking", "registered_model", "", ("tracking.registered_model: '' must be a name")),
    ],
)  # fmt: skip
def test_wrong_parameter_names_the_key_and_the_remedy(
    moco: Moco, project: Path, section: str, key: str, value: object, words: tuple[str, ...]
) -> None:
    assert moco("data").returncode == 0
    edit_params(project, lambda params: params[section].__setitem__(key, value))
    for command in ("pretrain", "profile"):
        if value != "sync" or command == "pretrain":  # one process can tell what several would need
            assert_one_line_error(moco(command), *words)


def test_unknown_key_names_file_and_line(moco: Moco, project: Path) -> None:
    edit_params(project, lambda params: params["train"].__setitem__("epoch", 3))
    lines = (project / "params.yaml").read_text().splitlines()
    assert_one_line_error(moco("train"), f"params.yaml:{lines.index('  epoch: 3') + 1}: train.epoch")


def test_missing_keys_and_sections_have_their_defaults(project: Path) -> None:
    edit_params(project, lambda params: params["train"].pop("epochs"))
    assert load(project / "params.yaml").train.epochs == TrainConfig().epochs
    edit_params(project, lambda params: params.pop("eval"))
    assert load(project / "params.yaml").eval == EvalConfig()
    text = "data:\n  source: folder\npretrain:\n"  # a section whose keys are all left out
    assert parse(text, Path("params.yaml")) == replace(Config(), data=replace(DataConfig(), source="folder"))


def test_missing_and_unreadable_files(moco: Moco, project: Path) -> None:
    for nothing in ("", "# nothing\n"):
        (project / "params.yaml").write_text(nothing)
        assert_one_line_error(moco("data"), "params.yaml", "expected a section")
    (project / "params.yaml").write_text("data: [unclosed\n")
    assert_one_line_error(moco("data"), "params.yaml:", "YAML")
    (project / "params.yaml").unlink()
    assert_one_line_error(moco("data"), "params.yaml", "not found")


def test_a_key_that_stands_twice_is_refused_with_both_lines(moco: Moco, project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("  epochs: 3\n", "  epochs: 3\n  epochs: 4\n", 1))
    assert_one_line_error(moco("data"), "train.epochs", "second time")


def test_merged_keys_stand_there_once(project: Path) -> None:
    text = (ROOT / "presets/default.yaml").read_text()
    merged = text.replace("\nbaseline:", "\nbaseline:\n  <<: {epochs: 7, minutes: 9.0}\n #")
    assert parse(merged, Path("params.yaml")).baseline == parse(text, Path("params.yaml")).baseline
    only = merged.replace("  epochs: 320", "  #")
    assert parse(only, Path("params.yaml")).baseline.epochs == 7


@pytest.mark.fault("bad-params")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulate": 5}, ("pretrain.accumulate", "5 parts of 8 images are too small")),
        ({"accumulate": 2, "batch_norm": "split", "splits": 3}, ("pretrain.splits", "3 is no multiple of the 2 parts")),
        ({"resolutions": [0.5, 1.0]}, ("pretrain.resolution_changes", "2 resolutions have 1 changes")),
        (
            {"resolutions": [0.5, 0.6, 0.7, 1.0], "resolution_changes": [0.1, 0.6, 0.4]},
            ("pretrain.resolution_changes", "rising"),
        ),
        ({"resolutions": []}, ("pretrain.resolutions", "rise to 1")),
        ({"resolutions": [1.0, 0.5], "resolution_changes": [0.5]}, ("pretrain.resolutions", "rise to 1")),
        ({"resolutions": [0.5, 1.0], "resolution_changes": [1.0]}, ("pretrain.resolution_changes", "below 1")),
        (
            {"resolutions": [0.1, 1.0], "resolution_changes": [0.5], "stages": 3},
            ("pretrain.stages", "views of 8 pixels", "E-PRETRAIN-VIEW-SIZE"),
        ),
    ],
)
def test_settings_that_do_not_fit_each_other_are_one_line(
    moco: Moco, project: Path, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    assert moco("data").returncode == 0
    edit_params(project, lambda params: params["pretrain"].update(changes))
    for command in ("pretrain", "profile"):
        assert_one_line_error(moco(command), *words)


@pytest.mark.parametrize(
    ("key", "value", "words"), [("encoder", "resnet5", "did you mean 'resnet50'"), ("stages", 6, "use fewer")]
)
def test_baseline_refuses_the_networks_that_pretraining_refuses(
    moco: Moco, project: Path, key: str, value: object, words: str
) -> None:
    assert moco("data").returncode == 0
    edit_params(project, lambda params: params["pretrain"].__setitem__(key, value))
    for stage in ("pretrain", "baseline"):
        assert_one_line_error(moco(stage), f"pretrain.{key}", words)


def test_number_with_an_exponent_and_no_dot_is_a_number(moco: Moco, project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("weight_decay: 0.001\n", "weight_decay: 1e-3\n"))
    assert moco("data").returncode == 0


def test_stages_out_of_order_say_what_to_run_first(moco: Moco, project: Path) -> None:
    assert_one_line_error(moco("pretrain"), "models/manifest.json", "moco data")
    assert moco("data").returncode == 0
    assert_one_line_error(moco("train"), "models/encoder.pth", "moco pretrain")
    assert_one_line_error(moco("eval"), "submission.py", "moco train")


def break_dataset(project: Path, what: str) -> None:
    data = project / "dataset"
    if what == "missing":
        shutil.rmtree(data)
    elif what == "labels short":
        torch.save(torch.arange(19) % 5, data / "train_label_tensor.pt")
    elif what == "label out of range":
        torch.save(torch.tensor([0] * 9 + [5]), data / "val_label_tensor.pt")
    elif what == "truncated":
        path = data / "unlabeled/7.png"
        path.write_bytes(path.read_bytes()[:300])
    elif what == "not an image":
        (data / "train/3.png").write_text("hello")
    elif what == "gap":
        (data / "unlabeled/5.png").unlink()
    elif what == "mixed sizes":
        Image.new("RGB", (40, 32)).save(data / "val/2.png")
    elif what == "empty split":
        for path in (data / "val").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", ("dataset", "not found", "data.path")),
        ("labels short", ("train_label_tensor.pt", "19 labels for 20 images")),
        ("label out of range", ("val/9.png", "5", "0 to 4")),
        ("truncated", ("unlabeled/7.png", "truncated")),
        ("not an image", ("train/3.png", "not an image")),
        ("gap", ("unlabeled", "5.png is missing")),
        ("mixed sizes", ("val/2.png", "40x32")),
        ("empty split", ("val", "empty")),
    ],
)
def test_broken_dataset_is_named_and_nothing_is_lost(
    moco: Moco, project: Path, what: str, words: tuple[str, ...]
) -> None:
    assert moco("data").returncode == 0
    manifest = (project / "models/manifest.json").read_bytes()
    before = sorted(caches(project / "scratch").iterdir())
    break_dataset(project, what)
    assert_one_line_error(moco("data"), *words)
    assert (project / "models/manifest.json").read_bytes() == manifest
    assert sorted(caches(project / "scratch").iterdir()) == before, "no remains, no loss"


def test_encoder_of_another_architecture_is_refused(moco: Moco, project: Path) -> None:
    for stage in ("data", "pretrain"):
        assert moco(stage).returncode == 0
    content = torch.load(project / "models/encoder.pth", weights_only=True)
    content["weights"].pop("conv1.weight")
    torch.save(content, project / "models/encoder.pth")
    assert_one_line_error(moco("train"), "models/encoder.pth", "conv1.weight")
    torch.save({"weights": content["weights"]}, project / "models/encoder.pth")
    assert_one_line_error(moco("train"), "not an encoder file")


def test_classifier_that_does_not_fit_its_submission_is_refused(moco: Moco, project: Path) -> None:
    for stage in ("data", "pretrain", "train"):
        assert moco(stage).returncode == 0
    path = project / "models/classifier/model_sub.pth"
    state = torch.load(path, weights_only=True)
    torch.save({"layer": state["fc.weight"]}, path)
    assert_one_line_error(moco("eval"), "model_sub.pth", "does not fit")
    path.write_bytes(b"PK")
    assert_one_line_error(moco("eval"), "model_sub.pth", "damaged")
    (path.parent / "submission.py").write_text("team_id = 1\n")
    assert_one_line_error(moco("eval"), "submission.py", "[E-EVAL-UNKNOWN-CODE]")
    assert_one_line_error(moco("eval", "--yes"), "submission.py", "get_model")


def test_classifier_of_other_classes_is_refused(moco: Moco, project: Path) -> None:
    for stage in ("data", "pretrain", "train"):
        assert moco(stage).returncode == 0
    edit_params(project, lambda params: params["data"].__setitem__("classes", 6))
    assert moco("data").returncode == 0
    assert_one_line_error(moco("eval"), "knows 5 classes, the data has 6")


def test_settings_that_do_not_belong_to_the_files_are_told_and_not_recorded(moco: Moco, project: Path) -> None:
    """Without DVC nobody else notices that params.yaml was edited after pretraining."""
    for stage in ("data", "pretrain"):
        assert moco(stage).returncode == 0
    write_params(project, pretrain__lr=0.5)
    for stage, made in (("train", "moco pretrain"), ("eval", "moco train")):
        done = moco(stage)
        assert done.returncode == 0
        assert "pretrain.lr is 0.12 there and 0.5 here" in done.stderr and made in done.stderr
        (log,) = (project / f"runs/{stage}").glob("*/metrics.jsonl")
        assert next(read_events(log))["params"]["pretrain.lr"] == "0.12"


@pytest.mark.fault("vanished")
def test_dataset_that_vanishes_after_decoding_does_not_matter(moco: Moco, project: Path) -> None:
    """Unmounted during a run: the decoded cache is complete by then. Fault 11: training decodes nothing."""
    assert moco("data").returncode == 0
    shutil.rmtree(project / "dataset")
    assert moco("pretrain").returncode == 0
    shutil.rmtree(project / "scratch")
    assert_one_line_error(moco("train"), "dataset", "not found")


def test_dataset_that_changed_since_the_manifest_is_refused(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    shutil.rmtree(project / "dataset")
    shutil.rmtree(project / "scratch")
    write_dataset(project / "dataset", seed=1)
    assert_one_line_error(moco("pretrain"), "unlabeled", "run `moco data` again")


@pytest.mark.fault("full-disk")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_while_saving_keeps_the_last_checkpoint(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    (project / "runs").mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(project / "runs")]
    subprocess.run(mount, check=True)
    try:
        write_params(project, pretrain__width=16, checkpoint__keep=20, pretrain__epochs=30)
        done = moco("pretrain")
        assert_one_line_error(done, "checkpoint_", "cannot be written")
        left = sorted(path.name for path in (project / "runs").glob("pretrain/*/*"))
        assert not [name for name in left if name.startswith(".")], "no temporary files"
        whole = [name for name in left if name.endswith(".pth")]
        assert whole
        for name in whole:
            (path,) = (project / "runs").glob(f"pretrain/*/{name}")
            torch.load(path, weights_only=True)
    finally:
        subprocess.run(["umount", str(project / "runs")], check=True)
