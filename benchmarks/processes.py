"""A function in a process of its own, so that its memory is its own and its end is not ours."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = [
    "benchmarks.methods", "opacus.grad_sample", "opacus.layers", "backpack.extensions", "torchjd.autogram",
    "captum.influence", "torch._dynamo",
]  # fmt: skip
SHARE_OF_MEMORY = 0.8  # of what is available; a method that needs more has failed
M_MMAP_THRESHOLD = -3  # glibc's name for the size from which a block is returned to the system when freed
M_TRIM_THRESHOLD = -1  # and for how much is free at the end of its memory before that goes back, too
LARGEST_KEPT = 32 * 2**20  # glibc keeps no larger blocks
PR_SET_PDEATHSIG = 1  # Linux's name for the signal that comes when the parent ends, so that nothing is left behind
KIB = 1024

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)  # imported once; what is missing is found missing where it is needed


class ProcessError(Exception):
    """The process gave no result; the text says why."""


def run(function: Callable[..., Any], *arguments: Any, time_limit: float) -> Any:
    """`function(*arguments)` in a fresh process; the function and all that it takes and returns are pickled."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_serve, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(time_limit):
            raise ProcessError(f"no result after {time_limit:.0f} s")
        succeeded, result = receiver.recv()
    except EOFError:
        process.join()
        raise ProcessError(f"the process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not succeeded:
        raise ProcessError(result)
    return result


def _serve(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    limit = _kilobytes("/proc/self/status", "VmSize") + SHARE_OF_MEMORY * _kilobytes("/proc/meminfo", "MemAvailable")
    resource.setrlimit(resource.RLIMIT_AS, (int(limit * KIB), int(limit * KIB)))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.freeze()  # what was imported is no garbage
    try:
        sender.send((True, function(*arguments)))
    except Exception as error:  # noqa: BLE001 (whatever a rival raises is its result)
        sender.send((False, describe(error)))


def describe(error: Exception) -> str:
    """The first line of an error, with its kind."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    return f"{type(error).__name__}: {text}"[:300]


def return_freed_blocks() -> None:
    """From now on large blocks go back to the system at once, so that the resident memory is what is in use."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)


def keep_freed_blocks() -> None:
    """From now on what is freed stays with the process for the next block.

    Otherwise whether a step asks the system for its memory anew, at a tenth of its time or more, hangs on which blocks
    happen to lie at the end, and so on what other methods did before.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def resident_bytes() -> int:
    """What this process holds, when everything that can be given back has been."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _kilobytes("/proc/self/status", "VmRSS") * KIB


def peak_bytes(function: Callable[[], Any]) -> tuple[int, Any]:
    """The most that the process held while the function ran, and its result."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the highest mark back
    result = function()
    return _kilobytes("/proc/self/status", "VmHWM") * KIB, result


def _kilobytes(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise KeyError(field)
