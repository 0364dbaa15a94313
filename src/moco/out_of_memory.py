"""Which of the many errors of libraries mean that memory is full. torch is not imported for that."""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from moco.errors import UserError

GPU = "the GPU's memory is full"
MACHINE = "the memory is full, or what this process may take of it"
# Words of errors, and what they mean; the first that are found count. Without a type in common, words are all there is.
WORDS = {
    "CUDA error: out of memory": f"{GPU}, or the machine's that is kept in place for it",
    "out of memory": GPU,  # of CUDA, HIP and MPS
    "ALLOC_FAILED": GPU,  # cuBLAS, cuDNN
    "CUBLAS_STATUS_NOT_INITIALIZED": "cuBLAS could not begin, mostly as the GPU's memory is full",
    "can't allocate memory": MACHINE,  # torch's allocator
    "Cannot allocate memory": MACHINE,  # a file that is mapped
    "std::bad_alloc": MACHINE,
    "failed to map segment": MACHINE,  # a library that is loaded
    # With the end of the line: that no descriptor of one can be made means that it does not exist.
    "could not create a primitive\n": "oneDNN could not set up a layer, mostly as the memory is full",
    "can't start new thread": "no thread can be started: memory, or the number of processes, is at its limit",
}
ASKED = re.compile(r"(?i:tried to|unable to) allocate (\d+ bytes|[\d.]+ [MGT]i?B)")


def refuse_queue(length: int, dim: int) -> None:
    """Raise UserError where a queue of `length` keys of `dim` float32 numbers is larger than the machine's memory."""
    needed = length * dim * 4
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # the system does not tell
        return
    if needed > there:
        raise UserError(
            f"pretrain.queue: {length} keys of {dim} numbers (pretrain.dim) take {needed / 2**30:,.0f} GiB, and this "
            f"machine has {there / 2**30:,.0f} GiB; lower pretrain.queue", "E-MEMORY-QUEUE",
        )  # fmt: skip


class FullMemory(NamedTuple):
    """Which memory was full, in words, and whether it is that of a GPU."""

    what: str
    gpu: bool

    def reading(self, place: object, done: str) -> UserError:
        """Return the error for a file that was to be loaded or decoded: a damaged one may ask for any amount."""
        return UserError(f"{place}: cannot be {done}: {self.what}; where there is enough, it is damaged")


def full_memory(error: BaseException) -> FullMemory | None:
    """Return which memory was full when this error was raised; None for an error of another kind."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        what = MACHINE
    elif not isinstance(error, (RuntimeError, ImportError)):
        return None
    else:
        found = [meaning for words, meaning in WORDS.items() if words in f"{text}\n"]
        if not found:
            return None
        what = found[0]
    return FullMemory(what + _asked(text), "GPU" in what)


def _asked(text: str) -> str:
    asked = ASKED.search(text)
    if asked is None:
        return ""
    size = asked[1].replace(". ", " ")
    if size.endswith("bytes"):
        size = f"{int(size.split()[0]) >> 20} MiB"
    return "" if size == "0 MiB" else f" (asked for {size} more)"
