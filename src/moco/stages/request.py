"""Stage `request`: which images of the unlabelled pool to have labelled next, as a form with pictures.

Nobody is asked for what is labelled already (in train, val or the extra labels), nor twice about nearly the same image.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.data.batches import gather
from moco.data.cache import DecodedSplit
from moco.data.manifest import Manifest
from moco.encoders.architecture import with_features
from moco.encoders.encoder import build_encoder, last_width, load_body, strip_head
from moco.errors import UserError, present, say
from moco.exchange.classifier_files import WEIGHTS, read_classifier
from moco.exchange.encoder_file import EncoderFile
from moco.labels.extra_labels import read_extra_labels
from moco.labels.pool_names import drawn_labels, pool_names
from moco.labels.selection.clusters import margins
from moco.labels.selection.coverage import coverage
from moco.labels.selection.near_duplicates import deduplicate, small_pictures
from moco.labels.selection.strategies import NEEDS_CLASSIFIER, Choice, Pool, choose, reduced
from moco.layout import CLASSIFIER, FORM
from moco.methods.projection import with_head
from moco.methods.step import pretraining_views
from moco.methods.view_losses import contrastive_losses
from moco.runs.identity import Making, Start
from moco.runs.outputs import locked_outputs
from moco.runs.run_folder import open_run_folder, run_key
from moco.settings.kinds import flatten
from moco.settings.schema import Config
from moco.stages.request_files import Asked, keep_answers, write_request
from moco.stages.train import FEATURE_BATCH, Inputs, linear_views, open_inputs
from moco.tracking.origin import origin
from moco.tracking.run import Run
from moco.training import features
from moco.training.numerics import choose_precision

BLOCK = 16_384  # images whose features are there in full at a time
SURPLUS = 64  # images chosen at least in the place of near copies, twice as many each time, as each costs the same
Probabilities = Callable[[np.ndarray], Tensor]  # B x H x W x 3 uint8 -> B x C


@dataclass(frozen=True)
class Known:
    """Images that need no label any more. images: M x H x W x 3 uint8, of train and the extra labels; digests: of all
    of them and of val's; pictures: small ones of all of these."""

    images: np.ndarray
    digests: set[bytes]
    pictures: Tensor


def run(config: Config, start: Start | None = None) -> None:
    """Ask for as many images as the budget says, or for all that can be asked for where these are fewer, which is said.

    Raises UserError where the strategy lacks a classifier, or encoder, data and settings do not fit each other."""
    with locked_outputs("request", say):
        begun, given = start or Start.of("request"), config
        if config.request.answers == "generator" and config.data.source != "generated":
            say("warning: request.answers: these images are not drawn by the generator; the form is left to people")
            config = replace(config, request=replace(config.request, answers="people"))
        keep_answers(config)  # before the labels are read: from now on they are some of them
        _run(config, begun.making(given))


def _run(config: Config, making: Making) -> None:
    section = config.request
    inputs = open_inputs(config)
    pool, manifest = inputs.splits["unlabeled"], inputs.manifest
    known = _known(config, inputs)
    candidates = _candidates(pool, known)
    available = int(candidates.sum())
    if section.budget and not available:
        say("warning: every image of the pool has a label; none is asked for")
        config = replace(config, request=replace(section, budget=0))
    chain = {**inputs.encoder.settings, **flatten(section, "request"), "request.known": len(known.digests)}
    key = run_key(chain, manifest.digest)
    with (
        open_run_folder("request", key, making, before=lambda: keep_answers(config)) as folder,
        contextlib.ExitStack() as stack,
    ):
        if folder.restored:
            return
        record = stack.enter_context(Run(folder.path, "request", config.tracking, say))
        record.start(chain, origin(config, manifest, inputs.device))
        say(f"request: features of {len(pool.images)} images on {inputs.device}")
        problem, classified = _pool(config, inputs, known, candidates)
        choice, copies = _choose(config, problem, pool, known)
        rows = choice.rows.numpy()
        names = pool_names(rows, config.data, manifest, pool, say)
        labels = None
        if config.request.answers == "generator":
            labels = [manifest.classes[label] for label in drawn_labels(manifest.pool_numbers()[rows], config.data)]
        asked = Asked(
            gather(pool.images, rows),
            pool.digests[rows],
            names,
            choice.scores.tolist(),
            choice.clusters.tolist(),
            labels,
        )
        expected = classified(asked.images) if classified is not None and len(rows) else None
        summary = _summary(config, problem, expected, choice, copies, manifest)
        write_request(asked, summary, record, folder)
        folder.finish(making)
    if len(rows) < config.request.budget:
        say(
            f"warning: request.budget: {section.budget} images wanted, {len(rows)} asked for: no others in the pool of "
            f"{len(pool.images)} are different, without a label and no near copies ({copies} are)"
        )
    say(f"request: {len(rows)} images by {section.strategy} -> {FORM}")


