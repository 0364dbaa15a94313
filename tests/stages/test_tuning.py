"""The options of fine-tuning: each does what its paper says, and nothing where it is off."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stage_helpers import run_all
from torch import nn
from torchvision.models import resnet18

from conftest import Moco, write_params
from moco.encoders import own
from moco.encoders.small_resnet import SmallResNet
from moco.errors import UserError
from moco.settings.reading import load
from moco.stages import finetune
from moco.training.best_epoch import BestEpoch
from moco.training.loop import LoopState
from moco.training.pool_batches import PoolBatches
from moco.training.schedules import scaled_lr
from moco.training.supervised import SupervisedStep, Tuning, layer_groups
from moco.views.views import Views, recipe

CPU = torch.device("cpu")


def stepped(project: Path, tuning: Tuning, network: nn.Module | None = None) -> tuple[SupervisedStep, torch.Tensor]:
    """A step on images that views leave as they are, and what the network got."""
    section = load(project / "params.yaml").finetune
    torch.manual_seed(0)
    network = network or SmallResNet(5, 4, 2)
    views = Views(recipe("crop", (1.0, 1.0), (0.1, 2.0)), 32, (0.0,) * 3, (1.0,) * 3, CPU)
    step = SupervisedStep(network, torch.arange(5).repeat(4), views, section, 4, CPU, torch.float32, tuning)
    seen: list[torch.Tensor] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3)).astype(np.uint8))
    step(np.array([0, 1, 2, 3]), images, 0.5, 7)
    hook.remove()
    return step, seen[0]


def loss_of(network: nn.Module, batch: torch.Tensor, targets: torch.Tensor) -> float:
    network.train()
    return float(F.cross_entropy(network(batch), targets))


def test_smoothed_targets_are_those_of_torch(project: Path) -> None:
    torch.manual_seed(0)
    before = SmallResNet(5, 4, 2)
    step, batch = stepped(project, Tuning(label_smoothing=0.2), copy.deepcopy(before))
    expected = F.cross_entropy(before.train()(batch), torch.arange(4), label_smoothing=0.2)
    expected.backward()
    torch.optim.SGD(before.parameters(), step.optimizer.param_groups[0]["lr"], 0.9, weight_decay=1e-4,
                    nesterov=True).step()  # fmt: skip
    for ours, theirs in zip(step.network.parameters(), before.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_mixup_mixes_images_and_targets_alike_and_again_the_same(project: Path) -> None:
    _, plain = stepped(project, Tuning())
    step, mixed = stepped(project, Tuning(mixup=1.0))
    share = np.random.default_rng((step.section.seed, 7)).beta(1.0, 1.0)
    partners = [
        next(j for j in range(4) if torch.allclose(share * plain[i] + (1 - share) * plain[j], mixed[i], atol=1e-5))
        for i in range(4)
    ]
    assert sorted(partners) == [0, 1, 2, 3] and 0.01 < share < 0.99
    again, same = stepped(project, Tuning(mixup=1.0))
    assert torch.equal(same, mixed)
    assert all(torch.equal(a, b) for a, b in zip(step.network.parameters(), again.network.parameters(), strict=True))


@pytest.mark.parametrize("network", [SmallResNet(5, 4, 3), resnet18(num_classes=5)])
def test_earlier_stages_learn_more_slowly(network: nn.Module, project: Path) -> None:
    groups = layer_groups(network, 0.5, own.stage)
    stages = 3 if isinstance(network, SmallResNet) else 4
    assert [group["scale"] for group in groups] == [0.5**depth for depth in range(stages + 1, -1, -1)]
    assert groups[-1]["params"][0] is network.fc.weight and groups[0]["params"][0] is network.conv1.weight
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(map(id, network.parameters()))
    step, _ = stepped(project, Tuning(layer_decay=0.5, stage_of=own.stage), network)
    rates = [group["lr"] for group in step.optimizer.param_groups]
    assert rates == pytest.approx([rates[-1] * group["scale"] for group in groups])
    assert rates[-1] == pytest.approx(scaled_lr(step.section.lr, 4) * 0.5, rel=0.01), "cosine, half-way"


def test_frozen_norms_keep_their_statistics_and_the_rest_trains(project: Path) -> None:
    torch.manual_seed(0)
    network = SmallResNet(5, 4, 2)
    before = copy.deepcopy(network.state_dict())
    step, _ = stepped(project, Tuning(frozen_norms=True), network)
    after = step.network.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not {name for name in moved if "running" in name or "num_batches" in name}
    assert "conv1.weight" in moved and "fc.weight" in moved and step.network.training
    step, _ = stepped(project, Tuning())
    assert int(step.network.state_dict()["bn1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("confidence", [0.0, 0.292, 1.0])
def test_the_pool_is_learned_with_the_labels_that_the_network_is_sure_of(project: Path, confidence: float) -> None:
    """FixMatch's loss by its definition, on views that are the images themselves."""
    torch.manual_seed(0)
    network = SmallResNet(5, 4, 2)
    section = load(project / "params.yaml").finetune
    views = Views(recipe("crop", (1.0, 1.0), (0.1, 2.0)), 32, (0.0,) * 3, (1.0,) * 3, CPU)
    views.recipe = replace(views.recipe, flip_probability=0.0)
    rng = np.random.default_rng(0)
    images, labelled = (rng.integers(0, 255, (count, 32, 32, 3)).astype(np.uint8) for count in (20, 4))
    pool = PoolBatches(images, 8, 0, views, views, confidence)
    before, labels = copy.deepcopy(network), torch.arange(4)
    step = SupervisedStep(network, labels, views, section, 4, CPU, torch.float32, Tuning(), pool)
    found = step(labels.numpy(), torch.from_numpy(labelled), 0.5, 1)
    known, unknown = (views.to_unit(torch.from_numpy(part)) for part in (labelled, pool.read(1).numpy()))
    chances = before.train()(unknown).softmax(1)
    sure = chances.amax(1) >= confidence
    outputs = before(torch.cat([known, unknown]))
    terms = F.cross_entropy(outputs[4:], chances.argmax(1), reduction="none")[sure]
    expected = F.cross_entropy(outputs[:4], labels) + terms.sum() / 8
    assert float(found["loss"]) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(found["pool_share"]) == pytest.approx(float(sure.float().mean()))
    assert {0.0: sure.all(), 0.292: sure.any() and not sure.all(), 1.0: not sure.any()}[confidence]
    expected.backward()
    ours, theirs = network.conv1.weight, before.conv1.weight
    assert theirs.grad is not None
    change = -step.optimizer.param_groups[0]["lr"] * 1.9 * (theirs.grad + section.weight_decay * theirs)
    assert torch.allclose(ours - theirs, change, atol=1e-5), "no gradient flows through the labels"


