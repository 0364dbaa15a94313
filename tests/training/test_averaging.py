"""Gradients are averaged through shared memory, and by messages where there can be none: to the same numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moco.training import averaging
from moco.training.averaging import Average
from moco.training.distributed import SOLO, Processes
from process_helpers import in_processes

CALLS = 5


def gradients(rank: int, call: int) -> list[Tensor]:
    """Of three layers, one of them channels-last, as they lie in a network."""
    generator = torch.Generator().manual_seed(100 * rank + call)
    kernel = torch.randn(8, 4, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    return [kernel, torch.randn(8, generator=generator), torch.randn(5, 8, generator=generator)]


def averaged(processes: Processes) -> tuple[int, list[list[Tensor]]]:
    """How many rooms there are, and the results of all calls, which rank 0 takes up late."""
    average, found = Average(processes), []
    for call in range(CALLS):
        tensors = gradients(processes.rank, call)
        take = average(tensors)
        assert torch.equal(tensors[1], gradients(processes.rank, call)[1]), "until the result is wanted"
        time.sleep(0.02 * (processes.rank == 0))
        take()
        found.append([tensor.contiguous() for tensor in tensors])
    return len(average.rooms), found


def refuse(*_: object) -> Tensor:
    raise PermissionError


def work(processes: Processes, folder: Path) -> dict[str, Any]:
    found, room = {"shared": averaged(processes)}, averaging._room
    averaging.machine = lambda: f"node {processes.rank}"
    found["nodes"] = averaged(processes)
    averaging.machine = lambda: "node"
    averaging._room = refuse if processes.rank == 1 else room  # one may not open the others' memory
    found["one cannot"] = averaged(processes)
    averaging._room, averaging.MOST = room, processes.size - 1
    found["many"] = averaged(processes)
    return found


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    return in_processes(work, request.param, tmp_path_factory.mktemp("averages"))


def test_a_few_processes_of_a_node_share_memory(found: list[dict[str, Any]]) -> None:
    for by_rank in found:
        assert {name: rooms for name, (rooms, _) in by_rank.items()} == {
            "shared": len(found), "nodes": 0, "one cannot": 0, "many": 0,
        }  # fmt: skip


@pytest.mark.parametrize("way", ["shared", "nodes", "one cannot", "many"])
def test_all_have_the_mean_in_the_same_bits(found: list[dict[str, Any]], way: str) -> None:
    for call in range(CALLS):
        everyones = [gradients(rank, call) for rank in range(len(found))]
        for place, parts in enumerate(zip(*everyones, strict=True)):
            results = [by_rank[way][1][call][place] for by_rank in found]
            torch.testing.assert_close(results[0], torch.stack(parts).mean(0).contiguous(), rtol=1e-5, atol=1e-6)
            assert all(torch.equal(results[0], other) for other in results[1:])


def test_one_process_keeps_what_it_has() -> None:
    tensors = gradients(0, 0)
    Average(SOLO)(tensors)()
    assert torch.equal(tensors[0], gradients(0, 0)[0])
