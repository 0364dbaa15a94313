"""Files of weights, loaded without unpickling anything but tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moco.errors import UserError
from moco.files import write_atomically
from moco.out_of_memory import full_memory


def write_weights(content: Any, path: Path) -> None:
    """Write content to `path` by torch.save. Raises OSError where the disk is full or the folder is missing."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's zip writer reports a full disk so
        if full_memory(error):
            raise
        if not path.parent.exists():
            raise FileNotFoundError(path) from None
        raise OSError(None, f"{str(error).splitlines()[0]} (disk full?)") from None


def save_weights(path: Path, content: Any) -> None:
    """Save tensors in plain containers, atomically. Raises UserError where the file cannot be written."""
    write_atomically(path, lambda temporary: write_weights(content, temporary))


def load_weights(path: Path, hint: str) -> Any:
    """Load what `save_weights` wrote, onto the CPU.

    Raises UserError where the file is missing or damaged; `hint` says what to do.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {hint}") from None
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        if full := full_memory(error):
            raise full.reading(path, "loaded") from None
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged or not a file of weights ({reason}); {hint}") from None