def test_batches_of_the_pool_are_a_function_of_the_step(project: Path) -> None:
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    views = Views(recipe("crop", (1.0, 1.0), (0.1, 2.0)), 2, (0.0,) * 3, (1.0,) * 3, CPU)

    def batches() -> PoolBatches:
        return PoolBatches(images, 5, 3, views, views, 0.5)

    pool = batches()
    found = [pool.read(number)[:, 0, 0, 0].tolist() for number in range(9)]
    for epoch in (found[:4], found[4:8]):
        assert sorted(row for batch in epoch for row in batch) == list(range(20)), "each once"
    assert found[:4] != found[4:8]
    for number in (6, 0, 8, 3, 4):
        assert batches().read(number)[:, 0, 0, 0].tolist() == found[number]
        assert pool.read(number)[:, 0, 0, 0].tolist() == found[number], "after others, too"
    assert PoolBatches(images, 99, 3, views, views, 0.5).read(2).shape[0] == 20


def test_straight_from_the_encoder_no_classifier_is_needed(moco: Moco, project: Path) -> None:
    write_params(project, finetune__start="encoder", finetune__epochs=1, finetune__lr=1e-9, finetune__weight_decay=0.0,
                 finetune__layer_decay=0.8, finetune__mixup=0.2, finetune__label_smoothing=0.1)  # fmt: skip
    run_all(moco, "data", "pretrain", "finetune")
    found = torch.load(project / "models/finetuned/model_sub.pth", weights_only=True)
    encoder = torch.load(project / "models/encoder.pth", weights_only=True)["weights"]
    assert torch.allclose(found["conv1.weight"], encoder["conv1.weight"], atol=1e-5)
    assert found["fc.weight"].std() == pytest.approx(0.01, rel=0.3) and found["fc.bias"].abs().max() < 1e-6
    done = moco("eval", "--classifier", "models/finetuned")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


@pytest.mark.parametrize(("below", "epoch"), [(0.95, 3), (1.05, 2)])
def test_the_last_epoch_is_kept_where_an_earlier_one_is_better_by_chance(
    project: Path, monkeypatch: pytest.MonkeyPatch, below: float, epoch: int
) -> None:
    """The border is two standard errors of the best accuracy (of 10 of 14 images, by Agresti and Coull)."""
    step, _ = stepped(project, Tuning())
    measured = iter([0.3, 0.8, 0.8 - below * 2 * (10 / 14 * 4 / 14 / 14) ** 0.5])
    monkeypatch.setattr(SupervisedStep, "accuracy", lambda *_: next(measured))
    choice = BestEpoch(step, LoopState(), np.zeros((10, 32, 32, 3), np.uint8), np.zeros(10, np.int64))
    with pytest.raises(ValueError, match="measured"):
        choice.choice()
    for number in (1, 2, 3):
        choice.state.epoch = number
        with torch.no_grad():
            step.network.fc.bias.fill_(float(number))  # type: ignore[union-attr, operator]
        choice()
    found = choice.choice()
    assert found["epoch"] == epoch and (found["weights"]["fc.bias"] == epoch).all()


def test_a_run_that_was_lost_after_its_last_checkpoint_chooses_the_same_epoch(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise UserError("lost")

    run_all(moco, "data", "pretrain", "train")
    accuracies = iter([0.1, 0.3, 0.8, 0.7, 0.7, 0.7, 0.7])  # the start, three epochs, val; the last again, val
    monkeypatch.setattr(SupervisedStep, "accuracy", lambda *_: next(accuracies))
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_write", lost)
        assert moco("finetune").returncode == 1
    done = moco("finetune")
    assert done.returncode == 0 and "continuing from" in done.stderr, done.stderr
    assert "finetune: epoch 3, held-out accuracy 70.00%" in done.stderr
