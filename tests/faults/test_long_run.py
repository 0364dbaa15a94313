"""20,000 steps: nothing grows."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from fault_helpers import must, start

from conftest import write_dataset, write_params

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
STEPS, PER_EPOCH, KEEP = 20_000, 20, 2


@pytest.mark.fault("long-run")
def test_memory_handles_and_files_stay_flat(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset", size=8)
    write_params(
        tmp_path, pretrain__batch_size=2, pretrain__queue=8, pretrain__stages=1, train__features="last",
        pretrain__augmentation="v1", pretrain__epochs=STEPS // PER_EPOCH, monitor__every=50,
        checkpoint__every=10, checkpoint__keep=KEEP, monitor__log_every=100,
    )  # fmt: skip
    must(tmp_path, "data")
    process, samples = start(tmp_path, "pretrain"), []
    watched = psutil.Process(process.pid)
    while not list(tmp_path.glob("runs/pretrain/*/checkpoint_010.pth")):
        assert process.poll() is None
        time.sleep(0.05)
    while process.poll() is None:
        try:
            samples.append((watched.memory_info().rss, watched.num_fds(), watched.num_threads()))
        except psutil.Error:
            break
        time.sleep(0.5)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    quarter = len(samples) // 4
    assert quarter >= 3, "too fast to see a trend"
    memory, handles, threads = (np.array(values, float) for values in zip(*samples, strict=True))
    assert np.median(memory[-quarter:]) - np.median(memory[quarter : 2 * quarter]) < 4 << 20
    assert np.median(handles[-quarter:]) <= np.median(handles[:quarter])
    assert np.median(threads[-quarter:]) <= np.median(threads[:quarter])
    assert len(list(tmp_path.glob("runs/pretrain/*/checkpoint_*.pth"))) == KEEP
    (log,) = tmp_path.glob("runs/pretrain/*/metrics.jsonl")
    lines = log.read_text().splitlines()
    assert sum('"loss"' in line and '"event": "metrics"' in line for line in lines) == STEPS // 100
    assert len(lines[-5]) < len(lines[5]) + 200, "no line grows with the run"
    assert all(character.isprintable() or character == "\n" for character in said), "nothing for a terminal in a file"
    assert len(said) < 20_000
