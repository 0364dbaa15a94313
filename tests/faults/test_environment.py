"""What notebooks, hooks, other allocations and files in the project's folder bring along is meant, or has no effect."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import Moco, write_dataset, write_params
from moco import environment
from moco.tracking import store
from moco.tracking.origin import no_commit

CONSOLE = str(Path(sys.executable).with_name("moco"))
NAMES = ["a$b$c", "_hidden", "^x\\frac{", "[red]x", "猫 😀", "\u202eabc", "n" * 300, "two\nlines", "plain"]

# Makes a store in the current folder, puts a file into a run, and fetches it.
IN_STORE = """
from pathlib import Path
from moco.settings.tracking import TrackingConfig
from moco.tracking import store
uri = store.store_uri(TrackingConfig(uri="sqlite:///mlflow.db", experiment="e", registered_model="m"))
assert store.sqlite_file(uri) == Path("mlflow.db").absolute()
client = store.client(uri)
experiment = client.create_experiment("e", artifact_location=store.artifact_location(uri))
run = client.create_run(experiment).info.run_id
client.log_artifact(run, "file")
print(Path(client.download_artifacts(run, "file", None)).read_text())
"""


def console(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as it is installed, in a process that begins by itself."""
    return subprocess.run(
        [CONSOLE, *arguments], cwd=project, capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, **variables},
    )  # fmt: skip


