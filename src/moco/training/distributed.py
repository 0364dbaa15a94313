"""One run in several processes, as torchrun starts them: which one this is, and what all of them must agree on.

Every process holds the same weights and an equal, consecutive part of each batch. What decides the course of the
run (when it ends, what is saved, what is wrong) is decided once and told to all, so that none waits for a process
that has gone another way. The functions that exchange something must be called by all processes in the same order.
A single process exchanges nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moco.errors import AloneError, Interrupted, ProcessLostError, UserError, present
from moco.out_of_memory import full_memory

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # waiting for the others: one node may have to decode the dataset, the next not


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run as one of them sees them; rank 0 writes the files. local_*: those of this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def place(self, device: torch.device) -> torch.device:
        """Return the device of this process: a GPU each, or the CPU for all.

        Raises UserError where the device cannot be shared.
        """
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise UserError(f"runtime.device: {device} cannot serve {self.size} processes; use auto, cuda or cpu")
        found = torch.cuda.device_count()
        if self.local_size > found:
            raise UserError(
                f"{self.local_size} processes on this node, {found} GPU(s): torchrun --nproc-per-node {found} "
                "(or runtime.device: cpu)"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    @contextlib.contextmanager
    def process_group(self, device: torch.device) -> Iterator[None]:
        """Connect the processes for the length of the context: gloo for tensors on the CPU, NCCL for those on GPUs.

        Processes that end for a reason that all know leave together: torchrun stops the others as soon as one has left
        with an exit code.
        """
        if self.size == 1:
            yield
            return
        with _others(self):
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        try:
            yield
        except UserError as error:
            if not isinstance(error, AloneError):  # all know of it
                self._leave_together()
            raise
        except Interrupted as error:
            if error.saved:
                self._leave_together()
            raise
        self._leave_together()

    def _leave_together(self) -> None:
        with contextlib.suppress(RuntimeError):  # whoever has left meanwhile has told why
            dist.all_reduce(torch.zeros(1))
        # The group is left to `end_process`.

    def on_rank_zero(self, action: Callable[..., T], *arguments: Any) -> T | None:
        """Return the action's result in rank 0, which alone executes it while the others wait; None in the others.

        A UserError that the action raises is raised in all processes.
        """
        if self.size == 1:
            return action(*arguments)
        result, problem = None, None
        if self.rank == 0:
            try:
                result = action(*arguments)
            except UserError as error:
                problem = error
        problem = self.broadcast(problem)
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # with its traceback it would keep alive what it was raised in
        return result

    def broadcast(self, value: T) -> T:
        """Return rank 0's value, sent by pickle; what the others pass is ignored."""
        if self.size == 1:
            return value
        box = [value]
        with _others(self):
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_gather_objects(self, value: T) -> list[T]:
        """Return the values of all processes, sent by pickle, in the order of ranks."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            with _others(self):
                dist.all_gather_object(found, value)
        return found

    def require_equal(self, facts: Mapping[str, str]) -> None:
        """Raise UserError in all processes, naming the facts, where a process has others than rank 0."""
        found = self.all_gather_objects(dict(facts))
        different = [name for name in facts if any(other[name] != found[0][name] for other in found)]
        if different:
            raise UserError(f"the processes do not have the same {', '.join(different)}; they must, on every node")

    def agree(self, seconds: float, signal: int | None) -> tuple[float, int | None]:
        """Return rank 0's seconds, and a signal that any of the processes received."""
        return self.agree_async(seconds, signal)()

    def agree_async(self, seconds: float, signal: int | None) -> Callable[[], tuple[float, int | None]]:
        """Begin what `agree` does, and return a function that waits for its result.

        The process can do something else meanwhile. It takes one message of 16 bytes between the CPUs.
        """
        if self.size == 1:
            return lambda: (seconds, signal)
        both = torch.tensor([seconds if self.rank == 0 else 0.0, signal or 0], dtype=torch.float64)
        arrived = start_async(self, lambda: dist.all_reduce(both, op=dist.ReduceOp.MAX, async_op=True))

        def answer() -> tuple[float, int | None]:
            arrived()
            return both[0].item(), int(both[1]) or None

        return answer

    def mean(self, numbers: dict[str, float]) -> dict[str, float]:
        """Return the mean over the processes of each number."""
        if self.size == 1 or not numbers:
            return numbers
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        with _others(self):
            dist.all_reduce(values)
        return dict(zip(numbers, (values / self.size).tolist(), strict=True))

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts (equal shapes) of all processes along the first dimension, in the order of ranks.

        No gradient flows back.
        """
        return self.gather_async(part)()

    def gather_with_gradient(self, part: Tensor) -> Tensor:
        """Return the parts (equal shapes) of all processes along the first dimension.

        The gradient of a part is the sum of those that all processes have for it.
        """
        if self.size == 1:
            return part
        from torch.distributed.nn.functional import all_gather

        return torch.cat(list(all_gather(part.contiguous())))

    def gather_async(self, part: Tensor) -> Callable[[], Tensor]:
        """Begin what `gather` does, and return a function that waits for its result."""
        if self.size == 1:
            return lambda: part
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        arrived = start_async(self, lambda: dist.all_gather(parts, part, async_op=True))

        def everyones() -> Tensor:
            arrived()
            return torch.cat(parts)

        return everyones


SINGLE_PROCESS = DistributedContext()


def start_async(processes: DistributedContext, begin: Callable[[], dist.Work | None]) -> Callable[[], object]:
    """Begin an exchange and return a function that waits for its end. On a GPU its stream waits, not the CPU."""
    with _others(processes):
        work = present(begin(), "an exchange between processes")

    def arrived() -> None:
        with _others(processes):
            work.wait()

    return arrived


@contextlib.contextmanager
def _others(processes: DistributedContext) -> Iterator[None]:
    """Raise ProcessLostError where the exchange fails, which is how the end of another process is noticed."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if full_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ProcessLostError(
            f"process {processes.rank} of {processes.size} lost the others: one has ended, or they cannot reach each "
            f"other ({reason}); the same command continues from the last checkpoint"
        ) from None


