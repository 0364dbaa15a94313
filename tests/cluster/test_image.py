"""The image, built by the real engine from the base image of this machine, and used as its users do."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import moco
from conftest import ROOT, tiny_params, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.container, pytest.mark.timeout(1500)]
BASE = "nvidia/cuda:11.1.1-cudnn8-devel-ubuntu18.04"
TAG = "moco-pipeline-test"
OWNER = 1234  # a user that the image does not know


def missing(reason: str) -> None:
    if os.environ.get("MOCO_NO_SKIP"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    import docker

    try:
        client = docker.from_env()
        client.images.get(BASE)
    except docker.errors.DockerException as error:
        missing(f"needs a Docker engine with the base image: {error}")
    yield client
    client.close()


def moco_image(*arguments: str, folder: Path = ROOT) -> str:
    command = [shutil.which("moco") or "moco", "image", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout of what is here, with a tiny dataset and settings, owned by a user of its own."""
    folder = tmp_path_factory.mktemp("checkout") / "a project"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    for name in ("src", "container", "requirements", "Dockerfile", "dvc.yaml", ".dockerignore"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    write_dataset(folder / "dataset")
    params = tiny_params(tracking__uri="sqlite:///mlflow.db")
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    subprocess.run(["chown", "-R", f"{OWNER}:{OWNER}", str(folder)], check=True)
    for parent in (*folder.parents,):
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    return folder


@pytest.fixture(scope="module")
def image(engine: Any, checkout: Path) -> str:
    """The stand-in for the base has no CUDA and torch's own index is out of reach: torch is the package index's."""
    moco_image("build", "--tag", TAG, "--torch-index", "", "--network", "host", folder=checkout)
    return TAG


def inside(image: str, checkout: Path, *command: str, user: int = OWNER, options: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        ["docker", "run", "--rm", "--user", f"{user}:{user}", "--volume", f"{checkout}:/project", *options, image,
         *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_it_runs_as_nobody_in_particular_and_says_what_it_is(engine: Any, image: str) -> None:
    found = engine.images.get(image).attrs
    assert found["Config"]["User"] == "moco"
    labels = found["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == moco.__version__
    commit, _, dirty = labels["org.opencontainers.image.revision"].partition("-")
    assert len(commit) == 40 and dirty in ("", "dirty")
    variables = dict(setting.split("=", 1) for setting in found["Config"]["Env"])
    assert variables["SHELL"] == "/bin/bash" and variables["LC_ALL"] == "C.UTF-8"
    assert variables["PYTHONNOUSERSITE"] == "1"
    assert "doctor --step" in found["Config"]["Healthcheck"]["Test"][-1]


def test_the_self_test_passes_and_versions_are_those_of_old_glibc(image: str, checkout: Path) -> None:
    assert "FAIL" not in inside(image, checkout, "moco", "doctor", "--step", "--params", "none")
    versions = inside(
        image, checkout, "python", "-c", "import torch, pyarrow; print(torch.__version__, pyarrow.__version__)"
    )
    assert versions.startswith("2.6.0") and versions.split()[1] == "20.0.0"


def test_nothing_is_compiled_anew_and_the_home_is_everybodys(image: str, checkout: Path) -> None:
    script = "import importlib.util as u, os; " + "; ".join(
        f"assert os.path.exists(u.cache_from_source(u.find_spec('{name}').origin)), '{name}'"
        for name in ("torch", "torchvision", "mlflow", "dvc", "json")
    )
    inside(image, checkout, "python", "-c", script)
    inside(image, checkout, "bash", "-c", "mkdir -p ~/.cache/anything")


def test_the_suite_passes_inside_with_the_images_versions(image: str, checkout: Path) -> None:
    suite = os.environ.get("MOCO_IMAGE_TESTS", "tests")  # folders; by default all
    script = (
        "uv pip install --quiet --no-cache --target /tmp/dev --require-hashes -r requirements/image-test.txt && "
        f"PYTHONPATH=/tmp/dev:src python -m pytest -p no:cacheprovider -m 'not slow' {suite}"
    )
    output = inside(image, checkout, "bash", "-c", script, options=("--network", "host", "--env", "OMP_NUM_THREADS=1"))
    assert " passed" in output
    print(output.splitlines()[-1])


def test_the_pipeline_runs_inside_and_its_files_belong_to_the_owner(image: str, checkout: Path) -> None:
    assert "Running stage 'eval'" in inside(image, checkout, "dvc", "repro")
    written = [checkout / name for name in ("models/encoder.pth", "reports/eval/metrics.json", "dvc.lock", "mlflow.db")]
    assert [path.stat().st_uid for path in written] == [OWNER] * 4
    again = inside(image, checkout, "dvc", "repro")
    assert re.findall("Running stage '(.*)'", again) == ["data"]  # whose files alone DVC does not watch


def test_it_works_with_a_root_that_nobody_can_write_and_no_capabilities(image: str, checkout: Path) -> None:
    locked = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp:exec",
              "--tmpfs", "/var/tmp")  # fmt: skip
    assert "FAIL" not in inside(image, checkout, "moco", "doctor", "--step", "--params", "none", options=locked)
    said = inside(image, checkout, "dvc", "repro", "--force", "data", "pretrain", options=locked)
    assert "Running stage 'pretrain'" in said


@pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy deprecate things among themselves
def test_what_ran_without_a_network_is_synced_from_outside(image: str, checkout: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    project = tmp_path / "offline"
    project.mkdir()
    shutil.copytree(checkout / "dataset", project / "dataset")
    params = tiny_params(tracking__uri="http://tracking.invalid:5000", tracking__offline=True)
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    tmp_path.chmod(0o755)  # another user has to reach it; the checkout keeps its modes, which the builds hash
    subprocess.run(["chmod", "-R", "a+rwX", str(project)], check=True)
    for stage in ("data", "pretrain", "train", "eval"):
        said = inside(image, project, "moco", stage, options=("--network", "none"))
        assert "warning" not in said, "offline is what was asked for"
    assert not list(project.glob("runs/*/*/mlflow.json"))

    uri = f"sqlite:///{project}/mlflow.db"
    command = [shutil.which("moco") or "moco", "sync"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "3 of 3 runs" in done.stdout) == (0, True), done.stdout + done.stderr
    client = MlflowClient(uri)
    (experiment,) = [found.experiment_id for found in client.search_experiments() if found.name != "Default"]
    for log in project.glob("runs/*/*/metrics.jsonl"):
        events = [json.loads(line) for line in log.read_text().splitlines()]
        measured = [event for event in events if event["event"] == "metrics"]
        written = [(event["step"], event["metrics"]["loss"]) for event in measured if "loss" in event["metrics"]]
        (run,) = client.search_runs([experiment], f"tags.stage = '{events[0]['stage']}'")
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == written
        assert written or events[0]["stage"] != "pretrain"
    found = client.get_model_version_by_alias(params["tracking"]["registered_model"], "candidate")
    assert int(found.version) == 1 and found.tags["champion_gate"]


def test_without_git_inside_and_with_a_checkout_of_somebody_else(image: str, checkout: Path) -> None:
    hide = ("--volume", "/dev/null:/usr/bin/git:ro")
    assert "Running stage 'data'" in inside(image, checkout, "dvc", "repro", "--force", "data", options=hide)
    # DVC's locks are the first user's. Sources keep their modes: the builds below hash them.
    subprocess.run(["chmod", "a+rwX", str(checkout)], check=True)
    subprocess.run(["chmod", "-R", "a+rwX", str(checkout / ".dvc")], check=True)
    assert inside(image, checkout, "dvc", "status", "data", user=4321).split("\n", 1)[1].strip() == "always changed"


def test_building_again_takes_all_from_the_cache_and_a_changed_source_only_the_packages(
    image: str, checkout: Path, engine: Any
) -> None:
    arguments = ("build", "--tag", TAG, "--torch-index", "", "--network", "host")
    before = engine.images.get(image).id
    moco_image(*arguments, folder=checkout)
    assert engine.images.get(image).id == before
    with (checkout / "src/moco/errors.py").open("a") as source:
        source.write("# touched\n")
    layers = engine.images.get(image).attrs["RootFS"]["Layers"]
    moco_image(*arguments, folder=checkout)
    changed = engine.images.get(image).attrs["RootFS"]["Layers"]
    assert changed != layers and changed[:6] == layers[:6], "up to the packages all is as it was"


def test_a_base_that_is_gone_is_one_line(engine: Any, checkout: Path) -> None:
    command = [shutil.which("moco") or "moco", "image", "build", "--base", "absent.invalid/base:1", "--tag", "none"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the build failed") and "--base" in line


def start(checkout: Path, image: str, *command: str, errors: int = subprocess.PIPE) -> subprocess.Popen[str]:
    words = [shutil.which("moco") or "moco", "image", "run", "--tag", image, "--", *command]
    return subprocess.Popen(words, cwd=checkout, stdout=subprocess.PIPE, stderr=errors, text=True)


def test_run_tells_which_image_it_is_and_passes_output_and_exit_code_on(
    engine: Any, image: str, checkout: Path
) -> None:
    script = "echo $MOCO_IMAGE_DIGEST; echo aside >&2; exit 7"
    process = start(checkout, image, "sh", "-c", script)
    assert process.communicate() == (f"{engine.images.get(image).id}\n", "aside\n")
    assert process.returncode == 7


def test_what_cannot_start_is_one_line_and_leaves_no_container(engine: Any, image: str, checkout: Path) -> None:
    process = start(checkout, image, "no-such-command")
    said = process.communicate()[1]
    assert process.returncode == 127 and "no-such-command" in said and said.count("\n") == 1
    assert engine.containers.list(all=True, filters={"ancestor": image}) == []


def test_a_signal_reaches_the_stage_below_dvc_which_saves_its_state(
    engine: Any, image: str, checkout: Path, tmp_path: Path
) -> None:
    project = tmp_path / "stopped"
    shutil.copytree(checkout, project, symlinks=True)
    for made in ("models", "runs"):
        shutil.rmtree(project / made, ignore_errors=True)
    (project / "mlflow.db").unlink(missing_ok=True)
    subprocess.run(["chown", "-R", f"{os.getuid()}:{os.getgid()}", str(project)], check=True)
    params = tiny_params(tracking__uri="", pretrain__epochs=100_000)
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for number in (signal.SIGTERM, signal.SIGUSR2):
        process = start(project, image, "dvc", "repro", "pretrain", errors=subprocess.STDOUT)
        assert process.stdout is not None
        said = ""
        while "images/s" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(number)
        said += process.communicate(timeout=60)[0]
        assert process.returncode == 128 + number, said
        assert "the state is saved" in said
    assert "continuing from" in said, "the second went on where the first was"
    assert engine.containers.list(all=True, filters={"ancestor": image}) == []


def test_a_shell_inside_has_a_terminal_and_passes_its_exit_code_on(image: str, checkout: Path) -> None:
    ours, theirs = pty.openpty()
    command = [shutil.which("moco") or "moco", "image", "shell", "--tag", image]
    process = subprocess.Popen(command, cwd=checkout, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = os.read(ours, 4096)  # the prompt
    os.write(ours, b"test -t 0 && echo typed-$((40 + 2)) in $PWD of $MOCO_IMAGE; exit 7\n")
    with contextlib.suppress(OSError):  # the end of the other side
        while more := os.read(ours, 4096):
            said += more
    os.close(ours)
    assert process.wait() == 7
    assert f"typed-42 in /project of {image}".encode() in said
