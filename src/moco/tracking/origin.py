"""Where a run comes from: commit and what differed from it, settings, data, host, job, versions."""

from __future__ import annotations

import email
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import moco
from moco.data.manifest import Manifest
from moco.environment import PACKAGE, differing_code, other_checkout
from moco.errors import first_of
from moco.files import sha256
from moco.redaction import literal_secret, redact_tree, redacted_keys
from moco.settings.kinds import flatten
from moco.settings.listing import params_text
from moco.settings.schema import Config

# What a run is made by, and all that its patch may hold: no settings of DVC, and no file that merely lies about.
SOURCES = (":(glob)src/**/*.py", ":(glob)src/**/*.html")
DIFF = ("diff-index", "-p", "--binary", "--no-ext-diff", "HEAD", "--", *SOURCES, "dvc.yaml", "pyproject.toml", "labels")
NEW = ("ls-files", "-z", "--others", "--exclude-standard", "--", *SOURCES)  # sources that git does not know yet
OF_ALL_STAGES = ("git_commit", "git_dirty", "dvc_experiment", "data_digest", "data_notes")
PATCH_LIMIT = 5_000_000  # bytes
HUNK = re.compile(r"@@ -\d+(?:,\d+)? \+(\d+)")
CONTINUED = 300  # characters of a statement that goes on in the next line


@dataclass(frozen=True)
class Origin:
    """tags: by name. dataset: name, digest, source, images by split. pipeline: key, name, params and tags of the run
    above those of the stages. files: to keep with the run, by name."""

    tags: dict[str, str]
    dataset: dict[str, Any]
    pipeline: dict[str, Any]
    files: dict[str, bytes]
    warning: str = ""  # for the user, where the commit should be known and is not


UNKNOWN = Origin({}, {}, {}, {})


def origin(config: Config, manifest: Manifest, device: torch.device) -> Origin:
    """Return what the run is made from. What cannot be found out is left out."""
    tags = {**_code(), **_machine(device), "data_digest": manifest.digest}
    if notes := manifest.notes():  # what a reader of the numbers must know
        tags["data_notes"] = "; ".join(notes)
    params: dict[str, Any] = {}
    for section in ("pretrain", "train", "request", "train_extra", "baseline", "finetune", "eval"):
        params.update(flatten(getattr(config, section), section))
    params = {**manifest.settings, **params}
    key = hashlib.sha256(json.dumps([params, manifest.digest], sort_keys=True, default=str).encode()).hexdigest()[:12]
    shared = {name: tags[name] for name in OF_ALL_STAGES if name in tags}
    dataset = {
        "name": manifest.source.get("name") or config.data.source, "digest": manifest.digest,
        "source": {"source": config.data.source, "path": config.data.path},
        "images": {name: split.count for name, split in manifest.splits.items()},
    }  # fmt: skip
    pipeline = {"key": key, "name": tags.get("dvc_experiment", f"pipeline-{key}"), "params": params, "tags": shared}
    files = {"params.yaml": params_text(config).encode()}
    patch = _patch()
    if len(patch) > PATCH_LIMIT:
        tags["patch_left_out"] = f"{len(patch)} bytes"
    elif secret := secret_place(patch):
        tags["patch_left_out"] = f"{secret} seems to hold a password or key"
    elif patch:
        files["changes.patch"] = patch
    if hidden := redacted_settings(config):
        tags["params_redacted"] = ", ".join(hidden)
    return Origin(tags, dataset, pipeline, files, _warning(tags))


def _warning(tags: dict[str, str]) -> str:
    if "git_commit" not in tags:
        return no_commit()
    if why := tags.get("patch_left_out"):
        return (
            f"warning: this run is recorded without your changes to its commit, and cannot be restored: {why}; "
            "commit the changes, with secrets moved to the environment"
        )
    return ""


def no_commit() -> str:
    """Return one line that says why this folder's commit cannot be read; '' where it is in no git repository."""
    here = Path.cwd()
    if not any((folder / ".git").exists() for folder in (here, *here.parents)):
        return ""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, check=False, timeout=20)
        said = " ".join(done.stderr.decode(errors="replace").split())
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    cure = "make a commit" if "unknown revision" in said else "see to it that `git status` works here"
    if "safe.directory" in said:
        folder = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)
        said = "the folder belongs to another user"
        cure = f"`git config --global --add safe.directory {shlex.quote(str(folder))}` allows it"
    return f"warning: this run is recorded without its commit, as git cannot read it ({said[:120]}); {cure}"


