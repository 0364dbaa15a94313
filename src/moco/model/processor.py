"""What the processor computes in hardware."""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def flags() -> frozenset[str]:
    """Names that Linux gives to the processor's abilities on x86; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def has_bf16() -> bool:
    """Whether it multiplies bfloat16; elsewhere that is slower than fp32."""
    return bool(flags() & {"avx512_bf16", "amx_bf16"})


def has_bf16_tiles() -> bool:
    """Whether it multiplies matrices of bfloat16, tile by tile: several times the rate of its vectors."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX").upper()  # oneDNN's own setting
    return "amx_bf16" in flags() and ("AMX" in allowed or allowed in ("ALL", "DEFAULT"))
