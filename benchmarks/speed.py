"""Views and training step beside the original's design, as ratios measured in turns in one process.

    python benchmarks/speed.py [--size 32] [--batch 256] [--rounds 9] [--width 24] [--stages 4]

The baseline does as the project of 2021 did: PIL images and torchvision's per-image operations; fp32, NCHW, a
Python loop that rebinds the key encoder's tensors, a clone of the queue, and a wait for the loss in every step.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

from moco.data.views import Views, recipe
from moco.model.momentum_contrast import MomentumContrast, with_head
from moco.model.small_resnet import SmallResNet
from moco.training.numerics import autocast, choose_precision

MEAN, STD = (0.47, 0.47, 0.47), (0.25, 0.25, 0.25)
QUEUE, DIM, TEMPERATURE = 4096, 128, 0.1
CPU = torch.device("cpu")


def pil_views(batch: torch.Tensor, size: int) -> Callable[[], object]:
    """Two views of every image by torchvision's operations on PIL images, one image after the other."""
    images = [Image.fromarray(image.numpy()) for image in batch]
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    chain = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
        transforms.RandomApply([jitter], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    return lambda: [torch.stack([chain(image) for image in images]) for _ in range(2)]


def our_views(batch: torch.Tensor, size: int) -> Callable[[], object]:
    views = Views(recipe("v2_no_blur", (0.2, 1.0), (0.1, 2.0)), size, MEAN, STD, CPU)
    generator = torch.Generator().manual_seed(0)

    def run() -> object:
        unit = views.to_unit(batch)
        return views(unit, generator), views(unit, generator)

    return run


class OriginalStep:
    """A MoCo v2 step in the way of the original's code."""

    def __init__(self, network: nn.Module) -> None:
        self.query = with_head(network, DIM, mlp=True)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.queue = F.normalize(torch.randn(DIM, QUEUE), dim=0)
        self.pointer = 0
        self.optimizer = torch.optim.SGD(self.query.parameters(), 0.06, momentum=0.9, weight_decay=5e-4)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> float:
        with torch.no_grad():
            for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
                key.data = key.data * 0.99 + query.data * 0.01
            keys = F.normalize(self.key(b), dim=1)
        queries = F.normalize(self.query(a), dim=1)
        positive = torch.einsum("nc,nc->n", queries, keys).unsqueeze(1)
        negative = torch.einsum("nc,ck->nk", queries, self.queue.clone().detach())
        logits = torch.cat([positive, negative], 1) / TEMPERATURE
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue[:, self.pointer : self.pointer + len(keys)] = keys.T
        self.pointer = (self.pointer + len(keys)) % QUEUE
        return loss.item()


class OurStep:
    """The same step as the pipeline takes it."""

    def __init__(self, network: nn.Module) -> None:
        self.model = MomentumContrast(
            network, dim=DIM, queue_length=QUEUE, temperature=TEMPERATURE, mlp=True, symmetric=False, shuffle=False
        ).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.query_encoder.parameters(), 0.06, momentum=0.9, weight_decay=5e-4, fused=True
        )
        self.precision = choose_precision("auto", CPU)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        with autocast(CPU, self.precision):
            contrast = self.model(a, b)
        contrast.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update(contrast.keys, 0.99)


def alternate(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of both, called in turns after a warm-up of two."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for function, times in zip((first, second), spent, strict=True):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return statistics.median(spent[0][2:]), statistics.median(spent[1][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("size", 32), ("batch", 256), ("rounds", 9), ("width", 24), ("stages", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    batch = torch.randint(0, 256, (args.batch, args.size, args.size, 3), dtype=torch.uint8)

    def line(name: str, times: tuple[float, float]) -> None:
        rates = [args.batch / seconds for seconds in times]
        print(f"{name:24} baseline {rates[0]:8.0f}/s   ours {rates[1]:8.0f}/s   ratio {times[0] / times[1]:5.1f}")

    line("two views", alternate(pil_views(batch, args.size), our_views(batch, args.size), args.rounds))
    a, b = torch.randn(2, args.batch, 3, args.size, args.size)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    original, ours = (step(SmallResNet(1, args.width, args.stages)) for step in (OriginalStep, OurStep))
    line("MoCo step", alternate(lambda: original(a, b), lambda: ours(x, y), args.rounds))


if __name__ == "__main__":
    main()
