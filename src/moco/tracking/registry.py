"""MLflow's models: checkpoints beside the metrics of their step, and classifiers as versions of a registered model.

The newest version is `candidate`. `champion` moves to it only where it is better on the same held-out images by more
than chance; the decision, its reason and what it rests on are tags of the version (docs/model-registry.md).
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco.files import sha256
from moco.training.significance import at_least, described, discordant, unpack

CANDIDATE, CHAMPION = "candidate", "champion"
REGISTERED_TAG = "moco.registered"  # of a run: the digest of the weights that became a version
GATE, TRAINED = "champion_gate", "trained"  # tags of a version; seconds since 1970
CODE = Path(__file__).parent / "classifier_model.py"
WEIGHTS = "model_sub.pth"
# Tags of a version: its held-out images by content, which of them it has right (in pieces), and the version of the
# champion that it was tested against.
HELD_OUT, CORRECT, TESTED = "held_out_digest", "held_out_correct", "champion_tested"
PIECE = 4000  # characters of a tag; some stores take no more than 5,000
FEWEST = 30  # held-out images: an accuracy on fewer is known to within 18 points at best
ALPHA = 0.05  # chance that any of all candidates that are no better than a champion displaces it
CUT_OFF = "it was better, or there was none; this was cut off before it was written down"
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what stores say of an alias that is not set


def log_checkpoint(client: Any, experiment: str, run_id: str, event: dict[str, Any]) -> None:
    """Log a model that says where the file is (it stays on the cluster) and what was measured at its step."""
    from mlflow.entities import Metric

    step, name = int(event["step"]), f"checkpoint-step-{int(event['step'])}"
    known = client.search_logged_models([experiment], f"name = '{name}' AND source_run_id = '{run_id}'")
    if known and str(known[0].status) == "READY":
        return
    model = known[0] if known else client.create_logged_model(
        experiment, name=name, source_run_id=run_id, model_type="checkpoint",
        tags={"path": str(event["path"]), "step": str(step)},
    )  # fmt: skip
    when = int(event["time"] * 1000)
    metrics = [Metric(f"checkpoint/{key}", value, when, step, model_id=model.model_id, run_id=run_id)
               for key, value in event["metrics"].items()]  # fmt: skip
    if metrics:
        client.log_batch(run_id, metrics=metrics)
    client.finalize_logged_model(model.model_id, "READY")


def register(
    client: Any, experiment: str, run_id: str, name: str, files: list[Path], event: dict[str, Any], again: bool = False
) -> None:
    """Upload a classifier as a model that MLflow can load and serve, and make it a version of the registered model.

    files: model_sub.pth and submission.py. A repeated call changes nothing, except for files that the store has lost. A
    version that somebody removed stays away, unless `again`.
    """
    digest = sha256(next(path for path in files if path.name == WEIGHTS))
    for path in files:
        client.log_artifact(run_id, str(path), "classifier")
    version = next(
        (found for found in client.search_model_versions(f"name = '{name}'")
         if found.run_id == run_id and found.tags.get("sha256") == digest),
        None,
    )  # fmt: skip
    if version is not None:
        _restore_files(client, version, files, event)
    elif digest in client.get_run(run_id).data.tags.get(REGISTERED_TAG, "").split() and not again:
        return
    else:
        _create_registered_model(client, name)
        model_id = _upload(client, experiment, run_id, name, files, event)
        tags = {
            **event["tags"],
            **held_out_tags(event.get("held_out") or {}),
            "sha256": digest,
            "data_digest": event.get("data_digest", ""),
            TRAINED: str(event["time"]),
        }
        # A server knows its models by id; without one MLflow looks an id up in the store that it takes for the current
        # one, which is another.
        served = client.tracking_uri.startswith("http")
        source = f"models:/{model_id}" if served else client.get_logged_model(model_id).artifact_location
        made = client.create_model_version(name, source, run_id, tags=tags, model_id=model_id)
        version = client.get_model_version(name, made.version)
        client.set_tag(run_id, REGISTERED_TAG, digest)
    if GATE not in version.tags:  # written last: what was interrupted before is made good
        candidate = _alias(client, name, CANDIDATE)
        if candidate is None or float(candidate.tags.get(TRAINED, 0)) <= float(version.tags[TRAINED]):
            client.set_registered_model_alias(name, CANDIDATE, version.version)
        _gate(client, name, version)


def _create_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _restore_files(client: Any, version: Any, files: list[Path], event: dict[str, Any]) -> None:
    """Upload a version's model again where its files are gone, as when a store was copied without its artifacts."""
    model_id = str(getattr(version, "model_id", None) or "")
    if model_id and not client.list_logged_model_artifacts(model_id):
        with tempfile.TemporaryDirectory(prefix="moco-model-") as folder:
            package(Path(folder) / "model", files, event["needs"], event["image"], model_id)
            client.log_model_artifacts(model_id, f"{folder}/model")


