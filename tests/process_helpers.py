"""`moco` in processes of its own, without the seconds that importing torch takes in each."""

from __future__ import annotations

import contextlib
import encodings
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moco.training.distributed import DistributedContext, end_process, from_environment
from server_helpers import free_port

# Processes are forked from one that has imported what takes long; torch.optim imports torch._dynamo when it is used.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["moco.cli.main", "moco.stages.pretrain", "torch._dynamo"])
running: list[Started] = []


def in_processes(find: Callable[[DistributedContext, Path], Any], size: int, folder: Path) -> list[Any]:
    """What `find` returns in each of several processes, of one thread, that are connected as those of torchrun."""
    port = free_port()
    workers = [SERVER.Process(target=_joined, args=(find, rank, size, port, folder)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * size
    return [torch.load(folder / f"found-{rank}.pth") for rank in range(size)]


def _joined(find: Callable[[DistributedContext, Path], Any], rank: int, size: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK=str(rank))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    processes = from_environment()
    with processes.process_group(torch.device("cpu")):
        found = find(processes, folder)
    torch.save(found, folder / f"found-{rank}.pth")
    end_process(0)


class Started:
    """`moco ARGS` in a project's folder, with environment variables beside those of the test, as a group of its own.

    room: so many bytes may be allocated after the imports, by a limit as `ulimit -v` sets it.
    """

    def __init__(self, project: Path, *arguments: str, room: int | None = None, **variables: str) -> None:
        descriptor, name = tempfile.mkstemp(prefix="moco-test-errors-")
        os.close(descriptor)
        self._errors = Path(name)
        environment = {**os.environ, **variables}
        self._process = SERVER.Process(target=_moco, args=(project, arguments, environment, self._errors, room))
        self._process.start()
        running.append(self)

    def send_signal(self, number: int) -> None:
        assert self._process.pid and self.runs()
        os.kill(self._process.pid, number)

    def kill_group(self) -> None:
        """SIGKILL to the process and all that it has started."""
        assert self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it has not become a group yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def runs(self) -> bool:
        return self._process.is_alive()

    def finish(self) -> tuple[int | None, str]:
        """Its exit code, negative where a signal ended it, and what it wrote to stderr. Asked once."""
        self._process.join(120)
        assert not self.runs(), f"did not end: {self._errors.read_text()}"
        said = self._errors.read_text()
        self.forget()
        return self._process.exitcode, said

    def forget(self) -> None:
        """Ends it if need be."""
        if self.runs():
            self.kill_group()
        self._process.join()
        self._errors.unlink()
        running.remove(self)


def _moco(
    project: Path, arguments: tuple[str, ...], environment: dict[str, str], errors: Path, room: int | None
) -> None:
    os.setsid()
    os.chdir(project)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    sys.argv = ["moco", *arguments]
    from moco.cli.main import main

    if room is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))
    main()


def make_ready() -> None:
    """So that the first process begins as fast as the others."""
    process = SERVER.Process(target=int)
    process.start()
    process.join()


def wait_for_steps(process: Started | None, project: Path, count: int, stage: str = "pretrain") -> None:
    """Until the last metric log of the stage, by name, has `count` losses; at most for as long as the process runs."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        logs = sorted((project / "runs" / stage).glob("*/metrics.jsonl"))
        if logs and logs[-1].read_text().count('"loss"') >= count:
            return
        assert process is None or process.runs(), process.finish()
        time.sleep(0.01)
    raise AssertionError("training did not start")


def start_two(project: Path, *, rooms: tuple[int | None, int | None] = (None, None)) -> list[Started]:
    """Two processes of one pretraining, as torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Started(project, "pretrain", room=room, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, room in enumerate(rooms)
    ]


def finish(processes: list[Started]) -> tuple[list[int | None], list[str]]:
    """Exit codes, and what each said."""
    found = [started.finish() for started in processes]
    return [code for code, _ in found], [errors for _, errors in found]


def forget_failed_imports() -> None:
    """Forget what could not be imported without root's rights, as the folder of Python itself may be root's alone."""
    importlib.invalidate_caches()
    known = encodings._cache  # type: ignore[attr-defined]
    for name in [name for name, found in known.items() if found is None]:
        del known[name]
