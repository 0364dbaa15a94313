"""How the threads of this process wait for each other on cores that others use as well.

Between two operations the threads that compute for torch on Linux (libgomp's) wait awake, for some milliseconds. On
cores of their own that is a little faster than to sleep and be woken. Where two such processes share cores, each keeps
awake what the other waits for, and together they do half of what one does alone, or far less; where both wait asleep,
as much as one alone, and where one does, something between (benchmarks/README.md, sharing.py).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

COUNTERS = Path("/proc/stat")
LOCK_TIMEOUT_S = 3  # what a machine does for a moment is none of ours
SECONDS = 0.1  # of each: ten of the kernel's ticks
SHARED = 0.5  # cores; one thread that is late makes all others wait, however many there are
SPINS = "1000"  # some 50 microseconds awake, then asleep
SETTINGS = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}  # the user's own word on it


def use_passive_wait_if_cores_are_busy() -> bool:
    """Set GOMP_SPINCOUNT where other processes are at work on the cores of this one, and return whether it was set.

    It holds for this process and for those that it starts. It has to be set before torch is imported, as libgomp reads
    the variable once. A value that the environment has already stays. Where the system does not tell what its cores do,
    nothing happens.
    """
    if os.environ.keys() & SETTINGS or os.environ.get("OMP_NUM_THREADS") == "1" or "torch" in sys.modules:
        return False
    if not all(_busy() >= SHARED for _ in range(LOCK_TIMEOUT_S)):  # ends with the first that finds them free
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True


def _busy() -> float:
    """Return how many of this process's cores are at work while it waits; 0 where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return 0.0
    try:
        before = COUNTERS.read_text(encoding="utf-8")
        time.sleep(SECONDS)
        return busy_cores(before, COUNTERS.read_text(encoding="utf-8"), os.sched_getaffinity(0))
    except (OSError, ValueError):
        return 0.0


def busy_cores(before: str, after: str, cores: set[int]) -> float:
    """Return how many of `cores` were at work between two texts of /proc/stat."""
    busy = 0.0
    for core in cores:
        early, late = _ticks(before, core), _ticks(after, core)
        if early and late:  # neither was the core off
            passed = [max(0, now - then) for then, now in zip(early, late, strict=True)]
            idle = passed[3] + passed[4]  # idle, and waiting for a disk, which the kernel may count backwards
            busy += (sum(passed) - idle) / max(1, sum(passed))
    return busy


def _ticks(text: str, core: int) -> list[int]:
    """Return user, nice, system, idle, iowait, irq, softirq, steal (guests are in user); [] for a core that is off."""
    words = next((line.split() for line in text.splitlines() if line.startswith(f"cpu{core} ")), [])
    return [int(word) for word in words[1:9]]