def from_environment(environment: Mapping[str, str] = os.environ) -> DistributedContext:
    """Return what torchrun has set; SINGLE_PROCESS without torchrun. Raises UserError where half of it is set."""
    size = _number(environment, "WORLD_SIZE", 1)
    if size == 1:
        if _number(environment, "RANK", 0) != 0:
            raise UserError("RANK is set and WORLD_SIZE is not: start several processes with torchrun, or unset RANK")
        return SINGLE_PROCESS
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not environment.get(name)]:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: start several processes with torchrun, or unset "
            "WORLD_SIZE"
        )
    rank, local = _number(environment, "RANK", 0), _number(environment, "LOCAL_RANK", 0)
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank}, but must be from 0 to WORLD_SIZE - 1 = {size - 1}")
    return DistributedContext(rank, size, local, max(local + 1, _number(environment, "LOCAL_WORLD_SIZE", 1)))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or (name == "WORLD_SIZE" and int(text) == 0):
        raise UserError(f"{name} is '{text}' in the environment: expected a whole number, as torchrun sets it")
    return int(text)


def end_process(code: int) -> None:
    """End a process that was connected to others, without waiting for anything; all files must be closed by now.

    Where gloo's connections are taken down on both sides at the same time, by destroy_process_group or by the end of
    the interpreter, they wait for each other for ever once in a while (seen with torch 2.6 on the CPU).
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def refuse_several(command: str) -> None:
    """Raise UserError where several processes were started for a command that is meant for one."""
    processes = from_environment()
    if processes.size > 1:
        raise UserError(
            f"moco {command} runs in one process, not in {processes.size}: start it without torchrun (`moco pretrain` "
            "alone can share its work)"
        )


class Average:
    """The mean over the processes of tensors that have the same shapes in every call.

    The mean is taken in place, by one all-reduce, and has the same bits in all processes. The wait is in the call of
    the result, until which the tensors keep what they have; it comes before the next call. The buffer is kept: new
    pages in every step cost more than sending it does.
    """

    def __init__(self, processes: DistributedContext) -> None:
        self.processes = processes
        self.buffer: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tensors: list[Tensor]) -> Callable[[], None]:
        """Begin the exchange, and return a function that waits for its end and changes the tensors."""
        if self.processes.size == 1:
            return lambda: None
        tensors = [_in_memory_order(tensor) for tensor in tensors]
        sizes = [tensor.numel() for tensor in tensors]
        buffer = self.buffer = tensors[0].new_empty(sum(sizes)) if self.buffer is None else self.buffer
        torch.cat([tensor.reshape(-1) for tensor in tensors], out=buffer)
        arrived = start_async(self.processes, lambda: dist.all_reduce(buffer, async_op=True))

        @torch.no_grad()
        def take() -> None:
            arrived()
            parts = zip(buffer.split(sizes), tensors, strict=True)
            torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in parts])
            torch._foreach_div_(tensors, self.processes.size)

        return take


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the same tensor with dimensions in the order of memory where it is channels-last.

    To bring it into another order and back takes as long as sending it.
    """
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor
