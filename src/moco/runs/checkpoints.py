"""States that a run can be continued from: the newest few, each with its digest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moco.errors import Say, UserError
from moco.files import sha256, write_atomically, write_text
from moco.weights import load_weights, write_weights

NAME = re.compile(r"checkpoint_(\d+)\.pth")


def read_record(record: Path) -> str:
    """Return the text of a digest file, whatever a damaged one holds."""
    return record.read_text(encoding="utf-8", errors="replace")


class CheckpointFolder:
    """checkpoint_EPOCH.pth files of one run with a digest beside each, in the format of sha256sum.

    keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, epoch: int, content: dict[str, Any]) -> Path:
        """Write the checkpoint of an epoch and return its path.

        Raises UserError where it cannot be written; earlier checkpoints are then untouched.
        """
        path = self.folder / f"checkpoint_{epoch:03d}.pth"
        record = path.with_suffix(".pth.sha256")
        line = ""

        def write(temporary: Path) -> None:
            nonlocal line
            write_weights(content, temporary)
            line = f"{sha256(temporary)}  {path.name}\n"
            # An epoch can be saved twice (in its midst after a signal): while the file is exchanged, the record
            # allows both, so that a crash at any moment leaves a checkpoint that counts as sound.
            write_text(record, line + (read_record(record) if path.exists() and record.exists() else ""))

        write_atomically(path, write)
        write_text(record, line)
        if not path.exists():  # and the record's folder was made anew
            raise UserError(f"{path}: was removed while it was being saved")
        # Later ones are damaged, as the run went on from an earlier one. They would take this one's place.
        self.drop_after(epoch)
        for old in self.paths()[: -self.keep]:
            self._drop(old)
        return path

    def paths(self) -> list[Path]:
        """Return the paths of the checkpoints, oldest first."""
        found = [(int(m[1]), p) for p in self.folder.glob("*.pth") if (m := NAME.fullmatch(p.name))]
        return [path for _, path in sorted(found)]

    def newest(self, say: Say) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest sound checkpoint and what it holds, or None. Damaged ones are named and passed over."""
        for remains in self.folder.glob(".checkpoint_*"):  # of a process that was killed while saving
            remains.unlink(missing_ok=True)
        for path in reversed(self.paths()):
            record = path.with_suffix(".pth.sha256")
            try:
                sound = sha256(path) in read_record(record).split()
            except OSError:
                sound = False
            if sound:
                return path, load_weights(path, "delete it to start again")
            say(f"warning: {path} is damaged (its digest does not match); using the one before")
        return None

    def drop_after(self, epoch: int) -> None:
        """Remove checkpoints of later epochs, such as those of a branch that is given up."""
        for path in self.paths():
            if int(NAME.fullmatch(path.name)[1]) > epoch:  # type: ignore[index]
                self._drop(path)

    def drop_newest(self) -> None:
        """Remove the newest checkpoint, where there is one."""
        for path in self.paths()[-1:]:
            self._drop(path)

    def _drop(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        path.with_suffix(".pth.sha256").unlink(missing_ok=True)
