"""How long a stage takes to open a warm decoded cache of 512,000 images of 96 pixels, and the memory of the process.

    python benchmarks/start.py

The images are a sparse file, as their values do not matter: checking and mapping it is the same work.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from moco.data.cache import CHUNK, damage, open_cache
from moco.data.decode import DIGEST_BYTES
from moco.data.manifest import SPLITS

COUNTS = {"unlabeled": 512_000, "train": 25_600, "val": 25_600}
SIZE, ROUNDS = 96, 5


def write_sparse(place: Path) -> None:
    row = SIZE * SIZE * 3
    full = zlib.crc32(bytes(CHUNK * row))
    splits = {}
    for name in SPLITS:
        count = COUNTS[name]
        with (place / f"{name}.u8").open("wb") as file:
            file.truncate(count * row)
        (place / f"{name}.digests").write_bytes(bytes(count * DIGEST_BYTES))
        if name != "unlabeled":
            np.save(place / f"{name}_label.npy", np.zeros(count, np.int64))
        assert count % CHUNK == 0
        splits[name] = {"shape": [count, SIZE, SIZE, 3], "crc": [full] * (count // CHUNK)}
    small = [*place.glob("*.digests"), *place.glob("*.npy")]
    files = {path.name: zlib.crc32(path.read_bytes()) for path in small}
    (place / "cache.json").write_text(json.dumps({"format": 2, "chunk": CHUNK, "splits": splits, "files": files}))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_sparse(place)
        spent = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            assert damage(place) is None
            splits = open_cache(place)
            spent.append(time.perf_counter() - began)
            assert len(splits["unlabeled"].images) == COUNTS["unlabeled"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{platform.machine()}: checked and opened in {statistics.median(spent):.2f} s (median of {ROUNDS}), "
          f"the process took at most {memory:.2f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
