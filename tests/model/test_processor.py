"""Which numbers a processor is fast at."""

from __future__ import annotations

from pathlib import Path

import pytest

from moco.accel import processor


@pytest.mark.parametrize(("vendor", "flags", "allowed", "bf16", "tiles"), [
    ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", None, True, True),
    ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", "AVX512_CORE_BF16", False, False),
    ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", "AVX512_CORE_AMX", True, True),
    ("GenuineIntel", "avx512f avx512_bf16", None, False, False),  # a machine that hides its tiles
    ("AuthenticAMD", "avx512f avx512_bf16", None, True, False),
    ("AuthenticAMD", "avx512f avx512_bf16", "avx512_core_bf16", True, False),
    ("AuthenticAMD", "avx512f avx512_bf16", "AVX512_CORE_FP16", True, False),
    ("AuthenticAMD", "avx512f avx512_bf16", "AVX10_1_512", True, False),
    ("AuthenticAMD", "avx512f avx512_bf16", "AVX512_CORE", False, False),
    ("AuthenticAMD", "avx2", None, False, False),
    ("", "", "DEFAULT", False, False),
])  # fmt: skip
def test_bf16_where_it_is_faster(
    vendor: str, flags: str, allowed: str | None, bf16: bool, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_told", {"flags": flags, "vendor_id": vendor}.__getitem__)
    monkeypatch.setattr(processor, "flags", processor.flags.__wrapped__)  # unremembered
    if allowed is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert (processor.is_fast_at_bf16(), processor.has_bf16_tiles()) == (bf16, tiles)


def test_what_linux_tells_is_read_of_the_first_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = processor._told.__wrapped__  # unremembered
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert told("flags") == ""
    (tmp_path / "cpuinfo").write_text("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n\nvendor_id\t: Other\n")
    assert (told("vendor_id"), told("flags"), told("model")) == ("AuthenticAMD", "fpu avx2", "")
