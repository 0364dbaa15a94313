"""The container image, through the Docker SDK: building and running."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import moco
from moco.errors import Say, UserError
from moco.tracking.store import ACCESS

TAG = "moco-pipeline"
PROJECT = "/project"  # where the checkout appears inside
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True)
class Build:
    """Arguments of a build. base, torch_index: None takes the Dockerfile's. network: of the build's steps."""

    tag: str = TAG
    base: str | None = None
    torch_index: str | None = None
    network: str | None = None


def connect() -> Any:
    """Return a client of the Docker engine, which may take as long as it needs.

    Raises UserError where there is none.
    """
    try:
        import docker
    except ImportError:
        raise UserError("the Python package docker is not installed; pip install docker") from None
    try:
        docker.from_env(timeout=20).ping()
        client = docker.from_env(timeout=None)  # before the first byte of a large image minutes may pass
    except docker.errors.DockerException as error:
        raise UserError(
            f"no Docker engine answers ({reason(error)}); start it, set DOCKER_HOST, or build with "
            "`apptainer build moco.sif apptainer.def`"
        ) from None
    return client


def engine_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the SDK raises where the engine refuses a request or ends."""
    import docker
    import requests

    return docker.errors.DockerException, requests.RequestException


def reason(error: Exception) -> str:
    """Return on one line what the engine itself says, where it answered, else what went wrong with the request."""
    text = " ".join(str(getattr(error, "explanation", None) or error).split())
    return text[:300] or type(error).__name__


def build(settings: Build, say: Say, folder: Path = Path()) -> str:
    """Build the Dockerfile of the checkout and return the image's id.

    Raises UserError with the last line of the step that failed.
    """
    if not (folder / "Dockerfile").is_file():
        raise UserError(f"{folder.absolute()}: no Dockerfile here; run this in the project's folder")
    if settings.torch_index and urlsplit(settings.torch_index).username is not None:
        raise UserError("--torch-index holds a name or password, which would stay in the image; use an index without")
    client = connect()
    arguments = {"VERSION": moco.__version__, "COMMIT": commit_of(folder)}
    if settings.base is not None:
        arguments["BASE"] = settings.base
    if settings.torch_index is not None:
        arguments["TORCH_INDEX"] = settings.torch_index
    try:
        lines = client.api.build(
            path=str(folder), tag=settings.tag, buildargs=arguments, rm=True, forcerm=True, decode=True,
            network_mode=settings.network,
        )  # fmt: skip
        _follow(lines, say)
        image = client.images.get(settings.tag)
    except engine_errors() as error:
        raise UserError(f"the build failed: {reason(error)}") from None
    say(f"{settings.tag}: {image.attrs['Size'] / 1e9:.2f} GB, {image.short_id}")
    return str(image.id)


def _follow(lines: Iterable[dict[str, Any]], say: Say) -> None:
    last = ""
    for line in lines:
        if "error" in line:
            reason = " ".join(line["error"].split())
            if ": FROM " in last:
                reason += "; the base image is gone or out of reach: --base takes another one"
            raise UserError(f"the build failed: {last + ': ' if last else ''}{reason}")
        text = line.get("stream", "").strip()
        if text:
            last = text.splitlines()[-1]
            say(text)


def commit_of(folder: Path) -> str:
    """Return the checkout's commit, marked where files differ from it; `unknown` without git."""

    def ask(*words: str) -> str | None:
        # For this one question the checkout may belong to another user.
        git = ["git", "-c", "safe.directory=*", "-C", str(folder), *words]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or not (commit := ask("rev-parse", "HEAD")):
        return "unknown"
    changed = ask("status", "--porcelain", "--", "src", "container", "requirements", "pyproject.toml", "Dockerfile")
    return f"{commit}-dirty" if changed else commit


