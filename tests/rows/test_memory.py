"""Large results in pages of the system's own: the same numbers, wherever they lie."""

from __future__ import annotations

import mmap

import pytest
import torch
from tests.cases import CASES
from tests.reference import assert_rows_close, flat, rows_by_grad

import rowgrad as rg
from rowgrad.rows import memory

MAPPED = pytest.mark.skipif(not memory.HAS_HUGE_PAGES, reason="the system has no pages to choose from")
LIKES = [torch.zeros((), dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16, torch.complex128)]


@pytest.fixture
def mapped(monkeypatch):
    """Every result is large."""
    monkeypatch.setattr(memory, "LEAST_BYTES", 1)


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
    assert memory.empty((n - 1,), like).untyped_storage().nbytes() == 4 * (n - 1)
    assert memory.empty((n,), torch.zeros((), device="meta")).device.type == "meta"
    assert memory.zeros((2, 2), like).tolist() == [[0, 0], [0, 0]]


@MAPPED
def test_memory_outlives_the_tensor_that_named_it_first(mapped):
    found = memory.empty((1000,), torch.zeros(())).fill_(3.0)
    part = found[10:20]
    del found
    assert part.tolist() == [3.0] * 10


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
    assert found.untyped_storage().nbytes() == 64


CHOSEN = [n for n, c in CASES.items() if c.fast and c.deterministic and c.independent and c.dtype == torch.float64]


@MAPPED
@pytest.mark.parametrize("name", CHOSEN)
def test_rows_are_the_same_in_mapped_memory(mapped, name):
    setup = CASES[name].build()
    expected = rows_by_grad(setup.losses(), setup.params)
    J = rg.jacobian(setup.losses(), setup.model)
    assert_rows_close(J.dense(as_dict=True), expected)
    assert torch.allclose(J.dense(), flat(expected), rtol=1e-9, atol=1e-10)
