"""What the image is made of, and how it is carried, as far as no engine is needed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import docker
import pytest
from docker.utils.build import exclude_paths

import moco
from conftest import ROOT
from moco.cluster.image import Build, build, commit_of, run
from moco.cluster.sif import definition, make_sif, push_sif
from moco.errors import UserError


def context(folder: Path) -> set[str]:
    """Files that the Docker SDK sends to the engine."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return {name for name in exclude_paths(str(folder), patterns) if (folder / name).is_file()}


def test_the_engine_gets_every_source_and_nothing_else(tmp_path: Path) -> None:
    sources = {str(path.relative_to(ROOT)) for kind in ("py", "html") for path in (ROOT / "src").rglob(f"*.{kind}")}
    others = {"container/build.sh", "requirements/uv.txt", "requirements/image.txt", "pyproject.toml", "README.md"}
    sent = {".dockerignore", "Dockerfile"}  # which the SDK adds
    assert context(ROOT) == sources | others | sent
    planted = {".env", "src/moco/.env", "src/moco/data/key.pem", "src/id_rsa", "container/pip.conf", "mlflow.db"}
    for name in planted | sources:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert context(tmp_path) == sources


def test_all_recipes_name_the_same_version() -> None:
    assert f'version = "{moco.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    for recipe in ("Dockerfile", "apptainer.def"):
        assert f"VERSION={moco.__version__}\n" in (ROOT / recipe).read_text()


def test_the_lock_of_the_image_meets_what_the_project_asks_for() -> None:
    """Those of torch come from its own index, in build.sh."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lock, script = (ROOT / "requirements/image.txt").read_text(), (ROOT / "container/build.sh").read_text()
    found = re.findall(r"^([\w.-]+)==([\w.+]+)", lock, re.MULTILINE)
    found += [(name.lower(), version) for name, version in re.findall(r"^(TORCH\w*)=\$\{\1:-([\d.]+)\}", script, re.M)]
    locked = {canonicalize_name(name): version for name, version in found}
    asked = [Requirement(line) for line in requires("moco-pipeline") or []]
    needed = [each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]
    assert {"torch", "mlflow", "dvc"} <= {each.name for each in needed}
    for each in needed:
        assert each.specifier.contains(locked[canonicalize_name(each.name)]), each


def test_a_password_for_the_index_is_refused_as_it_would_stay_in_the_image() -> None:
    with pytest.raises(UserError, match="name or password"):
        build(Build(torch_index="https://me:secret@wheels.example.org/simple"), print, ROOT)
    environment = {**os.environ, "TORCH_INDEX": "https://me:secret@wheels.example.org/simple"}
    done = subprocess.run(
        ["bash", ROOT / "container/build.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "secret" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: TORCH_INDEX")


def test_the_commit_is_marked_where_files_differ_from_it(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == "unknown"
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "a"]):
        subprocess.run([*git, *words], check=True)
    clean = commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "params.yaml").touch()
    assert commit_of(tmp_path) == clean, "settings are not in the image"
    (tmp_path / "src/a.py").write_text("changed")
    assert commit_of(tmp_path) == f"{clean}-dirty"


def test_a_carried_image_is_used_as_the_recipe_says() -> None:
    recipe = (ROOT / "apptainer.def").read_text()
    labels = {"org.opencontainers.image.version": "1.2", "org.opencontainers.image.revision": "abc"}
    found = definition(recipe, "a folder/moco.tar", labels)
    assert found.startswith("Bootstrap: docker-archive\nFrom: a folder/moco.tar\n")
    assert re.findall(r"^%(\w+)", found, re.MULTILINE) == ["environment", "labels", "runscript", "test"]
    assert "revision abc\n" in found and "version 1.2\n" in found and "{{" not in found
    assert 'exec moco "$@"' in found


@pytest.mark.parametrize(
    "target, said", [("moco.img", "must end in .sif"), ("login:moco", "must end in .sif"), ("moco.sif", "no Docker")]
)
def test_what_cannot_be_carried_is_one_line(target: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(UserError, match=said):
        push_sif("moco-pipeline", target, print, ROOT)


@pytest.mark.parametrize("broken", ["scp", "ssh"])
def test_what_was_sent_for_nothing_is_removed_over_there(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in ("scp", "ssh"):
        ends = f'case "$*" in *build*|*.def) exit {int(tool == broken)};; esac'
        (tmp_path / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >>{tmp_path}/record\n{ends}\n')
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "image.tar").touch()
    with pytest.raises(UserError, match=f"{broken} failed with exit code 1"):
        make_sif("login", "a b.sif", tmp_path / "image.tar", "apptainer", "", {}, print)
    assert "rm -f" in (tmp_path / "record").read_text().splitlines()[-1]


def test_no_engine_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Docker engine answers .* apptainer.def"):
        run("moco-pipeline", ["true"])


class Container:
    """One that is asked to end while the engine starts it, and that somebody removes meanwhile."""

    def __init__(self) -> None:
        self.running, self.told = False, list[str]()

    def attach(self, **_: object) -> list[tuple[bytes, bytes]]:
        return [(b"out", b"err")]

    def start(self) -> None:
        signal.raise_signal(signal.SIGUSR2)
        self.running = True

    def kill(self, name: str) -> None:
        if not self.running:
            raise docker.errors.APIError("is not running")
        self.told.append(name)

    def wait(self) -> dict[str, int]:
        return {"StatusCode": 130}

    def remove(self, force: bool) -> None:
        raise docker.errors.NotFound("no such container")


def test_a_signal_while_a_container_starts_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine is slow enough to be met in that moment."""
    container, image = Container(), SimpleNamespace(tags=["x:latest"], id="sha256:0")
    client = SimpleNamespace(
        images=SimpleNamespace(get=lambda tag: image),
        containers=SimpleNamespace(create=lambda *words, **options: container),
    )
    monkeypatch.setattr("moco.cluster.image.connect", lambda: client)
    before = signal.getsignal(signal.SIGUSR2)
    assert run("x", ["dvc", "repro"]) == 128 + signal.SIGUSR2
    assert container.told == ["SIGINT"]
    assert signal.getsignal(signal.SIGUSR2) is before
