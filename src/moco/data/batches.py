"""Which images make a batch, and fetching them while the device computes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Ready = queue.Queue[tuple[np.ndarray, Tensor] | BaseException | None]


class EpochSampler:
    """Batches of indices; the order is a function of the seed and the epoch alone, so that it can be
    taken up anywhere. The last batch of an epoch is left out when it is not full.

    rank, processes: of each batch, only this one of so many equal, consecutive parts; batch_size is that of the whole.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.indices, self.seed, self.rank = indices, seed, rank
        self.batch_size = min(batch_size, len(indices))
        self.part = self.batch_size // processes

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of whole batches in an epoch."""
        return len(self.indices) // self.batch_size

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[np.ndarray]:
        """Yield this process's image indices of each batch of an epoch, from `first_batch` on."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.indices))
        for batch in range(first_batch, self.batches_per_epoch):
            first = batch * self.batch_size + self.rank * self.part
            yield self.indices[order[first : first + self.part]]


def step_generator(seed: int, number: int) -> torch.Generator:
    """Return a generator on the CPU for one step, which depends on the run's seed and the step's number alone.

    Both are hashed into 32 bits, of which torch's generator on the CPU keeps no more.
    """
    hashed = np.random.SeedSequence((seed, number)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(hashed))


class Fetcher:
    """Gathers rows of a memory map in a thread of its own, a few batches ahead. Order is kept.

    `waited` counts the seconds that the consumer had to wait. `pin`: page-locked memory, for GPUs.
    """

    def __init__(self, images: np.ndarray, pin: bool, ahead: int = 2) -> None:
        self.images, self.pin, self.ahead = images, pin, ahead
        self.waited = 0.0

    def batches(self, indices: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield (indices, uint8 images B x H x W x 3) for each batch of indices."""
        ready: Ready = queue.Queue(self.ahead)
        stop = threading.Event()
        thread = threading.Thread(target=self._fill, args=(indices, ready, stop), daemon=True)
        thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - began
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while thread.is_alive():
                try:  # the thread may be waiting for room
                    ready.get_nowait()
                except queue.Empty:
                    thread.join(0.01)

    def _fill(self, indices: Iterator[np.ndarray], ready: Ready, stop: threading.Event) -> None:
        try:
            for chosen in indices:
                if stop.is_set():
                    return
                batch = torch.from_numpy(gather(self.images, chosen))
                ready.put((chosen, batch.pin_memory() if self.pin else batch))
            ready.put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            ready.put(error)


def gather(images: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return rows of a memory map in the order asked for. They are read in the order of the disk."""
    order = np.argsort(chosen, kind="stable")
    batch = np.empty((len(chosen), *images.shape[1:]), images.dtype)
    batch[order] = images[chosen[order]]
    return batch
