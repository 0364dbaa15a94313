"""Seconds and memory of each strategy at the original's size, on features that are drawn here.

    python benchmarks/selection_scale.py [--strategies maxherding ...] [--images 512000] [--budget 12800]

Features are mixtures of 800 clusters of differing size in 2,048 dimensions, reduced to 128 as `moco request` does. With
`--sklearn`, its MiniBatchKMeans makes as many clusters as the budget, and the images nearest to their centres, for
comparison. Peak memory is that of the whole process. Coverage is that of `maxherding`'s kernel: how well what was
chosen stands for all.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor

from moco.labels.selection.coverage import coverage
from moco.labels.selection.strategies import Pool, choose, reduced

CLUSTERS, WIDTH, BLOCK = 800, 2048, 16_384


def draw(count: int, generator: torch.Generator) -> Tensor:
    """N x 2048 in half precision, as a memory that a pool of features may take."""
    centres = torch.randn(CLUSTERS, WIDTH, generator=generator)
    chances = torch.rand(CLUSTERS, generator=generator) ** 2
    found = torch.empty(count, WIDTH, dtype=torch.float16)
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        which = torch.multinomial(chances, size, replacement=True, generator=generator)
        noise = torch.randn(size, WIDTH, generator=generator)
        found[first : first + size] = (centres[which] + 1.5 * noise).half()
    return found


def peak() -> float:
    """Gigabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["maxherding", "typiclust", "kmedoids", "coreset"])
    parser.add_argument("--images", type=int, default=512_000)
    parser.add_argument("--budget", type=int, default=12_800)
    parser.add_argument("--bandwidth", type=float, default=0.8)
    parser.add_argument("--sklearn", action="store_true")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    wide = draw(args.images, generator)
    print(f"drawn: peak {peak():.1f} GB", flush=True)
    began = time.perf_counter()
    small = reduced(wide, 128)
    del wide
    print(f"reduced: {time.perf_counter() - began:.1f} s, peak {peak():.1f} GB", flush=True)
    pool = Pool(small, torch.ones(len(small), dtype=torch.bool), small[:0])
    random = choose("random", pool, args.budget, args.bandwidth, 0).rows
    print(f"random: coverage {coverage(small, small[:0], small[random], args.bandwidth)[1]:.3f}", flush=True)
    for name in args.strategies:
        began = time.perf_counter()
        rows = choose(name, pool, args.budget, args.bandwidth, 0).rows
        seconds = time.perf_counter() - began
        covered = coverage(small, small[:0], small[rows], args.bandwidth)[1]
        print(f"{name}: {seconds:.1f} s, coverage {covered:.3f}, peak {peak():.1f} GB", flush=True)
    if args.sklearn:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.metrics import pairwise_distances_argmin

        began = time.perf_counter()
        model = MiniBatchKMeans(args.budget, batch_size=16_384, n_init=1, init="random", random_state=0)
        centres = model.fit(small.numpy()).cluster_centers_
        nearest = torch.from_numpy(pairwise_distances_argmin(centres, small.numpy()))
        covered = coverage(small, small[:0], small[nearest], args.bandwidth)[1]
        print(f"sklearn: {time.perf_counter() - began:.1f} s, coverage {covered:.3f}, peak {peak():.1f} GB", flush=True)


if __name__ == "__main__":
    main()
