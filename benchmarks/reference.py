"""The CIFAR-10 recipe of MoCo's authors in plain PyTorch, and this project's training beside it: losses and kNN
accuracy must agree epoch by epoch.

    PYTHONPATH=src python benchmarks/reference.py FOLDER [--images 10000 --epochs 20 --seeds 2]
    PYTHONPATH=src python benchmarks/reference.py FOLDER --device cuda --encoder resnet18 --batch 512 --queue 4096 \\
        --splits 8 --schedule 200

FOLDER holds unlabeled/0.png, …, train/0.png, … and train_label_tensor.pt. The reference shares with this project the
network's layers and the measure alone: PIL views by torchvision in worker processes, fp32 (on a GPU with
TensorFloat-32), NCHW, BatchNorm that views splits as channels, a shuffled key batch, a loop that moves the key encoder.
One of five labelled images is judged by its neighbours among the others.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from speed import settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from moco.data.batches import EpochSampler, Fetcher
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import batch_norms, build_encoder
from moco.methods.step import ContrastStep
from moco.settings.pretrain import PretrainConfig
from moco.training.features import knn_accuracy
from moco.training.numerics import choose_device, choose_precision, set_up
from moco.views.views import Views, recipe

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR-10
DIM, MOMENTUM, TEMPERATURE, LR_OF_512, WEIGHT_DECAY = 128, 0.99, 0.1, 0.06, 5e-4
Epoch = tuple[float, nn.Module]  # the mean loss, and the network after it
PLAIN = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image, which lies decoded in memory."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.chain = transforms.Compose([
            transforms.RandomResizedCrop(images.shape[1]), transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), transforms.RandomGrayscale(0.2),
            PLAIN,
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.images[index])
        return self.chain(image), self.chain(image)


class ViewedBatchNorm(nn.BatchNorm2d):
    """Every splits-th image makes a part: parts become channels of one plain BatchNorm."""

    splits: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        n, c, h, w = x.shape
        assert self.running_mean is not None and self.running_var is not None
        mean, variance = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        weight, bias = self.weight.repeat(self.splits), self.bias.repeat(self.splits)
        viewed = x.reshape(-1, c * self.splits, h, w)
        result = F.batch_norm(viewed, mean, variance, weight, bias, True, self.momentum or 0.1, self.eps)
        self.running_mean.data.copy_(mean.view(self.splits, c).mean(0))
        self.running_var.data.copy_(variance.view(self.splits, c).mean(0))
        return result.view(n, c, h, w)


def network(args: argparse.Namespace, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = build_encoder(Architecture(args.encoder, "small", args.width, args.stages), DIM)
    for _, _, layer in list(batch_norms(made)):
        layer.__class__ = ViewedBatchNorm
        layer.splits = args.splits  # type: ignore[assignment]
    return made


def reference(args: argparse.Namespace, images: np.ndarray, seed: int, device: torch.device) -> Iterator[Epoch]:
    query = network(args, seed).to(device)
    key = copy.deepcopy(query).requires_grad_(False)
    queue, pointer = F.normalize(torch.randn(DIM, args.queue, device=device), dim=0), 0
    peak = LR_OF_512 * args.batch / 512
    optimizer = torch.optim.SGD(query.parameters(), peak, momentum=0.9, weight_decay=WEIGHT_DECAY)
    loader = DataLoader(
        Pairs(images), args.batch, shuffle=True, drop_last=True, num_workers=args.workers, persistent_workers=True
    )
    for epoch in range(args.epochs):
        query.train()
        total = 0.0
        for number, pair in enumerate(loader):
            done = (epoch + number / len(loader)) / args.schedule
            optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * done))
            a, b = (view.to(device) for view in pair)
            with torch.no_grad():
                for slow, fast in zip(key.parameters(), query.parameters(), strict=True):
                    slow.data = slow.data * MOMENTUM + fast.data * (1 - MOMENTUM)
                order = torch.randperm(len(b), device=device)
                keys = F.normalize(key(b[order]), dim=1)[torch.argsort(order)]
            queries = F.normalize(query(a), dim=1)
            positive = torch.einsum("nc,nc->n", queries, keys).unsqueeze(1)
            logits = torch.cat([positive, queries @ queue.clone()], 1) / TEMPERATURE
            loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            places = torch.arange(pointer, pointer + len(keys), device=device) % args.queue
            queue[:, places] = keys.T
            pointer = (pointer + len(keys)) % args.queue
            total += loss.item()
        yield total / len(loader), query


def ours(args: argparse.Namespace, images: np.ndarray, seed: int, device: torch.device) -> Iterator[Epoch]:
    split = {"batch_norm": "split", "splits": args.splits} if args.splits > 1 else {}
    config: PretrainConfig = settings(
        encoder=args.encoder, width=args.width, stages=args.stages, head="linear", queue=args.queue,
        momentum=MOMENTUM, temperature=TEMPERATURE, shuffle=True, crop_scale=(0.08, 1.0), batch_size=args.batch,
        lr=LR_OF_512 / 2, weight_decay=WEIGHT_DECAY, precision=args.precision, seed=seed, **split,
    )  # fmt: skip
    views = Views(recipe("v2_no_blur", (0.08, 1.0), (0.1, 2.0)), images.shape[1], MEAN, STD, device)
    step = ContrastStep(config, views, device, choose_precision(args.precision, device), cuda_graphs=True)
    sampler = EpochSampler(np.arange(len(images)), args.batch, seed)
    fetcher = Fetcher(images, pin=device.type == "cuda")
    number, each = 0, len(images) // args.batch
    for epoch in range(args.epochs):
        losses = []
        for batch in fetcher.batches(sampler.epoch(epoch)):
            losses.append(step(*batch, number / (each * args.schedule), number)["loss"])
            number += 1
        yield float(torch.stack(losses).mean()), step.model.encoder


@torch.no_grad()
def judged(
    args: argparse.Namespace, trained: nn.Module, images: np.ndarray, labels: Tensor, device: torch.device
) -> tuple[float, float]:
    """kNN accuracy of the features before the last layer, as `moco pretrain` monitors them, and of the last layer's
    outputs, as the authors report it."""
    network = copy.deepcopy(trained).eval()
    inputs = torch.stack([PLAIN(Image.fromarray(image)) for image in images])
    outputs = torch.cat([network(part.to(device)).float().cpu() for part in inputs.split(500)])
    network.fc = nn.Identity()
    features = torch.cat([network(part.to(device)).float().cpu() for part in inputs.split(500)])
    held = torch.arange(len(labels)) % 5 == 0

    def accuracy(found: Tensor) -> float:
        return knn_accuracy(found[~held], labels[~held], found[held], labels[held], neighbours=args.neighbours,
                            classes=int(labels.max()) + 1)  # fmt: skip

    return accuracy(features), accuracy(outputs)


def read(folder: Path, count: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{index}.png").convert("RGB")) for index in range(count)])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoder", default="small_resnet")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of ours")
    parser.add_argument("--schedule", type=int, help="epochs of the whole schedule, where it is not run to its end")
    for name, value in (("images", 10_000), ("labelled", 5000), ("epochs", 20), ("batch", 128), ("queue", 1024),
                        ("splits", 2), ("width", 16), ("stages", 3), ("workers", 2), ("neighbours", 20),
                        ("seeds", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    args.schedule = args.schedule or args.epochs
    return args


def main() -> None:
    args = options()
    device = choose_device(args.device)
    set_up(device, 0)
    images, known = read(args.folder / "unlabeled", args.images), read(args.folder / "train", args.labelled)
    labels = torch.load(args.folder / "train_label_tensor.pt", weights_only=True)[: args.labelled]
    sides: dict[str, Callable[..., Iterator[Epoch]]] = {"reference": reference, "ours": ours}
    for seed in range(args.seeds):
        for name, run in sides.items():
            began = time.perf_counter()
            for epoch, (loss, trained) in enumerate(run(args, images, seed, device), 1):
                if epoch % max(1, args.epochs // 10) == 0 or epoch == 1:
                    features, outputs = judged(args, trained, known, labels, device)
                    print(f"seed {seed} {name:9} epoch {epoch:3} loss {loss:.3f} kNN {features:.1%}, of outputs "
                          f"{outputs:.1%}, after {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
