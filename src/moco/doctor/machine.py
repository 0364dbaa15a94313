"""Checks of the machine: they need no project."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import tempfile
from pathlib import Path

from moco.doctor.checks import (
    Finding,
    command,
    fail,
    file_system,
    note,
    numbers,
    ok,
    reason,
    warn,
)
from moco.environment import PACKAGE, differing_code, other_checkout
from moco.errors import UserError, first_of

DRIVER_LIBRARIES = Path("/.singularity.d/libs")  # where Apptainer's --nv puts the host's
READ = "gzip and xz images are read as they are, others"
UNPACKED = f"{READ} unpacked to scratch, which takes room for all pictures (squashfuse and /dev/fuse would spare it)"


def container_kind(root: Path = Path("/")) -> str | None:
    """Return which container this process runs in, with the image's name where it is known; None outside of one."""
    for variable in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"):
        if os.environ.get(variable):
            return f"{variable.partition('_')[0].capitalize()}, image {Path(os.environ[variable]).name}"
    if (root / ".singularity.d").is_dir():
        return "Apptainer or Singularity, image not named by the environment"
    if (root / ".dockerenv").exists():
        # Docker tells a container its id alone, as the host name.
        return f"Docker, container {socket.gethostname()}"
    return None


def container(root: Path = Path("/")) -> Finding:
    """Tell the container: Docker, Apptainer or none."""
    return ok("container", container_kind(root) or "none")


def needed_glibc(libraries: Path) -> str | None:
    """Return the newest glibc that the host's driver libraries need; None where none are bound."""
    found: set[bytes] = set()
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        if (libraries / name).is_file():
            found.update(re.findall(rb"GLIBC_(\d+\.\d+)", (libraries / name).read_bytes()))
    return max((version.decode() for version in found), key=numbers, default=None)


def libc(libraries: Path = DRIVER_LIBRARIES) -> Finding:
    """Tell the C library, and whether it is new enough for the driver libraries that --nv brings in."""
    kind, version = platform.libc_ver()
    if kind != "glibc" or not version:
        return note("libc", f"no glibc ({platform.system()} {platform.machine()})")
    needed = needed_glibc(libraries)
    if needed is None:
        return ok("libc", f"glibc {version}")
    if numbers(needed) > numbers(version):
        return fail(
            "libc",
            f"the host's driver libraries need glibc {needed}, the image has {version}",
            "build the image from a newer base (apptainer.def, --build-arg) or run without --nv",
        )
    return ok("libc", f"glibc {version}, the host's driver libraries need {needed}")


def squashfs(fuse: Path = Path("/dev/fuse")) -> Finding:
    """Tell by what means a squashfs image can be opened: tested where one can be packed, else judged."""
    if shutil.which("mksquashfs"):
        return _open_tiny_image()
    untried = "(not tried, as there is no mksquashfs)"
    if shutil.which("squashfuse") and os.access(fuse, os.R_OK | os.W_OK):
        return ok("squashfs", f"{READ} by squashfuse {untried}")
    if shutil.which("mount") and os.geteuid() == 0:
        return note("squashfs", f"{READ} by the kernel's mount, if this root may mount {untried}")
    if shutil.which("unsquashfs"):
        return note("squashfs", f"{UNPACKED} {untried}")
    return note("squashfs", f"{READ} cannot be opened without squashfuse or squashfs-tools")


def _open_tiny_image() -> Finding:
    from moco.data.squashfs import open_squashfs, opened

    with tempfile.TemporaryDirectory(prefix="moco-doctor-", ignore_cleanup_errors=True) as work:
        source, image, said = Path(work) / "source", Path(work) / "probe.sqsh", list[str]()
        source.mkdir()
        (source / "probe.txt").write_text("probe", encoding="utf-8")
        packed = command("mksquashfs", str(source), str(image), "-noappend", "-quiet", "-no-progress", timeout=60)
        if packed is None or packed.returncode != 0:
            why = reason(packed.stderr) if packed else "not executable"
            return fail("squashfs", f"mksquashfs cannot pack a folder in {work}: {why}", "install squashfs-tools anew")
        try:
            with opened(image, Path(work), lambda _: None) as found:
                whole = (found / "probe.txt").read_text(encoding="utf-8") == "probe"
            with open_squashfs(image, Path(work), said.append) as root:
                kind = file_system(root) if root.is_mount() else None
                whole = whole and (root / "probe.txt").read_text(encoding="utf-8") == "probe"
        except UserError as error:
            return note("squashfs", f"{READ} cannot be opened ({reason(str(error))})")
        if not whole:
            return fail("squashfs", f"an opened image ({kind}) shows other content", "install another squashfuse")
        if len(said) > 1:  # the first line tells the means, a second that undoing it failed
            return warn("squashfs", said[-1], "install fusermount, or unmount it by hand")
    if kind is None:
        return note("squashfs", UNPACKED)
    return ok("squashfs", f"{READ} opened by {'the kernel' if kind == 'squashfs' else 'squashfuse'} (both tried)")


def user_namespaces(root: Path = Path("/")) -> Finding:
    """Tell whether an ordinary user may build and overlay with Apptainer."""
    name = "user namespaces"
    done = command("unshare", "--user", "--map-root-user", "true")
    if done is None:
        return note(name, "cannot be tried: unshare is not installed")
    if done.returncode == 0:
        return ok(name, "permitted" + (" (tried as root)" if os.geteuid() == 0 else ""))
    if container_kind(root) is not None:
        return note(name, "forbidden within this container, which tells nothing about the host")
    return warn(
        name,
        "unprivileged user namespaces are forbidden",
        "rootless apptainer build and overlays need the administrator (setuid apptainer)",
    )


def slurm() -> Finding:
    """Tell Slurm's version, and the job that this process runs in."""
    job = os.environ.get("SLURM_JOB_ID")
    within = f", in job {job}, partition {os.environ.get('SLURM_JOB_PARTITION', 'unknown')}" if job else ""
    done = command("sbatch", "--version")
    if done is None:
        return note("slurm", f"no sbatch here{within or ': jobs are submitted where there is one'}")
    if done.returncode != 0:
        return warn("slurm", f"sbatch does not work: {reason(done.stderr)}{within}", "ask the administrator")
    return ok("slurm", done.stdout.strip() + within)


def code() -> Finding:
    """Tell whether the moco that runs is the project's own: DVC and the record name that one."""
    from moco.runs.identity import SETTINGS, code_of

    other = other_checkout()
    if other is None:
        own = Path("src/moco").is_dir()
        return ok("code", "this folder's own, src/moco") if own else note("code", f"{PACKAGE}: none in this folder")
    if different := differing_code(other):
        remedy = "`make install` here and use its moco, or set PYTHONPATH=src"
        decides = {name for stage in SETTINGS for name in code_of(stage)}
        judged = fail if decides & set(different) else warn
        return judged("code", f"{PACKAGE} runs; {len(different)} files differ here: {first_of(different)}", remedy)
    return note("code", f"{PACKAGE} runs, not this folder's src/moco, which is the same at present")
