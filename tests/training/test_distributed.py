"""Two processes that share every batch do what one does; they agree on when to stop and on what is wrong."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from conftest import tiny_params
from moco.data.batches import EpochSampler, Fetcher
from moco.errors import Interrupted, UserError
from moco.methods.step import ContrastStep
from moco.settings import reading as params
from moco.settings.pretrain import PretrainConfig
from moco.training.distributed import SINGLE_PROCESS, DistributedContext, from_environment
from moco.training.interrupt import StopFlag
from moco.training.loop import Hooks, Length, LoopState, run_loop
from moco.views.views import Views, recipe
from process_helpers import in_processes

CPU = torch.device("cpu")
STEPS, SIZE, BATCH, POOL = 6, 16, 8, 20
IMAGES = np.random.default_rng(0).integers(0, 256, (POOL, SIZE, SIZE, 3)).astype(np.uint8)
VARIANTS: dict[str, dict[str, Any]] = {
    "simclr": {"method": "simclr", "batch_norm": "split", "splits": 2},
    "split": {"batch_norm": "split", "splits": 2, "shuffle": False, "queue": 20},
    "split-shuffle": {"batch_norm": "split", "splits": 4, "shuffle": True, "queue": 20},
    "split-shuffle-symmetric": {"batch_norm": "split", "splits": 2, "shuffle": True, "loss": "symmetric", "queue": 10},
    "accumulated": {"batch_norm": "split", "splits": 4, "accumulate": 2, "shuffle": False, "queue": 20},
    # Each process's own statistics: what one process calls two parts.
    "plain-shuffle": {"batch_norm": "plain", "shuffle": True},
}
IN_ONE = {"plain-shuffle": {"batch_norm": "split", "splits": 2, "shuffle": True}}


def make_config(folder: Path, **changes: object) -> PretrainConfig:
    path = folder / f"params-{os.getpid()}.yaml"
    settings = {"batch_size": BATCH, "lr": 0.3, "augmentation": "v2", **changes}
    path.write_text(yaml.safe_dump(tiny_params(**{f"pretrain__{name}": value for name, value in settings.items()})))
    return params.load(path).pretrain


def make_step(config: PretrainConfig, processes: DistributedContext) -> ContrastStep:
    views = Views(recipe(config.augmentation, config.crop_scale, config.blur_sigma), SIZE, (0.5,) * 3, (0.25,) * 3, CPU)
    return ContrastStep(config, views, CPU, torch.float32, BATCH, processes)


def train(step: ContrastStep, first: int = 0, end: int = STEPS) -> list[float]:
    """Mean loss over the processes of each step."""
    processes, losses = step.processes, []
    sampler = EpochSampler(np.arange(POOL), BATCH, step.config.seed, processes.rank, processes.size)
    for number in range(first, end):
        indices = next(sampler.epoch(*divmod(number, sampler.batches_per_epoch)))
        found = step(indices, torch.from_numpy(IMAGES[indices]), number / STEPS, number)
        losses.append(processes.mean({"loss": float(found["loss"])})["loss"])
    return losses


def tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every number in nested containers by its place."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, inner in pairs for k, v in tensors(inner, f"{prefix}/{name}").items()}
    return {prefix: torch.as_tensor(value).clone()} if isinstance(value, Tensor | float | int) else {}


# What each of the two processes does; the tests look at what it found.


def variant(processes: DistributedContext, folder: Path, name: str) -> dict[str, Any]:
    config = make_config(folder, **VARIANTS[name])
    step = make_step(config, processes)
    losses = train(step, end=1)
    before = [weight.detach().clone() for weight in step._model.encoder.parameters()]
    late = not all(map(torch.equal, before, step.model.encoder.parameters()))  # which has taken the update
    losses += train(step, first=1, end=3)
    middle = tensors(step.state())
    resumed = make_step(config, processes)
    resumed.load_state(copy.deepcopy(step.state()))  # a file would be a copy too
    losses += train(step, first=3)
    train(resumed, first=3)
    return {"losses": losses, "middle": middle, "end": tensors(step.state()), "resumed": tensors(resumed.state()),
            "late": late}  # fmt: skip


def loop(
    processes: DistributedContext, *, signal_at: tuple[int, int] | None = None, nan_at: tuple[int, int] | None = None,
    length: Length | None = None, monitor: Callable[[], dict[str, float]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The loop around a step that does nothing; *_at: (rank, step) at which something happens."""
    stop, fractions, saved, logged = StopFlag(), [], [], []

    def step(indices: np.ndarray, images: Tensor, fraction: float, number: int) -> dict[str, Any]:
        fractions.append(fraction)
        time.sleep(0.002 + 0.004 * processes.rank)
        if signal_at == (processes.rank, number):
            stop.signal = signal.SIGUSR2
        return {"loss": torch.tensor(math.nan if nan_at == (processes.rank, number) else 1.0 + processes.rank)}

    class Display:
        def start(self, fraction: float) -> None: ...

        def update(self, fraction: float, rate: float, words: str) -> None: ...

    hooks = Hooks(
        lambda metrics, number: logged.append((number, metrics["loss"])) if "loss" in metrics else None, 1, Display(),
        stop, monitor, 2, lambda state: saved.append(state.step), 100, processes,
    )  # fmt: skip
    state, outcome = LoopState(), "finished"
    sampler = EpochSampler(np.arange(POOL), BATCH, 0, processes.rank, processes.size)
    try:
        run_loop(step, sampler, Fetcher(IMAGES, pin=False), length or Length(10, None), state, hooks)
    except (UserError, Interrupted) as error:
        outcome = f"{type(error).__name__}: {error}"
    return {"outcome": outcome, "step": state.step, "fractions": fractions, "saved": saved, "logged": logged,
            "seconds": state.seconds}  # fmt: skip


