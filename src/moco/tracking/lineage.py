"""From a registered classifier back to commit, settings and data."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moco.errors import Say, UserError, one_line
from moco.files import write_text
from moco.settings.tracking import TrackingConfig
from moco.tracking.store import available, client, explain, sqlite_file, store_uri
from moco.tracking.store_file import moved_from

PARAMS, PATCH = "params.yaml", "changes.patch"
# Lines of a patch: modes of symbolic links and submodules, and names that files are moved or copied from and to.
SPECIAL = re.compile(
    rb"^(?:(?:new|old|deleted) (?:file )?mode|index [0-9a-f]+\.\.[0-9a-f]+) 1[26]0000\s*$", re.MULTILINE
)
MOVED = re.compile(rb"^(?:rename|copy) (?:from|to) (.+)$", re.MULTILINE)
GIT_OWN = (".git", ".gitmodules", "git~1")  # what git takes orders from
# What is told of the run, in this order: tag and words.
TOLD = (
    ("git_commit", "commit"), ("git_dirty", "with changes"), ("git_commits", "commits in turn"),
    ("code_folder", "code from"), ("code_differs", "not the commit's"),
    ("dvc_experiment", "DVC experiment"), ("data_digest", "data"), ("data_notes", "its images"),
    ("slurm_job_ids", "Slurm jobs"), ("image", "image"), ("host", "host"),
    ("device", "device"), ("threads", "threads"), ("torch", "torch"), ("python", "Python"), ("packages", "packages"),
)  # fmt: skip


def show(config: TrackingConfig, wanted: str, ask: Callable[[str], bool] | None, say: Say) -> None:
    """Tell what a version was made from. ask: given where its commit is to be checked out here, with what was not
    committed, and its params.yaml to be written; asked before the recorded changes, which are shown, are applied.

    Raise UserError where there is no such version, the folder has changes that would be lost, or nobody agrees.
    """
    if not available():
        raise UserError("mlflow is not installed here; run this where it is")
    uri = store_uri(config)
    if not uri:
        raise UserError("tracking.uri is empty; set it in params.yaml")
    if (path := sqlite_file(uri)) and not path.exists():  # nothing is made by looking
        raise UserError(
            f"{path}: no such store; set MLFLOW_TRACKING_URI to that of the project that trained it",
            "E-ORIGIN-NO-STORE",
        )
    if path and (former := moved_from(path)):
        raise UserError(
            f"{path} was moved or copied from {former[0].parent}, where its artifacts' addresses still lead; "
            "`moco sync` sets them anew",
            "E-STORE-MOVED",
        )
    try:
        with tempfile.TemporaryDirectory(prefix="moco-origin-") as folder:
            connected = client(uri)
            version = _version(connected, config.registered_model, wanted)
            run = connected.get_run(version.run_id)
            _tell(version, run, say)
            if ask is not None:
                names = {file.path for file in connected.list_artifacts(version.run_id)}
                kept = {
                    name: connected.download_artifacts(version.run_id, name, folder)
                    for name in (PARAMS, PATCH) if name in names
                }  # fmt: skip
                _restore(run.data.tags, kept, ask, say)
            _advise(version, run, ask is not None, say)
    except UserError:
        raise
    except Exception as error:  # MLflow and its HTTP layers raise many kinds
        raise UserError(explain(error, uri)) from None


def _version(connected: Any, model: str, wanted: str) -> Any:
    known = {str(version.version): version for version in connected.search_model_versions(f"name = '{model}'")}
    if not known:
        raise UserError(f"no version of {model} is registered; `moco train` makes one", "E-ORIGIN-NO-VERSION")
    if wanted in known:
        return known[wanted]
    aliases = {alias: str(number) for alias, number in connected.get_registered_model(model).aliases.items()}
    if wanted not in aliases:
        choices = ", ".join([*aliases, *sorted(known, key=int)])
        raise UserError(f"{model} has no version or alias '{wanted}'; known: {choices}", "E-ORIGIN-NO-VERSION")
    return known[aliases[wanted]]


def _tell(version: Any, run: Any, say: Say) -> None:
    tags = run.data.tags
    lines = {
        "model": f"{version.name}, version {version.version}", "sha256": version.tags.get("sha256", ""),
        "held-out": _of_images(version.tags), "val": version.tags.get("val_accuracy", ""),
        "champion": version.tags.get("champion_gate", ""),
        "run": f"{run.info.run_name} ({run.info.run_id})", "stage": tags.get("stage", ""),
    }  # fmt: skip
    lines |= {words: tags[tag] for tag, words in TOLD if tag in tags and (tag != "git_commits" or _several(tags))}
    width = max(map(len, lines))
    for name, value in lines.items():
        if value:
            say(one_line(f"{name:<{width}}  {value}"))


def _of_images(tags: dict[str, str]) -> str:
    """Return '0.5540 of 480 images, 12 of them in the pool'; versions of before have no such numbers."""
    images, in_pool = tags.get("held_out_images"), float(tags.get("held_out_in_pool") or 0)
    pool = f", {in_pool:.0f} of them in the pool, which pretraining sees" if in_pool else ""
    return tags.get("best_held_out_accuracy", "") + (f" of {images} images{pool}" if images else "")


def _restore(tags: dict[str, str], kept: dict[str, str], ask: Callable[[str], bool], say: Say) -> None:
    if "git_commit" not in tags:
        raise UserError("the run knows no commit: it was made outside of a git repository")
    if not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", tags["git_commit"]):
        raise UserError("the run's tag git_commit is not a commit: somebody has changed it", "E-ORIGIN-COMMIT")
    if PARAMS not in kept:
        raise UserError("the run has no params.yaml: it is of an earlier version, or has not been synced whole")
    if "patch_left_out" in tags:
        raise UserError(
            f"the run's changes to commit {tags['git_commit'][:12]} are not recorded ({tags['patch_left_out']}); check "
            "it out and make them by hand",
            "E-ORIGIN-PATCH-LEFT-OUT",
        )
    if changed := _git("status", "--porcelain", "--untracked-files=no"):
        raise UserError(f"{changed.split()[-1]}: changed here, and would be lost; commit or stash it, then repeat")
    if PATCH in kept:
        _show_patch(kept[PATCH], say)
        if not ask("Apply these changes?"):
            raise UserError(
                "the run's changes to its commit are shown above, and may hold any code; look at them, then add --yes",
                "E-ORIGIN-UNSEEN-PATCH",
            )
    before = _git("rev-parse", "--abbrev-ref", "HEAD")
    _git("checkout", "--quiet", "--detach", tags["git_commit"])
    if PATCH in kept:
        try:
            _git("apply", "--whitespace=nowarn", kept[PATCH])
        except UserError:
            _git("checkout", "--quiet", before if before != "HEAD" else "-")
            raise
    write_text(Path(PARAMS), Path(kept[PARAMS]).read_text(encoding="utf-8"))
    say(f"checked out {tags['git_commit'][:12]}{' with its changes' if PATCH in kept else ''}; {PARAMS} is the run's")
    if hidden := tags.get("params_redacted"):
        say(one_line(f"note: recorded without its secrets, so set it again in {PARAMS} or the environment: {hidden}"))


def _show_patch(patch: str, say: Say) -> None:
    """Say which files a recorded patch changes, and how much. Raise UserError for one that makes links or leads out."""
    text = Path(patch).read_bytes()
    if SPECIAL.search(text):
        raise UserError(
            "the run's changes make a symbolic link or a submodule, which could lead anywhere; they are not applied",
            "E-ORIGIN-LINK",
        )
    names = [line.split("\t")[-1] for line in _git("apply", "--numstat", "-z", patch).split("\0") if line]
    for name in (*names, *(found.decode(errors="replace") for found in MOVED.findall(text))):
        parts = Path(name.strip('"')).parts
        if Path(name).is_absolute() or ".." in parts or any(part.lower().rstrip(". ") in GIT_OWN for part in parts):
            raise UserError(
                f"the run's changes lead out of the project ({name}); they are not applied", "E-ORIGIN-LINK"
            )
    for line in _git("apply", "--stat", patch).splitlines():
        say(one_line(line))


def _several(tags: dict[str, str]) -> bool:
    """Return whether one commit began the run and others went on with it."""
    return len(tags.get("git_commits", "").split()) > 1


def _advise(version: Any, run: Any, restored: bool, say: Say) -> None:
    if _several(run.data.tags):
        say("it cannot be made again: other code went on with the run that one commit had begun")
        return
    stage = run.data.tags.get("stage", "train")
    first = "" if restored else f"in a clone of the project: `moco origin {version.version} --restore`, then "
    say(f"make it again: {first}`dvc repro {stage}`; model_sub.pth then has the sha256 above (on a CPU of this kind)")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("git: not found; --restore checks out a commit with it") from None
    if done.returncode != 0:
        raise UserError(f"`git {words[0]}` says: {(done.stderr.strip().splitlines() or ['nothing'])[0]}")
    return done.stdout.strip()
