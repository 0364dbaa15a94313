"""The design of the project of 2021, made small and faithful: the baseline of every speed record.

Images are decoded and augmented one by one with PIL in two worker processes; training is fp32 in NCHW; the key encoder
follows in a Python loop that makes new tensors; the queue is cloned, and the loss waited for, in every step; the linear
classifier runs the frozen network again in every epoch.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from moco.methods.projection import with_head

MEAN, STD = (0.47, 0.47, 0.47), (0.25, 0.25, 0.25)
DIM, TEMPERATURE, WORKERS = 128, 0.2, 2
CPU = torch.device("cpu")


class Blur:
    """With a random radius, as MoCo v2 blurs; not scaled to the image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def chain_v2(size: int) -> transforms.Compose:
    """MoCo v2's augmentation by torchvision's operations on PIL images."""
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([Blur()], 0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """The images 0.png, 1.png, … of a folder, decoded anew whenever they are asked for."""

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.folder, self.count, self.chain = folder, count, chain_v2(size)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.open(self.folder / f"{index}.png").convert("RGB")
        return self.chain(image), self.chain(image)


class Labelled(Dataset[tuple[Tensor, int]]):
    """For the linear classifier: cropped and flipped for training, or as they are."""

    def __init__(self, folder: Path, labels: Tensor, size: int, train: bool) -> None:
        self.folder, self.labels = folder, labels.tolist()
        moves = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()] if train else []
        self.chain = transforms.Compose([*moves, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.chain(Image.open(self.folder / f"{index}.png").convert("RGB")), self.labels[index]


def load(dataset: Dataset[tuple[Tensor, Tensor]], batch: int) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(dataset, batch, shuffle=True, num_workers=WORKERS, drop_last=True)


class Step:
    """One MoCo v2 step. Its batch and queue are those given; the split BatchNorm, which slowed it further, is left
    out, so that both sides of a comparison learn the same."""

    def __init__(self, network: nn.Module, queue: int, device: torch.device = CPU) -> None:
        self.query = with_head(network, DIM, mlp=True).to(device)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.queue = F.normalize(torch.randn(DIM, queue, device=device), dim=0)
        self.pointer = 0
        self.optimizer = torch.optim.SGD(self.query.parameters(), 0.06, momentum=0.9, weight_decay=5e-4)

    def __call__(self, a: Tensor, b: Tensor) -> float:
        with torch.no_grad():
            for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
                key.data = key.data * 0.99 + query.data * 0.01
            keys = F.normalize(self.key(b), dim=1)
        queries = F.normalize(self.query(a), dim=1)
        positive = torch.einsum("nc,nc->n", queries, keys).unsqueeze(1)
        negative = torch.einsum("nc,ck->nk", queries, self.queue.clone().detach())
        logits = torch.cat([positive, negative], 1) / TEMPERATURE
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue[:, self.pointer : self.pointer + len(keys)] = keys.T
        self.pointer = (self.pointer + len(keys)) % self.queue.shape[1]
        return loss.item()


def linear_epochs(
    body: nn.Module, width: int, folder: Path, labels: Tensor, size: int, classes: int, epochs: int, of: int,
    told: Callable[[int, float], None], lr: float = 30.0,
) -> nn.Linear:  # fmt: skip
    """Trains the classifier for the first `epochs` of a schedule of `of` epochs; told(epoch, loss) after each."""
    layer = nn.Linear(width, classes)
    nn.init.normal_(layer.weight, std=0.01)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [of * share // 10 for share in (3, 4, 6, 8)])
    loader = load(Labelled(folder / "train", labels, size, train=True), 512)
    body.eval()
    for epoch in range(epochs):
        total = 0.0
        for images, targets in loader:
            with torch.no_grad():
                features = body(images)
            loss = F.cross_entropy(layer(features), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        schedule.step()
        told(epoch + 1, total / len(loader))
    return layer
