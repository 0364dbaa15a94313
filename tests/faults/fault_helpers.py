"""The program in processes of its own, and what a run leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from moco.tracking.metric_log import metric_history
from process_helpers import Started

WORLD = Path(__file__).parent / "world"
RESULTS = {
    "data": ("models/manifest.json",),
    "pretrain": ("models/encoder.pth",),
    "train": ("models/classifier/model_sub.pth", "models/classifier/submission.py"),
    "finetune": ("models/finetuned/model_sub.pth", "models/finetuned/submission.py"),
    "request": ("models/request/request.csv",),
}


def start(project: Path, stage: str, *arguments: str, world: str = "") -> subprocess.Popen[str]:
    """A stage's command in a process that begins by itself; `world`: what is broken for it (world/sitecustomize.py)."""
    environment = dict(os.environ)
    if world:
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{WORLD}{os.pathsep}{before}" if before else str(WORLD)
        environment |= {"MOCO_WORLD": world, "MOCO_WORLD_SEEN": str(project / "world-seen")}
    return subprocess.Popen(
        [sys.executable, "-m", "moco.cli", stage, *arguments], cwd=project, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def run(project: Path, stage: str, *arguments: str, world: str = "") -> tuple[int | None, str]:
    """Exit code and what was said."""
    if not world:
        return Started(project, stage, *arguments).finish()
    process = start(project, stage, *arguments, world=world)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def must(project: Path, stage: str, *arguments: str, world: str = "") -> str:
    """What a stage said that has to end well."""
    code, said = run(project, stage, *arguments, world=world)
    assert code == 0, f"{stage}: {said}"
    return said


def kill_after(project: Path, stage: str, seconds: float) -> bool:
    """Whether the stage was still at work after so many seconds, when SIGKILL ended it with all that it started."""
    process = Started(project, stage)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.runs():
        time.sleep(0.002)
    alive = process.runs()
    if alive:
        process.kill_group()
    process.finish()
    return alive


def results(project: Path, stage: str) -> dict[str, bytes]:
    """What has to be equal to the bit: the stage's files, and for `data` the decoded cache."""
    found = {name: (project / name).read_bytes() for name in RESULTS[stage]}
    if stage == "data":
        for path in sorted((project / "scratch").glob("moco-cache-*/*/*")):
            found[str(path.relative_to(project))] = path.read_bytes()
    return found


def history(project: Path, stage: str) -> list[tuple[int, float | None]]:
    """(step, loss) of every valid line of metrics of the stage's only run."""
    (log,) = (project / "runs" / stage).glob("*/metrics.jsonl")
    return [(line["step"], line["metrics"].get("loss")) for line in metric_history(log)]


def left_over(project: Path) -> list[str]:
    """Temporary files and folders, signs of life, and unfinished caches."""
    hidden = [path for path in project.rglob(".*") if path.name not in (".sweep.lock", ".dvc", ".git", ".gitignore")]
    named = [*project.rglob("moco-copy-*"), *project.rglob("moco-squashfs-*"), *project.rglob("holder")]
    return sorted(str(path.relative_to(project)) for path in (*hidden, *named))
