"""MLflow's models: checkpoints beside the metrics of their step, and classifiers as versions of a registered model.

The newest version is `candidate`. `champion` moves to it only where its held-out accuracy is better; the decision and
its reason are tags of the version.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from moco.files import sha256

CANDIDATE, CHAMPION = "candidate", "champion"
GATE, TRAINED = "champion_gate", "trained"  # tags of a version; seconds since 1970
CODE = Path(__file__).parent / "classifier_model.py"
WEIGHTS = "model_sub.pth"
ACCURACY = "best_held_out_accuracy"
CUT_OFF = "it was better, or there was none; this was cut off before it was written down"
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what stores say of an alias that is not set


def log_checkpoint(client: Any, experiment: str, run_id: str, event: dict[str, Any]) -> None:
    """A logged model that says where the file is (it stays on the cluster) and what was measured at its step."""
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


def register(client: Any, experiment: str, run_id: str, name: str, files: list[Path], event: dict[str, Any]) -> None:
    """Uploads a classifier as a model that MLflow can load and serve, and makes it a version of the registered model.

    files: model_sub.pth and submission.py. Repeated, it changes nothing.
    """
    digest = sha256(next(path for path in files if path.name == WEIGHTS))
    for path in files:
        client.log_artifact(run_id, str(path), "classifier")
    _create_registered_model(client, name)
    version = next(
        (found for found in client.search_model_versions(f"name = '{name}'")
         if found.run_id == run_id and found.tags.get("sha256") == digest),
        None,
    )  # fmt: skip
    if version is None:
        model_id = _upload(client, experiment, run_id, name, files, event)
        tags = {
            **event["tags"],
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
    """Writes the model's folder, without a pickle in it. needs: versions by package; image: height and width."""
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


def _gate(client: Any, name: str, version: Any) -> None:
    """Moves `champion` to a version that is better on held-out images, and writes down why, or why not."""
    champion = _alias(client, name, CHAMPION)
    if champion is not None and champion.version == version.version:  # cut off before the tag was written
        client.set_model_version_tag(name, version.version, GATE, f"moved: {CUT_OFF}")
        return
    better, reason = judge(version.tags, None if champion is None else champion.tags)
    if champion is not None:
        reason = f"{reason}; champion was version {champion.version}"
    if better:
        client.set_registered_model_alias(name, CHAMPION, version.version)
    client.set_model_version_tag(name, version.version, GATE, f"{'moved' if better else 'kept'}: {reason}")


def judge(ours: dict[str, str], theirs: dict[str, str] | None) -> tuple[bool, str]:
    """Whether a version takes over, and why; both by their tags, theirs None where there is no champion yet."""
    if ACCURACY not in ours:
        return False, "it has no held-out accuracy"
    if theirs is None:
        return True, "there was none"
    if ours.get("data_digest") != theirs.get("data_digest"):
        return False, "the data are others, so the held-out accuracies cannot be compared"
    mine, other = float(ours[ACCURACY]), float(theirs.get(ACCURACY, "nan"))
    sign = ">" if mine > other else "<" if mine < other else "="
    return mine > other, f"held-out accuracy {mine:.4f} {sign} {other:.4f}"


def _alias(client: Any, name: str, alias: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
        return None
