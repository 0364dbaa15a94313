"""Features of images and what they are worth: nearest neighbours, spread, rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.data.batches import gather
from moco.training.numerics import autocast

QUERY_BLOCK = 1024  # rows of the similarity matrix that are held at a time


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the network in evaluation mode; every module's own mode is restored afterwards."""
    before = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield network
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def extract(
    network: nn.Module, images: np.ndarray, prepare: Callable[[Tensor], Tensor], *, batch_size: int,
    device: torch.device, precision: torch.dtype = torch.float32, advance: Callable[[int], None] = lambda _: None,
) -> Tensor:  # fmt: skip
    """Return the outputs of the network in evaluation mode, N x D, fp32, on the CPU.

    images: N x H x W x 3 uint8. prepare: turns a batch of them into the network's input. advance: is told the number of
    images of every batch that is done.
    """
    parts = []
    with eval_mode(network):
        for first in range(0, len(images), batch_size):
            batch = torch.from_numpy(gather(images, np.arange(first, min(first + batch_size, len(images)))))
            inputs = prepare(batch)  # outside autocast: views are made in fp32, as in training
            with autocast(device, precision):
                parts.append(network(inputs).float().cpu())
            advance(len(batch))
    return torch.cat(parts)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, neighbours: int,
    classes: int, temperature: float = 0.1,
) -> float:  # fmt: skip
    """Return the fraction of queries that `knn_correct` has right."""
    correct = knn_correct(
        bank, bank_labels, queries, labels, neighbours=neighbours, classes=classes, temperature=temperature
    )
    return int(correct.sum()) / len(labels)


def knn_correct(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, neighbours: int,
    classes: int, temperature: float = 0.1,
) -> Tensor:  # fmt: skip
    """Return for each query whether its class wins the vote of the nearest bank features by cosine, M booleans.

    Votes are weighted by exp(similarity / temperature) (Wu et al. 2018, arXiv 1805.01978). bank: N x D, queries: M x D;
    never more than QUERY_BLOCK x N similarities at a time.
    """
    bank = F.normalize(bank, dim=1)
    neighbours = min(neighbours, len(bank))
    correct = []
    for part, truth in zip(queries.split(QUERY_BLOCK), labels.split(QUERY_BLOCK), strict=True):
        similarity, nearest = (F.normalize(part, dim=1) @ bank.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(part), classes).scatter_add_(
            1, bank_labels[nearest], torch.exp(similarity / temperature)
        )
        correct.append(votes.argmax(1) == truth)
    return torch.cat(correct)


def feature_std(features: Tensor) -> float:
    """Return the mean standard deviation per dimension of unit-length features, times sqrt(D).

    It is about 1 when the features are spread evenly, and 0 when all are the same (SimSiam, arXiv 2011.10566, section
    4.1).
    """
    return float(F.normalize(features, dim=1).std(0).mean() * features.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """Return the exponential of the entropy of the centred features' normalised singular values.

    This is the number of dimensions really in use (Roy and Vetterli 2007).
    """
    values = torch.linalg.svdvals(features - features.mean(0))
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(shares * torch.log(shares.clamp(min=1e-12))).sum()))


def count_in_pool(digests: np.ndarray, pool: np.ndarray) -> int:
    """Return how many of the held-out images also stand in the pool, where pretraining sees them without their labels.

    digests, pool: M x 16 and N x 16 uint8, of the images' content."""
    known = set(map(bytes, pool))
    return sum(bytes(digest) in known for digest in digests)


def describe_in_pool(count: int, held: int) -> str:
    """Return what must be known wherever an accuracy on `held` held-out images is shown; '' where nothing."""
    return f"{count:,} of the {held:,} held-out images also stand in the pool: pretraining sees them" if count else ""


def describe_holdout(labels: np.ndarray, held: np.ndarray, fraction: float, key: str, in_pool: int = 0) -> str:
    """Return a line that says how many of the images are held out, and why, where that is far from what was asked.

    labels: N int64; held: indices of the held-out ones. fraction: what the setting `key` asks for. in_pool: see
    `count_in_pool`.
    """
    real = len(held) / len(labels)
    text = f"{key} {fraction:g}: {len(held):,} of {len(labels):,} labelled images are held out ({real:.1%})"
    counts = np.unique(labels, return_counts=True)[1]
    if real > 1.25 * fraction:
        text = f"warning: {text}, since a class holds out one image at least"
    if alone := int((counts == 1).sum()):
        text += f"; {alone:,} of {len(counts):,} classes have a single label and hold out none"
    return f"{text}; {describe_in_pool(in_pool, len(held))}" if in_pool else text


def apart(kept: np.ndarray, held: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Return the rows of `kept` whose pixels are not those of a held-out image.

    With copies on both sides, held-out accuracy would be one of images that were learned from. digests: N x 16 uint8,
    of all rows.
    """
    known = {bytes(digest) for digest in digests[held]}
    rest = kept[[bytes(digest) not in known for digest in digests[kept]]]
    return rest if len(rest) else kept  # where all images are copies nothing could be learned


def stratified_holdout(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (kept, held out) indices: about `share` of every class, at least one where it has two or more."""
    rng = np.random.default_rng(seed)
    held = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(members[:count])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out
