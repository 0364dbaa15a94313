"""Which variables of the environment reach this program, and how it starts Python processes of its own.

Notebooks, shells, git hooks and the allocation that a job was submitted from set variables for their own purposes.
docs/environment.md lists those that are read here; what is not meant for this program is taken out at its start.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path

from moco.errors import Say, quoted

# Variables of MLflow that say how a server or an artifact store is reached, by the beginnings of their names. Others
# would choose an experiment, a run, a registry or a way of sending that nobody here has asked for.
MLFLOW_KEPT = (
    "MLFLOW_TRACKING_", "MLFLOW_HTTP_REQUEST_", "MLFLOW_S3_", "MLFLOW_GCS_", "MLFLOW_ARTIFACT_UPLOAD_",
    "MLFLOW_SERVER_", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "MLFLOW_SUPPRESS_PRINTING",
    "MLFLOW_ALLOW_HTTP_REDIRECTS",
)  # fmt: skip
FOREIGN = (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX",  # of a hook
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_NAMESPACE",
    "PYTHONWARNINGS",  # `error` would end a run on a remark that a library makes about another
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",  # would let weights run code
    "MATPLOTLIBRC",
)  # fmt: skip
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MOST_THREADS = 1024  # as runtime.threads
# Runs a module as `python -m` does, without the current folder on the path of modules: there, a random.py of the user's
# would be imported in place of Python's. (`-P` does the same from Python 3.11 on.)
RUN_MODULE = (
    "import sys; sys.path[:1] == [''] and sys.path.pop(0); import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
PACKAGE = Path(__file__).resolve().parent  # the code that runs
left_out: list[str] = []  # names of variables that `shield` has taken out of this process's environment


def shield(say: Say, environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove from the environment what is meant for other programs, and remember the names in `left_out`."""
    strangers = [
        name for name in environment
        if name in FOREIGN or (name.startswith(("MLFLOW_", "_MLFLOW_")) and not name.startswith(MLFLOW_KEPT))
    ]  # fmt: skip
    for name in strangers:
        del environment[name]
    if "PYTHONWARNINGS" in strangers:
        sys.warnoptions.clear()
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
    for name in ("SLURM_TMPDIR", "TMPDIR"):  # of another node, say, from which the job was submitted
        folder = environment.get(name)
        if folder and not os.access(folder, os.W_OK | os.X_OK):
            say(f"note: {name} is {folder}, which is not there or cannot be written; it is not used")
            strangers.append(name)
            del environment[name]
    strangers += _impossible_threads(environment, say)
    left_out[:] = sorted({*left_out, *strangers})
    environment["MPLBACKEND"] = "Agg"  # pictures are files here; a notebook's backend is not installed everywhere
    environment["PYTHONSAFEPATH"] = "1"  # for processes that libraries start: see RUN_MODULE
    if path := environment.get("PYTHONPATH"):
        here = os.path.realpath(os.curdir)
        environment["PYTHONPATH"] = os.pathsep.join(
            folder for folder in path.split(os.pathsep) if folder and os.path.realpath(folder) != here
        )
    if sys.version_info < (3, 11):
        _isolate_workers()
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding must not end a run at a sign it lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _impossible_threads(environment: MutableMapping[str, str], say: Say) -> list[str]:
    """Remove and return variables that name no possible number of threads.

    Of such a value, one library takes one thread and says nothing, another complains, and a third dies where the number
    is too large.
    """
    wrong = [name for name in THREADS if name in environment and not _is_thread_count(environment[name])]
    for name in wrong:
        value = environment.pop(name)
        if value.strip():
            say(f"note: {name} is {quoted(value)}, not a number of threads from 1 to {MOST_THREADS}; it is not used")
    return wrong


def _is_thread_count(value: str) -> bool:
    """Return whether a value is a number of threads, or a list of them by the level of nesting."""
    numbers = [number.strip() for number in value.split(",")]
    return all(re.fullmatch("[0-9]{1,4}", number) and 1 <= int(number) <= MOST_THREADS for number in numbers)


def other_checkout() -> Path | None:
    """Return src/moco of the current folder where it is not the code that runs; None where there is none.

    This is so with one virtual environment and two clones of the project, say, or in the folder of a queued experiment.
    There is none in a project that an installed moco works on.
    """
    here = Path("src/moco").resolve()
    return here if here != PACKAGE and (here / "errors.py").is_file() else None


def differing_code(other: Path) -> list[str]:
    """Return the files of code that are not the same here and in another package's folder, as 'moco/errors.py'."""
    names = {
        path.relative_to(folder)
        for folder in (PACKAGE, other)
        for kind in ("*.py", "*.html")
        for path in folder.rglob(kind)
    }
    return sorted(f"moco/{name.as_posix()}" for name in names if _content(PACKAGE / name) != _content(other / name))


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module like `python -m`, whatever files lie in the current folder."""
    return [sys.executable, "-c", RUN_MODULE, module, *arguments]


def _isolate_workers() -> None:
    """Start multiprocessing's workers with `-I`, as Python 3.10 does not know PYTHONSAFEPATH.

    The workers take the path of modules from this process.
    """
    from multiprocessing import util

    original = util._args_from_interpreter_flags  # type: ignore[attr-defined]
    if getattr(original, "isolates", False):
        return

    def isolated() -> list[str]:
        return [*original(), "-I"]

    isolated.isolates = True  # type: ignore[attr-defined]
    util._args_from_interpreter_flags = isolated  # type: ignore[attr-defined]
