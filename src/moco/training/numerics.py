"""Where and in which precision to compute."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from pathlib import Path

import torch
from torch import nn

from moco.accel.processor import is_fast_at_bf16
from moco.errors import DivergedError, UserError, quoted
from moco.out_of_memory import full_memory

GPUS = Path("/proc/driver/nvidia/gpus")  # of the machine, also where a container or a variable hides them
HIDE_GPUS = ("", "-1", "NoDevFiles")  # of CUDA_VISIBLE_DEVICES
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of mallopt(3)


def choose_device(wanted: str) -> torch.device:
    """Return the device; `auto` takes CUDA, else Apple's MPS, else the CPU.

    Raises UserError for a device that is not there, and where a job was given GPUs that cannot be used: days on the CPU
    are not what it waited for.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        lent = "SLURM_JOB_ID" in os.environ and (os.environ.keys() & {"SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"})
        if lent and given not in HIDE_GPUS:
            raise UserError(
                f"runtime.device: this job was given GPU {given}, and torch cannot use it: the driver is too old, the "
                "container was started without --nv, or torch is built without CUDA (`moco doctor` in the job says "
                "which); 'cpu' does without it"
            )
        if given not in HIDE_GPUS and torch.version.cuda and GPUS.is_dir() and any(GPUS.iterdir()):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES is {quoted(given)}, which names no GPU that torch can use here (`moco doctor` "
                "says more); correct or unset it, or set runtime.device to cpu",
                "E-DEVICE-VISIBLE",
            )
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()  # `meta` is a device too, but it computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if full_memory(error):  # the device is there
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"runtime.device: '{wanted}' cannot be used here: {reason}; try 'auto'") from None
    return device


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Return the precision; `auto` takes bf16 where the hardware is fast at it, fp16 on older GPUs, else fp32."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if wanted != "auto":
        if wanted == "fp16" and device.type != "cuda":
            raise UserError("pretrain.precision: fp16 needs a CUDA GPU; use auto, bf16 or fp32")
        return names[wanted]
    if device.type == "cuda":
        # Ampere (compute capability 8) is the first with bf16 units; a T4 (7.5) has fp16 alone.
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and is_fast_at_bf16():
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Return the context of mixed precision for the forward pass; it changes nothing in fp32."""
    if precision is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory, which makes views up to twice as fast (benchmarks/README.md).

    glibc hands big blocks back to the kernel when they are freed, and the next step's tensors are new pages that have
    to be cleared first.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Old versions take no more than 32 MiB. The second alone would be a loss: it ends glibc's own adaptation.
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 32 << 20):
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def set_up(device: torch.device, threads: int, deterministic: bool = False) -> None:
    """Set threads (0: as torch chooses) and memory on the CPU, TensorFloat-32 and cuDNN's choice of kernels on CUDA.

    deterministic: the same bits on the same GPU, at some cost; operations that have no such form are warned of. On the
    CPU it is always so.
    """
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # streams and page-locked memory are the current device's
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not deterministic  # which kernel is fastest differs from run to run
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it with its first product
            torch.use_deterministic_algorithms(True, warn_only=True)


def matmul_rate(device: torch.device, precision: torch.dtype, seconds: float = 0.5) -> float:
    """Return the FLOP/s of square matrix products, the best of so many seconds.

    This is what a machine has for passes to reach.
    """
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))

    best, end = 0.0, clock(device) + seconds
    while (began := clock(device)) < end:
        a @ b
        best = max(best, 2 * side**3 / (clock(device) - began))
    return best


def clock(device: torch.device) -> float:
    """Return the time in seconds when the device has done all that it was given: a GPU works asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def refuse_broken(model: nn.Module, step: int) -> None:
    """Raise DivergedError where a weight is NaN or infinite: gradients can break in a step whose loss does not."""
    found = [tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point()]
    if not torch.stack(found).all():
        raise DivergedError.because(f"weights are no numbers any more after step {step}")
