"""Where a pretraining goes on: from its own newest state, or from a checkpoint that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moco.config import HOUSEKEEPING
from moco.errors import UserError
from moco.files import sha256, write_text
from moco.stages import step_back
from moco.stages.workspace import differences, say
from moco.training.checkpoints import CheckpointFolder, load_weights, read_record

ORIGIN = "resumed_from"  # in the run's folder: digest and place of the checkpoint that the user named
MAY_DIFFER = {"pretrain.epochs", "pretrain.minutes", *HOUSEKEEPING}  # from the run of a named checkpoint


def saved_state(
    checkpoints: CheckpointFolder, resume: Path | None, params: dict[str, Any], digest: str, processes: int
) -> dict[str, Any] | None:
    """Where the run stands, or None at its beginning. Raises UserError where the checkpoint `resume` cannot be taken.

    digest: of the data. processes: those of now; a state of another number is taken with a warning.
    """
    saved = checkpoints.newest(say) if resume is None else _branch(checkpoints, resume, params, digest)
    if saved is not None and (before := saved.get("processes", 1)) != processes:
        say(f"warning: begun in {before} process(es), going on in {processes}: not to the same bits, and with "
            "batch_norm plain over other statistics")  # fmt: skip
    return saved


def _branch(checkpoints: CheckpointFolder, resume: Path, params: dict[str, Any], digest: str) -> dict[str, Any]:
    """A checkpoint named by the user begins a branch. Once that has checkpoints of its own, the same command (of a
    requeued job, say) goes on with those, also where the named one was among them and has made room for later ones."""
    origin, place = checkpoints.folder / ORIGIN, str(resume.resolve())
    named = sha256(resume) if resume.is_file() else ""
    noted = origin.read_text(encoding="utf-8", errors="replace").splitlines() if origin.is_file() else []
    begun = named in noted[:1] if named else place in noted[1:]
    if begun and (own := checkpoints.newest(say)) is not None:
        return own
    saved = _load(resume, named, params, digest)
    if not begun:
        # What the folder holds is of one way: that to the named checkpoint, where it lies there, or one given up now.
        inside = any(path.samefile(resume) for path in checkpoints.paths())
        checkpoints.drop_after(saved["loop"]["epoch"] if inside else -1)
        (checkpoints.folder / step_back.NAME).unlink(missing_ok=True)  # the state knows those that led to it
        write_text(origin, f"{named}\n{place}\n")
    return saved


def _load(path: Path, named: str, params: dict[str, Any], digest: str) -> dict[str, Any]:
    """A checkpoint named by the user, of the digest `named`. Raises UserError where it is damaged or belongs to another
    configuration."""
    record = path.parent / f"{path.name}.sha256"
    if named and record.is_file() and named not in read_record(record).split():
        raise UserError(f"{path}: damaged: its digest is not that in {record.name}; name another checkpoint")
    saved: dict[str, Any] = load_weights(path, "name another checkpoint, or none to start again")
    if not isinstance(saved, dict) or not {"params", "data", "loop", "model"} <= set(saved):
        raise UserError(f"{path}: not a checkpoint of `moco pretrain`")
    different = differences(saved["params"], params, MAY_DIFFER)
    if saved["data"] != digest:
        different.append("it was made from other data")
    if different:
        raise UserError(f"{path}: checkpoint of another configuration: {'; '.join(different)}")
    say(f"continuing from {path}")
    return saved
