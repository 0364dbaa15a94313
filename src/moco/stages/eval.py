"""Stage `eval`: scores submission.py and model_sub.pth, and nothing else, as a stranger would."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from moco.csv_files import csv_text
from moco.data.cache import DecodedSplit
from moco.data.manifest import load_manifest
from moco.data.prepare import open_decoded
from moco.errors import UserError, say
from moco.files import scratch_folder, sha256, write_text
from moco.layout import CLASSIFIER, FINETUNED, MANIFEST, PRODUCED_BY, REPORTS
from moco.out_of_memory import full_memory
from moco.runs.identity import Making, Start
from moco.runs.joins import check_scored, check_unseen, classifier_settings, differences
from moco.runs.outputs import locked_outputs
from moco.runs.run_folder import open_run_folder, run_key
from moco.settings.kinds import flatten
from moco.settings.schema import Config
from moco.tracking import pictures
from moco.tracking.canvas import shown
from moco.tracking.digests import write_provenance
from moco.tracking.origin import origin
from moco.tracking.run import Run
from moco.training.numerics import choose_device, set_up
from moco.training.progress import ProgressDisplay
from moco.weights import load_weights

WORST = 24  # mistakes drawn


@dataclass
class Scores:
    """labels, predicted: N int64. confidence: N, the probability of the prediction. top5: N booleans."""

    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    top5: np.ndarray


def run(config: Config, classifier: Path = CLASSIFIER, start: Start | None = None) -> None:
    """Score the files in folder `classifier` and write the reports.

    The reports go to reports/eval. Those of another folder than the default go to reports/eval-NAME, with a mark of the
    path where no stage wrote the folder.

    Raises UserError where the files are missing or do not fit each other or the data.
    """
    whole = classifier.resolve()
    maker = next((stage for known, stage in PRODUCED_BY.items() if known.resolve() == whole), None)
    name = whole.name if maker else f"{whole.name}-{hashlib.sha256(bytes(whole)).hexdigest()[:6]}"
    report = REPORTS / ("eval" if maker == PRODUCED_BY[CLASSIFIER] else f"eval-{name}")
    stage = re.sub(r"[^A-Za-z0-9_. -]", "_", report.name)  # what MLflow takes
    with locked_outputs(report.name, say, "eval"):
        _run(config, classifier, maker, report, stage, (start or Start.of("eval")).making(config, classifier))


def _run(config: Config, classifier: Path, maker: str | None, report: Path, stage: str, making: Making) -> None:
    hint = f"run `moco {maker}` first" if maker else f"known are {', '.join(map(str, PRODUCED_BY))}"
    device = choose_device(config.runtime.device)
    set_up(device, config.runtime.threads, config.runtime.deterministic)
    manifest = load_manifest(MANIFEST)
    submission = load_submission(classifier / "submission.py", hint)
    network = load_network(submission, classifier / "model_sub.pth", hint).to(device)
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), say)
    val = splits["val"]
    best = _made(classifier, hint, maker is not None)
    settings, weights = best.get("settings", {}), sha256(classifier / "model_sub.pth")
    ours = classifier_settings(config, settings)
    if maker == PRODUCED_BY[FINETUNED]:
        ours |= flatten(config.finetune, "finetune")
    if maker and settings and (different := differences(settings, ours)):
        say(f"warning: {classifier} was made with other settings: {'; '.join(different)}; `moco {maker}` makes it new")
    remedy = f"run `moco {maker}` again" if maker else "train it again"
    check_scored(classifier, best, submission, manifest, remedy, say)
    ours_to_train = remedy if maker else None
    seen = check_unseen(classifier, best.get("learned"), splits, config.data, manifest, ours_to_train, say)
    classes = len(manifest.classes)
    chain = {**settings, **flatten(config.eval, "eval")}
    key = run_key({**chain, "weights": weights}, manifest.digest)
    again = open_run_folder("eval", key, making, lambda _: False)  # measured anew each time: it takes little
    with again as folder, Run(folder.path, stage, config.tracking, say) as record:
        record.start(chain, origin(config, manifest, device))
        scores = score(network, submission.eval_transform, val, classes, config.eval.batch_size, device)
        results = summarise(scores, classes, config.eval.calibration_bins)
        record.log({**results, **_upstream(best)}, 0)
        correct, own = {"val_accuracy": scores.predicted == scores.labels}, folder.own(report)
        made = _digests(best) | ({} if seen is None else {"learned_in_val": seen})
        record.artifact(write_provenance(own, manifest, **made, weights=weights, correct=correct))
        for path in _write(own, scores, results, manifest.classes, config.eval.calibration_bins):
            record.artifact(path)
        if (scores.predicted != scores.labels).any():
            record.picture("mistakes", lambda path: _draw_mistakes(val, scores, manifest.classes, path))
        folder.finish(making)
    say(f"eval: top-1 {results['val_accuracy']:.2%} of {len(scores.labels)} images -> {report}")
    for note in manifest.notes():
        say(f"eval: {note}")


def _draw_mistakes(val: DecodedSplit, scores: Scores, classes: list[str], path: Path) -> None:
    """Draw the images of which the classifier was surest and wrong."""
    wrong = np.flatnonzero(scores.predicted != scores.labels)
    worst = wrong[np.argsort(-scores.confidence[wrong])][:WORST]
    names = [shown(name) for name in classes]
    said = [f"{names[scores.labels[i]]}\nas {names[scores.predicted[i]]}" for i in worst]
    pictures.mistakes(np.stack([val.images[i] for i in worst]), said).save(path, "png")


def _made(folder: Path, hint: str, ours: bool) -> dict[str, Any]:
    """Return what the classifier was made with and from, which scoring does not need: its stage writes it into
    model_best_*.pth. {} where that file is missing or of other weights than model_sub.pth.

    ours: a stage of this project wrote the folder, so a damaged file is an error."""
    for path in folder.glob("model_best_*.pth"):
        try:
            found = load_weights(path, hint)
        except UserError as error:
            if ours:
                raise
            say(f"warning: what the classifier was made with is not known: {error}")
            return {}
        if isinstance(found, dict) and _same(found.get("weights"), load_weights(folder / "model_sub.pth", hint)):
            return found
        say(f"warning: {path} is of other weights than model_sub.pth: what that was made with is not known")
    return {}


def _same(weights: Any, others: Any) -> bool:
    if not isinstance(weights, dict) or not isinstance(others, dict) or weights.keys() != others.keys():
        return False
    return all(torch.equal(value, others[name]) for name, value in weights.items())


def load_submission(path: Path, hint: str) -> ModuleType:
    """Import submission.py.

    Raises UserError where it is missing or lacks what the contract asks; `hint` says what to do.
    """
    spec = importlib.util.spec_from_file_location("submission", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{path}: not found; {hint}")
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is a DVC output
    sys.modules[spec.name] = module  # where its dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from None
    finally:
        sys.dont_write_bytecode = before
        del sys.modules[spec.name]
    for name in ("get_model", "eval_transform", "team_id", "team_name", "email_address"):
        if not hasattr(module, name):
            raise UserError(f"{path}: has no {name}; {hint}")
    return module


def load_network(submission: ModuleType, path: Path, hint: str) -> nn.Module:
    """Return get_model() with the weights of model_sub.pth, in evaluation mode."""
    try:
        network: nn.Module = submission.get_model()
    except Exception as error:
        if full_memory(error):
            raise
        raise UserError(f"{submission.__file__}: get_model() failed: {type(error).__name__}: {error}") from None
    state = load_weights(path, hint)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path}: does not fit submission.py: {reason}; {hint}") from None
    return network.eval()


def _outputs(
    network: nn.Module, transform: Callable[[Image.Image], Tensor], images: np.ndarray, device: torch.device
) -> Tensor:
    """Return the network's outputs for a batch, B x C, on the CPU. Raises UserError as `score` does."""
    try:
        outputs = network(torch.stack([transform(Image.fromarray(image)) for image in images]).to(device))
    except Exception as error:
        if full_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"eval_transform or the network of submission.py cannot do with val: {reason}") from None
    if outputs.dim() != 2 or len(outputs) != len(images):
        raise UserError(f"the network's outputs have shape {tuple(outputs.shape)}; images x classes are expected")
    return outputs.float().cpu()  # type: ignore[no-any-return]