@pytest.mark.fault("environment")
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg", "nonsense"])
def test_figures_are_drawn_whatever_backend_and_style_a_notebook_has_set(tmp_path: Path, backend: str) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 900\n")
    code = (
        "import numpy as np; from pathlib import Path; from moco.tracking.figures import confusion_figure;"
        f"confusion_figure(np.eye({len(NAMES)}, dtype=int), {NAMES!r}, Path('c.png'))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "MPLBACKEND": backend},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    with Image.open(tmp_path / "c.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.fault("odd-names")
def test_a_class_name_is_drawn_as_it_is_and_none_is_left_out(tmp_path: Path) -> None:
    from moco.tracking import canvas, figures, pictures

    labels = np.arange(18) % len(NAMES)
    features = np.random.default_rng(0).normal(size=(18, 4))
    with canvas.plain_style():
        figure = pictures._map(features, labels, [canvas.shown(name) for name in NAMES])
        texts = figure.axes[0].get_legend().get_texts()
        assert [text.get_text().strip() for text in texts] == [canvas.shown(name) for name in NAMES]
        assert not any(text.get_parse_math() for text in texts)
        confusion = figures._confusion(np.eye(len(NAMES), dtype=int), [canvas.shown(name) for name in NAMES])
        assert not any(text.get_parse_math() for text in confusion.axes[0].get_xticklabels())
    pictures.draw_map(features, labels, NAMES)(tmp_path / "map.png")
    tile = pictures.Tile(np.zeros((24, 24, 3), np.uint8), "\n".join(canvas.shown(name) for name in NAMES))
    assert pictures.grid([[tile]]).size[1] > 9 * 14
    assert canvas.shown("a$b$c") == "a$b$c" and canvas.shown("\u202eabc") == "abc"
    assert canvas.shown("two\nlines") == "two lines" and len(canvas.shown("n" * 300)) == canvas.LONGEST
    assert canvas.shown("x" * 20 + "1") != canvas.shown("x" * 20 + "2"), "the end tells names apart"


@pytest.mark.fault("environment")
def test_variables_for_other_programs_are_taken_out_and_those_that_are_meant_stay(tmp_path: Path) -> None:
    meant = {
        "MLFLOW_TRACKING_URI": "http://x", "MLFLOW_TRACKING_TOKEN": "t", "MLFLOW_S3_ENDPOINT_URL": "http://s3",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "SLURM_JOB_ID": "7", "DVC_EXP_NAME": "e", "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "/x",
    }  # fmt: skip
    foreign = {
        "MLFLOW_RUN_ID": "r", "MLFLOW_EXPERIMENT_NAME": "theirs", "MLFLOW_EXPERIMENT_ID": "4",
        "MLFLOW_REGISTRY_URI": "http://theirs", "MLFLOW_ENABLE_ASYNC_LOGGING": "true", "GIT_DIR": "/x/.git",
        "GIT_INDEX_FILE": "/x/index", "PYTHONWARNINGS": "error", "SLURM_TMPDIR": str(tmp_path / "gone"),
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }  # fmt: skip
    left, said = {**meant, **foreign}, list[str]()
    environment.shield(said.append, left)
    assert {name: left[name] for name in meant} == meant
    assert left.keys() - meant.keys() == {"MPLBACKEND", "PYTHONSAFEPATH"} and left["MPLBACKEND"] == "Agg"
    assert set(environment.left_out) >= foreign.keys() - {"MPLBACKEND"}
    assert len(said) == 1 and "SLURM_TMPDIR" in said[0] and str(tmp_path / "gone") in said[0]


IMPOSSIBLE = ["abc", "0", "-1", "100000", "1.5", "2,x", "1e3", "9" * 400]


@pytest.mark.fault("environment", 2 * len(IMPOSSIBLE))
def test_impossible_numbers_of_threads_are_told_and_not_used() -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        for value in IMPOSSIBLE:
            left, said = {name: value}, list[str]()
            environment.shield(said.append, left)
            assert name not in left and name in environment.left_out
            assert len(said) == 1 and f"{name} is '{value[:20]}" in said[0] and len(said[0]) < 300
        for value in ("1", "4", "1024", "4,2", " 8 "):
            left, said = {name: value}, list[str]()
            environment.shield(said.append, left)
            assert left[name] == value and not said


@pytest.mark.slow
@pytest.mark.fault("environment")
def test_a_command_with_an_impossible_number_of_threads_says_one_line(project: Path) -> None:
    """A process of its own: libraries read the variable once, and complain by themselves."""
    done = subprocess.run(
        [sys.executable, "-m", "moco.cli", "data"], env={**os.environ, "OMP_NUM_THREADS": "abc"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if "THREADS" in line]
    assert len(lines) == 1 and lines[0].startswith("note: OMP_NUM_THREADS is 'abc'"), done.stderr


@pytest.mark.fault("environment")
def test_a_commit_that_git_will_not_read_is_told(project: Path, monkeypatch: pytest.MonkeyPatch, moco: Moco) -> None:
    assert no_commit() == "", "outside of a repository there is none to know"
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert "commit" in no_commit()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert moco("data").returncode == 0
    said = [line for line in moco("pretrain").stderr.splitlines() if line.startswith("warning")]
    assert len(said) == 1
    assert f"git config --global --add safe.directory {project}" in said[0]


@pytest.mark.fault("environment")
def test_a_hooks_repository_is_not_taken_for_the_projects(
    project: Path, monkeypatch: pytest.MonkeyPatch, moco: Moco, tmp_path: Path
) -> None:
    """As in a pre-commit hook of another repository, which sets GIT_DIR."""
    subprocess.run(["git", "init", "--quiet", "theirs"], check=True)
    for name in ("user.name", "user.email"):
        subprocess.run(["git", "-C", "theirs", "config", name, "t@example.org"], check=True)
    subprocess.run(["git", "-C", "theirs", "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "theirs/.git"))
    assert moco("data").returncode == 0 and moco("pretrain").returncode == 0
    (log,) = project.glob("runs/pretrain/*/metrics.jsonl")
    assert "git_commit" not in log.read_text().splitlines()[0]


@pytest.mark.slow
@pytest.mark.fault("module-names")
@pytest.mark.filterwarnings("default")
def test_files_of_the_project_named_like_modules_disturb_no_process(project: Path) -> None:
    """Neither by workers that decode, nor by what feeds MLflow, nor where PYTHONPATH has an empty part."""
    for name in ("random", "json", "tempfile", "numpy", "types", "select", "pickle"):
        (project / f"{name}.py").write_text("raise SystemExit('the file of the project was imported')\n")
    write_dataset(project / "many", unlabeled=1100)
    write_params(project, data__path="many", tracking__uri="sqlite:///mlflow.db", pretrain__epochs=1)
    for stage in ("data", "pretrain"):
        done = console(project, stage, PYTHONPATH=f":{project}")
        assert done.returncode == 0 and "imported" not in done.stderr, done.stderr
    done = console(project, "sync", PYTHONPATH=":")
    assert done.returncode == 0, done.stderr
    (run,) = store.client(f"sqlite:///{project}/mlflow.db").search_runs(["1"], "tags.stage = 'pretrain'")
    assert run.info.status == "FINISHED"
    done = console(project, "doctor", PYTHONPATH=":")
    assert "FAIL" not in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.fault("odd-names")
@pytest.mark.parametrize("name", ["a%20b", "q?x=1#y", "-x", 'it\'s "ü" \\n'])
def test_store_and_artifacts_lie_in_the_project_whatever_its_folder_is_called(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.mkdir()
    (place / "file").write_text("content")
    done = subprocess.run(
        [sys.executable, "-c", IN_STORE], cwd=place, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "content\n", "it can be fetched again"
    assert [path.read_text() for path in place.glob("mlartifacts/**/file")] == ["content"]
    assert sorted(path.name for path in place.iterdir()) == ["file", "mlartifacts", "mlflow.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing lies outside"
