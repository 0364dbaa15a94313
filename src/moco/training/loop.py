"""The one training loop. Callers supply the step; the loop supplies order, time, logging and interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.data.batches import EpochSampler, Fetcher
from moco.errors import DivergedError, Interrupted
from moco.training.distributed import SINGLE_PROCESS, DistributedContext
from moco.training.interrupt import StopFlag
from moco.training.progress import Display

Step = Callable[[np.ndarray, Tensor, float, int], dict[str, Any]]
Log = Callable[[dict[str, float], int], None]
SCHEDULED = ("lr", "key_momentum")  # metrics that are logged as the last step had them, not as means
MINUTES = 10.0  # between two states, and two monitorings: what a crash may cost, where an epoch takes hours


@dataclass
class LoopState:
    """The position of a run.

    step: optimizer steps done. epoch: epochs finished. batch: batches done in the epoch that is under way. seconds:
    wall-clock time of the run so far, monitoring and saving included. unlogged: metrics by name of the steps since the
    last line of the log, so that the next line is the same after an interruption.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    unlogged: dict[str, list[Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Length:
    """When a run ends: after `epochs`, or after `minutes` of wall-clock, whichever comes first."""

    epochs: int
    minutes: float | None

    def fraction(self, state: LoopState, batches_per_epoch: int) -> float:
        """Return the progress in [0, 1]; 1 ends the run."""
        done = state.step / (self.epochs * batches_per_epoch)
        if self.minutes is not None:
            done = max(done, state.seconds / (60 * self.minutes))
        return min(done, 1.0)


@dataclass
class Hooks:
    """What happens beside the steps. Every one of them may raise UserError to end the run.

    monitor: called every `monitor_every` epochs and at the end; returns metrics. save: called every `save_every`
    epochs, where MINUTES have gone by since the last time, at the end and before an interruption ends the run. Both may
    be left out. timed_monitor: monitor after MINUTES too, which must then decide nothing, as it follows the clock.
    images: that the network sees in a step, each counted once however many views it has; None: the sampler's batch.
    processes: where there are several, rank 0 alone calls `log`, `display`, `monitor` and `save`.
    """

    log: Log
    log_every: int
    display: Display
    stop: StopFlag
    monitor: Callable[[], dict[str, float]] | None = None
    monitor_every: int = 1
    save: Callable[[LoopState], None] | None = None
    save_every: int = 1
    processes: DistributedContext = SINGLE_PROCESS
    timed_monitor: bool = False
    images: int | None = None


def run_loop(
    step: Step, sampler: EpochSampler, fetcher: Fetcher, length: Length, state: LoopState, hooks: Hooks
) -> None:
    """Train until `length` is reached.

    `state` moves along; start with a saved one to continue a run. step(indices, images, fraction, number) takes one
    optimizer step and returns metrics as tensors or numbers; they are averaged, over processes too, and read from the
    device only when they are logged. Several processes stop at the same step, whichever received the signal, and follow
    the clock of rank 0. Raises Interrupted after a signal (the state is saved where it can be), and DivergedError where
    the loss is NaN or infinite.
    """
    per_epoch = sampler.batches_per_epoch
    clock = _Clock(state, hooks)
    window = _Window(fetcher, hooks.processes, state.unlogged)
    due = _Due(state, hooks)
    show = hooks.display.update if hooks.processes.rank == 0 else _hidden
    hooks.display.start(length.fraction(state, per_epoch))
    # An interruption after a run's or an epoch's last batch leaves monitoring and saving to the resumed run.
    last = length.fraction(state, per_epoch) >= 1 and state.batch < per_epoch
    while not last:
        for indices, images in fetcher.batches(sampler.epoch(state.epoch, state.batch)):
            fraction = length.fraction(state, per_epoch)
            window.add(step(indices, images, fraction, state.step), hooks.images or sampler.batch_size)
            state.step += 1
            state.batch += 1
            clock.read(late=state.batch < per_epoch)
            done = length.fraction(state, per_epoch)
            rate = window.rate()
            if state.step % hooks.log_every == 0 or done >= 1:
                _report(window, state, per_epoch, hooks)
            show(done, rate, window.words)
            if clock.signal is not None:
                _refuse_divergence(window.loss(), state.step)
                if done >= 1:
                    state.batch = per_epoch  # time was up in the middle of an epoch: the rest of it is not trained
                if hooks.save is not None:
                    _save(hooks.save, state, window)
                raise Interrupted(clock.signal, saved=hooks.save is not None)
            if done >= 1 or state.batch == per_epoch:
                break
            _between(due.now(state, per_epoch), window, state, hooks)
        if state.batch >= per_epoch:
            state.epoch, state.batch = state.epoch + 1, 0
        last = length.fraction(state, per_epoch) >= 1
        monitor, save = due.now(state, per_epoch)
        if hooks.monitor is not None and (last or monitor):
            _between((True, False), window, state, hooks)
            clock.read()
            last = length.fraction(state, per_epoch) >= 1
        if hooks.save is not None and (last or save):
            _between((False, True), window, state, hooks)
            clock.read()  # time may run out here: then one more step ends the run properly


def _hidden(fraction: float, rate: float, words: str) -> None:
    """Discard what processes other than rank 0 have to show."""


def run_effort(state: LoopState, images_per_step: int) -> dict[str, float]:
    """Return what the whole run took: images that the network saw, wall-clock minutes, and images per second."""
    images = state.step * images_per_step
    rate = images / state.seconds if state.seconds else 0.0
    return {"images_seen": float(images), "minutes": state.seconds / 60, "images_per_second": rate}


class _Due:
    """When to monitor and to save: after so many epochs, and after MINUTES without."""

    def __init__(self, state: LoopState, hooks: Hooks) -> None:
        self.hooks, self.monitored, self.saved = hooks, state.seconds, state.seconds

    def now(self, state: LoopState, per_epoch: int) -> tuple[bool, bool]:
        """Return whether to monitor and to save after this step; the clock is the one that all processes agree on."""
        whole = state.batch == 0 and state.epoch > 0
        hooks, limit = self.hooks, 60 * MINUTES
        monitor = whole and state.epoch % hooks.monitor_every == 0
        monitor |= hooks.timed_monitor and state.seconds - self.monitored >= limit
        save = (whole and state.epoch % hooks.save_every == 0) or state.seconds - self.saved >= limit
        self.monitored = state.seconds if monitor else self.monitored
        self.saved = state.seconds if save else self.saved
        return monitor, save


def _between(todo: tuple[bool, bool], window: _Window, state: LoopState, hooks: Hooks) -> None:
    """Monitor and save, as `todo` says, in this order, outside the time that rates are measured in."""
    monitor, save = todo
    if hooks.monitor is not None and monitor:
        _refuse_divergence(window.loss(), state.step)
        with window.paused():
            hooks.processes.on_rank_zero(_monitor, hooks.monitor, hooks.log, state.step)
    if hooks.save is not None and save:
        _refuse_divergence(window.loss(), state.step)
        with window.paused():
            _save(hooks.save, state, window)


class _Clock:
    """Brings the time spent to the state. `signal`: the one to stop for. Both are those that all processes agree on, as
    of the last reading."""

    def __init__(self, state: LoopState, hooks: Hooks) -> None:
        self.state, self.hooks, self.began = state, hooks, time.perf_counter() - state.seconds
        self.signal: int | None = None
        self.asked = hooks.processes.agree_async(state.seconds, None)

    def read(self, late: bool = False) -> None:
        """Read the time and the signal that all processes agree on.

        late: where there are several processes, as of the reading before, so that none waits for others' answers.
        """
        asked = self.hooks.processes.agree_async(time.perf_counter() - self.began, self.hooks.stop.signal)
        self.state.seconds, self.signal = (self.asked if late and self.hooks.processes.size > 1 else asked)()
        self.asked = asked


class _Window:
    """Metrics between two log lines."""

    def __init__(self, fetcher: Fetcher, processes: DistributedContext, values: dict[str, list[Any]]) -> None:
        self.fetcher, self.processes, self.words = fetcher, processes, ""
        self.clear()
        self.values.update({name: list(steps) for name, steps in values.items()})

    def clear(self) -> None:
        self.values: dict[str, list[Any]] = {}
        self.images, self.began, self.waited = 0, time.perf_counter(), self.fetcher.waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time within the context out of the rate, which is that of training alone."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def add(self, metrics: dict[str, Any], images: int) -> None:
        self.images += images
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)

    def rate(self) -> float:
        """Return the images per second so far; nothing is read from the device."""
        return self.images / (time.perf_counter() - self.began)

    def unlogged(self) -> dict[str, list[Any]]:
        """Return what is not in the log yet, on the CPU; of several processes the mean of each step."""
        values = {
            name: [v.detach().cpu() if isinstance(v, Tensor) else v for v in steps]
            for name, steps in self.values.items()
        }
        if self.processes.size > 1:
            flat = {f"{name} {n}": float(v) for name, steps in values.items() for n, v in enumerate(steps)}
            mean = self.processes.mean(flat)
            values = {name: [torch.tensor(mean[f"{name} {n}"]) if isinstance(v, Tensor) else mean[f"{name} {n}"]
                             for n, v in enumerate(steps)] for name, steps in values.items()}  # fmt: skip
        return values

    def loss(self) -> float:
        """Return the mean loss since the last log line; 0 where there is none."""
        return self.processes.mean({"loss": _mean(self.values.get("loss", [0.0]))})["loss"]

    def read(self) -> dict[str, float]:
        result = self.processes.mean(
            {name: float(values[-1]) if name in SCHEDULED else _mean(values) for name, values in self.values.items()}
        )
        spent = time.perf_counter() - self.began
        result["images_per_second"] = self.images / spent
        result["data_wait_share"] = (self.fetcher.waited - self.waited) / spent
        self.clear()
        return result


def _mean(values: list[Any]) -> float:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return float(sum(values) / len(values))
    device = tensors[-1].device  # those of before an interruption are on the CPU
    return torch.stack([value.to(device) for value in tensors]).mean().item()


def _save(save: Callable[[LoopState], None], state: LoopState, window: _Window) -> None:
    state.unlogged = window.unlogged()
    window.processes.on_rank_zero(save, state)


def _refuse_divergence(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError.because(f"the loss became {loss} near step {step}")


def _report(window: _Window, state: LoopState, per_epoch: int, hooks: Hooks) -> None:
    metrics = window.read()
    _refuse_divergence(metrics.get("loss", 0.0), state.step)
    epoch = state.epoch + state.batch / per_epoch
    hooks.processes.on_rank_zero(hooks.log, {**metrics, "epoch": epoch, "minutes": state.seconds / 60}, state.step)
    window.words = f"loss {metrics.get('loss', 0.0):.3f}"


def _monitor(monitor: Callable[[], dict[str, float]], log: Log, step: int) -> None:
    log(monitor(), step)
