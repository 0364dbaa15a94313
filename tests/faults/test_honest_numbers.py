"""What a number counts, what it is called and where it stands: the docs, the reports and the log say the same."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import ROOT, Moco, write_dataset, write_params
from moco.methods.momentum_contrast import info_nce
from moco.tracking import system
from moco.tracking.metric_log import last_values, metric_history, read_events

STAGES = ("data", "pretrain", "train", "baseline", "finetune", "eval", "request", "train_extra")
# What a tiny pipeline on a processor cannot write.
ELSEWHERE = {"steps_back", "best_epoch", "lr"}


def run_all(moco: Moco, *stages: str) -> str:
    said = ""
    for stage in stages:
        done = moco(stage)
        assert done.returncode == 0, f"{stage}: {done.stderr}"
        said += done.stderr
    return said


def report(project: Path, stage: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((project / f"reports/{stage}/metrics.json").read_text())
    return found


def log(project: Path, stage: str) -> Path:
    (found,) = (project / "runs" / stage).glob("*/metrics.jsonl")
    return found


def documented() -> dict[str, set[str]]:
    """Names in docs/metrics.md, and the stages that are said to write each."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 4 and cells[0].startswith("`"):
            assert cells[1] and cells[3], f"no unit or no definition: {line}"
            for name in re.findall(r"`([^`]+)`", cells[0]):
                found.setdefault(name, set()).update(re.findall(r"\w+", cells[2]))
    return found


@pytest.mark.fault("numbers", 2)
def test_every_metric_is_defined_and_every_definition_has_its_metric(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways: by the classifier's two solvers, with the pool, extra labels and samples of the machine."""
    monkeypatch.setattr(system, "EVERY", 0.05)
    known, written = documented(), {}
    labels = project / "labels"
    labels.mkdir()
    (labels / "reply.csv").write_text("image,label\n0.png,0\n1.png,1\n")
    for solver in ("lbfgs", "sgd"):
        write_params(
            project, train__solver=solver, finetune__pool=1, train_extra__labels="labels/reply.csv",
            monitor__suspicious_labels="warn",
        )  # fmt: skip
        run_all(moco, *STAGES)
        for stage in STAGES[1:]:
            names = set(report(project, stage))
            for path in (project / "runs" / stage).glob("*/metrics.jsonl"):
                for event in read_events(path):
                    names |= set(event.get("metrics", {})) if event["event"] in ("metrics", "system") else set()
            for name in names:
                written.setdefault(name, set()).add(stage)
    for name, stages in written.items():
        assert name in known, f"docs/metrics.md does not define {name}, which {stages} write"
        assert stages <= known[name] or "all" in known[name], f"{name}: written by {stages}, the docs say {known[name]}"
    missing = {name for name in known if "gpu_N" not in name} - set(written) - ELSEWHERE
    assert not missing, f"docs/metrics.md defines what no stage writes: {missing}"


@pytest.mark.fault("numbers", 3)
def test_report_and_log_have_one_value_for_a_name(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train", "baseline", "finetune")
    for stage in ("pretrain", "train", "baseline", "finetune"):
        last = last_values(log(project, stage))
        for name, value in report(project, stage).items():
            assert last[name] == pytest.approx(value, rel=1e-9), f"{stage}: {name}"


@pytest.mark.fault("numbers", 2)
def test_rates_are_those_of_the_whole_run(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train", "finetune")
    for stage in ("pretrain", "finetune"):
        found = report(project, stage)
        assert found["images_per_second"] == pytest.approx(found["images_seen"] / (60 * found["minutes"]), rel=1e-6)


@pytest.mark.fault("numbers")
def test_fine_tuning_counts_the_images_of_the_pool(moco: Moco, project: Path) -> None:
    """10 labelled images that are kept: two batches of 4, three of the pool with each image, in three epochs."""
    write_params(project, finetune__pool=3)
    run_all(moco, "data", "pretrain", "train", "finetune")
    found = report(project, "finetune")
    assert found["labelled_images_seen"] == 24
    assert found["images_seen"] == 24 + 3 * 24
    assert found["views_seen"] == 24 + 2 * 3 * 24


@pytest.mark.fault("numbers")
def test_a_pass_of_the_baseline_takes_all_labelled_images(moco: Moco, project: Path) -> None:
    """20 images in batches of at most 12: two of 10, not one of 12."""
    write_params(project, baseline__batch_size=12, baseline__epochs=3)
    run_all(moco, "data", "baseline")
    assert report(project, "baseline")["supervised_images_seen"] == 3 * 20


@pytest.mark.fault("numbers")
def test_the_rate_in_the_log_is_that_of_its_step(moco: Moco, project: Path) -> None:
    """A cosine over four epochs of five steps, with a line after every fourth step."""
    write_params(project, pretrain__epochs=4, monitor__log_every=4, pretrain__lr=1.0)
    run_all(moco, "data", "pretrain")
    lines = [line for line in metric_history(log(project, "pretrain")) if "lr" in line["metrics"]]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20]
    for line in lines:
        used = 8 / 256 * 0.5 * (1 + np.cos(np.pi * (line["step"] - 1) / 20))
        assert line["metrics"]["lr"] == pytest.approx(used, rel=1e-6)


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("dim", [16, 128])
def test_collapsed_features_hit_nothing(dim: int) -> None:
    """All are the same vector; rounding may put the positive a little above the negatives, or below."""
    one = F.normalize(torch.randn(1, dim, generator=torch.Generator().manual_seed(dim)), dim=1)
    accuracy = info_nce(one.repeat(64, 1), one.repeat(64, 1), one.repeat(256, 1), 0.07)[1]
    assert accuracy.item() == 0


@pytest.mark.fault("numbers")
def test_classes_without_images_of_val_have_no_recall(moco: Moco, project: Path) -> None:
    labels = torch.load(project / "dataset/val_label_tensor.pt")
    torch.save(labels.clamp(max=2), project / "dataset/val_label_tensor.pt")
    run_all(moco, "data", "pretrain", "train", "eval")
    with (project / "reports/eval/classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["images"] for row in rows] == ["2", "2", "6", "0", "0"]
    assert [row["recall"] == "" for row in rows] == [False, False, False, True, True]
    with (project / "reports/eval/predictions.csv").open() as file:
        claimed = {row["predicted"] for row in csv.DictReader(file)}
    assert all((row["precision"] == "") == (row["class"] not in claimed) for row in rows)


@pytest.mark.fault("numbers")
def test_cpu_use_is_that_of_the_process() -> None:
    """A process that sleeps uses nothing, however busy the machine is; one that computes uses about a core."""
    import time

    cpu = system._Cpu()
    time.sleep(0.3)
    assert cpu.sample()["system/process_cpu_cores"] < 0.2
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass
    assert 0 < cpu.sample()["system/process_cpu_cores"] < 1.2


def bright(root: Path) -> Path:
    """A dataset whose classes differ in brightness alone, so that a linear classifier has all of them right."""
    rng = np.random.default_rng(0)
    write_dataset(root, unlabeled=40, train=60, val=20)
    for split, count in (("unlabeled", 40), ("train", 60), ("val", 20)):
        for i in range(count):
            image = np.clip(rng.normal(30 + 45 * (i % 5), 4, (32, 32, 3)), 0, 255)
            Image.fromarray(image.astype(np.uint8)).save(root / split / f"{i}.png")
    return root


@pytest.mark.fault("worse-than-start")
def test_fine_tuning_keeps_the_start_where_it_ruins_it(moco: Moco, project: Path) -> None:
    bright(project / "bright")
    write_params(
        project, data__path="bright", train__solver="lbfgs", finetune__epochs=2, finetune__lr=200.0,
        finetune__batch_size=36,
    )  # fmt: skip
    said = run_all(moco, "data", "pretrain", "train", "finetune")
    found = report(project, "finetune")
    assert found["start_held_out_accuracy"] > 0.8, "chosen so that the linear classifier is good"
    with (project / "reports/finetune/epochs.csv").open() as file:
        *_, last = csv.DictReader(file)
    assert float(last["held_out_accuracy"]) < 0.5, "and training spoils it"
    assert found["held_out_accuracy"] == found["start_held_out_accuracy"] and found["best_epoch"] == 0
    assert "no better than its start" in said


@pytest.mark.fault("worse-than-start")
def test_that_fine_tuning_gained_nothing_is_told(moco: Moco, project: Path) -> None:
    write_params(project, finetune__lr=1e-12, finetune__batch_norm="frozen", finetune__weight_decay=0.0)
    said = run_all(moco, "data", "pretrain", "train", "finetune")
    (line,) = [line for line in said.splitlines() if "no better than its start" in line]
    found = report(project, "finetune")
    assert line.startswith("warning: ") and f"{found['start_held_out_accuracy']:.2%}" in line
    assert found["better_than_start"] == 0
    assert last_values(log(project, "finetune"))["better_than_start"] == 0


@pytest.mark.fault("holdout", 4)
def test_what_is_really_held_out_is_told(moco: Moco, project: Path) -> None:
    """Two labels a class: a tenth of them is one, which is half."""
    write_dataset(project / "few", train=10)
    write_params(project, data__path="few", monitor__holdout=0.1, train__holdout=0.1, finetune__holdout=0.1)
    for stage in ("data", "pretrain", "train", "baseline", "finetune"):
        said = run_all(moco, stage)
        lines = [line for line in said.splitlines() if "holdout" in line]
        if stage != "data":
            (line,) = lines
            assert line.startswith("warning: ") and "5 of 10" in line and "50.0%" in line
    assert report(project, "train")["held_out_images"] == report(project, "finetune")["held_out_images"] == 5
