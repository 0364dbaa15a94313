"""Takes safety lines out one at a time, and sees whether a test notices: `make mutations`.

Each is a text in a file, what stands in its place, and the tests that have to fail with it (and pass without it, as
they do in the suite)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """`old` stands once in `file` (below src/moco)."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation("atomic rename", "files.py", "            write(temporary)\n",
             "            write(path)\n            return\n",
             "tests/training/test_checkpoints.py -k full_disk"),
    Mutation("fsync of the file", "files.py", "                os.fsync(file.fileno())\n", "                pass\n",
             "tests/faults/test_durable.py"),
    Mutation("fsync of the folder", "files.py", "            _sync_folder(path.parent)\n", "",
             "tests/faults/test_durable.py"),
    Mutation("log on the disk before the state", "stages/pretrain.py", "            record.sync()", "            pass",
             "tests/faults/test_durable.py"),
    Mutation("digest check", "runs/checkpoints.py",
             "sound = sha256(path) in read_record(record).split()", "sound = True",
             "tests/training/test_checkpoints.py -k damaged_newest"),
    Mutation("lock of a run", "runs/heartbeat_lock.py",
             "        lock.acquire(timeout=LOCK_TIMEOUT_S if wait is None else wait)\n",
             "        pass\n", "tests/stages/test_workspace.py -k second"),
    Mutation("sign of life", "runs/heartbeat_lock.py",
             "        _watch(path, text, other, what, say)\n", "        pass\n",
             "tests/faults/test_disk.py -k reach"),
    Mutation("weights_only for weights", "weights.py", 'map_location="cpu", weights_only=True',
             'map_location="cpu", weights_only=False', "tests/training/test_checkpoints.py -k code"),
    Mutation("weights_only for labels", "data/sources.py", 'map_location="cpu", weights_only=True',
             'map_location="cpu", weights_only=False', "tests/data/test_sources.py -k code"),
    Mutation("path check of label files", "labels/extra_labels.py",
             'inside = not Path(name).is_absolute() and ".." not in Path(name).parts', "inside = True",
             "tests/faults/test_hostile.py -k lead_out_of_the_pool"),
    Mutation("pipes and devices are no images", "data/decode.py",
             "if not stat.S_ISREG(kind):", "if False:",
             "tests/faults/test_hostile.py -k fifo --timeout 20"),
    Mutation("resume of the queue's pointer", "methods/momentum_contrast.py",
             'self.register_buffer("cursor", torch.zeros((), dtype=torch.long))',
             'self.register_buffer("cursor", torch.zeros((), dtype=torch.long), persistent=False)',
             "tests/training/test_resume_contrast.py"),
    Mutation("resume of the random state", "stages/pretrain.py", 'state = LoopState(**saved["loop"])',
             'state = LoopState(**{**saved["loop"], "step": 0})', "tests/stages/test_interruption.py -k SIGTERM"),
    Mutation("resume of the optimizer", "methods/step.py",
             '        load_training_state(self.optimizer, self.scaler, state, self.device)\n', "",
             "tests/training/test_resume_contrast.py"),
    Mutation("resume in the midst of an epoch", "training/loop.py", "sampler.epoch(state.epoch, state.batch)",
             "sampler.epoch(state.epoch, 0)", "tests/training/test_loop.py -k interrupted"),
    Mutation("metrics that are not logged yet", "training/loop.py", "    state.unlogged = window.unlogged()\n", "",
             "tests/training/test_loop.py -k midst"),
    Mutation("skip of replayed steps", "tracking/metric_log.py",
             'kept = [line for line in kept if line["step"] <= event["step"]]', "pass",
             "tests/tracking/test_metric_log.py"),
    Mutation("divergence before a state is saved", "training/loop.py", "    if not math.isfinite(loss):\n",
             "    if False:\n", "tests/training/test_loop.py -k diverge"),
    Mutation("broken weights before a state is saved", "training/numerics.py",
             "    if not torch.stack(found).all():\n", "    if False:\n", "tests/faults/test_divergence.py -k weights"),
    Mutation("update of the step before, where the state is looked at", "methods/step.py",
             "        self.flush_pending_update()\n        return self._model\n", "        return self._model\n",
             "tests/training/test_distributed.py"),
    Mutation("bound of what a block unpacks to", "data/squashfs_reader.py", "stream.decompress(packed, limit + 1)",
             "stream.decompress(packed)", "tests/data/test_squashfs_reader.py -k bombs"),
]  # fmt: skip


@cache
def passes(tests: str, source: Path) -> bool:
    """Whether these tests pass with the package that lies in `source`."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), f"{tests}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.returncode == 0


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass without the line, which they must not."""
    assert passes(mutation.tests, ROOT / "src"), f"{mutation.name}: its tests fail as it is"
    with tempfile.TemporaryDirectory(prefix="moco-mutation-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        path = source / "moco" / mutation.file
        text = path.read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.name}: its line is not there once"
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        return passes(mutation.tests, source)


def main() -> None:
    """Exit code 1 where a line can be missed."""
    missed = 0
    for mutation in MUTATIONS:
        alive = survives(mutation)
        missed += alive
        print(f"{'MISSED ' if alive else 'noticed'} {mutation.name}: {mutation.tests}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} noticed")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
