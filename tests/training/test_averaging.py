"""Gradients are averaged over processes: the mean, in the same bits in all of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moco.training.distributed import SINGLE_PROCESS, Average, DistributedContext
from process_helpers import in_processes

CALLS = 5


def gradients(rank: int, call: int) -> list[Tensor]:
    """Of three layers, one of them channels-last, as they lie in a network."""
    generator = torch.Generator().manual_seed(100 * rank + call)
    kernel = torch.randn(8, 4, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    return [kernel, torch.randn(8, generator=generator), torch.randn(5, 8, generator=generator)]


def averaged(processes: DistributedContext, folder: Path) -> list[list[Tensor]]:
    """The results of all calls, which rank 0 takes up late."""
    average, found = Average(processes), []
    for call in range(CALLS):
        tensors = gradients(processes.rank, call)
        take = average(tensors)
        assert torch.equal(tensors[1], gradients(processes.rank, call)[1]), "until the result is wanted"
        time.sleep(0.02 * (processes.rank == 0))
        take()
        found.append([tensor.contiguous() for tensor in tensors])
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_all_have_the_mean_in_the_same_bits(size: int, tmp_path: Path) -> None:
    found = in_processes(averaged, size, tmp_path)
    for call in range(CALLS):
        everyones = [gradients(rank, call) for rank in range(size)]
        for place, parts in enumerate(zip(*everyones, strict=True)):
            results = [by_rank[call][place] for by_rank in found]
            torch.testing.assert_close(results[0], torch.stack(parts).mean(0).contiguous(), rtol=1e-5, atol=1e-6)
            assert all(torch.equal(results[0], other) for other in results[1:])


def test_one_process_keeps_what_it_has() -> None:
    tensors = gradients(0, 0)
    Average(SINGLE_PROCESS)(tensors)()
    assert torch.equal(tensors[0], gradients(0, 0)[0])
