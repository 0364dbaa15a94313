"""The linear classifier on features that were computed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moco.errors import UserError
from moco.settings.train import TrainConfig
from moco.training.linear import LinearFit, fit_linear, is_significantly_better, make_scaling

CONFIG = TrainConfig(
    solver="sgd", epochs=12, batch_size=16, lr=1.0, sgd_momentum=0.9, weight_decay=0.0, schedule="cosine", warmup=0.0,
    milestones=(), features="last", feature_scaling="standardize", views=1, holdout=0.2, refit=False, seed=3,
)  # fmt: skip
CLASSES, WIDTH = 4, 6
HELD = 400  # so many that a better epoch is no matter of chance
Log = list[dict[str, float]]


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Tensors this small lose time with more."""
    torch.set_num_threads(1)


def blobs(count: int, seed: int, noise: float = 0.3, views: int = 1) -> tuple[Tensor, Tensor]:
    """V x N x D features around one centre a class, far from zero and of unequal scales; labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(count) % CLASSES
    x = centres[labels] + noise * torch.randn(views, count, WIDTH, generator=generator)
    return x * torch.tensor([1, 10, 0.1, 1, 50, 0.01]) + torch.arange(WIDTH) * 3.0, labels


def fit(
    config: TrainConfig = CONFIG, noise: float = 0.3, stop_after: int | None = None, views: int = 1
) -> tuple[LinearFit, Log]:
    x, labels = blobs(50, 0, noise, views)
    held, held_labels = blobs(HELD, 1, noise)
    log: Log = []
    fitted = fit_linear(
        x, labels, held[0], held_labels, CLASSES, config, lambda m, epoch: log.append({**m, "epoch": epoch}), stop_after
    )
    return fitted, log


def accuracy(fitted: LinearFit, features: Tensor, labels: Tensor) -> float:
    return float(((features @ fitted.weight.T + fitted.bias).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("batch_size", [16, 50, 1000])
def test_separable_classes_are_learnt(batch_size: int) -> None:
    fitted, log = fit(replace(CONFIG, batch_size=batch_size, epochs=30))
    values = [line["held_out_accuracy"] for line in log]
    assert fitted.accuracy == 1 and values.count(1) > 1
    assert fitted.epoch == 30, "none is better than the last"
    assert fitted.weight.shape == (CLASSES, WIDTH) and fitted.bias.shape == (CLASSES,)
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]


@pytest.mark.parametrize("scaling", ["standardize", "none"])
def test_weights_apply_to_features_as_they_come(scaling: str) -> None:
    config = replace(CONFIG, feature_scaling=scaling, lr=1.0 if scaling == "standardize" else 1e-3)
    fitted, _ = fit(config, noise=2.0)
    held, labels = blobs(HELD, 1, noise=2.0)
    assert accuracy(fitted, held[0], labels) == pytest.approx(fitted.accuracy)


def test_scaling_is_folded_into_the_layer_exactly() -> None:
    features = blobs(50, 0)[0][0]
    scaling = make_scaling(features[None], "standardize")
    scaled = scaling.apply(features)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(WIDTH), rtol=0, atol=1e-4)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(WIDTH), rtol=1e-4, atol=0)
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, CLASSES)
    weight, bias = scaling.fold(layer)
    assert weight.dtype is bias.dtype is torch.float32
    found = (features.double() @ weight.double().T + bias.double()).float()
    torch.testing.assert_close(found, layer(scaled).detach(), rtol=1e-5, atol=1e-4)


def test_no_scaling_is_the_identity() -> None:
    features = blobs(50, 0)[0][0]
    scaling = make_scaling(features[None], "none")
    assert torch.equal(scaling.apply(features), features)
    layer = nn.Linear(WIDTH, CLASSES)
    weight, bias = scaling.fold(layer)
    assert torch.equal(weight, layer.weight) and torch.equal(bias, layer.bias)


def test_a_constant_is_told_from_what_varies_at_any_size() -> None:
    """Over as many rows as there are images, where the mean of a constant is not quite it."""
    noise = torch.randn(20_001, generator=torch.Generator().manual_seed(0))
    columns = [*(torch.full_like(noise, value) for value in (0.0, 0.3, 1000.3)), 1000.3 + noise, 1e-4 * noise]
    full = torch.stack(columns, 1)
    std = make_scaling(torch.stack([full, full.bfloat16().float(), full]), "standardize").std
    assert std[:3].tolist() == [1, 1, 1]
    std = make_scaling(full[None], "standardize").std
    assert std[:3].tolist() == [1, 1, 1]
    torch.testing.assert_close(std[3:] / noise.std(correction=0), torch.tensor([1.0, 1e-4]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.3])
def test_a_constant_dimension_does_no_harm(constant: float) -> None:
    """Not here, and not for an image that is the first to differ in it."""
    x, labels = blobs(50, 0)
    held, held_labels = blobs(40, 1)
    x[..., 2], held[..., 2] = constant, constant + 5
    fitted = fit_linear(x, labels, held[0], held_labels, CLASSES, replace(CONFIG, epochs=30), lambda *_: None)
    assert torch.isfinite(fitted.weight).all() and torch.isfinite(fitted.bias).all()
    assert fitted.accuracy == 1


def test_a_single_image_gives_finite_weights() -> None:
    x, labels = blobs(1, 0)
    fitted = fit_linear(x, labels, x[0], labels, CLASSES, CONFIG, lambda *_: None)
    assert torch.isfinite(fitted.weight).all() and torch.isfinite(fitted.bias).all()


def test_the_best_epoch_is_the_first_with_the_highest_held_out_accuracy() -> None:
    fitted, log = fit(replace(CONFIG, lr=20.0, epochs=40), noise=3.0)
    values = [line["held_out_accuracy"] for line in log]
    assert fitted.accuracy == max(values)
    assert fitted.epoch == values.index(max(values)) + 1
    assert [line["epoch"] for line in log] == list(range(1, 41))
    assert 1 < fitted.epoch < 40 and min(values) < max(values), "a case in which the choice matters"
    held, labels = blobs(HELD, 1, noise=3.0)
    assert accuracy(fitted, held[0], labels) == pytest.approx(fitted.accuracy), "the weights are of that epoch"


@pytest.mark.parametrize("held_images", [6, HELD])
def test_an_earlier_epoch_must_be_better_by_more_than_chance(held_images: int) -> None:
    x, labels = blobs(50, 0, noise=3.0)
    held, held_labels = blobs(held_images, 1, noise=3.0)
    log: Log = []
    config = replace(CONFIG, lr=20.0, epochs=40)
    fitted = fit_linear(x, labels, held[0], held_labels, CLASSES, config, lambda m, epoch: log.append(m))
    values = [line["held_out_accuracy"] for line in log]
    best, last = max(values), values[-1]
    assert best > last, "a case in which the choice matters"
    if held_images == 6:
        assert not is_significantly_better(best, last, 6) and (fitted.epoch, fitted.accuracy) == (40, last)
    else:
        assert is_significantly_better(best, last, HELD) and (fitted.epoch, fitted.accuracy) == (
            values.index(best) + 1,
            best,
        )


@pytest.mark.parametrize(
    ("best", "last", "count", "clearly"),
    [(0.8, 0.75, 100, False), (0.8, 0.70, 100, True), (0.8, 0.75, 400, True), (1.0, 46 / 48, 48, False),
     (1.0, 44 / 48, 48, True), (0.0, 0.0, 0, False), (1 / 6, 0.0, 6, False)],
)  # fmt: skip
def test_what_is_clearly_better(best: float, last: float, count: int, clearly: bool) -> None:
    """Two standard errors of 0.8: 0.079 of a hundred images, 0.040 of four hundred."""
    assert is_significantly_better(best, last, count) is clearly


def test_the_optimizer_state_is_that_of_the_best_epoch() -> None:
    config = replace(CONFIG, lr=20.0, epochs=40)
    fitted, _ = fit(config, noise=3.0)
    alone, _ = fit(config, noise=3.0, stop_after=fitted.epoch)
    for index, state in alone.optimizer["state"].items():
        assert torch.equal(state["momentum_buffer"], fitted.optimizer["state"][index]["momentum_buffer"])
    assert alone.optimizer["param_groups"] == fitted.optimizer["param_groups"]
    assert fitted.optimizer["param_groups"][0]["lr"] > 0


def test_stop_after_keeps_the_last_epoch_and_the_schedule_of_the_whole() -> None:
    config = replace(CONFIG, lr=20.0, epochs=40)
    whole, log = fit(config, noise=3.0)
    last = whole.epoch + 3
    part, part_log = fit(config, noise=3.0, stop_after=last)
    assert part_log == log[:last]
    assert part.epoch == last and part.accuracy == log[last - 1]["held_out_accuracy"]
    assert not torch.equal(part.weight, whole.weight)


def test_without_held_out_images_the_last_epoch_of_stop_after_is_kept() -> None:
    x, labels = blobs(50, 0)
    nothing = (torch.empty(0, WIDTH), torch.empty(0, dtype=torch.long))
    fitted = fit_linear(x, labels, *nothing, CLASSES, replace(CONFIG, epochs=30), lambda *_: None, stop_after=25)
    assert fitted.epoch == 25
    assert accuracy(fitted, x[0], labels) == 1


def test_a_fit_is_a_function_of_its_seed_alone() -> None:
    first, log = fit(noise=2.0)
    torch.manual_seed(12345)
    again, again_log = fit(noise=2.0)
    other, _ = fit(replace(CONFIG, seed=4), noise=2.0)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias) and log == again_log
    assert not torch.equal(first.weight, other.weight)


def test_every_view_is_used() -> None:
    """One view is noise without a trace of the class, the other shows it: each alone gives another result."""
    x, labels = blobs(60, 0)
    noise = torch.randn(1, 60, WIDTH, generator=torch.Generator().manual_seed(5)) * x.std((0, 1)) + x.mean((0, 1))
    held, held_labels = blobs(40, 1)
    losses = []
    for views in (x, noise, torch.cat([noise, x]), torch.cat([x, noise])):
        log: Log = []
        fit_linear(views, labels, held[0], held_labels, CLASSES, CONFIG, lambda m, _, to=log: to.append(m))  # type: ignore[misc]
        losses.append(log[-1]["loss"])
    shown, hidden, *mixed = losses
    assert shown < 0.2 < hidden
    assert all(1.5 * shown < loss < hidden for loss in mixed), losses


def test_rate_follows_batch_and_schedule() -> None:
    _, log = fit(replace(CONFIG, schedule="step", milestones=(0.5, 0.75), epochs=8, lr=2.0))
    assert [line["lr"] for line in log] == pytest.approx([0.125] * 4 + [0.0125] * 2 + [0.00125] * 2)  # 2 * 16 / 256
    _, log = fit(replace(CONFIG, schedule="constant", epochs=1, batch_size=1000))
    assert log[0]["lr"] == pytest.approx(50 / 256), "of the batch that is really used"


def test_a_rate_that_ends_in_no_numbers_is_told() -> None:
    views, labels = blobs(64, 0)
    with pytest.raises(UserError, match=r"train\.lr: .* NaN or infinite in epoch \d+; lower it"):
        fit_linear(views, labels, views[0], labels, CLASSES, replace(CONFIG, lr=1e38), lambda *_: None)
