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

from moco.errors import UserError
from moco.files import home, write_atomically
from moco.redaction import redact
from moco.settings.tracking import TrackingConfig
from moco.tracking.metric_log import as_text
from moco.tracking.store_file import ARTIFACTS, refuse_other_schema, refuse_version

SQLITE = "sqlite:///"
AWKWARD = "%?#"  # signs of an address, which some versions of SQLAlchemy decode
BATCH = 1000  # metrics a request, the most that MLflow takes
NO_ANSWER = "does not answer"
KINDS = ("https?", "sqlite", "postgresql", "mysql", "mssql")
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
    """Return whether MLflow is installed. GPU machines may lack it; the metric log is enough there."""
    return importlib.util.find_spec("mlflow") is not None


def store_uri(config: TrackingConfig) -> str:
    """Return MLFLOW_TRACKING_URI where it is set, else params.yaml's. SQLite paths are made absolute."""
    return absolute(os.environ.get("MLFLOW_TRACKING_URI", "").strip() or config.uri.strip())


def shared_uri(config: TrackingConfig) -> str:
    """Return the store's address for workspaces elsewhere, which would resolve a relative path in their own folder.

    It is '' where params.yaml says enough (and so that no script holds a server's password).
    """
    uri = store_uri(config)
    if (path := sqlite_file(uri)) and not Path(uri.removeprefix(SQLITE)).is_absolute():
        raise UserError(
            f"{path}: a sweep's tasks cannot be told of a store in a folder with {' '.join(AWKWARD)} in its name; "
            "rename the folder", "E-STORE-ADDRESS",
        )  # fmt: skip
    return uri if path else ""


def absolute(uri: str) -> str:
    """Return the same store for any folder: a SQLite file's path made absolute, anything else as it is."""
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
    """Return the file of a SQLite store; None for any other."""
    return (home() / uri.removeprefix(SQLITE).partition("?")[0]).absolute() if uri.startswith(SQLITE) else None


def file_store(uri: str) -> str:
    """Return the folder of a store of the kind that MLflow ended with version 3; '' where `uri` is another."""
    folder = uri.startswith("file:") or not (re.search("[:@]", uri) or _is_databricks(uri))
    return uri.removeprefix("file://") if folder else ""


def _is_databricks(uri: str) -> bool:
    return re.match("databricks(-uc)?(:|$)", uri) is not None


def check_address(uri: str, experiment: str = "/") -> None:
    """Raise UserError for what no store can have, and for an experiment's name that this kind of store refuses."""
    if _is_databricks(uri) and not experiment.startswith("/"):
        raise UserError(
            f"tracking.experiment: Databricks takes absolute paths, as /Users/NAME/{experiment}; set one of those, or "
            "tracking.uri to another store",
            "E-STORE-DATABRICKS",
        )
    if folder := file_store(uri):
        raise UserError(
            f"{folder}: MLflow has no stores of files any more; set tracking.uri to sqlite:///mlflow.db. "
            f"What the old one holds: {MIGRATE.format(folder)}",
            "E-STORE-FILES",
        )
    in_memory = re.fullmatch(r"sqlite([+]\w+)?:/{0,3}(:memory:)?(\?.*)?", uri) is not None  # and gone at the end
    known = re.match(f"({'|'.join(KINDS)})([+][a-z0-9_]+)?:", uri) or _is_databricks(uri)
    file = sqlite_file(uri)
    if in_memory or not known or (file is not None and file.is_dir()):
        shown = redact(uri)
        raise UserError(
            f"tracking.uri: '{shown}' is no address of a store; http://HOST:PORT or sqlite:///mlflow.db is",
            "E-STORE-ADDRESS",
        )


def stray() -> str:
    """Return one line about runs in ./mlruns; '' where there are none.

    An older MLflow wrote there when it was told nothing, and no UI shows these runs beside those of a database.
    """
    if next(Path("mlruns").glob("*/meta.yaml"), None) is None:
        return ""
    return f"mlruns has runs of an older MLflow, which are not shown with the others; {MIGRATE.format('mlruns')}"


def explain(error: BaseException, uri: str) -> str:
    """Return one line for what a store says: what is wrong, and what to do."""
    if isinstance(error, UserError):
        return str(error)
    said = redact(" ".join(str(error).split())) or type(error).__name__
    shown = redact(uri)
    known = {
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


def artifact_location(uri: str) -> str | None:
    """Return the place of a SQLite store's artifacts: a folder beside it. None where the server has its own."""
    path = sqlite_file(uri)
    return None if path is None else (path.parent / ARTIFACTS).as_uri()


def client(uri: str) -> Any:
    """Return an MlflowClient. Takes seconds, as MLflow does to import and to make its tables.

    Raises UserError where MLflow would migrate the store by opening it.
    """
    create(uri)
    if path := sqlite_file(uri):
        refuse_other_schema(path)
    elif not uri.startswith(("http://", "https://")) and not _is_databricks(uri):
        _refuse_other_schema_of_server(uri)
    return _client(uri)


def _refuse_other_schema_of_server(uri: str) -> None:
    """Raise UserError where the database of a server has tables of another MLflow."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    with engine.connect() as connection:
        if sqlalchemy.inspect(connection).has_table("alembic_version"):
            version = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).scalar()
            refuse_version(str(version or ""), redact(uri), "back up the database")


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


def deleted_experiment(name: str, uri: str) -> UserError:
    """Return the error for an experiment that somebody deleted."""
    return UserError(
        f"experiment '{name}' is deleted in {redact(uri)}; restore it there (`mlflow experiments restore -x "
        "ID`), or set tracking.experiment to another name",
        "E-STORE-EXPERIMENT",
    )


def experiment(client: Any, uri: str, name: str) -> str:
    """Return the id of the experiment, which is made where it is missing. Raises UserError where it is deleted."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(uri)))
        except MlflowException:  # another job was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise deleted_experiment(name, uri)
    return str(found.experiment_id)


def identity(client: Any) -> str:
    """Return what tells a store from one that is made later at its address: the time when its first experiment was
    made; '' where that is not known."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_experiment("0").creation_time or "")
    except MlflowException:
        return ""


def search(client: Any, experiment: str, condition: str, view: int = 1) -> list[Any]:
    """Return all runs that meet a condition, over all pages of the answer. view: MLflow's ViewType."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], condition, run_view_type=view, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return found


def log_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    """Log parameters in as many requests as MLflow's limit of 100 needs. The same values again change nothing."""
    from mlflow.entities import Param

    known = [Param(name, as_text(value)) for name, value in params.items()]
    for first in range(0, len(known), 100):
        client.log_batch(run_id, params=known[first : first + 100])


def log_metrics(client: Any, run_id: str, metrics: Sequence[Any]) -> None:
    """Log metrics in requests of 1,000, the most that MLflow takes."""
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + BATCH])


def create(uri: str) -> None:
    """Make an empty store if `uri` is a SQLite file that is not there.

    MLflow builds its tables in dozens of migrations, and cannot open a store in which that was interrupted. So they are
    built on node-local disk, and the finished file appears at its place in one step, unless another process was faster.
    Raises UserError for what is no address of a store.
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
