"""CIFAR-10 and STL-10 as torchvision reads (and, when asked, downloads) them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torchvision.datasets

from moco.data.dataset import Dataset, Split
from moco.errors import UserError
from moco.out_of_memory import full_memory


def load_torchvision_set(name: str, root: Path, download: bool) -> Dataset:
    """Load the whole set. CIFAR-10's training images, or STL-10's unlabelled ones, are the pool.

    Raises UserError where the files are missing and the download is not allowed or fails.
    """
    try:
        if name == "cifar10":
            train = torchvision.datasets.CIFAR10(str(root), train=True, download=download)
            val = torchvision.datasets.CIFAR10(str(root), train=False, download=download)
            pool, images, val_images = train.data, train.data, val.data
            labels, val_labels = np.array(train.targets, np.int64), np.array(val.targets, np.int64)
        else:
            sets = {
                split: torchvision.datasets.STL10(str(root), split=split, download=download)
                for split in ("unlabeled", "train", "test")
            }
            pool, images, val_images = (
                np.ascontiguousarray(sets[s].data.transpose(0, 2, 3, 1)) for s in ("unlabeled", "train", "test")
            )
            train, labels = sets["train"], sets["train"].labels.astype(np.int64)
            val_labels = sets["test"].labels.astype(np.int64)
    except (RuntimeError, OSError) as error:
        if full_memory(error):
            raise
        hint = "" if download else "; set data.download to true"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{root}: {name} cannot be read ({reason}){hint}") from None
    splits = {
        "unlabeled": Split("unlabeled", array=pool),
        "train": Split("train", array=images, labels=labels),
        "val": Split("val", array=val_images, labels=val_labels),
    }
    return Dataset(splits, list(train.classes), {"kind": name})
