"""Checks of the GPU: driver, visibility, and that training computes."""

from __future__ import annotations

import functools
import os
import re
import time
import warnings
from collections import Counter
from pathlib import Path

from moco.doctor.checks import Finding, fail, note, numbers, ok, reason, warn

DRIVER_VERSION = Path("/proc/driver/nvidia/version")
# NVIDIA's minima for minor version compatibility: any CUDA of the family runs from this driver on.
MINIMUM_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
IMAGE_CUDA = 11  # of the project's image
STEPS = 2


def driver_version(path: Path) -> str | None:
    """Return the version of NVIDIA's kernel driver.

    It is '' where the file does not name it, and None where there is no driver.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    line = next((line for line in text.splitlines() if line.startswith("NVRM version")), "")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", line)
    return found[0] if found else ""


@functools.cache  # CUDA says once a process why it does not start
def gpu_visible() -> tuple[bool, str]:
    """Return whether torch can use a GPU, and what CUDA said where it cannot."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        visible = torch.cuda.is_available()
    return visible, reason(str(caught[-1].message)) if caught else ""


def judge_driver(version: str | None, cuda: str | None, visible: bool) -> Finding:
    """Compare the driver with the CUDA version that torch was built with.

    visible: whether torch can use a GPU all the same.
    """
    if version is None and visible:  # WSL, AMD's ROCm, some sandboxes
        return note("driver", f"{DRIVER_VERSION} is not there, yet torch can use a GPU")
    if version is None:
        return note("driver", "no NVIDIA driver: computing on the CPU")
    if not version:
        return warn("driver", f"{DRIVER_VERSION} names no version", "see what nvidia-smi says")
    minimum = MINIMUM_DRIVER.get(int(cuda.partition(".")[0])) if cuda else None
    if minimum is None:
        why = f"no minimum is known here for torch's CUDA {cuda}" if cuda else "this torch is built without CUDA"
        return note("driver", f"{version}, {why}")
    told = f"NVIDIA's minor-version-compatibility minimum for torch's CUDA {cuda} is {minimum}"
    if numbers(version) >= numbers(minimum):
        return ok("driver", f"{version}, {told}")
    return _old_driver(version, told, visible)


def _old_driver(version: str, told: str, visible: bool) -> Finding:
    if visible:  # NVIDIA's forward-compatibility package does that on data-centre GPUs
        return warn("driver", f"{version} works, yet {told}", "see that `moco doctor --step` succeeds")
    oldest = MINIMUM_DRIVER[IMAGE_CUDA]
    remedy = f"use the project's image, whose CUDA 11.8 build runs from {oldest} on"
    if numbers(version) < numbers(oldest):
        remedy = f"ask the administrator for driver {oldest} or newer, or set runtime.device to cpu"
    return fail("driver", f"{version} is too old, {told}", remedy)


def driver(path: Path = DRIVER_VERSION) -> Finding:
    """Compare NVIDIA's driver with torch."""
    import torch

    return judge_driver(driver_version(path), torch.version.cuda, gpu_visible()[0])


def gpu(path: Path = DRIVER_VERSION) -> Finding:
    """Tell which devices can compute here, and in which precision. A GPU is tested with a real computation."""
    import torch

    from moco.encoders.split_batch_norm import kernels
    from moco.training.numerics import choose_device, choose_precision

    visible, said = gpu_visible()
    version = driver_version(path)
    if not visible and version is not None:
        return _unseen(version, said)
    device = choose_device("auto")
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    if not visible:
        return note("gpu", f"none: computing on {device.type} in {precision}")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = Counter(f"{each.name} ({each.total_memory / 2**30:.0f} GiB)" for each in properties)
    names = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    try:  # a torch without kernels for this GPU sees it all the same, and so does one shut out by another job
        (torch.ones(8, device=device) * 2).sum().item()
    except (RuntimeError, AssertionError) as error:  # as choose_device finds them raised
        remedy = "install a torch built for this GPU, or wait until the other job has ended"
        return fail("gpu", f"{names} cannot compute: {reason(error)}", remedy)
    told = f"{names}, precision {precision}"
    if isinstance(found := kernels(), str):
        remedy = "install a C compiler and Python's headers, which triton needs, or set runtime.gpu_kernels to false"
        return warn("gpu", f"{told}; pretraining is slower with PyTorch's BatchNorm, its own: {reason(found)}", remedy)
    return ok("gpu", told)


def _unseen(driver_found: str, said: str) -> Finding:
    """Tell why torch sees no GPU although there is a driver."""
    import torch

    if judge_driver(driver_found, torch.version.cuda, False).status == "FAIL":
        return note("gpu", "none can be used with this driver")
    if torch.version.cuda is None:
        remedy = "install torch's CUDA build, or use the project's image"
        return warn("gpu", f"torch {torch.__version__} is built without CUDA: computing on the CPU", remedy)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden == "":  # as the image's own test does, which must not need a GPU
        return note("gpu", "hidden by an empty CUDA_VISIBLE_DEVICES: computing on the CPU")
    why = f" (CUDA_VISIBLE_DEVICES is '{hidden}')" if hidden is not None else f" ({said})" if said else ""
    return fail(
        "gpu",
        f"there is a driver, but torch sees no GPU{why}",
        "start the container with --nv (Apptainer) or --gpus all (Docker), in a job ask Slurm for a GPU",
    )


def step(wanted: str = "auto") -> Finding:
    """Take two real optimizer steps of momentum contrast on random images, on the device that training would use."""
    import torch

    from moco.encoders.small_resnet import SmallResNet
    from moco.encoders.split_batch_norm import use_split_batch_norm
    from moco.methods.momentum_contrast import MomentumContrast
    from moco.training.numerics import autocast, choose_device, choose_precision
    from moco.training.optimizer import make_sgd

    start = time.perf_counter()
    device = choose_device(wanted)
    precision = choose_precision("auto", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = use_split_batch_norm(SmallResNet(1, width=4, stages=2), 2)
        model = MomentumContrast(
            encoder, dim=16, queue_length=32, temperature=0.2, mlp=True, symmetric=False, shuffle=False
        )
        views = torch.rand(STEPS, 2, 8, 3, 32, 32)
    # As the stages do it, but for CUDA graphs: the same memory format, precision and optimizer.
    model = model.to(device).to(memory_format=torch.channels_last).train()
    weights = list(model.query_encoder.parameters())
    before, losses = [weight.detach().clone() for weight in weights], []
    optimizer = make_sgd(weights, device, precision, lr=0.1, momentum=0.9, weight_decay=0.0)
    for pair in views.to(device):
        optimizer.zero_grad()
        with autocast(device, precision):
            contrast = model(*pair)
        contrast.loss.backward()
        optimizer.step()
        model.update(contrast.keys, 0.99)
        losses.append(contrast.loss.item())
    where = f"{STEPS} steps on {device.type} in {str(precision).removeprefix('torch.')}"
    remedy = "install torch anew, or use the project's image"
    if not torch.tensor(losses).isfinite().all():
        return fail("step", f"{where}: the loss is {losses[-1]}", remedy)
    if any(torch.equal(old, new) or not new.isfinite().all() for old, new in zip(before, weights, strict=True)):
        return fail("step", f"{where}: the weights did not move as they should", remedy)
    seconds = time.perf_counter() - start
    return ok("step", f"{where}: loss {losses[0]:.2f} and {losses[1]:.2f}, weights moved, {seconds:.1f} s")
