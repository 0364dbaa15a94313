"""Fine-tuning: train mode, the choice of the epoch, the files, and going on after an interruption."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_helpers import outside_score, run_all, signalled
from torch import Tensor

from conftest import Moco, assert_one_line_error, write_params
from moco.encoders.small_resnet import SmallResNet
from moco.settings.reading import load
from moco.tracking.metric_log import read_events
from moco.training import best_epoch
from moco.training.best_epoch import BestEpoch
from moco.training.features import stratified_holdout
from moco.training.supervised import SupervisedStep
from moco.views.views import Views, recipe
from process_helpers import Started, wait_for_steps


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "model_sub.pth", weights_only=True)
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def metrics(project: Path, name: str = "finetune") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project / f"reports/{name}/metrics.json").read_text())
    return found


@pytest.fixture
def classifier(moco: Moco, project: Path) -> Path:
    run_all(moco, "data", "pretrain", "train")
    return project / "models/classifier"


def test_it_leaves_the_files_of_a_classifier_and_its_reports(moco: Moco, project: Path, classifier: Path) -> None:
    run_all(moco, "finetune")
    folder, found = project / "models/finetuned", metrics(project)
    (best,) = folder.glob("model_best_*.pth")
    epoch, accuracy = found["best_epoch"], found["held_out_accuracy"]
    assert best.name == f"model_best_{epoch}_{100 * accuracy:.2f}.pth"
    assert sorted(path.name for path in folder.iterdir()) == [best.name, "model_sub.pth", "submission.py"]
    content = torch.load(best, weights_only=True)
    assert {"weights", "optimizer", "epoch", "held_out_accuracy"} <= set(content)
    assert content["settings"]["finetune.epochs"] == "3" and "pretrain.lr" in content["settings"]
    assert same(content["weights"], weights(folder))
    assert set(found) == {
        "held_out_accuracy", "best_held_out_accuracy", "held_out_images", "held_out_in_pool", "val_accuracy",
        "best_epoch", "minutes",
        "images_seen", "images_per_second", "labelled_images_seen", "views_seen", "extra_labels",
        "start_held_out_accuracy", "better_than_start",
    }  # fmt: skip
    with (project / "reports/finetune/epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [0, 1, 2, 3], "the start, and every epoch"
    assert all(row["held_out_accuracy"] for row in rows) and all(row["loss"] and row["lr"] for row in rows[1:])
    assert float(rows[epoch]["held_out_accuracy"]) == pytest.approx(accuracy)
    (log,) = (project / "runs/finetune").glob("*/metrics.jsonl")
    (model,) = [event for event in read_events(log) if event["event"] == "model"]
    assert model["files"] == ["classifier/model_sub.pth", "classifier/submission.py"], "to be registered in MLflow"
    run_all(moco, "eval")
    assert "fine-tuned" in moco("report").stdout


def test_a_scorer_that_knows_only_the_contract_gets_the_reported_accuracy(
    moco: Moco, project: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[dict[str, Tensor]] = []
    correct = SupervisedStep.correct

    def watched(self: SupervisedStep, *arguments: Any) -> np.ndarray:
        measured.append({name: value.clone() for name, value in self.network.state_dict().items()})
        return correct(self, *arguments)

    monkeypatch.setattr(SupervisedStep, "correct", watched)
    monkeypatch.setattr(best_epoch, "is_significantly_better", lambda best, last, count: best > last)
    write_params(project, finetune__lr=20.0, finetune__epochs=10)
    run_all(moco, "finetune")
    assert metrics(project)["best_epoch"] < 10, "chosen so that the last weights are not the best"
    assert same(measured[-1], weights(project / "models/finetuned")), "val is measured with the weights written"
    right, total = outside_score(project, batch=4, folder="models/finetuned")
    assert metrics(project)["val_accuracy"] == pytest.approx(right / total)
    done = moco("eval", "--classifier", "models/finetuned")
    assert done.returncode == 0 and "other settings" not in done.stderr, done.stderr
    assert metrics(project, "eval-finetuned")["val_accuracy"] == pytest.approx(right / total)
    assert not (project / "reports/eval").exists()


def test_every_step_trains_in_train_mode_although_every_epoch_evaluates(
    moco: Moco, project: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 6: after the first evaluation the original never went back to train mode."""
    seen: list[tuple[bool, set[bool], Tensor]] = []
    forward = SmallResNet.forward

    def watched(self: SmallResNet, x: Tensor) -> Tensor:
        modes = {module.training for module in self.modules()}
        seen.append((torch.is_grad_enabled(), modes, self.state_dict()["bn1.running_mean"].clone()))
        return forward(self, x)

    monkeypatch.setattr(SmallResNet, "forward", watched)
    run_all(moco, "finetune")
    steps = [(modes, mean) for training, modes, mean in seen if training]
    assert [modes for modes, _ in steps] == [{True}] * 6
    assert all(modes == {False} for training, modes, _ in seen if not training)
    assert len({tuple(mean.tolist()) for _, mean in steps}) == 6, "running statistics move in every step"


