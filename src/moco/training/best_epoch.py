"""Which weights of fine-tuning to keep, and whether they are better than those that it began with."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from moco.errors import say
from moco.training.linear import is_significantly_better
from moco.training.loop import LoopState
from moco.training.supervised import SupervisedStep


class BestEpoch:
    """Callable for the loop, after every epoch: measures the held-out images and keeps the best weights so far.

    best: epoch (0: the start; one that the clock cut short counts), accuracy, weights and optimizer, on the CPU; the
    earlier epoch on a tie; None before the first. start: accuracy before the first step; None where a state of an
    earlier version does not have it. last: accuracy after the last epoch so far.
    images: M x H x W x 3 uint8; labels: M int64.
    """

    def __init__(self, step: SupervisedStep, state: LoopState, images: np.ndarray, labels: np.ndarray) -> None:
        self.step, self.state, self.images, self.labels = step, state, images, labels
        self.best: dict[str, Any] | None = None
        self.last = 0.0
        self.start: float | None = None

    def begin(self) -> dict[str, float]:
        """Measure the start, which is a candidate as every epoch is."""
        found = self()
        self.start = self.last
        return {**found, "epoch": 0}

    def __call__(self) -> dict[str, float]:
        """Measure the held-out images, keep the weights if they are the best so far, and return the accuracy."""
        self.last = self.step.accuracy(self.images, self.labels)
        if self.best is None or self.last > self.best["accuracy"]:
            self.best = self._now()
        return {"held_out_accuracy": self.last}

    def choice(self) -> dict[str, Any]:
        """Return the last epoch, or the best one where that is clearly better or the last is behind the start.

        An earlier epoch is clearly better by the rule of the linear classifier. The best may be the start. Raises
        ValueError before the first epoch.
        """
        if self.best is None:
            raise ValueError("no epoch has been measured")
        behind = self.start is not None and self.last < self.start
        clearly = is_significantly_better(self.best["accuracy"], self.last, len(self.labels))
        return self.best if behind or clearly else self._now()

    def correct(self) -> np.ndarray:
        """Return which held-out images the network has right now, M booleans."""
        return self.step.correct(self.images, self.labels)

    def _now(self) -> dict[str, Any]:
        return {
            "epoch": self.state.epoch + (self.state.batch > 0),
            "accuracy": self.last,
            "weights": _copied(self.step.network.state_dict()),
            "optimizer": _copied(self.step.optimizer.state_dict()),
        }


def _copied(value: Any) -> Any:
    """Return the tensors in dicts and lists, copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def beside_start(choice: BestEpoch, chosen: dict[str, Any]) -> dict[str, float]:
    """Return the start's accuracy and whether the kept weights are ahead of it; warn where they are not."""
    if choice.start is None:
        return {}
    better = chosen["accuracy"] > choice.start
    if not better:
        kept = "the start's weights are kept" if not chosen["epoch"] else f"those of epoch {chosen['epoch']} are kept"
        say(
            f"warning: finetune: no better than its start: {chosen['accuracy']:.2%} of {len(choice.labels):,} held-out "
            f"images, {choice.start:.2%} at the start; {kept}; lower finetune.lr, or use the classifier as it was"
        )
    return {"start_held_out_accuracy": choice.start, "better_than_start": float(better)}
