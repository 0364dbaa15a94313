"""The linear classifier's default solver reaches the optimum of logistic regression, as scikit-learn finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from moco.errors import UserError
from moco.settings.train import TrainConfig
from moco.training import linear
from moco.training.linear import LinearFit, fit_linear, make_scaling

CONFIG = TrainConfig(
    solver="lbfgs", epochs=1, batch_size=16, lr=1.0, sgd_momentum=0.9, weight_decay=0.01, schedule="cosine", warmup=0.0,
    milestones=(), features="last", feature_scaling="standardize", views=1, holdout=0.2, refit=False, seed=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Tensors this small lose time with more."""
    torch.set_num_threads(1)


def loaded(load: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    x, y = load(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32)[None], torch.tensor(y, dtype=torch.int64)


def fitted(views: Tensor, labels: Tensor, config: TrainConfig = CONFIG) -> LinearFit:
    classes = int(labels.max()) + 1
    return fit_linear(views, labels, views[0], labels, classes, config, lambda *_: None)


def probabilities(fit: LinearFit, features: Tensor) -> np.ndarray:
    logits = features.double() @ fit.weight.double().T + fit.bias.double()
    return torch.softmax(logits, 1).numpy()  # type: ignore[no-any-return]


def reference(views: Tensor, labels: Tensor, strength: float) -> LogisticRegression:
    """The same objective: the mean over all rows, and half of `strength` times the squared weights."""
    rows = make_scaling(views, "standardize").apply(views).flatten(0, 1).double().numpy()
    model = LogisticRegression(C=1 / (strength * len(rows)), tol=1e-8, max_iter=10_000)
    return model.fit(rows, labels.repeat(len(views)).numpy())


@pytest.mark.fault("linear-optimum")
@pytest.mark.parametrize("strength", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("load", [load_iris, load_wine, load_digits])
def test_it_is_the_optimum_that_scikit_learn_finds(load: Callable[..., Any], strength: float) -> None:
    views, labels = loaded(load)
    fit = fitted(views, labels, replace(CONFIG, weight_decay=strength))
    known = reference(views, labels, strength)
    scaled = make_scaling(views, "standardize").apply(views)[0].double().numpy()
    assert fit.converged
    np.testing.assert_allclose(probabilities(fit, views[0]), known.predict_proba(scaled), atol=2e-3)
    assert fit.accuracy == pytest.approx(known.score(scaled, labels.numpy()), abs=1 / len(labels))


@pytest.mark.fault("linear-optimum")
def test_all_views_count_alike() -> None:
    views, labels = loaded(load_wine)
    noise = views.std(1, keepdim=True) * torch.randn(3, *views.shape[1:], generator=torch.Generator().manual_seed(0))
    views = torch.cat([views, views + noise])
    known = reference(views, labels, 0.01)
    scaled = make_scaling(views, "standardize").apply(views)[0].double().numpy()
    found = probabilities(fitted(views, labels), views[0])
    np.testing.assert_allclose(found, known.predict_proba(scaled), atol=2e-3)


@pytest.mark.fault("linear-optimum")
def test_neither_steps_nor_the_number_of_labels_nor_the_seed_decide() -> None:
    """The same images four times over, and other settings of sgd, give the same classifier."""
    views, labels = loaded(load_iris)
    once = fitted(views, labels)
    often = fitted(views.repeat(1, 4, 1), labels.repeat(4))
    other = fitted(views, labels, replace(CONFIG, seed=5, epochs=99, batch_size=3, lr=7.0))
    np.testing.assert_allclose(probabilities(often, views[0]), probabilities(once, views[0]), atol=1e-3)
    assert torch.equal(other.weight, once.weight)


def test_a_fit_that_stopped_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    views, labels = loaded(load_digits)
    monkeypatch.setattr(linear, "MAX_ITERATIONS", linear.LOG_EVERY)
    assert fitted(views, labels).converged is False


def test_the_time_left_follows_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of MAX_ITERATIONS, which no fit needs, it would be wrong by a factor of ten."""
    fractions: list[float] = []
    monkeypatch.setattr(linear.ProgressDisplay, "update", lambda _, fraction, *more: fractions.append(fraction))
    views, labels = loaded(load_digits)
    fit = fitted(views, labels)
    assert fit.epoch < linear.MAX_ITERATIONS / 5 and fractions[-1] == 1 and len(fractions) > 2
    half = next(number for number, fraction in enumerate(fractions) if fraction >= 0.5)
    assert 0.2 < half / len(fractions) < 0.8


def test_a_loss_that_is_not_finite_is_one_line() -> None:
    views, labels = loaded(load_iris)
    views[0, 3, 1] = torch.inf
    with pytest.raises(UserError, match="NaN or infinite") as caught:
        fitted(views, labels, replace(CONFIG, feature_scaling="none"))
    assert caught.value.code == "E-TRAIN-DIVERGED"
