"""Whether an artifact belongs to the data that it is used with: the same classes in the same order, the same images.

Everything that brings an encoder or a classifier together with a manifest asks here, so that nothing is scored or
trained on labels that mean something else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from moco.data.cache import DecodedSplit
from moco.data.manifest import Manifest
from moco.data.prepare import image_names
from moco.errors import Say, UserError, first_of
from moco.labels.extra_file import CONTENT
from moco.settings.data import DataConfig
from moco.settings.kinds import flatten
from moco.settings.schema import MOVED, Config, without_setting

LONGEST = 40  # characters of a class's name in a message
SAME_PIXELS = 0.02  # mean and standard deviation of channels, of [0, 1], are as good as equal below


def image_facts(manifest: Manifest) -> dict[str, Any]:
    """Return what an artifact says of the images that it was made with: size, resizing and normalisation."""
    return {
        "size": [manifest.height, manifest.width], "resize": manifest.resize, "mean": list(manifest.mean),
        "std": list(manifest.std),
    }  # fmt: skip


def check_classes(what: object, classes: Sequence[str], manifest: Manifest, remedy: str) -> None:
    """Raise UserError where an artifact was made for other classes than the data has, or for another order of them."""
    theirs, ours = list(classes), manifest.classes
    if theirs == ours:
        return
    if len(theirs) != len(ours):
        found = f"knows {len(theirs)} classes, the data has {len(ours)}"
    else:
        different = [label for label, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]]
        kind = "in another order" if sorted(theirs) == sorted(ours) else "other classes"
        first = different[0]
        found = (
            f"made for {kind} than the data has: {len(different)} of {len(ours)} differ, first {first} is "
            f"'{theirs[first][:LONGEST]}' there and '{ours[first][:LONGEST]}' in the data"
        )
    raise UserError(f"{what}: {found}; {remedy}", "E-STAGE-CLASSES")


def check_images(what: object, made: dict[str, Any], manifest: Manifest, remedy: str, resizes: bool = False) -> None:
    """Raise UserError where an artifact was made with images of another size.

    made: see `image_facts`; {} in files of earlier versions, of which nothing is known. resizes: whether the artifact
    brings images to its size by itself.
    """
    size = made.get("size")
    if size and list(size) != [manifest.height, manifest.width] and not (resizes and made.get("resize")):
        raise UserError(
            f"{what}: made with images of {size[1]}x{size[0]} pixels, the data has {manifest.width}x{manifest.height}; "
            f"{remedy}, or set data.resize",
            "E-STAGE-IMAGE-SIZE",
        )


def tell_other_data(what: object, digest: str | None, made: dict[str, Any], manifest: Manifest, say: Say) -> None:
    """Tell where an artifact was made from other images or labels, which may be meant, and whether they are as bright.

    digest: of its data; None where it is not known."""
    if digest is None or digest == manifest.digest:
        return
    apart = ""
    for name, ours in (("mean", manifest.mean), ("std", manifest.std)):
        theirs = made.get(name) or ours
        if max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) > SAME_PIXELS:
            apart += f"; {name} of channels {_short(theirs)} there, {_short(ours)} here"
    say(f"warning: {what} was made with other data than the manifest describes{apart}")


def check_scored(
    folder: object, best: dict[str, Any], submission: ModuleType, manifest: Manifest, remedy: str, say: Say
) -> None:  # fmt: skip
    """Raise UserError where a classifier to be scored was made for other classes or images; tell what is not known.

    best: content of its model_best_*.pth, {} where there is none: a stranger's may have submission.py alone."""
    classes = best.get("classes") or getattr(submission, "class_names", None)
    if isinstance(classes, list | tuple):
        check_classes(folder, list(map(str, classes)), manifest, remedy)
    else:
        say(f"warning: {folder} does not say which classes it knows; its outputs are taken in the order of the data's")
    images = best.get("images", {})
    check_images(folder, images, manifest, remedy, resizes=True)
    tell_other_data(folder, best.get("made_from", {}).get("data"), images, manifest, say)


def learned_record(parts: Sequence[DecodedSplit], manifest: Manifest) -> dict[str, Any]:
    """Return which labelled images a classifier learns from, held-out ones included: N x 16 uint8, each once.

    The record also says by what rules and at what size they became pixels, without which digests say nothing.
    """
    digests = np.unique(np.concatenate([part.digests for part in parts]), axis=0)
    return {
        "digests": torch.from_numpy(digests), "size": [manifest.height, manifest.width], "decoding": manifest.decoding,
    }  # fmt: skip


def check_unseen(
    what: object, learned: object, splits: dict[str, DecodedSplit], config: DataConfig, manifest: Manifest,
    remedy: str | None, say: Say,
) -> int | None:  # fmt: skip
    """Return how many images of val a classifier learned from; None, which is told, where that is not known.

    Images that also stand in train are in the data's notes; others are an error (E-STAGE-SEEN), whose `remedy` is the
    stage to run again; of a classifier from elsewhere (None), which nobody here can train again, they are told.
    learned: see `learned_record`; in files of earlier versions and of strangers anything."""
    known, why = _learned_digests(learned, manifest)
    if known is None:
        say(f"warning: {what} {why}; whether val has some of them could not be checked")
        return None
    told = set(map(bytes, splits["train"].digests))
    seen = [row for row, digest in enumerate(map(bytes, splits["val"].digests)) if digest in known]
    rows = [row for row in seen if bytes(splits["val"].digests[row]) not in told]
    if rows:
        names = first_of(image_names(config, "val", rows), 100)
        found = f"{what}: learned from {len(rows)} of {len(splits['val'].digests)} images of val ({names})"
        if remedy is not None:
            raise UserError(f"{found}; a score would not be of new images; {remedy}", "E-STAGE-SEEN")
        say(f"warning: {found}; its score is not of new images alone")
    return len(seen)


def _learned_digests(learned: object, manifest: Manifest) -> tuple[set[bytes] | None, str]:
    """Return the digests of a `learned_record`, or None and why nothing can be compared."""
    found = learned if isinstance(learned, dict) else {}
    digests = found.get("digests")
    if not isinstance(digests, torch.Tensor) or digests.dtype is not torch.uint8 or digests.shape[1:] != (16,):
        return None, "does not say which images it learned from"
    if [found.get("size"), found.get("decoding")] != [[manifest.height, manifest.width], manifest.decoding]:
        return None, "learned from images of another size or decoding"
    return set(map(bytes, digests.numpy())), ""


def _short(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def differences(theirs: dict[str, Any], ours: dict[str, Any], but: Collection[str] = ()) -> list[str]:
    """Return 'pretrain.lr is 0.06 there and 0.1 here' for every setting that differs, compared as text.

    A setting that is missing on one side differs too.
    """
    theirs = {**without_setting(), **{MOVED.get(name, name): value for name, value in theirs.items()}}
    return [
        f"{name} is {theirs.get(name, 'not set')} there and {value} here"
        for name, value in ours.items()
        if name not in but and (name not in theirs or str(theirs[name]) != str(value))
    ]


def classifier_settings(config: Config, theirs: dict[str, str]) -> dict[str, Any]:
    """Return the present settings of the stages before a classifier that was made with `theirs`.

    Those of `train_extra` are among them where the classifier has extra labels.
    """
    ours = {**flatten(config.pretrain, "pretrain"), **flatten(config.train, "train")}
    return {**ours, **flatten(config.train_extra, "train_extra")} if CONTENT in theirs else ours
