"""What the processor computes in hardware."""

from __future__ import annotations

import functools
import os
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def flags() -> frozenset[str]:
    """Return the names that Linux gives to the processor's abilities on x86; an empty set elsewhere."""
    return frozenset(_told("flags").split())


@functools.cache
def _told(field: str) -> str:
    """Return what Linux says of the first processor under this field; "" where it says nothing."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def is_fast_at_bf16() -> bool:
    """Return whether bfloat16 trains faster than fp32: tile by tile, or by AMD's vectors.

    The bfloat16 vectors of an Intel Xeon have half the rate of fp32 (benchmarks/README.md).
    """
    vectors = "avx512_bf16" in flags() and _told("vendor_id") == "AuthenticAMD"
    return has_bf16_tiles() or (vectors and _may_use("BF16", "FP16", "AVX10", "AMX"))


def has_bf16_tiles() -> bool:
    """Return whether the processor multiplies bfloat16 matrices tile by tile: several times the rate of its vectors."""
    return "amx_bf16" in flags() and _may_use("AMX")


def _may_use(*any_of: str) -> bool:
    """Return whether oneDNN's own setting, which names the newest instructions that it may use, allows any of these."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    return allowed in ("ALL", "DEFAULT") or any(name in allowed for name in any_of)