def test_a_step_does_not_trust_the_mode_that_it_finds(project: Path) -> None:
    config = load(project / "params.yaml")
    device, images = torch.device("cpu"), np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    views = Views(recipe("crop", (0.5, 1.0), (0.1, 2.0)), 32, (0.5,) * 3, (0.2,) * 3, device)
    step = SupervisedStep(SmallResNet(5, 4, 2), torch.arange(4), views, config.finetune, 4, device, torch.float32)
    before = step.network.eval().state_dict()["bn1.running_mean"].clone()
    step(np.arange(4), torch.from_numpy(images), 0.0, 0)
    assert all(module.training for module in step.network.modules())
    assert not torch.equal(step.network.state_dict()["bn1.running_mean"], before)


def test_all_weights_and_statistics_move(
    moco: Moco, project: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BestEpoch, "choice", BestEpoch._now)  # the last, also where it is behind the start
    run_all(moco, "finetune")
    before, after = weights(classifier), weights(project / "models/finetuned")
    assert set(before) == set(after)
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


def test_it_starts_from_the_classifier(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where train has held out the same images and not refitted, the start is model_sub.pth to the bit."""
    started: list[dict[str, Tensor]] = []
    call = SupervisedStep.__call__

    def watched(self: SupervisedStep, *arguments: Any) -> dict[str, Any]:
        started.append({name: value.clone().cpu() for name, value in self.network.state_dict().items()})
        return call(self, *arguments)

    monkeypatch.setattr(SupervisedStep, "__call__", watched)
    write_params(project, train__refit=False, train__views=2, train__epochs=9)
    run_all(moco, "data", "pretrain", "train", "finetune")
    assert same(started[0], weights(project / "models/classifier"))
    started.clear()
    write_params(project, train__refit=True, train__views=2, train__epochs=9)
    run_all(moco, "train", "finetune")
    classifier = weights(project / "models/classifier")
    changed = {name for name, value in classifier.items() if not torch.equal(value, started[0][name])}
    assert changed == {"fc.weight", "fc.bias"}, "the encoder is the classifier's, the layer has not seen all of train"


def test_the_last_layer_has_not_seen_held_out_images(moco: Moco, project: Path, classifier: Path) -> None:
    """With `train.refit` the layer of model_sub.pth was fitted on all labels: wrong ones of held-out images must
    not reach the start of fine-tuning."""
    labels = torch.load(project / "dataset/train_label_tensor.pt")
    _, held = stratified_holdout(labels.numpy(), 0.4, 0)
    write_params(project, train__epochs=1, finetune__lr=1e-12, finetune__epochs=1)
    run_all(moco, "train", "finetune")
    fitted, first = weights(classifier)["fc.weight"], weights(project / "models/finetuned")["fc.weight"]
    labels[held[0]], labels[held[2]] = labels[held[2]].item(), labels[held[0]].item()
    assert (stratified_holdout(labels.numpy(), 0.4, 0)[1] == held).all(), "chosen so that the split stays"
    torch.save(labels, project / "dataset/train_label_tensor.pt")
    run_all(moco, "data", "train", "finetune")
    assert not torch.equal(weights(classifier)["fc.weight"], fitted)
    assert torch.equal(weights(project / "models/finetuned")["fc.weight"], first)


def test_labels_of_val_change_nothing_but_the_report(moco: Moco, project: Path, classifier: Path) -> None:
    """Fault 7."""
    run_all(moco, "finetune")
    before = weights(project / "models/finetuned")
    labels = torch.load(project / "dataset/val_label_tensor.pt")
    torch.save((labels + 1) % 5, project / "dataset/val_label_tensor.pt")
    run_all(moco, "data", "train", "finetune")
    assert same(weights(project / "models/finetuned"), before)


def test_the_best_epoch_survives_an_interruption(
    moco: Moco, project: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three epochs is the best; a signal comes in the third, in the midst of it."""
    start = int(weights(classifier)["bn1.num_batches_tracked"])

    def scripted(self: SupervisedStep, images: Any, labels: Any) -> float:
        return {start + 2: 0.9, start + 4: 0.9, start + 6: 0.2}.get(
            int(self.network.state_dict()["bn1.num_batches_tracked"]), 0.1
        )

    monkeypatch.setattr(SupervisedStep, "accuracy", scripted)
    run_all(moco, "finetune")
    (best,) = (project / "models/finetuned").glob("model_best_*.pth")
    assert best.name == "model_best_1_90.00.pth", "the earlier on a tie, as the last is far worse"
    undisturbed = torch.load(best, weights_only=True)
    assert undisturbed["weights"]["bn1.num_batches_tracked"] == start + 2, "weights are those of the best epoch"

    (project / "runs").rename(project / "runs-undisturbed")
    (project / "models/finetuned").rename(project / "undisturbed")
    with signalled(4):
        done = moco("finetune")
    assert done.returncode == 128 + signal.SIGTERM and "the same command continues" in done.stderr
    assert not (project / "models/finetuned").exists()
    done = moco("finetune")
    assert done.returncode == 0 and "continuing from" in done.stderr, done.stderr
    resumed = torch.load(project / "models/finetuned" / best.name, weights_only=True)
    assert same(resumed["weights"], undisturbed["weights"])
    buffers = [[s["momentum_buffer"] for s in found["optimizer"]["state"].values()] for found in (resumed, undisturbed)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*buffers, strict=True))