def _known(config: Config, inputs: Inputs) -> Known:
    """Return the images of train and val, and those of the extra labels.

    The extra labels are left out where they are the answers to this very request.
    """
    train, val = inputs.splits["train"], inputs.splits["val"]
    parts, digests = [train.images], set(map(bytes, train.digests)) | set(map(bytes, val.digests))
    extra = config.train_extra.labels
    if extra is not None and not Path(extra).exists():
        say(f"request: {extra} (train_extra.labels): not there yet, so no answers are left out")
    elif extra is not None and Path(extra).resolve() != FORM.resolve():
        found = read_extra_labels(Path(extra), config.data, inputs.manifest, inputs.splits, say)
        parts.append(found.images)
        digests |= set(map(bytes, found.digests))
    pictures = torch.cat([small_pictures(part) for part in (*parts, val.images)])
    return Known(np.concatenate([np.asarray(part) for part in parts]), digests, pictures)


def _candidates(pool: DecodedSplit, known: Known) -> np.ndarray:
    """Return N booleans: the first image of each content in the pool, without those that are known."""
    seen, found = set(known.digests), np.zeros(len(pool.images), bool)
    for row, digest in enumerate(map(bytes, pool.digests)):
        found[row] = digest not in seen
        seen.add(digest)
    return found


def _pool(config: Config, inputs: Inputs, known: Known, candidates: np.ndarray) -> tuple[Pool, Probabilities | None]:
    """Return what strategies choose from, and the classifier's probabilities.

    The probabilities are a function of images of the pool; None where there is no classifier.
    """
    section, encoder, device = config.request, inputs.encoder, inputs.device
    layer, sees = _layer(encoder, section.strategy, inputs.manifest.classes)
    network = build_encoder(with_features(encoder.architecture, sees), len(inputs.manifest.classes))
    load_body(network, encoder.weights)
    last = last_width(network)  # of the features that contrast shaped
    body = strip_head(network).to(device).to(memory_format=torch.channels_last)
    views, images = linear_views(inputs.manifest, device), inputs.splits["unlabeled"].images
    precision = choose_precision(config.pretrain.precision, device)

    def blocks(images: np.ndarray) -> Iterator[Tensor]:
        for first in range(0, len(images), BLOCK):
            yield features.extract(
                body, images[first : first + BLOCK], views.plain, batch_size=FEATURE_BATCH, device=device,
                precision=precision,
            )  # fmt: skip

    def chances(block: Tensor) -> Tensor:
        return torch.softmax(present(layer, "a classifier")(block), 1)

    def classified(images: np.ndarray) -> Tensor:
        return torch.cat([chances(block) for block in blocks(images)])

    # In half precision, and only once: features of half a million images take gigabytes.
    wide = torch.empty(len(images) + len(known.images), last, dtype=torch.float16, device=device)
    found: list[Tensor] = []
    first = 0
    for block in itertools.chain(blocks(images), blocks(known.images)):
        directions = F.normalize(block[:, -last:], dim=1)  # what half precision holds, whatever their lengths
        if not directions.isfinite().all():
            raise UserError("models/encoder.pth: features that are no numbers; run `moco pretrain` again")
        wide[first : first + len(block)] = directions.to(device)
        if section.strategy in NEEDS_CLASSIFIER and first < len(images):
            found.append(margins(chances(block)))
        first += len(block)
    small = reduced(wide, section.dimensions)
    del wide
    losses = None
    if section.strategy == "loss":
        losses = pool_losses(config, inputs, section.loss_views, section.seed).to(device)
    usable = torch.from_numpy(candidates).to(device)
    unsure = torch.cat(found).to(device) if found else None
    pool = Pool(small[: len(images)], usable, small[len(images) :], unsure, losses)
    return pool, classified if layer is not None else None


def pool_losses(config: Config, inputs: Inputs, count: int, seed: int) -> Tensor:
    """Return how hard the contrastive task is for each image of the pool, N. Raises UserError where the encoder's file
    has no projection, or another than the settings ask for."""
    section, encoder, device = config.pretrain, inputs.encoder, inputs.device
    if not encoder.projection:
        raise UserError("models/encoder.pth: has no projection, which strategy loss needs; run `moco pretrain` again")
    network = with_head(build_encoder(encoder.architecture, 1), section.dim, section.head == "mlp")
    try:
        network.load_state_dict({**encoder.weights, **encoder.projection})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"models/encoder.pth: not made with pretrain.dim and head as they are: {reason}") from None
    network.to(device).to(memory_format=torch.channels_last)
    return contrastive_losses(
        network, inputs.splits["unlabeled"].images, pretraining_views(section, inputs.manifest, device),
        queue=section.queue, temperature=section.temperature, count=count, seed=seed, batch_size=FEATURE_BATCH,
        device=device, precision=choose_precision(section.precision, device),
    )  # fmt: skip


