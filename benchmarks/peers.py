"""Other tools at the same work, in turns with this project; those that are not installed are left out.

    pip install lightly kornia
    python benchmarks/peers.py step --encoder resnet50 --size 96 --batch 64
    python benchmarks/peers.py input --size 96

`step`: lightly's MoCo as its examples write it. `input`: two v2 views of a batch that is in memory, by kornia on the
batch and by torchvision's v2 transforms per image in two workers.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from original import DIM, MEAN, STD, TEMPERATURE, WORKERS
from speed import CPU, QUEUE, OurStep, alternate, tell
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from moco.data.batches import step_generator
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import build_encoder, feature_width, strip_head
from moco.training.numerics import set_up
from moco.views.views import Views, recipe


def found(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name.partition('.')[0]}: left out ({error})")
        return None


def lightly_step(architecture: Architecture) -> Callable[[Tensor, Tensor], None] | None:
    loss, heads, utils = (found(f"lightly.{name}") for name in ("loss", "models.modules.heads", "models.utils"))
    if loss is None or heads is None or utils is None:
        return None
    network = build_encoder(architecture, 1)
    width = feature_width(network)
    query = nn.Sequential(strip_head(network), heads.MoCoProjectionHead(width, width, DIM))
    key = copy.deepcopy(query)
    utils.deactivate_requires_grad(key)
    criterion = loss.NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(QUEUE, DIM))
    optimizer = torch.optim.SGD(query.parameters(), 0.06, momentum=0.9, weight_decay=5e-4)

    def step(a: Tensor, b: Tensor) -> None:
        utils.update_momentum(query, key, m=0.99)
        queries = query(a)
        with torch.no_grad():
            keys = key(b)
        value = criterion(queries, keys)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(args: argparse.Namespace) -> None:
    stem = "small" if args.size <= 40 and not args.imagenet_stem else "imagenet"
    architecture = Architecture(args.encoder, stem, 24, 4)
    theirs = lightly_step(architecture)
    if theirs is None:
        return
    ours = OurStep(architecture)
    a, b = torch.randn(2, args.batch, 3, args.size, args.size)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    spent = alternate(lambda: theirs(a, b), lambda: ours(x, y), args.rounds)
    name = f"step, {args.encoder}, {stem} stem, {args.size} px, batch {args.batch}, ours in {ours.precision}"
    tell(f"{name}; baseline: lightly in fp32", args.batch, spent)


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Tensor, size: int) -> None:
        self.images = images
        self.chain = v2.Compose([
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(2 * max(1, size // 20) + 1, (0.1, 2.0))], 0.5),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.chain(self.images[index]), self.chain(self.images[index])


def kornia_chain(size: int) -> nn.Module | None:
    k = found("kornia.augmentation")
    if k is None:
        return None
    chain: nn.Module = k.AugmentationSequential(
        k.RandomResizedCrop((size, size), scale=(0.2, 1.0)),
        k.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        k.RandomGrayscale(p=0.2),
        k.RandomGaussianBlur((2 * max(1, size // 20) + 1,) * 2, (0.1, 2.0), p=0.5),
        k.RandomHorizontalFlip(),
        k.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input"],
    )
    return chain


def inputs(args: argparse.Namespace) -> None:
    count = 4 * args.batch
    images = torch.randint(0, 256, (count, args.size, args.size, 3), dtype=torch.uint8)
    views = Views(recipe("v2", (0.2, 1.0), (0.1, 2.0)), args.size, MEAN, STD, CPU)

    def ours() -> None:
        for number, batch in enumerate(images.split(args.batch)):
            generator, unit = step_generator(0, number), views.to_unit(batch)
            views(unit, generator), views(unit, generator)

    planar = images.permute(0, 3, 1, 2).contiguous()
    loader = DataLoader(TwoViews(planar, args.size), args.batch, num_workers=WORKERS)
    name = f"input, two v2 views, {args.size} px, batch {args.batch}; baseline: "
    tell(name + "torchvision v2", count, alternate(lambda: sum(1 for _ in loader), ours, args.rounds))
    chain = kornia_chain(args.size)
    if chain is not None:

        def kornia() -> None:
            for batch in planar.split(args.batch):
                unit = batch.float().div_(255)
                chain(unit), chain(unit)

        tell(name + "kornia", count, alternate(kornia, ours, args.rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["step", "input"])
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--imagenet-stem", action="store_true", help="below 40 pixels as well")
    for name, value in (("size", 96), ("batch", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    set_up(CPU, 0)
    {"step": steps, "input": inputs}[args.work](args)


if __name__ == "__main__":
    main()
