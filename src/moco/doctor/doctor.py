"""`moco doctor`: one screen that tells what works on this machine, and what to do about what does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from moco.doctor import gpu, machine, project, tracking
from moco.doctor.checks import Finding, attempt, note
from moco.errors import Say
from moco.settings.schema import Config


def run(params: Path, step: bool, say: Say) -> int:
    """Print one line per check and return the exit code: 1 if anything FAILs. `step` adds two steps of training.

    Never raises, whatever state the machine and the project are in.
    """
    failed = False

    def check(name: str, look: Callable[[], Finding]) -> None:
        nonlocal failed
        finding = attempt(name, look)
        failed = failed or finding.status == "FAIL"
        say(finding.line())

    check("container", machine.container)
    check("code", machine.code)
    check("libc", machine.libc)
    if importlib.util.find_spec("torch"):
        check("driver", gpu.driver)
        check("gpu", gpu.gpu)
    else:
        check("torch", lambda: note("torch", "not installed: from here jobs are submitted, and nothing is trained"))
    check("squashfs", machine.squashfs)
    check("user namespaces", machine.user_namespaces)
    check("slurm", machine.slurm)
    config = _project(params, check)
    if step:
        check("step", lambda: gpu.step(config.runtime.device if config else "auto"))
    return int(failed)


def _project(params: Path, check: Callable[[str, Callable[[], Finding]], None]) -> Config | None:
    """Check the project and return its settings; None where there are none or they are wrong."""
    if _absent(params):
        check("project", lambda: note("project", f"no {params} here: run this in the project's folder to check it too"))
        return None
    loaded: list[Config] = []
    check("params", lambda: project.parameters(params, loaded.append))
    if loaded:
        config = loaded[0]
        check("dataset", lambda: project.dataset(config.data))
        check("scratch", lambda: project.scratch(config.runtime))
        check("mlflow", lambda: tracking.mlflow(config.tracking))
        if old_runs := tracking.old_runs():
            check("mlruns", lambda: old_runs)
    else:
        check("project", lambda: note("project", "dataset, scratch and mlflow are checked once params is valid"))
    check("dvc", tracking.dvc)
    check("git", tracking.git)
    return loaded[0] if loaded else None


def _absent(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:  # not permitted, say: reading it will tell
        return False
    return False
