"""A linear classifier on features that were computed once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.errors import UserError, present
from moco.settings.train import TrainConfig
from moco.training.progress import ProgressDisplay
from moco.training.schedules import lr_factor, scaled_lr

ROWS = 256  # of features, which a processor's cache holds
TOLERANCE = 1e-4  # of lbfgs: the gradient's largest component over that at zero weights
MAX_ITERATIONS = 2000  # of lbfgs; the fits of the presets take 40 to 200
LOG_EVERY = 10  # iterations of lbfgs
PART = 1024  # rows of features at a time, for lbfgs
HISTORY = 20  # gradients from which lbfgs estimates curvature

Log = Callable[[dict[str, float], int], None]


@dataclass
class LinearFit:
    """A fitted linear classifier.

    weight (C x D) and bias (C): for features as they come. epoch: with sgd the one that they are from, from 1 on; with
    lbfgs the number of iterations. accuracy: fraction of correct held-out images. optimizer: its state then, empty with
    lbfgs. converged: whether lbfgs reached its tolerance; None with sgd, which has none.
    """

    weight: Tensor
    bias: Tensor
    epoch: int
    accuracy: float
    optimizer: dict[str, Any]
    converged: bool | None = None


@dataclass(frozen=True)
class Scaling:
    """Shift and scale per dimension, D each, applied before the classifier and folded into it at the end."""

    mean: Tensor
    std: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Return the features, N x D, shifted and scaled."""
        return (features - self.mean).div_(self.std)

    def fold(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the layer that does both steps at once; computed in float64."""
        weight = layer.weight.detach().double() / self.std.double()
        bias = layer.bias.detach().double() - weight @ self.mean.double()
        return weight.float(), bias.float()


def make_scaling(views: Tensor, kind: str) -> Scaling:
    """Return the scaling of features by views, V x N x D.

    kind: `standardize` gives zero mean over all rows and unit variance within each view; `none` is the identity. A
    dimension that is constant within each view (these may differ in precision) is not scaled: its weights are never
    trained, and a small divisor would let them drown all others wherever an image is the first not to have that
    constant.
    """
    width = views.shape[2]
    if kind == "none":
        return Scaling(torch.zeros(width), torch.ones(width))
    means = views.mean(1)
    # `std` over rows takes fifteen times as long as sums of parts that fit the cache.
    squares = [
        (part - mean).square_().sum(0) for view, mean in zip(views, means, strict=True) for part in view.split(ROWS)
    ]
    std = (torch.stack(squares).sum(0) / views[..., 0].numel()).sqrt()
    mean = means.mean(0)
    least = 1e-6 * mean.abs().clamp(min=1)  # a constant's mean is rounded
    return Scaling(mean, torch.where(std > least, std, torch.ones_like(std)))


def fit_linear(
    views: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor, classes: int, config: TrainConfig,
    log: Log, stop_after: int | None = None,
) -> LinearFit:  # fmt: skip
    """Fit a linear classifier by `train.solver` and measure it on the held-out images.

    views: V x N x D, the features of N images in V augmentations. held: M x D, features of held-out images.
    stop_after: sgd alone: train so many epochs, and keep the last whatever its accuracy. Raises UserError where the
    loss or the weights become NaN or infinite.
    """
    lbfgs = config.solver == "lbfgs"
    steps = MAX_ITERATIONS if lbfgs else stop_after or config.epochs
    images, began = views.shape[1] * (len(views) if lbfgs else 1), time.monotonic()

    def shown(metrics: dict[str, float], step: int) -> None:
        log(metrics, step)
        rate = step * images / max(time.monotonic() - began, 1e-9)
        done = step / steps
        if lbfgs:  # the gradient falls by about the same factor in every iteration, and ends the fit
            done = max(done, min(math.log(max(metrics["gradient"], TOLERANCE)) / math.log(TOLERANCE), 1))
        display.update(
            max(done, 0.0), rate, f"loss {metrics['loss']:.3f} after {step} {'iterations' if lbfgs else 'epochs'}"
        )

    with ProgressDisplay("linear classifier") as display:
        if lbfgs:
            return _fit_lbfgs(views, labels, held, held_labels, classes, config, shown)
        return _fit_sgd(views, labels, held, held_labels, classes, config, shown, stop_after)


def _fit_lbfgs(
    views: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor, classes: int, config: TrainConfig, log: Log
) -> LinearFit:
    """Minimise multinomial logistic regression's objective: the mean cross-entropy over all images in all views, plus
    half of `train.weight_decay` times the squared weights (the bias is free, as in scikit-learn).

    The mean keeps the strength of the penalty the same for any number of labels, and the optimum is unique, so the
    result depends neither on a seed nor on a number of steps. The held-out images choose nothing here.
    """
    scaling = make_scaling(views, config.feature_scaling)
    views, held = scaling.apply(views), scaling.apply(held)
    layer = nn.Linear(views.shape[2], classes, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=LOG_EVERY, max_eval=2 * LOG_EVERY, history_size=HISTORY,
        tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip
    loss = 0.0

    def objective() -> Tensor:
        nonlocal loss
        optimizer.zero_grad()
        loss = 0.0
        for view in views:
            for part, target in zip(view.split(PART), labels.split(PART), strict=True):
                # In float64: near the optimum the line search cannot tell differences in the loss of float32.
                value = F.cross_entropy(layer(part.double()), target, reduction="sum") / (len(views) * len(labels))
                value.backward()
                loss += value.item()
        penalty = config.weight_decay / 2 * layer.weight.square().sum()
        if config.weight_decay:
            penalty.backward()
        return penalty.detach() + loss

    objective()
    first = _largest_gradient(layer)
    accuracy, iterations, converged = 0.0, 0, False
    while not converged and iterations < MAX_ITERATIONS:
        optimizer.step(objective)
        objective()
        iterations += LOG_EVERY
        if not math.isfinite(loss + float(layer.weight.detach().sum())):
            raise UserError(
                f"train: the loss or the weights became NaN or infinite in iteration {iterations}; set "
                "train.feature_scaling: standardize or raise train.weight_decay",
                "E-TRAIN-DIVERGED",
            )
        gradient = _largest_gradient(layer) / max(first, 1e-30)
        converged = gradient <= TOLERANCE
        accuracy = _accuracy(layer, held, held_labels)
        log({"loss": loss, "held_out_accuracy": accuracy, "gradient": gradient}, iterations)
    return LinearFit(*scaling.fold(layer), iterations, accuracy, {}, converged)


def _largest_gradient(layer: nn.Linear) -> float:
    """Return the largest absolute value of the objective's gradient."""
    return max(float(p.grad.abs().max()) for p in layer.parameters() if p.grad is not None)


def _accuracy(layer: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Return the fraction of correct predictions, 0 where there are no features."""
    with torch.no_grad():
        return (
            float((layer(features.to(layer.weight.dtype)).argmax(1) == labels).float().mean()) if len(features) else 0.0
        )


def _fit_sgd(
    views: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor, classes: int, config: TrainConfig,
    log: Log, stop_after: int | None,
) -> LinearFit:  # fmt: skip
    """Train by SGD and keep the last epoch, unless an earlier one (the best, and of equal ones the earliest) is
    clearly better on the held-out images: weights from the middle of the schedule, where rates are high, are the worse
    for it, and of a hundred epochs the best has mostly luck with few held-out images.

    Every image of a batch takes one of its views at random.
    """
    generator = torch.Generator().manual_seed(config.seed)
    scaling = make_scaling(views, config.feature_scaling)
    views, held = scaling.apply(views), scaling.apply(held)
    layer = nn.Linear(views.shape[2], classes)
    with torch.no_grad():  # He et al. 2020, section 4.1: normal weights with std 0.01
        layer.weight.normal_(0, 0.01, generator=generator)
        layer.bias.zero_()
    batch = min(config.batch_size, len(labels))
    peak = scaled_lr(config.lr, batch)
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=peak, momentum=config.sgd_momentum, weight_decay=config.weight_decay
    )
    best: LinearFit | None = None
    for epoch in range(1, (stop_after or config.epochs) + 1):
        loss = _one_epoch(layer, optimizer, views, labels, batch, (epoch - 1) / config.epochs, config, generator, peak)
        if not math.isfinite(loss + float(layer.weight.detach().sum())):
            raise UserError(
                f"train.lr: the loss or the weights became NaN or infinite in epoch {epoch}; lower it",
                "E-TRAIN-DIVERGED",
            )
        accuracy = _accuracy(layer, held, held_labels)
        log({"loss": loss, "held_out_accuracy": accuracy, "lr": optimizer.param_groups[0]["lr"]}, epoch)
        if best is None or accuracy > best.accuracy or epoch == stop_after:
            best = LinearFit(*scaling.fold(layer), epoch, accuracy, copy.deepcopy(optimizer.state_dict()))
    best = present(best, "an epoch")
    if stop_after is None and not is_significantly_better(best.accuracy, accuracy, len(held)):
        return LinearFit(*scaling.fold(layer), config.epochs, accuracy, copy.deepcopy(optimizer.state_dict()))
    return best


def is_significantly_better(best: float, last: float, count: int, errors: float = 2.0) -> bool:
    """Return whether the best epoch's accuracy is ahead of the last one's by more than `errors` standard errors of it.

    count: images that both were measured on. The error is that of Agresti and Coull (1998, two right and two wrong ones
    added), which is not 0 where all images were right.
    """
    share = (best * count + 2) / (count + 4)
    return best - last > errors * math.sqrt(share * (1 - share) / (count + 4))


def _one_epoch(
    layer: nn.Linear, optimizer: torch.optim.Optimizer, views: Tensor, labels: Tensor, batch: int,
    progress: float, config: TrainConfig, generator: torch.Generator, peak: float,
) -> float:  # fmt: skip
    factor = lr_factor(config.schedule, progress, config.warmup, config.milestones)
    for group in optimizer.param_groups:
        group["lr"] = peak * factor
    total = 0.0
    order = torch.randperm(len(labels), generator=generator)
    for chosen in order.split(batch):
        view = torch.randint(len(views), (len(chosen),), generator=generator)
        loss = F.cross_entropy(layer(views[view, chosen]), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(chosen)
    return total / len(labels)
