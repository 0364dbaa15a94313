"""`moco` in processes of its own, without the seconds that importing torch takes in each."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

# Processes are forked from one that has imported what takes long; torch.optim imports torch._dynamo when it is used.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["moco.cli", "moco.stages.pretrain", "torch._dynamo"])


class Started:
    """`moco ARGS` in a project's folder, with environment variables of its own."""

    def __init__(self, project: Path, *arguments: str, **variables: str) -> None:
        descriptor, name = tempfile.mkstemp(prefix="moco-test-errors-")
        os.close(descriptor)
        self._errors = Path(name)
        self._process = SERVER.Process(target=_moco, args=(project, arguments, variables, self._errors))
        self._process.start()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)

    def runs(self) -> bool:
        return self._process.is_alive()

    def finish(self) -> tuple[int | None, str]:
        """Its exit code, negative where a signal ended it, and what it wrote to stderr. Asked once."""
        self._process.join(90)
        self._process.kill()  # one that has not ended
        self._process.join()
        said = self._errors.read_text()
        self._errors.unlink()
        return self._process.exitcode, said


def _moco(project: Path, arguments: tuple[str, ...], variables: dict[str, str], errors: Path) -> None:
    from moco.cli import main

    os.chdir(project)
    os.environ.update(variables)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    sys.argv = ["moco", *arguments]
    main()


def wait_for_steps(process: Started | None, project: Path, count: int, stage: str = "pretrain") -> None:
    """Until the newest metric log of the stage has `count` losses; at most for as long as the process runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        logs = sorted((project / "runs" / stage).glob("*/metrics.jsonl"))
        if logs and logs[-1].read_text().count('"loss"') >= count:
            return
        assert process is None or process.runs(), process.finish()
        time.sleep(0.01)
    raise AssertionError("training did not start")
