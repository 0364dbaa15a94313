"""Samples of the machine while a run goes on: CPU, memory, GPU, under the names of MLflow's system metrics."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable

import torch

EVERY = 15.0  # seconds between two samples
MEGABYTE = 1e6


class SystemSampler:
    """A thread that hands a sample to `write` every 15 seconds. Without psutil there are only the GPU's."""

    def __init__(self, write: Callable[[dict[str, float]], None]) -> None:
        self.write = write
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        if self.thread.ident is not None:
            self.thread.join(5)  # a driver that hangs is not waited for

    def _sample(self) -> None:
        _cpu()  # the first call begins to count
        while not self.ended.wait(EVERY):
            with contextlib.suppress(Exception):  # a full disk is the run's to tell; a driver's moods are nobody's
                self.write({**_cpu(), **_gpu()})


def _cpu() -> dict[str, float]:
    if importlib.util.find_spec("psutil") is None:
        return {}
    import psutil

    memory, own = psutil.virtual_memory(), psutil.Process().memory_info().rss
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": memory.percent,
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/process_memory_megabytes": own / MEGABYTE,
    }


def _gpu() -> dict[str, float]:
    """Of the devices that this process uses."""
    if not torch.cuda.is_initialized():
        return {}
    found: dict[str, float] = {}
    for index in range(torch.cuda.device_count()):
        if not torch.cuda.memory_reserved(index):
            continue
        free, total = torch.cuda.mem_get_info(index)
        found[f"system/gpu_{index}_memory_usage_megabytes"] = (total - free) / MEGABYTE
        found[f"system/gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
        with contextlib.suppress(Exception):  # needs NVIDIA's management library
            found[f"system/gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
            found[f"system/gpu_{index}_power_usage_watts"] = torch.cuda.power_draw(index) / 1000
    return found