def _options(image: Any, folder: Path, dataset: Path | None, gpus: bool) -> dict[str, Any]:
    """Return the options of a container for this image and checkout.

    The checkout is at /project and its files are owned by the caller. The dataset is read-only at /dataset. Runs record
    the image.
    """
    import docker

    if dataset is not None and not dataset.is_dir():
        raise UserError(f"{dataset}: dataset folder not found")
    for path in (folder, dataset):
        if path and ":" in str(path.absolute()):
            raise UserError(f"{path.absolute()}: Docker cannot mount a path with a colon; rename it")
    volumes = [f"{folder.absolute()}:{PROJECT}"] + ([f"{dataset.absolute()}:/dataset:ro"] if dataset else [])
    devices = [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpus else []
    environment = [f"MOCO_IMAGE={(image.tags or [image.short_id])[0]}", f"MOCO_IMAGE_DIGEST={image.id}"]
    environment += [f"{name}={os.environ[name]}" for name in ACCESS if name in os.environ]
    user = f"{os.getuid()}:{os.getgid()}"
    return {
        "user": user, "volumes": volumes, "device_requests": devices, "environment": environment, "shm_size": "1g",
    }  # fmt: skip


def find(client: Any, tag: str) -> Any:
    """Return the image. Raises UserError where there is none."""
    import docker

    try:
        return client.images.get(tag)
    except docker.errors.ImageNotFound:
        raise UserError(f"{tag}: no such image here; build it with `moco image build`") from None
    except engine_errors() as error:
        raise UserError(f"{tag!r} is no image: {reason(error)}") from None


def run(
    tag: str, command: Sequence[str], *, gpus: bool = False, dataset: Path | None = None, folder: Path = Path()
) -> int:
    """Run a command in the image, show its output as it comes, and return its exit code.

    A signal that asks this process to end reaches every process inside as SIGINT. On SIGINT a stage saves its state,
    and DVC waits for it. The exit code is then 128 plus the signal's number. Raises UserError where the image is
    missing or the engine refuses.
    """
    client, errors = connect(), engine_errors()
    image = find(client, tag)
    options = _options(image, folder, dataset, gpus)
    told: list[int] = []
    container: Any = None

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        with contextlib.suppress(*errors):  # not begun yet, or ended just now
            if container is not None:
                container.kill("SIGINT")

    before = {number: signal.signal(number, pass_on) for number in ENDINGS}
    try:
        container = client.containers.create(tag, list(command), init=True, working_dir=PROJECT, **options)
        output = container.attach(stream=True, demux=True)
        if told:
            return 128 + told[0]
        container.start()
        if told:  # while it was starting
            pass_on(told.pop(), None)
        for parts in output:
            for chunk, stream in zip(parts, (sys.stdout, sys.stderr), strict=True):
                with contextlib.suppress(OSError):  # a terminal that was closed: what is inside still saves its state
                    stream.buffer.write(chunk or b"")
                    stream.buffer.flush()
        code = int(container.wait()["StatusCode"])
    except errors as error:
        raise UserError(f"the engine refuses to run {tag}: {reason(error)}") from None
    finally:
        with contextlib.suppress(*errors):  # removed by somebody else, or the engine has ended
            if container is not None:
                container.remove(force=True)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + told[0] if told and code else code


def shell(tag: str, *, gpus: bool = False, dataset: Path | None = None, folder: Path = Path()) -> int:
    """Open an interactive shell in the image. The SDK has no terminal, so the `docker` command does this."""
    image = find(connect(), tag)
    if shutil.which("docker") is None:
        raise UserError("docker: command not found; an interactive shell needs it beside the engine")
    options = _options(image, folder, dataset, gpus)
    volumes = [word for volume in options["volumes"] for word in ("--volume", volume)]
    for setting in options["environment"]:  # a password is for the environment, not for the list of processes
        volumes += ["--env", setting if setting.startswith("MOCO_") else setting.partition("=")[0]]
    arguments = [
        "docker", "run", "--rm", "--interactive", "--tty", "--init", "--shm-size", options["shm_size"],
        "--user", options["user"], *volumes, *(["--gpus", "all"] if gpus else []), "--workdir", PROJECT, tag, "bash",
    ]  # fmt: skip
    return subprocess.run(arguments, check=False).returncode
