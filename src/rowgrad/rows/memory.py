"""Memory for large results on the CPU, in pages of 2 MB where the system has them, and for what is used up at once.

Note [fresh pages]
    What a process asks for comes without pages; the system makes each at its first touch and fills it with zeros.
    In pages of 4 KB that takes several times as long as writing the numbers: 60 ms for 340 MB on a machine where
    writing them again takes 10 ms, and 14 ms in pages of 2 MB. Rows of large layers are such results, each call anew.
    Blocks below `LEAST_BYTES` come from `malloc`, which often keeps what was freed and hands it out again, pages and
    all. It gives back what lies at the end of its memory, so that pieces of a few MB, each made and used up in turn,
    may cost their pages every time. Those share a piece that stays, one a thread.

Note [pages that stay]
    Whether there are pages of 2 MB to be had hangs on what else the system does, and the same rows may take three times
    as long an hour later. So what nobody uses any longer stays with the process for the next result of about its size,
    as in PyTorch's own allocators for accelerators. It comes back when the storage of the last tensor in it lets go of
    the memoryview that it was made of. It is marked as free, so that the system may take the pages when it is short of
    memory; the addresses stay. A storage spans its own numbers alone, and no older ones beside them. Up to
    `UNUSED_BYTES` stay, those used last.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

LEAST_BYTES = 32 * 2**20  # above the largest block that glibc keeps
HUGE_PAGE = 2 * 2**20
SCRATCH_BYTES = 8 * 2**20  # that stay, a thread
KNOWN_VIEWS = 64  # shapes and dtypes in which that was lent
HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")  # Linux
UNUSED_BYTES = 4 * 2**30  # that stay, of all threads
SLACK = 1.25  # how many times as much as is asked for may be used


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor to be written whole, of this shape and the dtype and device of `like`. See Note [pages that stay]."""
    n_bytes = prod(shape) * like.element_size()
    mapping = None
    if _is_mapped(n_bytes, like):
        mapping = _taken(n_bytes + HUGE_PAGE) or _mapped(n_bytes + HUGE_PAGE, huge=True)
    if mapping is None:
        return like.new_empty(tuple(shape))
    view = _aligned(mapping, n_bytes)
    weakref.finalize(view, _left, mapping).atexit = False
    return _tensor_in(view, shape, like)


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros to be written here and there: pages that nobody touches are never made."""
    n_bytes = prod(shape) * like.element_size()
    mapping = _mapped(n_bytes + HUGE_PAGE, huge=False) if _is_mapped(n_bytes, like) else None
    return like.new_zeros(tuple(shape)) if mapping is None else _tensor_in(_aligned(mapping, n_bytes), shape, like)


def release() -> None:
    """Give the system back what stays for the next results."""
    _unused.clear()


class _Scratch(threading.local):
    piece: Tensor | None = None  # made when it is first asked for
    is_lent = False

    def __init__(self) -> None:
        self.views: dict[tuple, Tensor] = {}  # of the piece, by shape and dtype


_scratch = _Scratch()


class scratch:
    """A tensor to be written whole and read within the block, and not beyond it.

    A small plain one on the CPU lies in the thread's piece, unless that is lent already.
    """

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        self._shape, self._like = tuple(shape), like
        self._has_piece = False

    def __enter__(self) -> Tensor:
        shape, like = self._shape, self._like
        if _scratch.is_lent or not like.is_cpu or type(like) is not Tensor:
            return empty(shape, like)
        view = _scratch.views.get((shape, like.dtype))
        if view is None:
            if prod(shape) * like.dtype.itemsize > SCRATCH_BYTES:
                return empty(shape, like)
            view = _view(shape, like.dtype)
        _scratch.is_lent = self._has_piece = True
        return view

    def __exit__(self, *_: object) -> None:
        if self._has_piece:
            _scratch.is_lent = False


def _view(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode
        if _scratch.piece is None:
            _scratch.piece = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device="cpu")
        found = _scratch.piece[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
    if _is_plain_view(found, _scratch.piece):
        _scratch.views[shape, dtype] = found
        if len(_scratch.views) > KNOWN_VIEWS:
            _scratch.views.pop(next(iter(_scratch.views)))
    return found


def _is_plain_view(t: Tensor, whole: Tensor) -> bool:
    """False for what modes and transforms around the call made of it, which must not outlive them."""
    with suppress(RuntimeError):  # it has no address
        return type(t) is Tensor and t.data_ptr() == whole.data_ptr()
    return False


def _is_mapped(n_bytes: int, like: Tensor) -> bool:
    return n_bytes >= LEAST_BYTES and like.device.type == "cpu" and HAS_HUGE_PAGES


def _mapped(n_bytes: int, huge: bool) -> mmap.mmap | None:
    """Memory of the system's own, which is zero; None where it would not help or cannot be had."""
    for _ in range(2):
        with suppress(OSError):  # no such pages in this kernel, or no memory, which PyTorch says better
            found = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if huge:
                found.madvise(mmap.MADV_HUGEPAGE)
            return found
        release()
    return None


def _aligned(mapping: mmap.mmap, n_bytes: int) -> memoryview:
    """As many bytes from the first border of a large page."""
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return memoryview(mapping)[start : start + n_bytes]


def _tensor_in(view: memoryview, shape: Sequence[int], like: Tensor) -> Tensor:
    storage = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
    return like.new_empty(0).set_(storage, 0, tuple(shape))  # pyright: ignore[reportCallIssue]


_unused: list[mmap.mmap] = []  # the one used last at the end; changed by single operations, as threads may do


def _taken(n_bytes: int) -> mmap.mmap | None:
    """Of what nobody uses, one of about that size."""
    for mapping in reversed(_unused.copy()):
        if n_bytes <= len(mapping) <= SLACK * n_bytes:
            with suppress(ValueError):  # another thread was first
                _unused.remove(mapping)
                return mapping
    return None


def _left(mapping: mmap.mmap) -> None:
    """It stays if the system can take its pages."""
    try:
        mapping.madvise(mmap.MADV_FREE)
    except (OSError, AttributeError):
        return
    _unused.append(mapping)
    while sum(map(len, _unused.copy())) > UNUSED_BYTES:
        with suppress(IndexError):
            _unused.pop(0)
