"""Where a run comes from: commit, host, job, versions."""

from __future__ import annotations

import os
import platform
import socket
import subprocess

import torch

import moco


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(device: torch.device) -> dict[str, str]:
    """Tags for a run. What cannot be found out is left out."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    tags = {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else str(bool(status)).lower(),
        "dvc_experiment": os.environ.get("DVC_EXP_NAME"),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        "moco": moco.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {name: value for name, value in tags.items() if value}
