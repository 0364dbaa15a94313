"""Where a training goes on: from its own newest state, or from a checkpoint that the user names.

A state knows the digests of the code that made it. With other code a run is continued on purpose only: the result would
be of neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moco.errors import UserError, first_of, say
from moco.files import sha256, write_text
from moco.runs import rollback
from moco.runs.checkpoints import CheckpointFolder, read_record
from moco.runs.identity import CODE, ROOM, Identity, code_changes
from moco.runs.joins import differences
from moco.weights import load_weights

ORIGIN = "resumed_from"  # in the run's folder: digest and place of the checkpoint that the user named
NETWORK = {"pretrain": "model", "finetune": "network"}  # where a stage's states have the weights


def saved_state(
    checkpoints: CheckpointFolder, resume: Path | None, params: dict[str, Any], digest: str, processes: int,
    identity: Identity,
) -> dict[str, Any] | None:  # fmt: skip
    """Return the state from which the run continues, or None at its beginning.

    Raises UserError where the checkpoint `resume` cannot be taken, and, without one, where the run's code has changed
    since its newest state (E-RUN-CODE). digest: of the data. processes: their number now; a state of another number is
    taken with a warning.
    """
    if resume is None:
        found = checkpoints.newest(say)
        if found is None:
            return None
        path, saved = found
        if changed := _changed(saved, identity):
            raise UserError(
                f"the code of the interrupted run has changed: {changed}; `moco {identity.stage} --resume {path}` "
                "goes on with the code of now; move its folder away to start anew", "E-RUN-CODE"
            )  # fmt: skip
        say(f"continuing from {path}")
    else:
        path, saved = _branch(checkpoints, resume, params, digest, identity.stage)
        changed = _changed(saved, identity)
        say(f"continuing from {path}" + (f" with other code than it was made by: {changed}" if changed else ""))
    if (before := saved.get("processes", 1)) != processes:
        say(f"warning: begun in {before} process(es), going on in {processes}: not to the same bits, and with "
            "batch_norm plain over other statistics")  # fmt: skip
    return saved


def _changed(saved: dict[str, Any], identity: Identity) -> str:
    """Return the files of code that have changed since the state was saved; '' for none."""
    if CODE not in saved:
        return "the version of moco (it did not record its code yet)"
    return first_of(code_changes(saved[CODE], identity.code), ROOM)


def is_branch(folder: Path, resume: Path | None) -> bool:
    """Return whether a run is the one that a command asks for.

    With `resume`, that is the one that began from this checkpoint.
    """
    return resume is None or _begun(folder, resume, _digest(resume))


def _digest(path: Path) -> str:
    return sha256(path) if path.is_file() else ""


def _begun(folder: Path, resume: Path, named: str) -> bool:
    origin = folder / ORIGIN
    noted = origin.read_text(encoding="utf-8", errors="replace").splitlines() if origin.is_file() else []
    return named in noted[:1] if named else str(resume.resolve()) in noted[1:]


def _branch(
    checkpoints: CheckpointFolder, resume: Path, params: dict[str, Any], digest: str, stage: str
) -> tuple[Path, dict[str, Any]]:
    """Return the path and content of the checkpoint from which a branch continues.

    A checkpoint named by the user begins a branch. Once the branch has checkpoints of its own, the same command (of a
    requeued job, say) continues from those, also where the named one was among them and has made room for later ones.
    """
    named = _digest(resume)
    begun = _begun(checkpoints.folder, resume, named)
    if begun and (own := checkpoints.newest(say)) is not None:
        return own
    saved = _load(resume, named, params, digest, stage)
    if not begun:
        # What the folder holds is of one way: that to the named checkpoint, where it lies there, or one given up now.
        inside = any(path.samefile(resume) for path in checkpoints.paths())
        checkpoints.drop_after(saved["loop"]["epoch"] if inside else -1)
        (checkpoints.folder / rollback.NAME).unlink(missing_ok=True)  # the state knows those that led to it
        write_text(checkpoints.folder / ORIGIN, f"{named}\n{resume.resolve()}\n")
    return resume, saved


def _load(path: Path, named: str, params: dict[str, Any], digest: str, stage: str) -> dict[str, Any]:
    """Return a checkpoint named by the user, of the digest `named`.

    Raises UserError where it is damaged or belongs to another configuration.
    """
    record = path.parent / f"{path.name}.sha256"
    if named and record.is_file() and named not in read_record(record).split():
        raise UserError(f"{path}: damaged: its digest is not that in {record.name}; name another checkpoint")
    saved: dict[str, Any] = load_weights(path, "name another checkpoint, or none to start again")
    if not isinstance(saved, dict) or not {"params", "data", "loop", NETWORK[stage]} <= set(saved):
        raise UserError(f"{path}: not a checkpoint of `moco {stage}`, or of a version that kept no settings in it")
    may_differ = {f"{stage}.epochs", f"{stage}.minutes"}
    different = differences(saved["params"], params, may_differ)
    if saved["data"] != digest:
        different.append("it was made from other data")
    if different:
        raise UserError(f"{path}: checkpoint of another configuration: {'; '.join(different)}")
    return saved
