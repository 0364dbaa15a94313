"""Learning rates and momenta over a run."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import yaml

from conftest import ROOT
from moco.training.schedules import key_momentum, lr_factor, scaled_lr, view_size


def test_rate_grows_with_the_batch() -> None:
    assert scaled_lr(0.03, 256) == pytest.approx(0.03)
    assert scaled_lr(0.03, 512) == pytest.approx(0.06)
    assert scaled_lr(0.03, 64) == pytest.approx(0.0075)  # the value the original used at 512


def test_the_originals_preset_pretrains_at_the_rate_of_its_batch() -> None:
    preset: dict[str, Any] = yaml.safe_load((ROOT / "presets" / "nyu.yaml").read_text())
    pretrain, train = preset["pretrain"], preset["train"]
    assert (pretrain["lr"], pretrain["batch_size"]) == (0.03, 512)
    assert scaled_lr(pretrain["lr"], pretrain["batch_size"]) == pytest.approx(0.06)
    assert scaled_lr(train["lr"], train["batch_size"]) == pytest.approx(30)


def test_the_originals_linear_steps_fall_at_its_epochs() -> None:
    train = yaml.safe_load((ROOT / "presets" / "nyu.yaml").read_text())["train"]
    factors = [lr_factor("step", epoch / 200, 0.0, tuple(train["milestones"])) for epoch in range(200)]
    drops = [epoch for epoch in range(1, 200) if factors[epoch] < 0.5 * factors[epoch - 1]]
    assert drops == [60, 80, 120, 160]


def test_views_grow_at_their_shares_of_the_run_to_the_size_of_the_images() -> None:
    def sizes(full: int) -> list[int]:
        return [view_size(full, (0.625, 0.75, 1.0), (0.5, 0.8), place / 10) for place in range(11)]

    assert sizes(32) == [20] * 5 + [24] * 3 + [32] * 3
    assert sizes(96) == [60] * 5 + [72] * 3 + [96] * 3
    assert sizes(50)[-1] == 50  # whatever it is
    assert {view_size(33, (1.0,), (), progress) for progress in (0.0, 0.5, 1.0)} == {33}
    assert view_size(8, (0.1, 1.0), (0.5,), 0.0) == 4
    assert [view_size(32, (share,), (), 0) for share in (0.4375, 0.5625)] == [16, 20]  # halves go up
    assert view_size(95, (0.99,), (), 0) == 95  # never larger than the images


@pytest.mark.parametrize("epochs", [10, 100, 200, 300, 700])
@pytest.mark.parametrize("milestone", [0.1, 0.3, 0.6, 0.7, 0.8])
def test_a_milestone_takes_effect_at_exactly_its_share(epochs: int, milestone: float) -> None:
    at = round(milestone * epochs)
    assert lr_factor("step", (at - 1) / epochs, 0.0, (milestone,)) == 1.0
    assert lr_factor("step", at / epochs, 0.0, (milestone,)) == pytest.approx(0.1)


def test_milestones_multiply() -> None:
    milestones = (0.6, 0.8)
    assert [lr_factor("step", p, 0.0, milestones) for p in (0.0, 0.6, 0.8, 1.0)] == pytest.approx([1, 0.1, 0.01, 0.01])
    assert lr_factor("step", 0.9, 0.0, milestones, gamma=0.5) == pytest.approx(0.25)
    assert lr_factor("step", 0.9, 0.0, ()) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_warm_up_rises_linearly_from_zero_to_the_peak(schedule: str) -> None:
    assert [lr_factor(schedule, p, 0.2, (0.9,)) for p in (0.0, 0.05, 0.1, 0.15)] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert lr_factor(schedule, 0.2, 0.2, (0.9,)) == pytest.approx(1)
    assert lr_factor(schedule, 0.0, 0.0, (0.9,)) == 1


def test_cosine_falls_from_the_peak_to_nothing() -> None:
    for p in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert lr_factor("cosine", p, 0.0, ()) == pytest.approx((1 + math.cos(math.pi * p)) / 2)
    assert lr_factor("cosine", 0.6, 0.2, ()) == pytest.approx(0.5)  # half of what is left after the warm-up
    for warmup in (0.0, 0.1, 0.99):
        assert lr_factor("cosine", 1.0, warmup, ()) == pytest.approx(0, abs=1e-12)
        assert lr_factor("cosine", 1.5, warmup, ()) == pytest.approx(0, abs=1e-12)
    factors = [lr_factor("cosine", i / 100, 0.0, ()) for i in range(101)]
    assert all(later < earlier for earlier, later in pairwise(factors))


def test_constant_stays() -> None:
    assert {lr_factor("constant", i / 10, 0.0, (0.5,)) for i in range(11)} == {1.0}


def test_key_momentum_is_constant_or_rises_to_one() -> None:
    assert {key_momentum(0.99, "constant", i / 10) for i in range(11)} == {0.99}
    assert key_momentum(0.99, "cosine", 0.0) == pytest.approx(0.99)
    assert key_momentum(0.99, "cosine", 0.5) == pytest.approx(0.995)
    assert key_momentum(0.99, "cosine", 1.0) == 1.0
    assert key_momentum(0.99, "cosine", 1.2) == 1.0
