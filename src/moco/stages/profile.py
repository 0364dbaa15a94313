"""`moco profile`: where a pretraining step's time goes, on the real images, in words. Nothing is written."""

from __future__ import annotations

import itertools
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from moco.data.batches import EpochSampler, Fetcher
from moco.data.manifest import load_manifest
from moco.data.prepare import open_decoded
from moco.errors import Say, say
from moco.files import scratch_folder
from moco.layout import MANIFEST
from moco.methods.step import ContrastStep, missing_kernels, pass_flops, pool, pretraining_views
from moco.settings.schema import Config
from moco.stages.pretrain_settings import check_alone, check_shares
from moco.training.architecture import chosen_architecture
from moco.training.numerics import choose_device, choose_precision, clock, matmul_rate, set_up
from moco.training.schedules import view_size

WARM_UP = 3  # steps: memory is laid out, kernels are chosen
PARTS = {
    "wait": "waiting for images",
    "views": "views",
    "keys": "keys: forward pass of the key encoder, and shuffling",
    "queries": "queries: forward pass of the encoder, and loss",
    "backward": "backward pass",
    "update": "optimizer, key encoder and queue",
}
Batch = tuple[np.ndarray, Tensor]
TOO_LONG = 0.03  # share of a step that waiting may take


class Stopwatch:
    """Seconds by part of a step. A GPU is waited for at both ends of a part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def now(self) -> float:
        """Return the time in seconds, after the work of a GPU is done."""
        return clock(self.device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds that the context takes to those of a part."""
        began = self.now()
        yield
        self.seconds[name] += self.now() - began


def run(config: Config, steps: int, tell: Say) -> None:
    """Take `steps` steps after a warm-up and tell where the time went. Raises UserError for bad input."""
    section, device = config.pretrain, choose_device(config.runtime.device)
    check_alone(section)
    precision = choose_precision(section.precision, device)
    set_up(device, config.runtime.threads, config.runtime.deterministic)
    manifest = load_manifest(MANIFEST)
    chosen_architecture(section, manifest)
    images = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), say)["unlabeled"].images
    sampler = EpochSampler(pool(len(images), section), section.batch_size, section.seed)
    check_shares(section, sampler.batch_size, 1)
    step = ContrastStep(section, pretraining_views(section, manifest, device), device, precision, sampler.batch_size,
                        cuda_graphs=config.runtime.cuda_graphs, own_kernels=config.runtime.gpu_kernels)  # fmt: skip
    if missing := missing_kernels(section, device, config.runtime.gpu_kernels):
        tell(f"note: BatchNorm is PyTorch's, which is slower: {missing}")
    fetcher = Fetcher(images, pin=device.type == "cuda")
    flops = pass_flops(step, manifest.height, sampler.batch_size)
    watch = Stopwatch(device)
    batches = (batch for epoch in itertools.count() for batch in fetcher.batches(sampler.epoch(epoch)))
    for number in range(WARM_UP):
        step(*next(batches), 1.0, number)
    step.phase = watch.phase
    began = watch.now()
    for number in range(WARM_UP, WARM_UP + steps):
        with watch.phase("wait"):
            batch = next(batches)
        step(*batch, 1.0, number)
    each = (watch.now() - began) / steps
    name = str(precision).removeprefix("torch.")
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    tell(f"A step of {sampler.batch_size} images takes {each * 1e3:.0f} ms, {sampler.batch_size / each:.0f} images/s "
         f"({section.encoder}, {manifest.width} pixels, {name}, {where}):")  # fmt: skip
    _tell_parts({part: seconds / steps for part, seconds in watch.seconds.items()}, each, tell)
    passes = sum(watch.seconds[part] for part in ("keys", "queries", "backward")) / steps
    peak = matmul_rate(device, precision)
    tell(f"The passes are {flops / 1e9:.1f} GFLOP a step, at {flops / passes / 1e9:.0f} GFLOP/s: "
         f"{flops / passes / peak:.0%} of what matrix products in {name} reach here ({peak / 1e9:.0f}).")  # fmt: skip
    for begin, end in itertools.pairwise((0.0, *section.resolution_changes)):
        rate = sampler.batch_size / _seconds(step, batches, begin, steps, watch)
        size = view_size(manifest.height, section.resolutions, section.resolution_changes, begin)
        tell(f"From {begin:.0%} to {end:.0%} of the run, with views of {size} pixels: {rate:.0f} images/s.")
    tell(_memory(device))


def _seconds(step: ContrastStep, batches: Iterator[Batch], progress: float, steps: int, watch: Stopwatch) -> float:
    """Return the seconds of a step, after a warm-up. progress: of the run."""
    began = 0.0
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            began = watch.now()
        step(*next(batches), progress, number)
    return (watch.now() - began) / steps


def _tell_parts(parts: dict[str, float], each: float, tell: Say) -> None:
    """Tell the share and time of each part of a step. parts, each: seconds of a step."""
    rest = each - sum(parts.values())
    for words, seconds in [*((PARTS[part], seconds) for part, seconds in parts.items()), ("the rest", rest)]:
        tell(f"  {seconds / each:6.1%} {seconds * 1e3:8.1f} ms  {words}")
    if parts["wait"] > TOO_LONG * each:
        tell(
            "Images come too late: the decoded cache (runtime.scratch) belongs on a local disk, which memory, where "
            "there is enough, makes needless once all was read."
        )


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        used, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
        return f"At most {used / 1e9:.2f} of the GPU's {total / 1e9:.1f} GB were in use."
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"The process took at most {used / 1e9:.2f} GB of memory."