def _upload(client: Any, experiment: str, run_id: str, name: str, files: list[Path], event: dict[str, Any]) -> str:
    known = client.search_logged_models([experiment], f"name = '{name}' AND source_run_id = '{run_id}'")
    begun = [model for model in known if str(model.status) == "PENDING"]  # an upload that was cut off
    model = begun[0] if begun else client.create_logged_model(
        experiment, name=name, source_run_id=run_id, model_type="classifier", params={}, tags=event["tags"]
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="moco-model-") as folder:
        package(Path(folder) / "model", files, event["needs"], event["image"], str(model.model_id))
        client.log_model_artifacts(model.model_id, f"{folder}/model")
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def package(target: Path, files: list[Path], needs: dict[str, str], image: list[int], model_id: str | None) -> None:
    """Write the model's folder, without a pickle in it. needs: versions by package; image: height and width."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    paths = {"weights" if path.name == WEIGHTS else "submission": str(path) for path in files}
    inputs = Schema([TensorSpec(np.dtype(np.uint8), (-1, *image, 3))])
    outputs = Schema([ColSpec(DataType.string, "label"), ColSpec(Array(DataType.double), "probabilities")])
    requirements = [f"{package}=={version}" for package, version in {**needs, "mlflow": mlflow.__version__}.items()]
    loggers = [logging.getLogger(name) for name in ("mlflow", "mlflow.models.model", "mlflow.pyfunc")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about type hints, and what libraries deprecate among themselves
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            mlflow.pyfunc.save_model(
                target, python_model=str(CODE), artifacts=paths, signature=ModelSignature(inputs, outputs),
                input_example=np.zeros((1, *image, 3), np.uint8), pip_requirements=requirements,
                mlflow_model=Model(model_id=model_id),
            )  # fmt: skip
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def held_out_tags(found: dict[str, str]) -> dict[str, str]:
    """Return the tags of a version for what a log's event `model` has under `held_out`."""
    if not found:
        return {}
    text = found["correct"]
    pieces = {f"{CORRECT}_{i // PIECE}": text[i : i + PIECE] for i in range(0, len(text), PIECE)}
    images = text.partition(":")[0]
    return {HELD_OUT: found["digest"], "held_out_images": images, "held_out_judged": found["judged"], **pieces}


def _correct(tags: dict[str, str]) -> np.ndarray | None:
    """Return which held-out images a version has right, N booleans; None where its tags do not say."""
    pieces, number = [], 0
    while f"{CORRECT}_{number}" in tags:
        pieces.append(tags[f"{CORRECT}_{number}"])
        number += 1
    try:
        return unpack("".join(pieces)) if HELD_OUT in tags else None
    except ValueError:
        return None


class Verdict(NamedTuple):
    """tested: it was compared with the champion image by image, and could have won or lost."""

    better: bool
    reason: str
    tested: bool = False


def _gate(client: Any, name: str, version: Any) -> None:
    """Move `champion` to a version that is better on held-out images, and record why, or why not."""
    champion = _alias(client, name, CHAMPION)
    if champion is not None and champion.version == version.version:  # cut off before the tag was written
        client.set_model_version_tag(name, version.version, GATE, f"moved: {CUT_OFF}")
        return
    before = 0
    if champion is not None:
        others = client.search_model_versions(f"name = '{name}'")
        before = sum(
            other.tags.get(TESTED) == str(champion.version) and other.version != version.version for other in others
        )
    better, reason, tested = judge(version.tags, None if champion is None else champion.tags, before)
    if champion is not None:
        reason = f"{reason}; champion was version {champion.version}"
        if tested:
            client.set_model_version_tag(name, version.version, TESTED, str(champion.version))
    if better:
        client.set_registered_model_alias(name, CHAMPION, version.version)
    client.set_model_version_tag(name, version.version, GATE, f"{'moved' if better else 'kept'}: {reason}")


def judge(ours: dict[str, str], theirs: dict[str, str] | None, before: int = 0) -> Verdict:
    """Return whether a version takes over, and why; both by their tags, theirs None where there is no champion yet.

    Both must have been measured on the same held-out images, FEWEST at least, and McNemar's exact test on the images
    that one of the two alone has right (one-sided) must show more than chance. before: candidates that were tested
    against this champion already. The n-th has to reach p < ALPHA / (n (n + 1)); these add up to ALPHA, so that
    candidates of the same worth, however many, displace the champion by luck with a probability of ALPHA in all.
    """
    mine = _correct(ours)
    if mine is None:
        return Verdict(False, "its held-out images are not known")
    if theirs is None:
        return Verdict(True, f"there was none; held-out accuracy {described(mine)}")
    other = _correct(theirs)
    if other is None:
        return Verdict(
            False, f"the champion's held-out images are not known, as an earlier version of this program registered it;"
            f" held-out accuracy {described(mine)}; train it again, or move the alias by hand"
        )  # fmt: skip
    numbers = f"held-out accuracy {described(mine)}, the champion's {described(other)}"
    if ours[HELD_OUT] != theirs[HELD_OUT] or len(mine) != len(other):
        return Verdict(False, f"measured on other held-out images than the champion: not comparable; {numbers}")
    if len(mine) < FEWEST:
        return Verdict(False, f"{len(mine)} held-out images are too few, {FEWEST} are needed; {numbers}")
    gained, lost = discordant(mine, other)
    chance, needed = at_least(gained, gained + lost), ALPHA / ((before + 1) * (before + 2))
    return Verdict(
        chance < needed,
        f"{numbers}; {gained} images it alone has right, {lost} the champion alone: p = {chance:.2g}, "
        f"{'below' if chance < needed else 'not below'} the {needed:.2g} for candidate {before + 1} of this champion",
        gained + lost > 0,
    )


def _alias(client: Any, name: str, alias: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
        return None
