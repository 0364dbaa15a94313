"""Where MLflow keeps runs: the address, and a SQLite store that comes into being whole or not at all."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moco.config import TrackingConfig
from moco.errors import UserError
from moco.files import home, write_atomically
from moco.tracking.metric_log import as_text

SQLITE = "sqlite:///"
AWKWARD = "%?#"  # signs of an address, which some versions of SQLAlchemy decode
BATCH = 500  # metrics a request
NO_ANSWER = "does not answer"
KINDS = ("https?", "sqlite", "postgresql", "mysql", "mssql", "databricks(-uc)?")
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a job reports to its user's store and to nobody else
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's own would keep at it for minutes; what is not taken now is taken at the next delivery.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
# What a user may have set to reach a server, for jobs in containers, which see no other variables.
ACCESS = tuple(
    f"MLFLOW_TRACKING_{name}"
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS", "SERVER_CERT_PATH", "CLIENT_CERT_PATH")
)
MIGRATE = (
    "`mlflow migrate-filestore --source {} --target sqlite:///mlruns.db`, "
    "then `MLFLOW_TRACKING_URI=sqlite:///mlruns.db moco ui` shows its runs"
)


def available() -> bool:
    """Whether MLflow is installed. GPU machines may lack it; the metric log is enough there."""
    return importlib.util.find_spec("mlflow") is not None


def store_uri(config: TrackingConfig) -> str:
    """MLFLOW_TRACKING_URI where it is set, else params.yaml's. SQLite paths are made absolute."""
    return absolute(os.environ.get("MLFLOW_TRACKING_URI") or config.uri)


def shared_uri(config: TrackingConfig) -> str:
    """The store's address for workspaces elsewhere, which would take a relative path for their own; '' where
    params.yaml says enough (and so that no script holds a server's password)."""
    uri = store_uri(config)
    if (path := sqlite_file(uri)) and not Path(uri.removeprefix(SQLITE)).is_absolute():
        raise UserError(
            f"{path}: a sweep's tasks cannot be told of a store in a folder with {' '.join(AWKWARD)} in its name; "
            "rename the folder", "E-STORE-ADDRESS",
        )  # fmt: skip
    return uri if path else ""


def absolute(uri: str) -> str:
    """The same store from any folder: a SQLite file's path made absolute, anything else as it is."""
    path, (before, question, options) = sqlite_file(uri), uri.partition("?")
    if path is None:
        return uri
    if set(str(path)) & set(AWKWARD) and home() == Path():  # said from here, as all processes of a project see it
        path = Path(os.path.relpath(path))
    if found := set(str(path)) & set(AWKWARD):
        raise UserError(
            f"{before.removeprefix(SQLITE)}: the path of a SQLite store cannot have {' '.join(sorted(found))}, which "
            f"mean something else in an address; rename the folder ({path})", "E-STORE-ADDRESS",
        )  # fmt: skip
    return f"{SQLITE}{path}{question}{options}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other."""
    return (home() / uri.removeprefix(SQLITE).partition("?")[0]).absolute() if uri.startswith(SQLITE) else None


def file_store(uri: str) -> str:
    """The folder of a store of the kind that MLflow ended with version 3; '' where `uri` is another."""
    return uri.removeprefix("file://") if uri.startswith("file:") or not re.search("[:@]", uri) else ""


def check_address(uri: str) -> None:
    """Raises UserError for what no store can have."""
    if folder := file_store(uri):
        raise UserError(
            f"{folder}: MLflow has no stores of files any more; set tracking.uri to sqlite:///mlflow.db. "
            f"What the old one holds: {MIGRATE.format(folder)}"
        )
    if not re.match(f"({'|'.join(KINDS)})([+][a-z0-9_]+)?:", uri):
        shown = without_password(uri)
        raise UserError(f"tracking.uri: '{shown}' is no address of a store; http://HOST:PORT or sqlite:///mlflow.db is")


def stray() -> str:
    """One line about runs in ./mlruns, where an older MLflow wrote when it was told nothing, and which no UI shows
    beside those of a database; '' where there are none."""
    if next(Path("mlruns").glob("*/meta.yaml"), None) is None:
        return ""
    return f"mlruns has runs of an older MLflow, which are not shown with the others; {MIGRATE.format('mlruns')}"


