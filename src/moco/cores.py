"""How the threads of this process wait for each other on cores that others use as well.

Between two operations the threads that compute for torch on Linux (libgomp's) wait awake, for some milliseconds. On
cores of their own that is a tenth to a fifth faster. Where two such processes share cores, each keeps awake what the
other waits for, and both fall to a tenth of their rate and less (benchmarks/README.md); one that waits asleep is enough
for both to have their share.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

COUNTERS = Path("/proc/stat")
SECONDS = 0.1  # to look at the cores: ten of the kernel's ticks
SHARED = 0.25  # of these cores' time: below, others are but the small things that every machine does
SPINS = "1000"  # some 50 microseconds awake, then asleep


def wait_asleep_where_shared() -> bool:
    """Where others are at work on this process's cores, sets GOMP_SPINCOUNT for it and those that it starts. Returns
    whether it did.

    It has to come before torch, as libgomp reads the variable once. What the environment says already stays, and on
    systems without /proc/stat nothing happens.
    """
    decided = os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} or os.environ.get("OMP_NUM_THREADS") == "1"
    if decided or "torch" in sys.modules or not COUNTERS.exists():
        return False
    before = COUNTERS.read_text(encoding="utf-8")
    time.sleep(SECONDS)
    if used(before, COUNTERS.read_text(encoding="utf-8"), os.sched_getaffinity(0)) < SHARED:
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True


def used(before: str, after: str, cores: set[int]) -> float:
    """Share of these cores' time, 0 to 1, in which they were at work between two texts of /proc/stat."""
    passed = {core: (_ticks(before, core), _ticks(after, core)) for core in cores}
    total = sum(sum(late) - sum(early) for early, late in passed.values())
    idle = sum(sum(late[3:5]) - sum(early[3:5]) for early, late in passed.values())  # idle, and waiting for a disk
    return (total - idle) / total if total > 0 else 0.0


def _ticks(text: str, core: int) -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal (guests are in user); none for a core that is off."""
    words = next((line.split() for line in text.splitlines() if line.startswith(f"cpu{core} ")), [])
    return [int(word) for word in words[1:9]]