@torch.no_grad()
def score(
    network: nn.Module, transform: Callable[[Image.Image], Tensor], split: DecodedSplit, classes: int, batch: int,
    device: torch.device,
) -> Scores:  # fmt: skip
    """Return the predictions for every image, in order, batch by batch.

    Raises UserError for another number of classes, for outputs that are no numbers, and where the network fails.
    """
    parts = []
    with ProgressDisplay("eval").counting(len(split.images)) as advance:
        for first in range(0, len(split.images), batch):
            parts.append(_outputs(network, transform, split.images[first : first + batch], device))
            advance(len(parts[-1]))
    logits, labels = torch.cat(parts), torch.from_numpy(split.known_labels)
    if broken := int((~logits.softmax(1).isfinite()).any(1).sum()):
        raise UserError(f"the classifier's outputs for {broken} of {len(logits)} images are no numbers")
    if logits.shape[1] != classes:
        raise UserError(f"the classifier knows {logits.shape[1]} classes, the data has {classes}")
    confidence, predicted = logits.softmax(1).max(1)
    top5 = logits.topk(min(5, logits.shape[1]), 1).indices
    return Scores(split.known_labels, predicted.numpy(), confidence.numpy(), (top5 == labels[:, None]).any(1).numpy())


def calibration(scores: Scores, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (images, mean confidence, accuracy) per bin of confidence; the bins divide [0, 1] evenly."""
    which = np.minimum((scores.confidence * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    correct = scores.predicted == scores.labels
    divisor = np.maximum(count, 1)
    confidence = np.bincount(which, scores.confidence, bins) / divisor
    return count, confidence, np.bincount(which, correct, bins) / divisor


def summarise(scores: Scores, classes: int, bins: int) -> dict[str, float]:
    """Return accuracy (top 1, top 5, mean over classes) and expected calibration error (Guo et al. 2017)."""
    correct = scores.predicted == scores.labels
    count, confidence, accuracy = calibration(scores, bins)
    present = np.bincount(scores.labels, minlength=classes)
    recall = np.bincount(scores.labels, correct, classes)[present > 0] / present[present > 0]
    return {
        "val_accuracy": float(correct.mean()),
        "val_top5_accuracy": float(scores.top5.mean()),
        "val_mean_class_accuracy": float(recall.mean()),
        "val_calibration_error": float((count * np.abs(confidence - accuracy)).sum() / count.sum()),
        "val_mean_confidence": float(scores.confidence.mean()),
    }


def _digests(best: dict[str, Any]) -> dict[str, Any]:
    """Return the digests of what the classifier was made from, as far as they are known."""
    made_from = best.get("made_from", {})
    known = {"encoder": "encoder", "start": "start", "data": "trained_on"}
    return {ours: made_from[theirs] for theirs, ours in known.items() if theirs in made_from}


def _upstream(best: dict[str, Any]) -> dict[str, float]:
    """Return headline figures of the stages that this classifier was made by, so that one row of MLflow's table shows
    the whole chain. best: what its stage wrote beside the weights; the folder reports/ may be of another by now."""
    pretraining = best.get("made_from", {}).get("pretraining", {})
    names = {"loss": "pretrain_loss", "knn_accuracy": "knn_accuracy", "minutes": "pretrain_minutes",
             "images_seen": "images_seen"}  # fmt: skip
    found = {ours: pretraining[theirs] for theirs, ours in names.items() if theirs in pretraining}
    if "held_out_accuracy" in best:
        found["held_out_accuracy"] = best["held_out_accuracy"]
    if "val_knn_accuracy" in best.get("results", {}):
        found["val_knn_accuracy"] = best["results"]["val_knn_accuracy"]
    return found


def _write(folder: Path, scores: Scores, results: dict[str, float], classes: list[str], bins: int) -> list[Path]:
    """Write metrics.json, predictions.csv, classes.csv, and the figures confusion.png and reliability.png."""
    write_text(folder / "metrics.json", json.dumps(results, indent=2, sort_keys=True) + "\n")
    rows = [
        {"image": f"{i}", "actual": classes[a], "predicted": classes[p], "confidence": f"{c:.4f}"}
        for i, (a, p, c) in enumerate(zip(scores.labels, scores.predicted, scores.confidence, strict=True))
    ]
    write_text(folder / "predictions.csv", _table(rows))
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (scores.labels, scores.predicted), 1)
    truth, claimed, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    per_class = [
        {
            "class": name,
            "images": int(truth[i]),
            "recall": f"{right[i] / truth[i]:.4f}" if truth[i] else "",
            "precision": f"{right[i] / claimed[i]:.4f}" if claimed[i] else "",
        }
        for i, name in enumerate(classes)
    ]
    write_text(folder / "classes.csv", _table(per_class))
    names = ["metrics.json", "predictions.csv", "classes.csv"]
    if importlib.util.find_spec("matplotlib"):
        from moco.tracking.figures import confusion_figure, reliability_figure

        confusion_figure(confusion, classes, folder / "confusion.png")
        reliability_figure(*calibration(scores, bins), folder / "reliability.png")
        names += ["confusion.png", "reliability.png"]
    else:  # a rented GPU, say
        say("eval: no confusion.png and reliability.png, as matplotlib is not installed here")
    return [folder / name for name in names]


def _table(rows: list[dict[str, Any]]) -> str:
    return csv_text([list(rows[0]), *(list(row.values()) for row in rows)])