def collapse() -> dict[str, float]:
    raise UserError("the features collapsed")


def look_slowly() -> dict[str, float]:
    time.sleep(0.3)
    return {}


def agreement(processes: DistributedContext) -> float:
    """Seconds that one agreement takes."""
    began = time.perf_counter()
    for _ in range(300):
        processes.agree(1.0, None)
    return (time.perf_counter() - began) / 300


def refusal(processes: DistributedContext) -> str:
    try:
        processes.require_equal({"data": "the same", "precision": f"fp{16 * (1 + processes.rank)}"})
    except UserError as error:
        return str(error)
    return ""


def work(processes: DistributedContext, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: variant(processes, folder, name) for name in VARIANTS}
    found["signal"] = loop(processes, signal_at=(1, 4))
    found["signal in the last batch"] = loop(processes, signal_at=(1, 1), monitor=collapse)
    found["slow monitor"] = loop(processes, length=Length(2, None), monitor=look_slowly)
    found["nan"] = loop(processes, nan_at=(1, 3))
    found["minutes"] = loop(processes, length=Length(1000, 0.2 / 60))
    found["collapse"] = loop(processes, monitor=collapse)
    found["agreement"] = agreement(processes)
    found["refusal"] = refusal(processes)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    return in_processes(work, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_learn_what_one_learns(found: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    alone = make_step(make_config(tmp_path, **IN_ONE.get(name, VARIANTS[name])), SINGLE_PROCESS)
    losses = train(alone, end=3)
    middle = tensors(alone.state())
    losses += train(alone, first=3)
    assert found[0][name]["losses"] == pytest.approx(losses, rel=1e-4)
    for ours, theirs in ((middle, found[0][name]["middle"]), (tensors(alone.state()), found[0][name]["end"])):
        assert set(ours) == set(theirs), "keys of the checkpoint"
        for place, value in ours.items():
            if name == "accumulated" and "running" in place:
                continue  # which one part after the other moves, and each process its own
            torch.testing.assert_close(theirs[place], value, rtol=2e-3, atol=2e-4, msg=lambda m, p=place: f"{p}: {m}")


@pytest.mark.parametrize("name", VARIANTS)
def test_all_processes_hold_the_same_bits_and_go_on_to_the_same(found: list[dict[str, Any]], name: str) -> None:
    first, second = (by_rank[name] for by_rank in found)
    assert first["late"] and second["late"], "the update follows when somebody wants to see it"
    assert first["losses"] == second["losses"]
    for place, value in first["end"].items():
        assert torch.equal(value, second["end"][place]), place
        assert torch.equal(value, first["resumed"][place]), place
        assert torch.equal(value, second["resumed"][place]), place


def test_a_signal_to_one_process_stops_all_at_the_same_step(found: list[dict[str, Any]]) -> None:
    for by_rank in found:
        assert by_rank["signal"]["outcome"].startswith("Interrupted: stopped by SIGUSR2; the state is saved")
        assert by_rank["signal"]["step"] == 6, "one after that in which it came: none waits to hear of it"
    assert [by_rank["signal"]["saved"] for by_rank in found] == [[6], []], "rank 0 alone saves"
    assert found[0]["signal"]["logged"] == [(number, 1.5) for number in range(1, 7)], "the mean of both"
    assert found[1]["signal"]["logged"] == []


def test_a_signal_in_the_last_batch_of_an_epoch_is_heard_before_anything_else_is_done(
    found: list[dict[str, Any]],
) -> None:
    for by_rank in found:
        assert by_rank["signal in the last batch"]["outcome"].startswith("Interrupted")
        assert by_rank["signal in the last batch"]["step"] == 2


def test_the_time_of_monitoring_counts_in_all(found: list[dict[str, Any]]) -> None:
    seconds = [by_rank["slow monitor"]["seconds"] for by_rank in found]
    assert seconds[0] == seconds[1] > 0.3


def test_the_clock_of_one_decides_for_all(found: list[dict[str, Any]]) -> None:
    assert found[0]["minutes"]["fractions"] == found[1]["minutes"]["fractions"]
    assert found[0]["minutes"]["step"] == found[1]["minutes"]["step"] < 2000


def test_what_goes_wrong_in_one_ends_all(found: list[dict[str, Any]]) -> None:
    for by_rank in found:
        assert by_rank["nan"]["outcome"].startswith("DivergedError: the loss became nan near step 4")
        assert by_rank["collapse"]["outcome"] == "UserError: the features collapsed"
        assert by_rank["collapse"]["step"] == 4
        assert by_rank["refusal"] == "the processes do not have the same precision; they must, on every node"


def test_agreeing_costs_little(found: list[dict[str, Any]]) -> None:
    print(f"agreement: {found[0]['agreement'] * 1e6:.0f} us")
    assert found[0]["agreement"] < 0.02


TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
            "MASTER_PORT": "1"}  # fmt: skip


def test_the_environment_of_torchrun_is_read() -> None:
    assert from_environment(TORCHRUN) == DistributedContext(3, 4, 1, 2)
    for environment in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": ""}):
        assert from_environment(environment) is SINGLE_PROCESS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": None}, "WORLD_SIZE is 4, but RANK not set"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": None}, "RANK is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "4"}, "must be from 0 to WORLD_SIZE - 1 = 3"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ],
)
def test_half_an_environment_is_refused_in_one_line(changes: dict[str, str | None], words: str) -> None:
    environment = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        from_environment(environment)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert DistributedContext(3, 4, 1, 2).place(torch.device("cuda")) == torch.device("cuda", 1) and chosen == [1]
    assert DistributedContext(3, 4, 1, 2).place(CPU) == CPU
    assert SINGLE_PROCESS.place(torch.device("cuda")) == torch.device("cuda")
    for processes, device, words in ((DistributedContext(0, 4, 0, 4), "cuda", "4 processes on this node, 2 GPU"),
                                     (DistributedContext(0, 2, 0, 2), "cuda:1", "cuda:1 cannot serve 2 processes"),
                                     (DistributedContext(0, 2, 0, 2), "mps", "mps cannot serve")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            processes.place(torch.device(device))
