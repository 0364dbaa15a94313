"""A run of the loop with everything it did written down."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.data.batches import EpochSampler, Fetcher
from moco.training import loop
from moco.training.interrupt import StopFlag
from moco.training.loop import Hooks, Length, LoopState, run_loop

POOL, BATCH, PER_EPOCH = 11, 4, 2  # three images are left out of each epoch


@dataclass
class Recorder:
    """A run with everything it did written down."""

    stop_at: int | None = None  # a signal arrives during this step
    stop: StopFlag = field(default_factory=StopFlag)
    batches: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    logs: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)
    saved: dict[str, Any] = field(default_factory=dict)
    updates: list[float] = field(default_factory=list)
    metrics: Callable[[int], dict[str, Any]] = lambda number: {"loss": torch.tensor(float(number))}
    pause: float = 0.0
    began_at: float = -1.0
    timed_monitor: bool = False
    save_pause: float = 0.0

    def step(self, indices: np.ndarray, images: Tensor, fraction: float, number: int) -> dict[str, Any]:
        assert images[:, 0, 0, 0].tolist() == indices.tolist(), "images belong to their indices"
        assert images.dtype is torch.uint8
        self.batches.append((number, tuple(indices.tolist())))
        self.fractions.append(fraction)
        loop.time.sleep(self.pause)
        if number == self.stop_at:
            self.stop.signal = signal.SIGTERM
        return self.metrics(number)

    def save(self, state: LoopState) -> None:
        loop.time.sleep(self.save_pause)
        self.events.append(("save", state.step))
        self.saved = dict(state.as_dict())

    def monitor(self) -> dict[str, float]:
        self.events.append(("monitor", len(self.batches)))
        return {"knn_accuracy": 0.5}

    def start(self, fraction: float) -> None:
        self.began_at = fraction

    def update(self, fraction: float, rate: float, words: str) -> None:
        assert rate > 0
        self.updates.append(fraction)

    def run(
        self, length: Length, state: LoopState | None = None, *, every: tuple[int, int, int] = (1, 1, 1),
        pool: int = POOL,
    ) -> LoopState:  # fmt: skip
        """every: steps between logs, epochs between monitoring, epochs between saving."""
        state = state or LoopState()
        images = np.arange(pool, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
        hooks = Hooks(
            lambda metrics, step: self.logs.append((step, metrics)), every[0], self, self.stop,
            self.monitor, every[1], self.save, every[2], timed_monitor=self.timed_monitor,
        )  # fmt: skip
        sampler = EpochSampler(np.arange(pool), BATCH, seed=3)
        run_loop(self.step, sampler, Fetcher(images, pin=False), length, state, hooks)
        return state

    def metric(self, name: str) -> list[tuple[int, float]]:
        return [(step, metrics[name]) for step, metrics in self.logs if name in metrics]
