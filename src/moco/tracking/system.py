"""Samples while a run goes on: CPU and memory of the run's process and its children, memory and GPUs of the machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import time
from collections.abc import Callable
from typing import Any

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
        """Start the thread."""
        self.thread.start()

    def stop(self) -> None:
        """End the thread, and wait at most 5 seconds for it."""
        self.ended.set()
        if self.thread.ident is not None:
            self.thread.join(5)  # a driver that hangs is not waited for

    def _sample(self) -> None:
        cpu = _Cpu()
        while not self.ended.wait(EVERY):
            with contextlib.suppress(Exception):  # a full disk is the run's to tell; a driver's moods are nobody's
                self.write({**cpu.sample(), **_gpu()})


class _Cpu:
    """CPU time and memory of this process and its children, and the machine's memory."""

    def __init__(self) -> None:
        self.began, self.used = time.monotonic(), self._seconds()

    def _seconds(self) -> float:
        """Return the CPU seconds of this process and its children so far, of those that have ended too."""
        own = os.times()
        children = sum(times.user + times.system for child in _children() if (times := _asked(child, "cpu_times")))
        return float(own.user + own.system + own.children_user + own.children_system + children)

    def sample(self) -> dict[str, float]:
        """Return what was used since the sample before; nothing without psutil."""
        if importlib.util.find_spec("psutil") is None:
            return {}
        import psutil

        now, used = time.monotonic(), self._seconds()
        cores = max(used - self.used, 0.0) / max(now - self.began, 1e-9)
        self.began, self.used = now, used
        memory = psutil.virtual_memory()
        own = psutil.Process().memory_info().rss
        own += sum(info.rss for child in _children() if (info := _asked(child, "memory_info")))
        return {
            "system/process_cpu_cores": cores,
            "system/process_memory_megabytes": own / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        }


def _children() -> list[Any]:
    if importlib.util.find_spec("psutil") is None:
        return []
    import psutil

    return list(psutil.Process().children(recursive=True))


def _asked(child: Any, what: str) -> Any:
    """Return what psutil knows of a child, None where it has just ended."""
    with contextlib.suppress(Exception):
        return getattr(child, what)()
    return None


def _gpu() -> dict[str, float]:
    """Return the measurements of the devices that this process uses."""
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
