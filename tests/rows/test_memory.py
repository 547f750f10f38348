"""Large results in pages of the system's own: the same numbers, wherever they lie."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.cases import CASES
from tests.reference import assert_rows_close, flat, rows_by_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import rowgrad as rg
from rowgrad.rows import memory

MAPPED = pytest.mark.skipif(not memory.HAS_HUGE_PAGES, reason="the system has no pages to choose from")
LIKES = [torch.zeros((), dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16, torch.complex128)]


@pytest.fixture
def mapped(monkeypatch):
    """Every result is large, and nothing is left of earlier ones."""
    monkeypatch.setattr(memory, "LEAST_BYTES", 1)
    monkeypatch.setattr(memory, "_unused", [])


@pytest.fixture
def unused(mapped):
    """What nobody uses."""
    return memory._unused


@MAPPED
@pytest.mark.parametrize("like", LIKES, ids=lambda t: str(t.dtype))
@pytest.mark.parametrize("make", [memory.empty, memory.zeros])
def test_a_mapped_tensor_is_one_like_any_other(mapped, make, like):
    found = make((3, 5, 7), like)
    assert found.shape == (3, 5, 7)
    assert found.dtype == like.dtype
    assert found.is_contiguous()
    assert not found._is_view()
    assert found.data_ptr() % memory.HUGE_PAGE == 0
    assert not found.any()
    values = torch.arange(105).reshape(3, 5, 7)
    found.copy_(values)
    assert torch.equal(found.real.long(), values)


@MAPPED
def test_only_what_is_large_and_on_the_cpu_is_mapped():
    like = torch.zeros(())
    n = memory.LEAST_BYTES // 4
    assert memory.empty((n,), like).data_ptr() % memory.HUGE_PAGE == 0
    assert memory.empty((n - 1,), like).data_ptr() % memory.HUGE_PAGE != 0
    assert memory.empty((n,), torch.zeros((), device="meta")).device.type == "meta"
    assert memory.zeros((2, 2), like).tolist() == [[0, 0], [0, 0]]


@MAPPED
def test_memory_outlives_the_tensor_that_named_it_first(mapped):
    found = memory.empty((1000,), torch.zeros(())).fill_(3.0)
    part = found[10:20]
    del found
    assert part.tolist() == [3.0] * 10


@MAPPED
def test_what_nobody_uses_serves_the_next_of_its_size(unused):
    like = torch.zeros(())
    found = memory.empty((1000,), like)
    part, where = found[10:20], found.data_ptr()
    del found
    assert memory.empty((1000,), like).data_ptr() != where  # in use by a part, which is left alone
    part.fill_(1.0)
    del part
    assert memory.empty((10**7,), like).data_ptr() != where  # too small
    zeros = memory.zeros((1000,), like)
    assert zeros.data_ptr() != where
    assert not zeros.any()
    memory.release()
    found = memory.empty((1000,), like)
    where = found.data_ptr()
    del found
    assert memory.empty((990,), like).data_ptr() == where


@MAPPED
@pytest.mark.parametrize("make", [memory.empty, memory.zeros])
def test_a_storage_spans_no_older_numbers(unused, make):
    """They would go out with whoever saves the tensor."""
    like = torch.zeros(())
    memory.empty((10**6,), like).fill_(7.25)
    found = make((10**6 - 10**5,), like)
    assert found.untyped_storage().nbytes() == 4 * found.numel()
    assert found.storage_offset() == 0


@MAPPED
def test_numbers_survive_what_is_freed_and_used_again(unused):
    like, held = torch.zeros(()), []
    for i in range(19):
        found = memory.empty((100, 10), like).fill_(i)
        if i % 3:
            held.append((i, found[::7]))
        del found
    assert all((part == i).all() for i, part in held)
    assert len(unused) == 1  # of the last, which the one after it would have got


@MAPPED
def test_only_so_much_stays(unused, monkeypatch):
    like = torch.zeros(())
    tensors = [memory.empty((1000,), like) for _ in range(5)]
    size = memory.HUGE_PAGE + 4000
    monkeypatch.setattr(memory, "UNUSED_BYTES", 2 * size)
    del tensors
    assert [len(mapping) for mapping in unused] == [size, size]
    memory.release()
    assert not unused


@MAPPED
@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_nothing_stays_where_the_system_could_not_take_it(unused, monkeypatch, error):
    class Map(mmap.mmap):
        def madvise(self, option, *args):
            if option == mmap.MADV_FREE:
                raise error
            super().madvise(option, *args)

    monkeypatch.setattr(memory.mmap, "mmap", Map)
    memory.empty((1000,), torch.zeros(())).fill_(1.0)
    assert not unused


@MAPPED
def test_what_stays_is_given_back_where_there_is_no_other_memory(unused, monkeypatch):
    like = torch.zeros(())
    memory.empty((1000,), like)
    assert len(unused) == 1

    class Map(mmap.mmap):
        def __new__(cls, *args, **options):
            if unused:
                raise OSError(12, "Cannot allocate memory")
            return super().__new__(cls, *args, **options)

    monkeypatch.setattr(memory.mmap, "mmap", Map)
    assert memory.empty((10**7,), like).data_ptr() % memory.HUGE_PAGE == 0


@MAPPED
def test_threads_never_share_what_stays(unused):
    like = torch.zeros(())

    def work(nr: int) -> bool:
        for i in range(50):
            value = 1000 * nr + i
            found = memory.empty((500,), like).fill_(value)
            if not (found == value).all():
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("failing", ["mmap", "madvise", "none"])
def test_a_system_without_such_pages_gives_ordinary_memory(mapped, monkeypatch, failing):
    class Map(mmap.mmap):
        def __new__(cls, *args, **options):
            if failing == "mmap":
                raise OSError(12, "Cannot allocate memory")
            return super().__new__(cls, *args, **options)

        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Map)
    if failing == "none":
        monkeypatch.setattr(memory, "HAS_HUGE_PAGES", False)
    found = memory.empty((4, 4), torch.zeros(()))
    assert found.data_ptr() % memory.HUGE_PAGE != 0


@pytest.mark.parametrize("like", LIKES, ids=lambda t: str(t.dtype))
def test_a_piece_that_is_used_up_is_lent_again(like):
    with memory.scratch((2, 3), like) as first, memory.scratch((2, 3), like) as second:
        assert first.shape == (2, 3)
        assert (first.dtype, first.device) == (like.dtype, like.device)
        first.fill_(1)
        second.fill_(2)
        assert (first == 1).all()
        where = first.data_ptr()
    with memory.scratch((5,), like) as third:
        assert third.data_ptr() == where
    with pytest.raises(ZeroDivisionError), memory.scratch((5,), like):
        _ = 1 / 0
    with memory.scratch((5,), like) as fourth:
        assert fourth.data_ptr() == where


def test_what_is_lent_is_small_and_the_threads_own():
    like = torch.zeros(())
    with memory.scratch((memory.SCRATCH_BYTES // 4,), like) as piece:
        where = piece.data_ptr()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(address_of_a_piece, like).result() != where
    with memory.scratch((memory.SCRATCH_BYTES // 4 + 1,), like) as larger:
        assert larger.data_ptr() != where
    with memory.scratch((2,), torch.zeros((), device="meta")) as elsewhere:
        assert elsewhere.device.type == "meta"


def address_of_a_piece(like):
    with memory.scratch((2,), like) as piece:
        return piece.data_ptr()


def test_a_piece_made_in_inference_mode_serves_beyond_it(monkeypatch):
    monkeypatch.setattr(memory, "_scratch", memory._Scratch())
    with torch.inference_mode(), memory.scratch((2,), torch.zeros(())) as piece:
        piece.fill_(1.0)
    with memory.scratch((2,), torch.zeros(())) as piece:
        piece.fill_(2.0)
    with torch.device("meta"), memory.scratch((2,), torch.zeros((), device="cpu")) as piece:
        assert piece.device.type == "cpu"


class Tagged(torch.Tensor):
    pass


class MakesTagged(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return found.as_subclass(Tagged) if type(found) is torch.Tensor else found


@pytest.mark.parametrize("mode", [MakesTagged, lambda: FakeTensorMode(allow_non_fake_inputs=True)], ids=["fn", "fake"])
def test_what_a_mode_makes_of_a_piece_does_not_outlive_it(mode, monkeypatch):
    monkeypatch.setattr(memory, "_scratch", memory._Scratch())
    like = torch.zeros(())
    with memory.scratch((3,), like):
        pass
    with mode(), memory.scratch((7,), like) as inside:
        assert type(inside) is not torch.Tensor
    with memory.scratch((7,), like) as piece:
        assert type(piece) is torch.Tensor
        assert piece.data_ptr() == memory._scratch.piece.data_ptr()


def test_what_a_transform_makes_of_a_piece_does_not_outlive_it(monkeypatch):
    monkeypatch.setattr(memory, "_scratch", memory._Scratch())

    def within(x):
        with memory.scratch((7,), torch.zeros(())):
            return x.sum()

    with memory.scratch((3,), torch.zeros(())):
        pass
    torch.func.grad(within)(torch.ones(2))
    with memory.scratch((7,), torch.zeros(())) as piece:
        assert piece.data_ptr() == memory._scratch.piece.data_ptr()


def test_views_of_the_piece_are_few(monkeypatch):
    monkeypatch.setattr(memory, "_scratch", memory._Scratch())
    for n in range(2 * memory.KNOWN_VIEWS):
        with memory.scratch((n,), torch.zeros(())) as piece:
            assert piece.shape == (n,)
    assert len(memory._scratch.views) == memory.KNOWN_VIEWS


CHOSEN = [n for n, c in CASES.items() if c.fast and c.deterministic and c.independent and c.dtype == torch.float64]


@MAPPED
@pytest.mark.parametrize("name", CHOSEN)
def test_rows_are_the_same_in_mapped_memory(mapped, name):
    setup = CASES[name].build()
    expected = rows_by_grad(setup.losses(), setup.params)
    J = rg.jacobian(setup.losses(), setup.model)
    assert_rows_close(J.dense(as_dict=True), expected)
    assert torch.allclose(J.dense(), flat(expected), rtol=1e-9, atol=1e-10)