def _layer(encoder: EncoderFile, strategy: str, classes: list[str]) -> tuple[nn.Linear | None, str]:
    """Return the linear classifier on this encoder for these classes, and the features that it sees.

    It is None where `train` has made none on this encoder for these classes. Raises UserError where the strategy needs
    one and it was made on another encoder or for other classes.
    """
    needed = strategy in NEEDS_CLASSIFIER
    if not needed and not (CLASSIFIER / WEIGHTS).is_file():
        return None, "last"
    found = read_classifier(CLASSIFIER)
    other = "for other classes than the data has" if found.classes != classes else ""
    if found.weights.keys() - {"fc.weight", "fc.bias"} != encoder.weights.keys() or any(
        not torch.equal(found.weights[name], value) for name, value in encoder.weights.items()
    ):
        other = other or "on another encoder"
    if other and needed:
        raise UserError(f"{CLASSIFIER}: made {other}; run `moco train` again", "E-STAGE-OTHER-CLASSIFIER")
    if other:
        say(f"request: {CLASSIFIER} is not asked, as it was made {other}; `moco train` makes it new")
        return None, "last"
    weight, bias = found.weights["fc.weight"], found.weights["fc.bias"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False), found.architecture.features


def _choose(config: Config, pool: Pool, images: DecodedSplit, known: Known) -> tuple[Choice, int]:
    """Return the choice, and how many near copies were left out.

    The choice is smaller than the budget where there are no more images. In place of near copies other images are
    chosen, with the chosen ones as labelled. More are chosen than are needed, since those may be near copies again.
    """
    section, budget = config.request, config.request.budget
    candidates = pool.candidates.clone()
    before, surplus = known.pictures, SURPLUS
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    copies, count = 0, 0
    labelled = pool.labelled
    while wanted := min(budget - count, int(candidates.sum())):
        now = Pool(pool.features, candidates, labelled, pool.margins, pool.losses)
        if parts:
            wanted, surplus = min(max(wanted, surplus), int(candidates.sum())), 2 * surplus
        choice = choose(section.strategy, now, wanted, section.bandwidth, section.seed)
        pictures = small_pictures(gather(images.images, choice.rows.numpy()))
        unlike = deduplicate(pictures, before)
        kept = unlike.nonzero().flatten()[: budget - count]
        last = int(kept[-1]) + 1 if count + len(kept) == budget else wanted  # of those that are decided
        candidates[choice.rows[:last].to(candidates.device)] = False
        copies += int((~unlike[:last]).sum())
        count += len(kept)
        first = max((int(part[2].max()) + 1 for part in parts if len(part[2])), default=0)  # clusters are new ones
        parts.append((choice.rows[kept], choice.scores[kept], choice.clusters[kept] + first))
        before = torch.cat([before, pictures[kept]])
        labelled = torch.cat([labelled, pool.features[choice.rows[kept].to(pool.features.device)]])
    if not parts:
        nothing = torch.empty(0)
        return Choice(nothing.long(), nothing, nothing.long()), 0
    rows, scores, clusters = (torch.cat(each) for each in zip(*parts, strict=True))
    return Choice(rows, scores, clusters), copies


def _summary(
    config: Config, pool: Pool, probabilities: Tensor | None, choice: Choice, copies: int, manifest: Manifest
) -> dict[str, Any]:
    """Return numbers for the report.

    probabilities: the classifier's, for the images asked for. coverage: the mean kernel of the pool's images with the
    nearest labelled one, before the request and once it is answered. expected: labels of each class that the classifier
    expects.
    """
    rows = choice.rows.to(pool.features.device)
    before, after = coverage(pool.features, pool.labelled, pool.features[rows], config.request.bandwidth)
    found: dict[str, Any] = {
        "images": len(rows),
        "candidates": int(pool.candidates.sum()),
        "near_copies_passed_over": copies,
        "coverage_before": before,
        "coverage_after": after,
    }
    if probabilities is not None:
        expected = probabilities.sum(0).tolist()
        found["expected"] = {name: round(value, 1) for name, value in zip(manifest.classes, expected, strict=True)}
    return found
