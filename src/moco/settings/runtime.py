"""Section `runtime`: the machine at hand. Nothing here is meant to change a result, so no stage runs again for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moco.settings.kinds import Range, setting


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The machine at hand."""

    device: str = setting("auto", "auto | cpu | cuda | cuda:1 | mps")
    # Far beyond the number of cores, libgomp ends in a segmentation fault.
    threads: Annotated[int, Range(0, 1024)] = setting(0, "CPU threads; 0: all")
    deterministic: bool = setting(
        False, "CUDA: the same bits each time on the same GPU, slower; the CPU always is deterministic"
    )
    cuda_graphs: bool = setting(
        True, "CUDA: launch all kernels of an encoder, or of the views, at once: 2.5 times as fast with small images"
    )
    gpu_kernels: bool = setting(
        True,
        "CUDA: BatchNorm of pretraining in this project's kernels: 1.4 times as fast with splits; false: PyTorch's",
    )
    scratch: str = setting(
        "auto", "node-local folder for the decoded cache; auto: SLURM_TMPDIR, TMPDIR or /tmp"
    )  # fmt: skip
