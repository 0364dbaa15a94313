"""What is said where a CUDA graph cannot be captured. Graphs themselves need a GPU: tests/test_gpu.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moco.accel import cuda_graphs
from moco.errors import AloneError


@pytest.mark.parametrize(("cause", "kind", "words"), [
    (RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be"),
     AloneError,
     "cannot be captured here: operation not permitted when stream is capturing; set runtime.cuda_graphs: false"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory"), torch.cuda.OutOfMemoryError, "CUDA out of memory"),
])  # fmt: skip
def test_a_failed_capture_tells_its_cause_and_not_the_end_that_it_led_to(
    cause: RuntimeError, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def capture(graph: object, **options: object) -> Iterator[None]:
        assert options == {"pool": None, "capture_error_mode": "thread_local"}
        try:
            yield
        finally:  # as CUDAGraph.capture_end does
            raise RuntimeError("operation failed due to a previous error during capture")

    def broken() -> None:
        raise cause

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    with pytest.raises(kind, match=words) as refusal:
        cuda_graphs._capture(broken)
    assert "\n" not in str(refusal.value) and "previous error" not in str(refusal.value)
