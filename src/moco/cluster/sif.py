"""Carrying the container image to a cluster: saved as an archive, copied, and made into a SIF there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from moco.cluster.image import connect, engine_errors, find, reason
from moco.errors import Say, UserError

RECIPE = "apptainer.def"
# What the image brings itself; the rest of the recipe says how it is used.
BROUGHT = ("arguments", "setup", "files", "post")
PLAIN = "the recipe is refused here; built without it: run `moco`, which the SIF does not do by itself"
# Over there: by a login shell, as clusters have their tools in modules.
BUILDER = "type -P apptainer || type -P singularity"


def definition(recipe: str, archive: str, labels: dict[str, str]) -> str:
    """Return a recipe that makes a SIF from an archive of the image.

    It has the environment, the command and the test of the project's own recipe. labels: those of the image.
    """
    _, *sections = re.split(r"^%", recipe, flags=re.MULTILINE)
    kept = "".join(f"%{section}" for section in sections if section.split(None, 1)[0] not in BROUGHT)
    for name, key in (("version", "VERSION"), ("revision", "COMMIT")):
        kept = kept.replace(f"{{{{ {key} }}}}", labels.get(f"org.opencontainers.image.{name}", "unknown"))
    return f"Bootstrap: docker-archive\nFrom: {archive}\n\n{kept}"


def push_sif(tag: str, target: str, say: Say, folder: Path = Path()) -> None:
    """Save the image, copy it, and turn it into a SIF.

    target: PATH on this machine, or HOST:PATH for scp and ssh; a relative path is below the home folder. folder: the
    checkout. Raises UserError where a step fails; what a failed step leaves behind on the host is removed.
    """
    host, colon, path = target.rpartition(":")
    path = path.removeprefix("~/") if colon else path
    if not path.endswith(".sif"):
        raise UserError(f"{target}: the target must end in .sif")
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder.absolute()}: no {RECIPE} here; run this in the project's folder")
    client = connect()
    image = find(client, tag)
    for tool in ("scp", "ssh") if colon else ():
        if shutil.which(tool) is None:
            raise UserError(f"{tool}: not found here; needed for {target}")
    found = subprocess.run(_there(host, BUILDER), capture_output=True, text=True, errors="replace", check=False)
    if found.returncode == 255 and colon:
        raise UserError(f"{host}: ssh cannot log in: {' '.join(found.stderr.split())[-200:]}")
    if found.returncode != 0:
        raise UserError(f"{host or 'here'}: neither apptainer nor singularity is found; needed for {target}")
    builder = found.stdout.strip().splitlines()[-1]
    recipe = (folder / RECIPE).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="moco-sif-") as work:
        archive = Path(work) / "image.tar"
        _save(image, tag, archive, say)
        make_sif(host, path, archive, builder, recipe, image.labels, say)


def _save(image: Any, tag: str, archive: Path, say: Say) -> None:
    size, free = image.attrs["Size"], shutil.disk_usage(archive.parent).free
    if free < size:
        raise UserError(
            f"{archive.parent.parent}: {free / 1e9:.1f} GB are free, the image has {size / 1e9:.1f}; set TMPDIR to a "
            "folder with more"
        )
    say(f"saving {tag} ({size / 1e9:.1f} GB) to {archive}")
    try:
        with archive.open("wb") as file:
            for chunk in image.save(named=image.tags[0] if image.tags else False):
                file.write(chunk)
    except engine_errors() as error:
        raise UserError(f"{tag} could not be saved: {reason(error)}") from None
    except OSError as error:
        raise UserError(f"{archive.parent}: {error.strerror}; set TMPDIR to another place") from None


def make_sif(host: str, path: str, archive: Path, builder: str, recipe: str, labels: dict[str, str], say: Say) -> None:
    """Make the SIF on the host, or on this machine where `host` is empty.

    Raises UserError where a step fails; what was sent is removed.
    """
    copied = f"{path}.tar" if host else str(archive)
    own = archive.with_suffix(".def")
    own.write_text(definition(recipe, copied, labels))
    used = f"{path}.def" if host else str(own)
    # A recipe, even one that installs nothing, needs rights that some sites do not give; an archive does not.
    build = [builder, "build", "--force"]
    script = (
        f"{shlex.join([*build, '--notest', path, used])} || {{ echo {shlex.quote(PLAIN)}; "
        f"{shlex.join([*build, path, f'docker-archive:{copied}'])}; }}"
    )
    if not host:
        _call(_there(host, script), say)
        return
    left = shlex.join(["rm", "-f", copied, used])
    try:
        _call(["scp", str(archive), f"{host}:{copied}"], say)
        _call(["scp", str(own), f"{host}:{used}"], say)
        _call(_there(host, f"trap {shlex.quote(left)} EXIT; {script}"), say)
    except BaseException:  # an interruption as well
        subprocess.run(_there(host, left), capture_output=True, check=False)
        raise


def _there(host: str, script: str) -> list[str]:
    """Return the command that runs a script in the host's bash, or in this machine's."""
    return ["ssh", host, f"bash -lc {shlex.quote(script)}"] if host else ["bash", "-c", script]


def _call(command: list[str], say: Say) -> None:
    say(shlex.join(command))
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise UserError(f"{command[0]} failed with exit code {code}")
