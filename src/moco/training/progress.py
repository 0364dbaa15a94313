"""A progress bar on a terminal; a line now and then in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY = 15.0  # seconds between two lines in a file
FIRST_LINE = 5.0  # seconds to the first
LENGTH = 1000  # steps of the bar, whatever it counts


class Display(Protocol):
    """What the loop reports its progress to, at its beginning and then after every step.

    fraction: how much of the whole is done. rate: images/s. words: a few words to show.
    """

    def start(self, fraction: float) -> None:
        """Begin to show progress, from this fraction on."""

    def update(self, fraction: float, rate: float, words: str) -> None:
        """Show the progress after a step."""


def clock(seconds: float) -> str:
    """Return a time as '1:02:03' or '2:03'."""
    minutes, s = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


class ProgressDisplay:
    """A context manager that shows progress.

    The time left is that of the rest at the mean speed since `start`, pauses included.
    """

    def __init__(self, title: str, terminal: bool | None = None) -> None:
        self.title = title
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.began, self.first, self.last_line = time.monotonic(), 0.0, time.monotonic() - LINE_EVERY + FIRST_LINE
        self.bar: Progress | None = None
        self.always_ends = True  # with a line in a file, however short it was

    def __enter__(self) -> ProgressDisplay:
        self.began = time.monotonic()
        if self.terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
            self.bar = Progress(*columns, console=Console(stderr=True), transient=False)
            self.bar.start()
            self.bar.add_task(self.title, total=LENGTH, words="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, fraction: float) -> None:
        """Begin to measure time; a resumed run does not begin at 0."""
        self.began, self.first = time.monotonic(), fraction

    @contextmanager
    def counting(self, total: int) -> Iterator[Callable[[int], None]]:
        """Yield a function to call with the number of images of each batch that is done, of `total` images.

        Within the context it is shown how many are done.
        """
        done, self.always_ends = 0, False

        def advance(images: int) -> None:
            nonlocal done
            done += images
            rate = done / max(time.monotonic() - self.began, 1e-9)
            self.update(done / max(total, 1), rate, f"{done:,} of {total:,} images")

        with self:
            yield advance

    def update(self, fraction: float, rate: float, words: str) -> None:
        """Show the progress: on a terminal at once, in a file a line every LINE_EVERY seconds and at the end."""
        now = time.monotonic()
        spent, done = now - self.began, fraction - self.first
        left = clock(spent / done * (1 - fraction)) if done > 0 else "-"
        text = f"{fraction:4.0%} {rate:,.0f} images/s {left} left  {words}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=fraction * LENGTH, words=text)
        elif now - self.last_line >= LINE_EVERY or (
            fraction >= 1 and (self.always_ends or now - self.began >= LINE_EVERY)
        ):
            self.last_line = now
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)