def without_password(uri: str) -> str:
    """For messages and files: text in which no address has a user's name or password."""
    return re.sub(r"(password=)[^&\s]+", r"\1...", re.sub(r"//\S*@", "//", uri))


def explain(error: BaseException, uri: str) -> str:
    """One line for what a store says: what is wrong, and what to do."""
    if isinstance(error, UserError):
        return str(error)
    said = without_password(" ".join(str(error).split())) or type(error).__name__
    shown = without_password(uri)
    newer = f"{shown} has the schema of a newer MLflow than the one here; `pip install --upgrade mlflow`"
    older = f"{shown} has the schema of an older MLflow; after a backup: `mlflow db upgrade {shown}`"
    known = {
        "out-of-date database schema": older if _is_known_schema(said) else newer,
        "Can't locate revision": newer,
        "file is not a database": f"{shown}: not a SQLite store; set tracking.uri to another file",
        "unable to open database file": f"{shown}: cannot be opened; look at its folder's rights, or set tracking.uri",
        "error code 401": f"{shown} refuses the credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        "error code 403": f"{shown} does not permit this to the user; ask whoever runs the server",
        "error code 404": f"{shown} is no MLflow server, or an older one; look at tracking.uri",
        "UnsupportedModelRegistryStoreURIException": f"{shown} has no model registry; use a database or a server",
        "Max retries exceeded": f"{shown} {NO_ANSWER}; is the server running, and tracking.uri right?",
    }
    for words, meaning in known.items():
        if words in said or words == type(error).__name__:
            return meaning
    return said[:200]


def _is_known_schema(said: str) -> bool:
    """Whether MLflow here has the migration to the schema that its message names."""
    found, package = re.search(r"found version (\w+)", said), importlib.util.find_spec("mlflow")
    if found is None or package is None or package.origin is None:
        return True
    return any((Path(package.origin).parent / "store/db_migrations/versions").glob(f"{found[1]}_*.py"))


def artifact_location(uri: str) -> str | None:
    """For the artifacts of a SQLite store: a folder beside it. None where the server has its own."""
    path = sqlite_file(uri)
    return None if path is None else (path.parent / "mlartifacts").as_uri()


def client(uri: str) -> Any:
    """An MlflowClient. Takes seconds, as MLflow does to import and to make its tables."""
    create(uri)
    return _client(uri)


def _quiet_mlflow() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    for name in ("alembic", "mlflow"):  # after the import, which sets them; they tell of every migration
        logging.getLogger(name).setLevel(logging.WARNING)


def _client(uri: str) -> Any:
    _quiet_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def log_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    """In as many requests as MLflow's limit of 100 needs. The same values again change nothing."""
    from mlflow.entities import Param

    known = [Param(name, as_text(value)) for name, value in params.items()]
    for first in range(0, len(known), 100):
        client.log_batch(run_id, params=known[first : first + 100])


def log_metrics(client: Any, run_id: str, metrics: Sequence[Any]) -> None:
    """In requests of 500; MLflow allows 1,000."""
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + BATCH])


def create(uri: str) -> None:
    """Makes an empty store if `uri` is a SQLite file that is not there.

    MLflow builds its tables in dozens of migrations, and cannot open a store in which that was interrupted. So they
    are built on node-local disk, and the finished file appears at its place in one step, unless another process was
    faster. Raises UserError for what is no address of a store.
    """
    check_address(uri)
    path = sqlite_file(uri)
    if path is None or path.exists():
        return
    with tempfile.TemporaryDirectory(prefix="moco-store-") as scratch:
        built = Path(scratch) / "mlflow.db"
        _quiet_mlflow()
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        # It makes the tables. Without a place for artifacts it would write the current folder's name into its SQL as it
        # is, which fails where that has a quote.
        SqlAlchemyStore(f"{SQLITE}{built}", artifact_location(uri))  # type: ignore[no-untyped-call]
        write_atomically(path, lambda copy: shutil.copyfile(built, copy), replace=False)
