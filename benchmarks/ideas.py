"""Ideas for learning more in the same time, each beside a preset, at equal wall-clock.

    python benchmarks/ideas.py student_dataset.sqsh preset symmetric small_4 --minutes 5 --seeds 0 1 2

First the ideas' steps are timed in turns on all cores; from its own rate each gets as many images as it would see in so
many minutes. Then the runs are made, by default two at a time with one thread each, so that other work beside them
changes how long they take but not what they learn. The accuracy is that of the linear classifier on the train images,
in five folds of which each is held out once; images of train are taken out of the unlabelled pool first. val is never
looked at. The preset is `cifar10`, or `default` where `generated` stands for the file: the images that the project
draws, from another seed and with more labels than the preset's. `--list` tells of all ideas, and `a+b` tries two
together. What paid is in the presets; README.md has the whole table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from idea_networks import NETWORKS
from torch import Tensor, nn

from moco.data.batches import EpochSampler, gather, step_generator
from moco.data.cache import DecodedSplit
from moco.data.prepare import open_decoded, prepare
from moco.encoders.encoder import build_encoder, last_width
from moco.encoders.split_batch_norm import use_split_batch_norm
from moco.methods.momentum_contrast import MomentumContrast, info_nce
from moco.settings.presets import edit, render
from moco.settings.reading import parse
from moco.settings.schema import Config
from moco.stages.train import CROP_SCALE, feature_sets
from moco.training.architecture import described
from moco.training.features import extract, knn_accuracy
from moco.training.linear import fit_linear
from moco.training.numerics import autocast, choose_precision, set_up
from moco.training.schedules import key_momentum, lr_factor, scaled_lr
from moco.views.views import Views, recipe

CPU = torch.device("cpu")
FOLDS = 5
RECALIBRATE = 5000  # images
PRESETS = Path(__file__).resolve().parent.parent / "presets"


@dataclass(frozen=True)
class Options:
    """What the settings of `pretrain` do not have."""

    small: int = 0  # more views of each image, small ones, as queries of the same key
    small_size: int = 20  # pixels
    small_scale: tuple[float, float] = (0.1, 0.5)  # share of the area
    full_query: bool = True  # whether the large view is a query too
    sizes: tuple[tuple[float, int], ...] = ()  # (progress, pixels of the views until then), then as the images
    predictor: bool = False  # two more layers on the queries' side (BYOL, arXiv 2006.07733)
    two_queues: bool = False  # with a symmetric loss: one for the keys of either view
    neighbours: bool = False  # the queue's key nearest to the positive stands for it (NNCLR, arXiv 2104.14548)
    patches: int = 0  # so many small views in place of everything else, no keys (EMP-SSL, arXiv 2304.03977)
    pull: float = 200.0  # weight of the patches' cosine similarity to their mean; the paper's
    one_encoder: bool = False  # keys with gradients from the query encoder; the queue stays
    optimizer: str = "sgd"  # or adamw
    network: str = "small_resnet"
    strength: float = 1.0  # of the colour jitter
    recalibrate: bool = False  # BatchNorm's statistics, before the network is judged
    averaged: bool = False  # the key encoder is judged, an average of the query encoder's weights


@dataclass(frozen=True)
class Idea:
    """changes: of section `pretrain`."""

    says: str
    changes: dict[str, Any] = field(default_factory=dict)
    options: Options = Options()


RATE_EPSILON_SQUARED = 0.2  # of the coding rate; EMP-SSL's

# What the CIFAR-10 preset had before it took what was found here; the images that are drawn have their own.
BASE = {"width": 24, "convolutions": 2}

# EMP-SSL's objective on a quarter of the area, near the image's own scale. The loss is large; AdamW, like the paper's
# LARS, does not depend on its scale. Other than there, patches are not enlarged to the size of the image, and what is
# judged are features of whole images, not means over those of patches.
PATCHES = Options(small_size=16, small_scale=(0.25, 0.25), optimizer="adamw")
ADAMW = {"lr": 0.001, "weight_decay": 0.05}

IDEAS = {
    "preset": Idea("the preset as it is, but for BASE"),
    "symmetric": Idea("both views as queries and keys", {"loss": "symmetric"}),
    "momentum_098": Idea("the key encoder follows faster", {"momentum": 0.98}),
    "momentum_095": Idea("the key encoder follows much faster", {"momentum": 0.95}),
    "momentum_0995": Idea("the key encoder follows slower", {"momentum": 0.995}),
    "momentum_cosine": Idea("the key encoder's momentum rises to 1", {"momentum_schedule": "cosine"}),
    "temperature_02": Idea("temperature of MoCo v2", {"temperature": 0.2}),
    "temperature_007": Idea("temperature of MoCo v1", {"temperature": 0.07}),
    "crop_008": Idea("crops as small as ImageNet's", {"crop_scale": [0.08, 1.0]}),
    "crop_03": Idea("larger crops", {"crop_scale": [0.3, 1.0]}),
    "jitter_half": Idea("colour jitter of half the strength", options=Options(strength=0.5)),
    "jitter_more": Idea("colour jitter of 1.5 times the strength", options=Options(strength=1.5)),
    "batch_256": Idea("twice the batch", {"batch_size": 256}),
    "batch_64": Idea("half the batch", {"batch_size": 64}),
    "lr_half": Idea("half the learning rate", {"lr": 0.02}),
    "lr_double": Idea("twice the learning rate", {"lr": 0.08}),
    "lr_triple": Idea("three times the learning rate", {"lr": 0.12}),
    "no_warmup": Idea("no warm-up", {"warmup": 0.0}),
    "warmup_more": Idea("warm-up for a tenth of the run", {"warmup": 0.1}),
    "decay_1e-4": Idea("less weight decay", {"weight_decay": 1e-4}),
    "decay_1e-3": Idea("more weight decay", {"weight_decay": 1e-3}),
    "queue_16384": Idea("four times the queue", {"queue": 16384}),
    "queue_1024": Idea("a quarter of the queue", {"queue": 1024}),
    "dim_512": Idea("an embedding of four times the width", {"dim": 512}),
    "dim_64": Idea("an embedding of half the width", {"dim": 64}),
    "split": Idea("BatchNorm over two halves, keys shuffled", {"batch_norm": "split", "splits": 2, "shuffle": True}),
    "width_16": Idea("a narrower network", {"width": 16}),
    "width_32": Idea("a wider network", {"width": 32}),
    "stages_3": Idea("three stages, twice as wide", {"width": 48, "stages": 3}),
    "patch_stem": Idea("a stem of 4x4 at stride 2", options=Options(network="patch_stem")),
    "patch_stem_32": Idea("the same, wider", {"width": 32}, Options(network="patch_stem")),
    "one_conv": Idea("one convolution a stage, wider", {"width": 32, "convolutions": 1}),
    "one_conv_16": Idea("one convolution a stage, narrower", {"width": 16, "convolutions": 1}),
    "one_conv_48": Idea("one convolution a stage, much wider", {"width": 48, "convolutions": 1}),
    "plain": Idea("one convolution a stage, no shortcut", {"width": 32}, Options(network="plain")),
    "small_2": Idea("two more queries of 20 pixels", options=Options(small=2)),
    "small_4": Idea("four more queries of 20 pixels", options=Options(small=4)),
    "small_4_16": Idea("four more queries of 16 pixels", options=Options(small=4, small_size=16)),
    "small_alone": Idea("four queries of 20 pixels, none of the whole size", options=Options(4, full_query=False)),
    "progressive": Idea("views of 20, 24, 32 pixels, from 0, 50, 80 %", options=Options(sizes=((0.5, 20), (0.8, 24)))),
    "progressive_24": Idea("views of 24 pixels for 70 % of the run", options=Options(sizes=((0.7, 24),))),
    "two_queues": Idea("both views as queries, a queue for the keys of each", {"loss": "symmetric", "queue": 8192},
                       Options(two_queues=True)),
    "blur": Idea("blur of up to a pixel", {"augmentation": "v2", "blur_sigma": [0.7, 7.0]}),
    "predictor": Idea("a predictor on the queries", options=Options(predictor=True)),
    "neighbours": Idea("nearest neighbours as positives", options=Options(neighbours=True)),
    "one_encoder": Idea("gradients through both views, no key encoder", options=Options(one_encoder=True)),
    "recalibrated": Idea("BatchNorm's statistics over images as they are", options=Options(recalibrate=True)),
    "averaged": Idea("the key encoder's weights for the classifier", options=Options(averaged=True)),
    "adamw": Idea("AdamW at 0.001 per 256 images", ADAMW, Options(optimizer="adamw")),
    "emp_4": Idea("four patches of 16 pixels", ADAMW, replace(PATCHES, patches=4)),
    "emp_8": Idea("eight patches of 16 pixels", ADAMW, replace(PATCHES, patches=8)),
    "emp_20": Idea("twenty patches of 16 pixels", ADAMW, replace(PATCHES, patches=20)),
    "emp_8_pull_50": Idea("eight, pulled less to their mean", ADAMW, replace(PATCHES, patches=8, pull=50.0)),
}  # fmt: skip


class Step:
    """As `stages.contrast.ContrastStep` takes it, in one process, with the options above."""

    def __init__(self, config: Config, options: Options, mean: Any, std: Any, size: int) -> None:
        others = (options.averaged, options.predictor, options.sizes, options.small, options.neighbours,
                  options.one_encoder, config.pretrain.loss == "symmetric")  # fmt: skip
        if options.patches and any(others):
            raise SystemExit("patches stand in place of everything else: only `recalibrated` goes with them")
        if options.one_encoder and config.pretrain.loss == "symmetric":
            raise SystemExit("one encoder has keys of one view, and learns both ways as it is")
        self.config, self.options, self.size = config.pretrain, options, size
        section = config.pretrain
        torch.manual_seed(section.seed)
        build = NETWORKS.get(options.network)
        network = build(section.width, section.stages) if build else build_encoder(described(section), 1)
        if section.batch_norm == "split":
            use_split_batch_norm(network, section.splits)
        self.model = MomentumContrast(
            network, dim=section.dim, queue_length=section.queue, temperature=section.temperature,
            mlp=section.head == "mlp", symmetric=section.loss == "symmetric", shuffle=section.shuffle,
        ).to(memory_format=torch.channels_last)  # fmt: skip
        hidden = last_width(self.model.query_encoder)
        self.predictor: nn.Module = nn.Identity()
        if options.predictor:
            self.predictor = nn.Sequential(
                nn.Linear(section.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, section.dim)
            )
        weights = [*self.model.query_encoder.parameters(), *self.predictor.parameters()]
        self.peak = scaled_lr(section.lr, section.batch_size)
        if options.optimizer == "adamw":
            self.optimizer: Any = torch.optim.AdamW(weights, self.peak, weight_decay=section.weight_decay, fused=True)
        else:
            self.optimizer = torch.optim.SGD(
                weights, self.peak, section.sgd_momentum, weight_decay=section.weight_decay, fused=True
            )
        self.precision = choose_precision(section.precision, CPU)
        chosen = recipe(section.augmentation, section.crop_scale, section.blur_sigma)
        colours = ("brightness", "contrast", "saturation", "hue")
        chosen = replace(chosen, **{c: getattr(chosen, c) * options.strength for c in colours})
        small = replace(chosen, crop_scale=options.small_scale)
        sizes = {size, *(pixels for _, pixels in options.sizes)}
        self.views = {pixels: Views(chosen, pixels, mean, std, CPU) for pixels in sizes}
        self.small = Views(small, options.small_size, mean, std, CPU)

    def __call__(self, images: Tensor, fraction: float, number: int) -> Tensor:
        section, options, model = self.config, self.options, self.model
        generator = step_generator(section.seed, number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * lr_factor(section.schedule, fraction, section.warmup, section.milestones)
        model.train()
        if options.patches:
            return self._take(self._patch_loss(images, generator))
        views = self.views[next((pixels for until, pixels in options.sizes if fraction < until), self.size)]
        unit = views.to_unit(images)
        a, b = views(unit, generator), views(unit, generator)
        few = [self.small(unit, generator) for _ in range(options.small)]
        with autocast(CPU, self.precision):
            keys = [model.encode_queries(b)] if options.one_encoder else model.targets(a, b, generator)
            groups = [(a, keys[0], self._queue(0))] if options.full_query else []
            if model.symmetric:
                groups.append((b, keys[1], self._queue(1)))
            found = [(self._queries(view), key, queue) for view, key, queue in groups]
            if few:
                found += [(part, keys[0], model.queue) for part in self._queries(torch.cat(few)).chunk(options.small)]
        loss_of = self._to_neighbours if options.neighbours else self._to_keys
        loss = torch.stack([loss_of(*each) for each in found]).mean()
        if options.one_encoder:  # the other way round too, as both have their gradients
            loss = (loss + loss_of(keys[0], found[0][0], model.queue)) / 2
        self._take(loss)
        momentum = key_momentum(section.momentum, section.momentum_schedule, fraction)
        model.update(torch.cat(keys).detach(), momentum)
        return loss.detach()

    def _queue(self, view: int) -> Tensor:
        """All keys or, with two queues, those of one view: batches of both take turns in the ring."""
        queue = self.model.queue
        if not self.options.two_queues:
            return queue
        return queue.view(-1, 2, self.config.batch_size, queue.shape[1])[:, view].flatten(0, 1)

    def _take(self, loss: Tensor) -> Tensor:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _patch_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Minus the coding rate of each patch's embeddings over the batch, minus `pull` times their mean cosine to the
        mean of their image."""
        count = self.options.patches
        unit = self.small.to_unit(images)
        patches = torch.cat([self.small(unit, generator) for _ in range(count)])
        with autocast(CPU, self.precision):
            embedded = self.model.encode_queries(patches).view(count, len(images), -1)  # n x B x D
        batch, dim = embedded.shape[1:]
        gram = embedded.transpose(1, 2) @ embedded * (dim / (batch * RATE_EPSILON_SQUARED))
        rate = torch.logdet(torch.eye(dim) + gram).mean() / 2
        towards = F.cosine_similarity(embedded, embedded.mean(0, keepdim=True), dim=2).mean()
        return -rate - self.options.pull * towards

    def _queries(self, images: Tensor) -> Tensor:
        return F.normalize(self.predictor(self.model.query_encoder(images)).float(), dim=1)

    def _to_keys(self, queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
        return info_nce(queries, keys, queue, self.config.temperature)[0]

    def _to_neighbours(self, queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
        """The positive is the queue's nearest to the key; the rest of the queue are the negatives."""
        return F.cross_entropy(queries @ queue.T / self.config.temperature, (keys @ queue.T).argmax(1))


@dataclass(frozen=True)
class Data:
    pool: np.ndarray  # N x H x W x 3, no image of train among them
    train: DecodedSplit
    mean: Any
    std: Any

    @property
    def size(self) -> int:
        return int(self.pool.shape[1])


def open_data(path: Path, scratch: Path) -> Data:
    """Decoded once, by whoever comes first; the runs find it in the scratch folder."""
    scratch.mkdir(parents=True, exist_ok=True)
    place = scratch / f"{path.stem}.npz"
    if not place.exists():
        config = settings(path)
        manifest = prepare(config.data, scratch, lambda _: None)
        splits = open_decoded(config.data, manifest, scratch, lambda _: None)
        train, pool = splits["train"], splits["unlabeled"].images
        known = {image.tobytes() for image in train.images}
        kept = [i for i, image in enumerate(pool) if image.tobytes() not in known]
        np.savez(place, pool=pool[kept], train=train.images, labels=train.labels, mean=manifest.mean, std=manifest.std)
    with np.load(place) as found:
        train = DecodedSplit(found["train"], found["labels"], np.empty((0, 16), np.uint8))
        return Data(found["pool"], train, tuple(found["mean"].tolist()), tuple(found["std"].tolist()))


def settings(path: Path, **changes: Any) -> Config:
    """The preset with changes of section `pretrain`."""
    values = {"pretrain.minutes": None, "train.views": 4} | {f"pretrain.{key}": each for key, each in changes.items()}
    if path.name == "generated":
        drawn = {"data.path": str(path), "data.generated.seed": 1, "data.generated.train_per_class": 200,
                 "data.generated.val_per_class": 1}  # fmt: skip
        return parse(edit(render(PRESETS, "default"), values | drawn, "idea"), Path("params.yaml"))
    values = {f"pretrain.{key}": each for key, each in BASE.items()} | values
    return parse(edit(render(PRESETS, "cifar10"), values | {"data.path": str(path)}, "idea"), Path("params.yaml"))


def combined(name: str) -> Idea:
    """Of `a+b` both, the later first where they do not agree."""
    ideas = [IDEAS[part] for part in name.split("+")]
    changes = {key: value for idea in ideas for key, value in idea.changes.items()}
    options = {key: value for idea in ideas for key, value in vars(idea.options).items()
               if value != getattr(Options(), key)}  # fmt: skip
    return Idea(", ".join(idea.says for idea in ideas), changes, Options(**options))


def build(name: str, data: Data, args: argparse.Namespace, seed: int = 0) -> Step:
    idea = combined(name)
    return Step(settings(args.data, seed=seed, **idea.changes), idea.options, data.mean, data.std, data.size)


def rates(names: list[str], data: Data, args: argparse.Namespace, rounds: int = 5, steps: int = 10) -> dict[str, float]:
    """Images per second: the ideas in turns, steps from all over a run; the median of the rounds."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            step = build(name, data, args)
            batch = step.config.batch_size
            chosen = np.arange(batch)
            for warm in range(2):
                step(torch.from_numpy(gather(data.pool, chosen)), 0.0, warm)
            began = time.perf_counter()
            for place in range(steps):
                step(torch.from_numpy(gather(data.pool, chosen + place)), (place + 0.5) / steps, place)
            if number:
                found[name].append(steps * batch / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in found.items()}


def train(step: Step, data: Data, images: int) -> None:
    sampler = EpochSampler(np.arange(len(data.pool)), step.config.batch_size, step.config.seed)
    total = max(1, images // sampler.batch_size)

    def endless() -> Iterator[np.ndarray]:
        epoch = 0
        while True:
            yield from sampler.epoch(epoch)
            epoch += 1

    for number, chosen in zip(range(total), endless(), strict=False):
        loss = step(torch.from_numpy(gather(data.pool, chosen)), number / total, number)
        if not bool(torch.isfinite(loss)):
            raise SystemExit(f"diverged at step {number}")


@torch.no_grad()
def recalibrate(network: nn.Module, data: Data, views: Views) -> None:
    """BatchNorm's running statistics over images as they are, not over random views of them."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    network.train()
    for first in range(0, RECALIBRATE, 250):
        network(views.plain(torch.from_numpy(data.pool[first : first + 250])))


def linear_accuracies(network: nn.Module, data: Data, views: Views, config: Config) -> tuple[float, float]:
    """Share of the train images that are right in the fold that holds them out: from all features, and from those of
    the last stage alone."""
    assert data.train.labels is not None
    labels = torch.from_numpy(data.train.labels)
    stack = feature_sets(network, [data.train], views, config.train, CPU)
    folds = np.array_split(np.random.default_rng(0).permutation(len(labels)), FOLDS)

    def share(stack: Tensor) -> float:
        correct = 0
        for held in folds:
            kept = np.setdiff1d(np.arange(len(labels)), held)
            fit = fit_linear(
                stack[:, kept], labels[kept], stack[0, :0], labels[:0], int(labels.max()) + 1, config.train,
                lambda *_: None, stop_after=config.train.epochs,
            )  # fmt: skip
            correct += int(((stack[0, held] @ fit.weight.T + fit.bias).argmax(1) == labels[held]).sum())
        return correct / len(labels)

    return share(stack), share(stack[:, :, -last_width(network) :])


def one_run(name: str, seed: int, images: int, args: argparse.Namespace) -> dict[str, Any]:
    data = open_data(args.data, args.scratch)
    began = time.perf_counter()
    step = build(name, data, args, seed)
    train(step, data, images)
    row: dict[str, Any] = {"idea": name, "seed": seed, "images": images, "seconds": time.perf_counter() - began}
    config = settings(args.data)
    network = step.model.key_encoder if step.options.averaged else step.model.encoder
    crops = Views(recipe("crop", CROP_SCALE, (0.1, 2.0)), data.size, data.mean, data.std, CPU)
    network.fc = nn.Identity()
    if step.options.recalibrate:
        recalibrate(network, data, crops)
    torch.save(network.state_dict(), args.scratch / f"{name}-{seed}.pth")  # for a closer look
    row["linear"], row["last"] = linear_accuracies(network, data, crops, config)
    assert data.train.labels is not None
    labels = torch.from_numpy(data.train.labels)
    found = extract(network, data.train.images, crops.plain, batch_size=500, device=CPU)
    order = np.random.default_rng(0).permutation(len(labels))
    bank, asked = order[len(order) // FOLDS :], order[: len(order) // FOLDS]
    row["knn"] = knn_accuracy(
        found[bank], labels[bank], found[asked], labels[asked], neighbours=20, classes=int(labels.max()) + 1
    )
    return row


def tell(rows: list[dict[str, Any]], speed: dict[str, float]) -> None:
    columns = ("idea", "images/s", "images", "linear: mean (lowest to highest, seeds)", "last stage", "kNN")
    print("|" + "|".join(columns) + "|\n" + "|---" * len(columns) + "|")
    for name in dict.fromkeys(row["idea"] for row in rows):
        mine = [row for row in rows if row["idea"] == name]
        linear, last, knn = ([100 * row[key] for row in mine] for key in ("linear", "last", "knn"))
        spread = f"({min(linear):.1f} to {max(linear):.1f}, {len(mine)})"
        print(f"| {name} | {speed[name]:,.0f} | {mine[0]['images']:,} | {statistics.mean(linear):.1f} {spread} "
              f"| {statistics.mean(last):.1f} | {statistics.mean(knn):.1f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="student_dataset.sqsh of CIFAR-10, or `generated`")
    parser.add_argument("ideas", nargs="*", default=["preset"])
    parser.add_argument("--minutes", type=float, default=5.0, help="of wall-clock on all cores, by the measured rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "moco-ideas")
    parser.add_argument("--rows", type=Path, default=Path("ideas.jsonl"), help="each run's result is added here")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:16} {idea.says}" for name, idea in IDEAS.items()))
        return
    if args.data is None:
        parser.error("name the dataset")
    if unknown := [part for name in args.ideas for part in name.split("+") if part not in IDEAS]:
        parser.error(f"unknown: {', '.join(unknown)}; --list tells of all")
    if args.run:
        set_up(CPU, 1)
        print(json.dumps(one_run(*json.loads(args.run), args)))
        return
    set_up(CPU, 0)
    speed = rates(args.ideas, open_data(args.data, args.scratch), args)
    print(", ".join(f"{name} {rate:,.0f} images/s" for name, rate in speed.items()), flush=True)

    def run(task: tuple[str, int]) -> dict[str, Any]:
        wanted = json.dumps([*task, int(speed[task[0]] * 60 * args.minutes)])
        command = [sys.executable, __file__, str(args.data), "--scratch", str(args.scratch), "--run", wanted]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{task}: {done.stderr.strip()[-2000:]}")
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        with args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        return row

    with ThreadPoolExecutor(args.jobs) as workers:
        tell(list(workers.map(run, [(name, seed) for seed in args.seeds for name in args.ideas])), speed)


if __name__ == "__main__":
    main()
