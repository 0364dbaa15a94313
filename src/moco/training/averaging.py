"""The mean of gradients over the processes of a run: through memory that they share where a few of them have the CPU of
one node, else by a message."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moco.files import machine
from moco.training.distributed import Processes, begun

MOST = 4  # processes that share memory: each reads what all others have, a message does not
NAMESPACE = Path("/proc/self/ns/pid")
TOKEN = 16  # bytes


class Average:
    """The mean over the processes of tensors that have the same shapes in every call, in place; the same bits in all of
    them. The wait is in the call of the result, until which the tensors keep what they have; it comes before the next
    call. What is exchanged lies in memory that is kept: new pages in every step cost more than sending it does."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.rooms: list[Tensor] = []  # where there is shared memory, two of each process: 2 x numbers
        self.turn: int | None = None
        self.flat: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tensors: list[Tensor]) -> Callable[[], None]:
        if self.processes.size == 1:
            return lambda: None
        tensors = [_as_it_lies(tensor) for tensor in tensors]
        if self.turn is None:
            self.turn, numbers = 0, sum(tensor.numel() for tensor in tensors)
            self.rooms = shared_rooms(self.processes, tensors[0], numbers)
            self.flat = None if self.rooms else tensors[0].new_empty(numbers)
        # Two rooms in turn: before one is written again, all have read it, and after that written the other.
        self.turn = 1 - self.turn
        rooms = [room[self.turn] for room in self.rooms]
        mine = rooms[self.processes.rank] if self.flat is None else self.flat
        torch.cat([tensor.reshape(-1) for tensor in tensors], out=mine)
        message = torch.zeros(1) if rooms else mine  # the first says no more than that all is written
        arrived = begun(self.processes, lambda: dist.all_reduce(message, async_op=True))

        @torch.no_grad()
        def take() -> None:
            arrived()
            if rooms:
                self._add(tensors, rooms)
            else:
                torch._foreach_copy_(tensors, _parts(mine, tensors))
            torch._foreach_div_(tensors, self.processes.size)

        return take

    def _add(self, tensors: list[Tensor], rooms: Sequence[Tensor]) -> None:
        """In the order of ranks, as sums in another one have other bits; only the first two may be exchanged."""
        rank = self.processes.rank
        if rank > 1:
            torch._foreach_copy_(tensors, _parts(rooms[0], tensors))
        for other, room in enumerate(rooms):
            if other != (0 if rank > 1 else rank):
                torch._foreach_add_(tensors, _parts(room, tensors))


def _parts(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _as_it_lies(tensor: Tensor) -> Tensor:
    """The same tensor with dimensions in the order of memory where it is channels-last: to bring it into another order
    and back takes as long as sending it."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor


def shared_rooms(processes: Processes, like: Tensor, numbers: int) -> list[Tensor]:
    """Memory of each process that all of them see: 2 x numbers, of the type of `like`. None where they are too many, on
    several nodes or GPUs, or may not see each other's.

    It is a file without a name (Linux, memfd_create), which the others open by its place in /proc: no limit of /dev/shm
    holds for it, and it goes with the last process that has it."""
    if like.device.type != "cpu" or processes.size > MOST:
        return []
    size, file = 2 * numbers * like.itemsize, -1
    try:
        place, file = f"{machine()} {NAMESPACE.readlink()}", os.memfd_create("gradients")
        os.posix_fallocate(file, 0, TOKEN + size)  # so that a lack of memory is told here, if it is told
        token = os.urandom(TOKEN)
        os.pwrite(file, token, size)
        own = place, f"/proc/{os.getpid()}/fd/{file}", token
    except (OSError, AttributeError):  # the second where this is not Linux
        own = os.urandom(TOKEN).hex(), "", b""  # like no other
    try:
        found = processes.everyones(own)
        rooms: list[Tensor] = []
        if all(place == own[0] for place, _, _ in found):
            rooms = [_room(path, size, token, like) for _, path, token in found]
    except (OSError, ValueError):  # the second is mmap's
        rooms = []
    everyones = processes.everyones(len(rooms))  # all have opened all, or none uses any
    if file >= 0:
        os.close(file)
    return rooms if all(everyones) else []


def _room(path: str, size: int, token: bytes, like: Tensor) -> Tensor:
    """2 x numbers, zero at first. Raises OSError where the file is another."""
    with Path(path).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), TOKEN + size)
    if memory[size:] != token:
        raise FileNotFoundError(path)
    return torch.frombuffer(memory, dtype=like.dtype, count=size // like.itemsize).view(2, -1)
