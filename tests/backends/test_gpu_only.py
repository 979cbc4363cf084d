"""What only a GPU shows: offsets past 2^31, captured graphs, real vocabularies, streams."""

from __future__ import annotations

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before


import fastkd
from fastkd.backends import base
from fastkd.backends.base import rows_of as rows

pytest.importorskip("triton")
from gpu_rows import DEVICE, assert_like_reference, each_name, fused, make, spec_of

from fastkd.backends.gpu import BACKEND as gpu

INF, NAN = math.inf, math.nan
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# numpy's warnings about inf - inf under the interpreter; on a GPU nothing warns
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---- only on a GPU


@needs_gpu
@pytest.mark.parametrize("programs", ["", "0"])
def test_offsets_past_two_to_the_31(programs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_GPU_COOPERATIVE", programs)
    n, vocab = 16_500, 131_072
    student = torch.empty(n, vocab, dtype=torch.bfloat16, device=DEVICE)
    teacher = torch.randn(1, vocab, device=DEVICE).bfloat16().expand(n, vocab)
    student[-1] = torch.randn(vocab, device=DEVICE)
    keep = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    keep[-1] = True
    last = student[-1:].clone()
    spec = spec_of("kl", vocab)
    loss = gpu.fused(rows(student), rows(teacher), spec, base.Rows(keep), rows(student))
    small = torch.empty_like(last)
    alone = gpu.fused(rows(last), rows(teacher[:1]), spec, base.Rows(), rows(small))
    # one row alone is shared by more programs than each of many
    torch.testing.assert_close(loss[-1:], alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(student[-1:], small, rtol=1e-2, atol=1e-9)
    assert not loss[:-1].any() and not student[: n // 2].any()


@needs_gpu
@each_name
@pytest.mark.parametrize(("n", "vocab"), [(64, 5000), (3, 128_256)])
def test_capture_in_a_graph(name: str, n: int, vocab: int) -> None:
    x, spec = make(1, n, vocab, (torch.bfloat16,) * 2), spec_of(name, vocab, hard=0.3)
    grad = torch.empty_like(x.student)
    fused(gpu, x, spec, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fused(gpu, x, spec, grad)
    x.student.copy_(torch.randn_like(x.student))
    graph.replay()
    again = torch.empty_like(grad)
    assert torch.equal(loss, fused(gpu, x, spec, again)) and torch.equal(grad, again)


@needs_gpu
@each_name
@pytest.mark.parametrize("n", [1, 64, 500])
@pytest.mark.parametrize("vocab", [50_257, 128_256])
def test_real_vocabularies(name: str, n: int, vocab: int) -> None:
    """From many programs to a row to one; rows on a 16-byte boundary, and odd ones."""
    spec = spec_of(name, vocab, hard=0.3, smoothing=0.1)
    for pair in ((torch.bfloat16,) * 2, (torch.float32,) * 2):
        x = make(1, n, vocab, pair)
        loss, grad = assert_like_reference(x, spec)
        again = torch.empty_like(grad)
        assert torch.equal(loss, fused(gpu, x, spec, again)) and torch.equal(grad, again)
        fused(gpu, x, spec, x.student)
        assert torch.equal(x.student, grad)


@needs_gpu
@pytest.mark.parametrize("n", [64, 600])
def test_second_stream(n: int) -> None:
    x, spec = make(1, n, 50_000), spec_of("js", 50_000)
    grads = [torch.empty_like(x.student) for _ in range(2)]
    loss = fused(gpu, x, spec, grads[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = fused(gpu, x, spec, grads[1])
    stream.synchronize()
    torch.cuda.synchronize()
    assert torch.equal(loss, other) and torch.equal(*grads)


@needs_gpu
def test_nothing_waits_for_the_device() -> None:
    student = torch.randn(64, 5000, device=DEVICE, requires_grad=True)
    teacher, labels = torch.randn_like(student), torch.randint(0, 5000, (64,), device=DEVICE)

    def step() -> None:
        fastkd.distillation_loss(student, teacher, labels).backward()
        loss = fastkd.js_div(student, teacher, labels=labels, reduction="none")
        (3.0 * loss.sum()).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