def _patch() -> bytes:
    """Return what differs from the commit, new sources included.

    New sources are added to a copy of the index, not to the user's.
    """
    place = _git("rev-parse", "--git-path", "index")
    if place is None or not Path(place).is_file():
        return b""
    with tempfile.TemporaryDirectory(prefix="moco-index-") as folder:
        index = str(shutil.copy(place, folder))
        new = [name.decode(errors="surrogateescape") for name in (_git_bytes(*NEW) or b"").split(b"\0") if name]
        if new:
            _git_bytes("add", "--", *new, index=index)
        return _git_bytes(*DIFF, index=index) or b""


def secret_place(patch: bytes) -> str:
    """Return 'FILE, line N' of the first line in a patch that seems to hold a password or key, else ''.

    Removed lines and those around a change count as well: the patch shows them. Lines that a statement goes on over are
    looked at together."""
    name, number, before = "", 0, ""
    for line in patch.decode(errors="replace").splitlines():
        if line.startswith(("+++ ", "--- ")) and not line.endswith("/dev/null"):
            name, before = line[4:].split("/", 1)[-1], ""
        elif hunk := HUNK.match(line):
            number, before = int(hunk[1]) - 1, ""
        elif line.startswith(("+", "-", " ")):
            number += line[0] != "-"
            statement = f"{before} {line[1:].strip()}"
            if literal_secret(line[1:], name) or (before and literal_secret(statement, name)):
                return f"{name}, line {max(1, number)}{', as it was,' if line[0] == '-' else ''}"
            before = statement[-CONTINUED:] if line.endswith(("(", "[", "{", "=", ",", ":", "\\")) else ""
    return ""


def redacted_settings(config: Config) -> list[str]:
    """Return the dotted names of the settings that `params_text` does not show as they are."""
    settings = json.loads(json.dumps(asdict(config)))
    return list(redacted_keys(settings, redact_tree(settings)))


def _code() -> dict[str, str]:
    status, new = _git("status", "--porcelain", "--untracked-files=no"), _git_bytes(*NEW)
    lock = Path("dvc.lock")
    tags = {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else str(bool(status or new)).lower(),
        "dvc_experiment": os.environ.get("DVC_EXP_NAME"),
        "dvc_lock": sha256(lock) if lock.is_file() else None,
        **_foreign_code(),
        "packages": _packages(),
        "moco": moco.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {name: value for name, value in tags.items() if value}


def _foreign_code() -> dict[str, str]:
    """Return where the code lies that runs, in place of the current folder's, and what differs from that."""
    other = other_checkout()
    if other is None:
        return {} if Path("src/moco").is_dir() else {"code_folder": str(PACKAGE)}
    different = differing_code(other)
    differs = {"code_differs": f"{len(different)} file(s): {first_of(different)}"} if different else {}
    return {"code_folder": str(PACKAGE), **differs}


@functools.cache
def _packages() -> str:
    """Return a digest of names and versions of all installed packages.

    Only headers are parsed, since descriptions run to pages.
    """
    found = []
    for package in importlib.metadata.distributions():
        text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
        headers = email.message_from_string(text.partition("\n\n")[0])
        found.append(f"{headers['Name']}=={headers['Version']}")
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def _machine(device: torch.device) -> dict[str, str]:
    tags = {
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "image": os.environ.get("MOCO_IMAGE") or os.environ.get("APPTAINER_CONTAINER"),
        "image_digest": os.environ.get("MOCO_IMAGE_DIGEST") or sif_identity(os.environ.get("APPTAINER_CONTAINER")),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
    }
    return {name: value for name, value in tags.items() if value}


def sif_identity(image: str | None) -> str | None:
    """Return the UUID in a SIF's header, new with every build (https://github.com/apptainer/sif, Header.ID).

    A digest of the whole file would take a minute. slurm/launch does the same where the file cannot be seen from
    inside.
    """
    try:
        with Path(image or "").open("rb") as file:
            header = file.read(64)
    except OSError:
        return None
    return f"sif:{uuid.UUID(bytes=header[48:64])}" if header[32:41] == b"SIF_MAGIC" else None


def _git(*arguments: str) -> str | None:
    said = _git_bytes(*arguments)
    return None if said is None else said.decode(errors="replace").strip("\n")


def _git_bytes(*arguments: str, index: str | None = None) -> bytes | None:
    environment = {**os.environ, "GIT_INDEX_FILE": index} if index else None
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=False, timeout=20, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
