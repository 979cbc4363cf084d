"""The CPU's gradient buffers: used again when free, never while anybody holds them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from common import imported_anew
from torch import Tensor

import fastkd
from fastkd.backends import buffer_pool

SHAPE = (64, 20000)  # 5 MB in float32: above buffer_pool.LEAST


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    buffer_pool.release()
    yield
    buffer_pool.release()


def _gradient() -> Tensor:
    student = torch.zeros(SHAPE, requires_grad=True)
    (grad,) = torch.autograd.grad(fastkd.kl_div(student, torch.randn(SHAPE)), student)
    return grad


def test_a_free_buffer_is_used_again() -> None:
    first = buffer_pool.empty(torch.empty(SHAPE))
    place = first.data_ptr()
    del first
    assert buffer_pool.empty(torch.empty(SHAPE)).data_ptr() == place


def test_a_buffer_in_use_is_left_alone() -> None:
    kept = _gradient()
    copy, part = kept.clone(), kept[3:5]
    place = kept.data_ptr()
    del kept  # the view still holds the storage
    other = _gradient()
    assert other.data_ptr() != place
    torch.testing.assert_close(part, copy[3:5], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("typed", [False, True])
def test_a_storage_object_counts_as_a_holder(typed: bool) -> None:
    kept = _gradient()
    copy = kept.clone()
    storage = kept.storage() if typed else kept.untyped_storage()
    place = kept.data_ptr()
    del kept
    assert _gradient().data_ptr() != place
    again = torch.empty(0).set_(storage, 0, SHAPE, (SHAPE[1], 1))
    torch.testing.assert_close(again, copy, rtol=0, atol=0)


def test_shared_memory_is_given_up() -> None:
    """What a queue of torch.multiprocessing does to a tensor that is sent through it."""
    sent = _gradient().share_memory_()
    place = sent.data_ptr()
    del sent
    other = _gradient()
    assert other.data_ptr() != place and not other.is_shared()


def test_a_leaf_keeps_its_gradient_over_steps() -> None:
    student, teacher = torch.zeros(SHAPE, requires_grad=True), torch.randn(SHAPE)
    fastkd.kl_div(student, teacher).backward()
    assert student.grad is not None
    once = student.grad.clone()
    fastkd.kl_div(student, teacher).backward()
    torch.testing.assert_close(student.grad, 2 * once)


def test_shape_and_dtype_are_those_asked_for() -> None:
    held = buffer_pool.empty(torch.empty(SHAPE))
    del held
    like = torch.empty(SHAPE[::-1]).t()  # as many bytes, other strides
    got = buffer_pool.empty(like)
    assert got.shape == like.shape and got.is_contiguous() and got.dtype == like.dtype
    del got
    half = torch.empty(128, 20000, dtype=torch.bfloat16)
    assert buffer_pool.empty(half).dtype == torch.bfloat16


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * SHAPE[0] * SHAPE[1]
    monkeypatch.setattr(buffer_pool, "limit", 2 * size)
    held = [buffer_pool.empty(torch.empty(SHAPE)) for _ in range(5)]
    assert sum(storage.nbytes() for storage in buffer_pool._kept) <= 2 * size
    assert len({x.data_ptr() for x in held}) == 5
    monkeypatch.setattr(buffer_pool, "limit", size - 1)
    before = len(buffer_pool._kept)
    buffer_pool.empty(torch.empty(SHAPE))
    assert len(buffer_pool._kept) == before  # larger than the bound: torch's business


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(megabytes: str) -> int:
        monkeypatch.setenv("FASTKD_POOL_MB", megabytes)
        pool = imported_anew("fastkd.backends.buffer_pool")
        pool.empty(torch.empty(SHAPE))
        return len(pool._kept)

    assert kept("0") == 0 and kept("64") == 1
    with pytest.raises(ValueError, match="FASTKD_POOL_MB: got 'many'"):
        kept("many")
