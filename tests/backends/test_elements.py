"""The kernels' passes over logits one by one: places, factors, labels, guesses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from common import require
from oracle import differentiate
from torch import Tensor

import fastkd

NAN = float("nan")
LOSS = fastkd.binary_distillation_loss
LABELS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
LABELS += [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=["cpu", "gpu"])
def backend(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return str(request.param)


@pytest.fixture(params=["baseline", "avx2", "avx512", "gpu"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend, whose C++ is that for one instruction set."""
    if request.param == "gpu":
        require("gpu")
        yield "gpu"
        return
    require("cpu")
    from fastkd import _C

    if request.param not in _C.isas():
        pytest.skip(f"this processor has no {request.param}")
    before = _C.isa()
    _C.use_isa(request.param)
    yield "cpu"
    _C.use_isa(before)


def both(name: str, s: Tensor, t: Tensor, *labels: Tensor, **options: Any) -> None:
    """The kernel's value and gradients are those of torch's operations."""
    found, want = (_on(at, s, t, *labels, **options) for at in (name, "reference"))
    torch.testing.assert_close(found.value, want.value, rtol=1e-5, atol=1e-6)
    for x, mine, its in ((s, found.student, want.student), (t, found.teacher, want.teacher)):
        assert mine is not None and its is not None and mine.dtype == x.dtype
        at = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(x.dtype, 1e-5)
        torch.testing.assert_close(mine, its, rtol=2 * at, atol=float(its.abs().max()) * 1e-5)


def _on(name: str, *operands: Tensor, **options: Any) -> Any:
    with fastkd.use_backend(name):
        return differentiate(LOSS, *operands, wrt="both", **options)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js"])
def test_sizes(kernels: str, name: str) -> None:
    for n in (1, 3, 15, 16, 17, 33, 2047, 2048, 2049, 8191, 8193):
        s, t = (3 * torch.randn(2, n + 1)).unbind()
        y = torch.rand(n)
        y[::3] = -100.0
        for reduction in ("mean", "none"):
            both(kernels, s[1:], t[1:], y, divergence=name, reduction=reduction)
    kinds = (torch.float32, torch.bfloat16), (torch.float16, torch.float16)
    for a, b in (*kinds, (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float16)):
        options: dict[str, Any] = dict(divergence=name, temperature=3.0, reduction="sum")
        both(kernels, s.to(a), t.to(b), alpha=0.0, **options)


@pytest.mark.parametrize("dtype", LABELS)
@pytest.mark.interpreted(4)
def test_label_kinds(dtype: torch.dtype, backend: str) -> None:
    s, t = torch.randn(2, 7, 5).unbind()
    y = torch.randint(2, (7, 5)).to(dtype)
    if dtype != torch.bool:
        y[2, 3], y[0] = 100, 1
    both(backend, s, t, y, ignore_index=(100, -100))


@pytest.mark.parametrize("shape", [(), (5,), (3, 1), (1, 3, 1), (2, 1, 1), (2, 3, 5), (2, 1, 5)])
@pytest.mark.interpreted(4)
def test_factors(shape: tuple[int, ...], backend: str) -> None:
    s, t, y = torch.randn(3, 2, 3, 5).unbind()
    for x in (s, s.transpose(1, 2).contiguous().transpose(1, 2), torch.randn(2, 3, 10)[..., ::2]):
        weight = torch.rand(shape)
        both(backend, x, t, y.sigmoid(), weight=weight, pos_weight=torch.rand(shape))
        both(backend, x, t, y.sigmoid(), weight=weight, pos_weight=torch.rand(3, 1))
        both(backend, x, t, alpha=0.0, weight=torch.rand(shape).double())


def test_the_bits(backend: str) -> None:
    """They depend on no guess, no thread and no neighbour; NaN stays where it is."""
    n, bad = (70_001, 20_000) if backend == "cpu" else (4_097, 2_050)
    s, t = torch.randn(2, n).half().unbind()
    s[7], t[bad] = NAN, NAN
    y = torch.rand(n)
    leaf = s.clone().requires_grad_()
    grads = []
    with fastkd.use_backend(backend):
        for by in (1.0, 65_536.0, 65_536.0, 1.0, 3.0, 3.0):
            loss = LOSS(leaf, t, y, reduction="sum") * by
            first, again = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
            assert first.isnan().nonzero().flatten().tolist() == [7, bad]
            assert torch.equal(first.nan_to_num(), again.nan_to_num())
            grads.append(first.nan_to_num())
        assert torch.equal(grads[0], grads[3]) and torch.equal(grads[1], grads[2])
        before = torch.get_num_threads()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                per = LOSS(s, t, y, reduction="none")
                found = differentiate(LOSS, s, t, y, reduction="sum").student
            finally:
                torch.set_num_threads(before)
            assert found is not None and torch.equal(found.nan_to_num(), grads[0])
            alone = LOSS(s[900:903], t[900:903], y[900:903], reduction="none")
            assert torch.equal(per[900:903], alone)


def test_nothing_beside_is_read(backend: str) -> None:
    storage = torch.full((3, 70), NAN)
    s, t, y = storage[0, 5:42], storage[1, 6:43], storage[2, 7:44]
    for x in (s, t, y):
        x.copy_(torch.rand(37))
    with fastkd.use_backend(backend):
        found = differentiate(LOSS, s, t, y).student
    assert found is not None and found.isfinite().all()
    assert storage.isnan().sum() == 3 * 70 - 3 * 37


def test_no_number_is_read_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading would wait: neither values nor labels, weights, normalizer or upstream."""
    require("gpu")
    monkeypatch.setattr("fastkd.engine.elementwise.reads_values", lambda _: False)
    s, t, y = torch.randn(3, 4, 5).unbind()
    y, leaf = y.sigmoid(), s.clone().requires_grad_()
    launched: list[Any] = []
    monkeypatch.setattr(
        "fastkd.backends.gpu.launch.launch", lambda kernel, *_: launched.append(kernel)
    )
    reads = ["__float__", "__bool__", "item", "tolist", "__int__"]
    with fastkd.use_backend("gpu"), monkeypatch.context() as watch:
        for options in (dict(), dict(weight=torch.rand(5)), dict(normalizer=torch.tensor(7))):
            launched.clear()
            for name in reads:
                watch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a number was read"))
            LOSS(leaf, t, y, **options).backward()
            assert len(launched) == (3 if "normalizer" in options else 5)
