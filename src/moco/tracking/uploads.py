"""What of a run's folder goes to MLflow as files: only what lies in that folder, whatever its log names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moco.errors import UserError
from moco.tracking import registry


def own_file(folder: Path, name: str) -> Path | None:
    """Return a file that the log names, its links resolved; None where somebody has removed it.

    Raises UserError where it is not a file within the run's own folder.
    """
    path, own = (folder / name).resolve(), folder.resolve()
    if not path.is_relative_to(own):
        raise UserError(
            f"{folder}: its log names '{name[:100]}', which is outside the run's folder and is not sent; a log that "
            "you did not make may ask for any file",
            "E-LOG-OUTSIDE",
        )
    if path.exists() and not path.is_file():
        raise UserError(f"{folder}: its log names '{name[:100]}', which is not a file; it is not sent", "E-LOG-OUTSIDE")
    return path if path.exists() else None


def send_artifact(client: Any, run_id: str, folder: Path, event: dict[str, Any]) -> None:
    """Send a file of the run. Raises UserError as `own_file`."""
    if path := own_file(folder, event["path"]):
        client.log_artifact(run_id, str(path))


def send_model(
    client: Any, experiment: str, run_id: str, folder: Path, name: str, event: dict[str, Any], again: bool
) -> None:
    """Register a classifier of the run, unless somebody tidied its files up. Raises UserError as `own_file`."""
    files = [own_file(folder, path) for path in event["files"]]
    there = [path for path in files if path is not None]
    if len(there) == len(files):
        registry.register(client, experiment, run_id, name, there, event, again)


def dataset(described: dict[str, Any]) -> Any:
    """Return the manifest's digest as MLflow keeps data sets: 32 of its 64 digits, as MLflow takes no more than 36."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = json.dumps({"images": described["images"], "digest": described["digest"]})
    dataset = Dataset(
        name=described["name"], digest=described["digest"][:32], source_type="local",
        source=json.dumps(described["source"]), profile=profile,
    )  # fmt: skip
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])
