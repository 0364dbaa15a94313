"""The container image, through the Docker SDK: building, running, and carrying it to a cluster as a SIF."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moco
from moco.errors import Say, UserError
from moco.tracking.store import ACCESS

TAG = "moco-pipeline"
PROJECT = "/project"  # where the checkout appears inside


@dataclass(frozen=True)
class Build:
    """Arguments of a build. base, torch_index: None takes the Dockerfile's. network: of the build's steps."""

    tag: str = TAG
    base: str | None = None
    torch_index: str | None = None
    network: str | None = None


def connect() -> Any:
    """A client of the Docker engine. Raises UserError where there is none."""
    try:
        import docker
    except ImportError:
        raise UserError("the Python package docker is not installed; pip install docker") from None
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        raise UserError(
            f"no Docker engine answers ({_reason(error)}); start it, set DOCKER_HOST, or build with "
            "`apptainer build moco.sif apptainer.def`"
        ) from None
    return client


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def build(settings: Build, say: Say, folder: Path = Path()) -> str:
    """Builds the Dockerfile of the checkout; returns the image's id.

    Raises UserError with the last line of the step that failed.
    """
    import docker

    if not (folder / "Dockerfile").is_file():
        raise UserError(f"{folder.absolute()}: no Dockerfile here; run this in the project's folder")
    client = connect()
    arguments = {"VERSION": moco.__version__, "COMMIT": _commit(folder)}
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
    except docker.errors.DockerException as error:
        raise UserError(f"the build failed: {_reason(error)}") from None
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


def _commit(folder: Path) -> str:
    # For this one question the checkout may belong to another user.
    git = ["git", "-c", "safe.directory=*", "-C", str(folder), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return done.stdout.strip() if done is not None and done.returncode == 0 else "unknown"


def _options(image: Any, folder: Path, dataset: Path | None, gpus: bool) -> dict[str, Any]:
    """The checkout at /project, files owned by the caller, the dataset read-only at /dataset; runs carry the image."""
    import docker

    if dataset is not None and not dataset.is_dir():
        raise UserError(f"{dataset}: dataset folder not found")
    volumes = [f"{folder.absolute()}:{PROJECT}"] + ([f"{dataset.absolute()}:/dataset:ro"] if dataset else [])
    devices = [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpus else []
    environment = [f"MOCO_IMAGE={(image.tags or [image.short_id])[0]}", f"MOCO_IMAGE_DIGEST={image.id}"]
    environment += [f"{name}={os.environ[name]}" for name in ACCESS if name in os.environ]
    user = f"{os.getuid()}:{os.getgid()}"
    return {"user": user, "volumes": volumes, "device_requests": devices, "environment": environment}


def _find(client: Any, tag: str) -> Any:
    import docker

    try:
        return client.images.get(tag)
    except docker.errors.ImageNotFound:
        raise UserError(f"{tag}: no such image here; build it with `moco image build`") from None


def run(
    tag: str, command: Sequence[str], *, gpus: bool = False, dataset: Path | None = None, folder: Path = Path()
) -> int:
    """Runs a command in the image, shows its output as it comes, returns its exit code.

    SIGINT and SIGTERM are passed on, so that a stage inside saves its state. Raises UserError where the image
    is missing or the engine refuses.
    """
    import docker

    client = connect()
    image = _find(client, tag)
    try:
        container = client.containers.run(
            tag, list(command), detach=True, init=True, working_dir=PROJECT, shm_size="1g",
            **_options(image, folder, dataset, gpus),
        )  # fmt: skip
    except docker.errors.DockerException as error:
        raise UserError(f"the engine refuses to run {tag}: {_reason(error)}") from None

    def pass_on(number: int, _: object) -> None:
        container.kill(signal.Signals(number).name)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for chunk in container.logs(stream=True, follow=True):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        return int(container.wait()["StatusCode"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        container.remove(force=True)


def shell(tag: str, *, gpus: bool = False, dataset: Path | None = None, folder: Path = Path()) -> int:
    """An interactive shell in the image. The SDK has no terminal, so this is the `docker` command's work."""
    image = _find(connect(), tag)
    if shutil.which("docker") is None:
        raise UserError("docker: command not found; an interactive shell needs it beside the engine")
    options = _options(image, folder, dataset, gpus)
    volumes = [word for volume in options["volumes"] for word in ("--volume", volume)]
    for setting in options["environment"]:  # a password is for the environment, not for the list of processes
        volumes += ["--env", setting if setting.startswith("MOCO_") else setting.partition("=")[0]]
    arguments = [
        "docker", "run", "--rm", "--interactive", "--tty", "--init", "--user", options["user"], *volumes,
        *(["--gpus", "all"] if gpus else []), "--workdir", PROJECT, tag, "bash",
    ]  # fmt: skip
    return subprocess.run(arguments, check=False).returncode


def push_sif(tag: str, target: str, say: Say) -> None:
    """Carries the image to a cluster: saved as an archive, copied, and there made into a SIF.

    target: PATH on this machine, or HOST:PATH for scp and ssh. Raises UserError where a step fails.
    """
    client = connect()
    image = _find(client, tag)
    host, colon, path = target.rpartition(":")
    if not path.endswith(".sif"):
        raise UserError(f"{target}: the target must end in .sif")
    needed = ["scp", "ssh"] if colon else ["apptainer"]
    missing = [tool for tool in needed if shutil.which(tool) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: not found here; needed for {target}")
    with tempfile.TemporaryDirectory(prefix="moco-sif-") as work:
        archive = Path(work) / "image.tar"
        say(f"saving {tag} ({image.attrs['Size'] / 1e9:.1f} GB) to {archive}")
        with archive.open("wb") as file:
            for chunk in image.save(named=tag if ":" in tag else f"{tag}:latest"):
                file.write(chunk)
        if not colon:
            _call(["apptainer", "build", "--force", path, f"docker-archive:{archive}"], say)
            return
        _call(["scp", str(archive), f"{host}:{path}.tar"], say)
        sif, remote = shlex.quote(path), shlex.quote(f"{path}.tar")
        _call(["ssh", host, f"apptainer build --force {sif} docker-archive:{remote} && rm {remote}"], say)


def _call(command: list[str], say: Say) -> None:
    say(shlex.join(command))
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise UserError(f"{command[0]} failed with exit code {code}")
