"""What is wrong with section `pretrain` where one key alone does not tell."""

from __future__ import annotations

from moco.errors import Say, UserError
from moco.settings.pretrain import PretrainConfig
from moco.training.distributed import SINGLE_PROCESS, DistributedContext


def check(section: PretrainConfig, processes: DistributedContext) -> None:
    """Raise UserError, before anything is computed, for the first keys that do not fit each other."""
    if section.batch_norm == "sync" and processes.size == 1:
        raise UserError("pretrain.batch_norm: sync needs several processes (torchrun); use plain or split")
    check_alone(section, processes)


def check_alone(section: PretrainConfig, processes: DistributedContext = SINGLE_PROCESS) -> None:
    """Check the same as `check`, but let a single process stand for one of several."""
    if section.batch_norm == "split" and section.splits * 2 > section.batch_size:
        raise UserError(f"pretrain.splits: {section.splits} parts of {section.batch_size} images are too small")
    if section.accumulate > 1 and section.method == "simclr":
        raise UserError(
            "pretrain.accumulate: simclr takes its negatives from the batch, which must not be split; set it to 1",
            "E-PRETRAIN-ACCUMULATE",
        )
    parts = section.accumulate * processes.size
    if section.accumulate > 1 and section.batch_norm == "split" and section.splits % parts:
        raise UserError(f"pretrain.splits: {section.splits} is no multiple of the {parts} parts that are accumulated")
    _check_resolutions(list(section.resolutions), list(section.resolution_changes))
    if section.warmup >= 1:
        raise UserError("pretrain.warmup: the share of the run with rising learning rate must be below 1")
    check_shares(section, section.batch_size, processes.size)


def check_pool(section: PretrainConfig, batch_size: int, images: int, say: Say) -> None:
    """Tell where the pool is smaller than batch or queue. batch_size: the real one, at most the pool's images.

    Raises UserError where the real batch is too small for the splits of its BatchNorm."""
    if batch_size < section.batch_size:
        say(
            f"warning: pretrain.batch_size: {section.batch_size} is more than the pool has; batches are of {batch_size}"
        )
    if section.method == "moco_v2" and section.queue > images:
        say(
            f"warning: pretrain.queue: {section.queue} keys of a pool of {images}: every image is in it several times, "
            "its own earlier views as negatives too; a queue below the pool's size learns better"
        )
    if section.batch_norm == "split" and section.splits * 2 > batch_size:
        raise UserError(
            f"pretrain.splits: {section.splits} parts of {batch_size} images (the pool has {images}) are too small; "
            f"set it to {max(1, batch_size // 2)} at most",
            "E-PRETRAIN-SPLITS",
        )


def _check_resolutions(resolutions: list[float], changes: list[float]) -> None:
    if not resolutions or resolutions != sorted(set(resolutions)) or resolutions[-1] != 1:
        raise UserError(f"pretrain.resolutions: {resolutions} do not rise to 1, the size of the images")
    if len(changes) != len(resolutions) - 1 or changes != sorted({*changes} - {0.0, 1.0}):
        raise UserError(
            f"pretrain.resolution_changes: {len(resolutions)} resolutions have {len(resolutions) - 1} changes between "
            f"them, rising, above 0 and below 1; found {changes}"
        )


def check_shares(section: PretrainConfig, batch_size: int, size: int) -> None:
    """Check whether every process can have the same share of each batch, and of its parts for split BatchNorm.

    Raises UserError where this is impossible.
    """
    if section.accumulate > 1 and section.accumulate * size * 2 > batch_size:
        raise UserError(f"pretrain.accumulate: {section.accumulate * size} parts of {batch_size} images are too small")
    if size == 1:
        return
    if batch_size % size or batch_size < 2 * size:
        raise UserError(
            f"pretrain.batch_size: {batch_size} images (all processes together) cannot be shared by {size} processes: "
            f"it must be a multiple of {size}, two for each at least"
        )
    if section.batch_norm == "split" and (section.splits % size or batch_size % section.splits):
        raise UserError(
            f"pretrain.splits: {section.splits} parts of {batch_size} images cannot be shared by {size} processes: the "
            f"parts must be a multiple of {size}, and the images one of the parts"
        )