@pytest.mark.parametrize("pool", [0, 3])
def test_a_signal_saves_and_the_same_command_continues_to_the_same_bits(
    moco: Moco, project: Path, classifier: Path, pool: int
) -> None:
    write_params(project, finetune__epochs=40, checkpoint__every=100, finetune__pool=pool)
    run_all(moco, "finetune")
    undisturbed = (project / "models/finetuned/model_sub.pth").read_bytes()
    with (project / "reports/finetune/epochs.csv").open() as file:
        curve = [(row["step"], row["held_out_accuracy"]) for row in csv.DictReader(file)]
    (project / "runs").rename(project / "runs-undisturbed")
    (project / "models/finetuned").rename(project / "undisturbed")
    process = Started(project, "finetune")
    wait_for_steps(process, project, 6, "finetune")
    process.send_signal(signal.SIGTERM)
    code, errors = process.finish()
    assert code == 128 + signal.SIGTERM, errors
    assert "the same command continues" in errors
    write_params(project, finetune__epochs=40, checkpoint__every=7, finetune__pool=pool)  # still the same run
    done = moco("finetune")
    assert done.returncode == 0 and "continuing from" in done.stderr, done.stderr
    assert (project / "models/finetuned/model_sub.pth").read_bytes() == undisturbed
    with (project / "reports/finetune/epochs.csv").open() as file:
        assert [(row["step"], row["held_out_accuracy"]) for row in csv.DictReader(file)] == curve


def test_another_classifier_of_the_same_settings_is_another_run(moco: Moco, project: Path, classifier: Path) -> None:
    run_all(moco, "finetune")
    content = weights(classifier)
    content["conv1.weight"] *= 1.01
    torch.save(content, classifier / "model_sub.pth")
    run_all(moco, "finetune")
    keys = {path.name.split("-")[0] for path in (project / "runs/finetune").iterdir()}
    assert len(keys) == 2


def test_minutes_end_the_run(moco: Moco, project: Path, classifier: Path) -> None:
    write_params(project, finetune__epochs=100000, finetune__minutes=0.01)
    run_all(moco, "finetune")
    assert 0.01 <= metrics(project)["minutes"] < 1


def test_what_is_missing_or_does_not_fit_is_one_line(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain")
    assert_one_line_error(moco("finetune"), "models/classifier/model_sub.pth", "moco train")
    run_all(moco, "train")
    folder = project / "models/classifier"
    good = (folder / "model_sub.pth").read_bytes()
    (folder / "model_sub.pth").write_bytes(good[:100])
    assert_one_line_error(moco("finetune"), "model_sub.pth", "damaged")
    torch.save({"fc.weight": torch.zeros(1)}, folder / "model_sub.pth")
    assert_one_line_error(moco("finetune"), "model_sub.pth", "does not fit")
    (folder / "model_sub.pth").write_bytes(good)
    (best,) = folder.glob("model_best_*.pth")
    torch.save({"epoch": 1}, best)
    assert_one_line_error(moco("finetune"), best.name, "not a file of `moco train`")
    best.unlink()
    assert_one_line_error(moco("finetune"), "model_best_*.pth", "moco train")


def test_a_classifier_of_other_classes_is_refused(moco: Moco, project: Path, classifier: Path) -> None:
    (project / "dataset/classes.txt").write_text("a\nb\nc\nd\ne\n")
    run_all(moco, "data")
    assert_one_line_error(moco("finetune"), "other classes", "moco train")


def test_other_settings_than_the_classifier_was_made_with_are_told(moco: Moco, project: Path, classifier: Path) -> None:
    write_params(project, train__lr=0.2)
    done = moco("finetune")
    assert done.returncode == 0 and "train.lr is 0.1 there and 0.2 here" in done.stderr
