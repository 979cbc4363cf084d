"""Stored teachers whose columns somebody chose: the student, a server's caller, a nucleus."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import INF, Backend, each_dtype, each_name, unreadable
from stored_teachers import assert_as_good_as_torch, each_tail
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence


def named(x: Tensor) -> list[list[int]]:
    """The columns of each row, in their order."""
    return [[int(i) for i in row if i >= 0] for row in x]


# ---- the habit


def test_a_students_own_columns_scored_by_the_teacher(backend: Backend) -> None:
    """On the student's own rows, reverse KL over its best columns and one bucket for the rest."""
    torch.manual_seed(0)
    student = torch.randn(2, 6, 50, device=backend.device, requires_grad=True)
    teacher = torch.randn(2, 6, 50, device=backend.device)
    scored = fastkd.topk_from_logits(teacher, indices=student.topk(8).indices)
    loss = fastkd.reverse_kl_div(student, scored)
    loss.backward()
    logq, logp = student.detach().double().log_softmax(-1), teacher.double().log_softmax(-1)
    at = student.topk(8).indices
    q, p = (torch.cat([x.gather(-1, at), rest_of(x, at)], -1) for x in (logq, logp))
    want = (q.exp() * (q - p)).sum(-1).mean()
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=1e-6)
    assert student.grad is not None and student.grad.isfinite().all()


def rest_of(log: Tensor, at: Tensor) -> Tensor:
    return log.scatter(-1, at, -INF).logsumexp(-1, keepdim=True)


def test_a_nucleus_in_a_loss(backend: Backend) -> None:
    torch.manual_seed(1)
    student = torch.randn(4, 200, device=backend.device, requires_grad=True)
    teacher = 4 * torch.randn(4, 200, device=backend.device)
    stored = fastkd.topk_from_logits(teacher, top_p=0.95)
    assert stored.size(-1) < 60
    fastkd.kl_div(student, stored).backward()
    assert student.grad is not None and student.grad.isfinite().all()


# ---- values


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chosen_columns(backend: Backend, dtype: torch.dtype, temperature: float) -> None:
    logits = (4 * torch.randn(2, 5, 300, device=backend.device)).to(dtype)
    at = torch.rand(2, 5, 300, device=backend.device).argsort(-1)[..., :9].to(torch.int32)
    at[0, 0, 3:], at[1, 4, 0], at[1, 2] = -1, -1, -1
    kept = fastkd.topk_from_logits(logits, indices=at, temperature=temperature)
    full = F.log_softmax(logits.double() / temperature, -1)
    there = at >= 0
    want = full.gather(-1, at.long().clamp_min(0)).masked_fill(~there, -INF)
    assert torch.equal(kept.indices, at)
    torch.testing.assert_close(kept.logprobs.double(), want, rtol=1e-5, atol=1e-5)
    off = torch.zeros_like(full).scatter_add(-1, at.long().clamp_min(0), there.double()) == 0
    rest = full.where(off, -INF).logsumexp(-1)
    assert kept.tail_logprob is not None
    torch.testing.assert_close(kept.tail_logprob.double(), rest, rtol=1e-5, atol=1e-5)


def test_the_rest_of_chosen_columns_does_not_cancel() -> None:
    logits = torch.full((1, 1000), -60.0)
    logits[0, 7] = 0.0
    kept = fastkd.topk_from_logits(logits, indices=torch.tensor([[-1, 7]]))
    assert kept.tail_logprob is not None
    assert float(kept.tail_logprob) == pytest.approx(-60 + math.log(999), rel=1e-6)


def test_the_best_columns_chosen_are_the_best_columns() -> None:
    logits = torch.randn(7, 80)
    best = fastkd.topk_from_logits(logits, 5)
    chosen = fastkd.topk_from_logits(logits, indices=best.indices)
    for a, b in zip((*best.tensors, best.indices), (*chosen.tensors, chosen.indices), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


@each_dtype
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_nucleus(backend: Backend, dtype: torch.dtype, top_p: float, spread: float) -> None:
    logits = (spread * torch.randn(2, 3, 700, device=backend.device)).to(dtype)
    logits[0, 1, 5:] = -INF
    kept = fastkd.topk_from_logits(logits, top_p=top_p, temperature=1.5)
    full = (logits.double() / 1.5).log_softmax(-1)
    p = full.exp().sort(-1, descending=True).values
    counts = (kept.indices >= 0).sum(-1)
    assert int(counts.max()) == kept.size(-1)
    reached = F.pad(p.cumsum(-1), (1, 0))
    assert (reached.gather(-1, counts[..., None]) > top_p - 1e-6).all()
    assert (reached.gather(-1, counts[..., None] - 1) < top_p + 1e-6).all()
    at = kept.indices.long()
    want = full.gather(-1, at.clamp_min(0)).masked_fill(at < 0, -INF)
    torch.testing.assert_close(kept.logprobs.double(), want, rtol=1e-5, atol=1e-5)
    assert (kept.logprobs[..., 1:] <= kept.logprobs[..., :-1]).all()
    mass = kept.logprobs.double().exp().sum(-1) + kept.tail_logprob.double().exp()  # type: ignore
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0.0, atol=1e-5)


def test_a_nucleus_by_hand(backend: Backend) -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.03, 0.02]], device=backend.device)
    for top_p, want in (
        (0.4, [[0], [1]]),
        (0.6, [[0, 1], [1]]),
        (0.91, [[0, 1, 2], [1, 0]]),
        (1.0, [[0, 1, 2, 3], [1, 0, 2, 3]]),
        (1e-30, [[0], [1]]),
    ):
        kept = fastkd.topk_from_logits(p.log(), top_p=top_p)
        assert named(kept.indices) == want, top_p
        assert kept.size(-1) == max(map(len, want))
    kept = fastkd.topk_from_logits(p.log(), 2, top_p=0.91)
    assert named(kept.indices) == [[0, 1], [1, 0]]
    kept = fastkd.topk_from_logits(p.log(), 4, top_p=0.6)
    assert kept.shape == (2, 4) and named(kept.indices) == [[0, 1], [1]]
    assert kept.logprobs[0, 2:].tolist() == [-INF, -INF]
    assert float(kept.tail_logprob[0]) == pytest.approx(math.log(0.2), rel=1e-5)  # type: ignore


def test_rows_of_several_blocks_have_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.topk.BLOCK", 200)
    logits = torch.arange(1, 8)[:, None] * torch.randn(7, 100)
    at = logits.topk(3).indices
    whole = fastkd.topk_from_logits(logits, top_p=0.8)
    chosen = fastkd.topk_from_logits(logits, indices=at)
    for row in range(7):
        alone = fastkd.topk_from_logits(logits[row], top_p=0.8)
        n = alone.size(-1)
        assert torch.equal(whole.indices[row, :n], alone.indices)
        assert (whole.indices[row, n:] == -1).all()
        one = fastkd.topk_from_logits(logits[row], indices=at[row])
        assert torch.equal(chosen.logprobs[row], one.logprobs)


def test_a_linear_teacher() -> None:
    hidden, weight = torch.randn(9, 6), torch.randn(50, 6)
    at = torch.rand(9, 50).argsort(-1)[:, :4]
    for options in ({"indices": at}, {"top_p": 0.7}, {"k": 5, "top_p": 0.7}):
        linear, dense = (
            fastkd.topk_from_logits(x, **options)
            for x in (fastkd.LinearLogits(hidden, weight), hidden @ weight.t())
        )
        assert torch.equal(linear.indices, dense.indices)
        torch.testing.assert_close(linear.logprobs, dense.logprobs)


def test_edges() -> None:
    none = fastkd.topk_from_logits(torch.randn(0, 5), top_p=0.5)
    assert none.shape == (0, 1)
    empty = torch.zeros(0, 3).long()
    assert fastkd.topk_from_logits(torch.randn(0, 5), indices=empty).shape == (0, 3)
    one = fastkd.topk_from_logits(torch.randn(5), indices=torch.tensor([4, -1]))
    assert one.shape == (2,) and one.tail_logprob is not None and one.tail_logprob.shape == ()
    x = torch.randn(3, 9)
    x[0, 4], x[1] = math.nan, -INF
    for options in ({"top_p": 0.5}, {"top_p": 1.0}, {"indices": torch.tensor([[2, -1]] * 3)}):
        kept = fastkd.topk_from_logits(x, **options)
        assert kept.logprobs[:, 0].isnan().tolist() == [True, True, False]
    narrow = fastkd.topk_from_logits(torch.randn(2, 9), top_p=1.0, vocab_size=4)
    assert narrow.shape == (2, 4) and int(narrow.indices.max()) == 3


@each_name
@each_tail
def test_losses_of_chosen_columns(backend: Backend, divergence: Divergence, tail: str) -> None:
    student, teacher = 3 * torch.randn(2, 4, 60, device=backend.device)
    at = student.topk(7).indices
    at[1, 4:] = -1
    kept = fastkd.topk_from_logits(teacher, indices=at, tail=tail)
    assert_as_good_as_torch(student, kept, divergence=divergence)


# ---- columns past the student's vocabulary


def past_the_student(backend: Backend, measured: bool) -> tuple[Tensor, Tensor, fastkd.TopK]:
    """Student [3, 40], all log-probabilities [3, 60] of a teacher, and its best 12 of the first."""
    student = 2 * torch.randn(3, 40, device=backend.device)
    teacher = 3 * torch.randn(3, 60, device=backend.device)
    teacher[1, 40:] -= 30  # one row without such columns
    kept = fastkd.topk_from_logits(teacher, 12)
    if not measured:
        kept = fastkd.TopK(kept.logprobs, kept.indices)
    return student, teacher.double().log_softmax(-1), kept


@each_name
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "unmeasured"])
def test_columns_past_the_student_are_a_part_of_the_bucket(
    backend: Backend, divergence: Divergence, measured: bool
) -> None:
    student, logp, kept = past_the_student(backend, measured)
    at = kept.indices.masked_fill(kept.indices >= 40, -1)
    inside = torch.zeros_like(logp).scatter_add(-1, at.long().clamp_min(0), (at >= 0).double()) > 0
    inside &= torch.arange(60, device=backend.device) < 40
    rest = logp.masked_fill(inside, -INF).logsumexp(-1)
    by_hand = fastkd.TopK(
        kept.logprobs.masked_fill(at < 0, -INF), at, tail_logprob=rest.to(kept.dtype)
    )
    want = assert_as_good_as_torch(student, by_hand, divergence=divergence)
    x = student.clone().requires_grad_()
    with (
        fastkd.checked(),
        pytest.warns(UserWarning, match=r"past the student's 40 .*outside\(40\)"),
    ):
        got = fastkd.distillation_loss(
            x, kept, alpha=0.0, temperature=1.0, divergence=divergence, t_squared=False
        )
    (grad,) = torch.autograd.grad(got, x)
    torch.testing.assert_close(got.detach(), want.value, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad, want.student, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "unmeasured"])
def test_within_is_what_the_loss_makes_of_it(
    backend: Backend, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _, kept = past_the_student(backend, measured)
    count = kept.outside(40)
    assert count.tolist() == (kept.indices >= 40).sum(-1).tolist() and int(count[1]) == 0
    inside = kept.within(40)
    assert not inside.outside(40).any() and int(inside.indices.max()) < 40
    assert kept.outside(60).sum() == 0
    want = fastkd.kl_div(student, inside, reduction="none")
    with pytest.warns(UserWarning) if backend.device.type == "cpu" else fastkd.checked():
        assert torch.equal(fastkd.kl_div(student, kept, reduction="none"), want)
    monkeypatch.setattr("fastkd.engine.topk_rows.reads_values", lambda x: False)
    assert torch.equal(fastkd.kl_div(student, kept, reduction="none"), want)
    linear = fastkd.LinearLogits(student, torch.eye(40, device=backend.device))
    torch.testing.assert_close(fastkd.kl_div(linear, kept, reduction="none"), want)


def test_a_row_whose_columns_are_all_past_the_student(backend: Backend) -> None:
    """Both sides have one outcome left: there is nothing to learn."""
    student = torch.randn(2, 5, device=backend.device, requires_grad=True)
    kept = fastkd.TopK(
        torch.tensor([[0.6, 0.3], [0.6, 0.3]], device=backend.device).log(),
        torch.tensor([[7, 9], [0, 7]], device=backend.device),
    )
    with fastkd.checked(), pytest.warns(UserWarning, match="past the student"):
        loss = fastkd.kl_div(student, kept, reduction="none")
    loss.sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(loss[0].detach().cpu(), torch.tensor(0.0), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(
        student.grad[0], torch.zeros_like(student.grad[0]), rtol=0, atol=1e-6
    )
    assert loss[1] > 0 and student.grad[1].abs().max() > 1e-3


def test_what_else_is_wrong_is_still_found(backend: Backend) -> None:
    student = torch.randn(1, 5, device=backend.device)
    for ids, values, message in (
        ([7, 7], [-1.0, -2.0], "for the second time"),
        ([7, 9], [-0.1, -0.1], "a mass of 1.8"),
        ([7, 1], [0.5, -1.0], "got 0.5 in row 0"),
        ([7, -2], [-1.0, -1.0], "indices: got -2"),
    ):
        kept = fastkd.TopK(torch.tensor([values]), torch.tensor([ids])).to(backend.device)
        with fastkd.checked(), pytest.raises(ValueError, match=message):
            fastkd.kl_div(student, kept)


def test_within_has_a_bucket_only() -> None:
    kept = fastkd.topk_from_logits(torch.randn(2, 9), 3, tail="renormalize")
    with pytest.raises(ValueError, match=r"tail: got 'renormalize', expected 'bucket'"):
        kept.within(5)


def test_a_gradient_of_logprobs_past_the_student() -> None:
    student = torch.randn(2, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 6, 2], [1, 3, -1]])
    logprobs = torch.tensor([[0.4, 0.3, 0.1], [0.5, 0.2, 1.0]]).double().log().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return fastkd.kl_div(student, fastkd.TopK(x, ids).within(4))

    assert torch.autograd.gradcheck(loss, logprobs)


# ---- a rest that nobody measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_mass_above_1_leaves_the_reverse_finite(backend: Backend, dtype: torch.dtype) -> None:
    """Rounded above 1, a mass does not say that the teacher excludes a rest."""
    logprobs = torch.tensor([[0.7, 0.29, 0.0099], [1.0, 1e-5, 1e-7]]).log().to(dtype)
    logprobs[1, 0] = 0.0
    at = torch.tensor([[4, 1, 2], [0, 1, 2]])
    kept = fastkd.TopK(logprobs, at).to(backend.device)
    student = torch.randn(2, 6, device=backend.device, requires_grad=True)
    for loss in (fastkd.reverse_kl_div, fastkd.kl_div, fastkd.js_div):
        value = loss(student, kept)
        (grad,) = torch.autograd.grad(value, student)
        assert value.isfinite() and grad.isfinite().all()
    measured = fastkd.TopK(
        *kept.tensors[:1], kept.indices, tail_logprob=torch.full((2,), -INF).to(backend.device)
    )
    assert fastkd.reverse_kl_div(student, measured) == INF


# ---- under torch.compile


def test_compiled() -> None:
    def scored(x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        kept = fastkd.topk_from_logits(x, indices=at)
        best = fastkd.topk_from_logits(x, 4, top_p=0.5)
        return kept.logprobs, best.indices

    x = torch.randn(3, 40)
    at = x.topk(3).indices
    got = torch.compile(scored, fullgraph=True, backend="eager")(x, at)
    for a, b in zip(got, scored(x, at), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(Exception, match=r"top_p: got no k"):
        torch.compile(
            lambda x: fastkd.topk_from_logits(x, top_p=0.5).logprobs,
            fullgraph=True,
            backend="eager",
        )(x)


# ---- bad input


@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("k: got none of them, expected one of k, indices and top_p", ValueError, {}),
        ("k: got k with indices", ValueError, {"k": 2, "indices": [[0], [1]]}),
        ("indices: got indices with top_p", ValueError, {"top_p": 0.5, "indices": [[0], [1]]}),
        ("k: got k with indices with top_p", ValueError, {"k": 2, "top_p": 0.5, "indices": [[0]]}),
        ("method: got 'sample' with top_p", ValueError, {"top_p": 0.5, "method": "sample"}),
        ("method: got 'sample' with indices", ValueError, {"indices": [[0]], "method": "sample"}),
        ("top_p: got 0", ValueError, {"top_p": 0}),
        ("top_p: got 1.5", ValueError, {"top_p": 1.5}),
        ("top_p: got nan", ValueError, {"top_p": math.nan}),
        ("top_p: got bool", TypeError, {"top_p": True}),
        ("top_p: got a tensor", TypeError, {"top_p": torch.tensor(0.5)}),
        ("k: got 9, expected 1 <= k <= 5", ValueError, {"k": 9, "top_p": 0.5}),
        (r"indices: got 5 in row 1, place 0, expected 0 to 4", ValueError, {"indices": [[0], [5]]}),
        (r"indices: got -2 in row 0", ValueError, {"indices": [[-2], [1]]}),
        (
            "indices: got 3 again in row 1, place 2",
            ValueError,
            {"indices": [[0, 1, 2], [3, -1, 3]]},
        ),
        (r"indices: got shape \[1, 1\], expected \[2, K\]", ValueError, {"indices": [[0]]}),
        (r"indices: got shape \[2\], expected \[2, K\]", ValueError, {"indices": [0, 1]}),
        (r"indices: got shape \[2, 0\]", ValueError, {"indices": [[], []]}),
        ("indices: got a tensor .* of torch.float32", TypeError, {"indices": [[0.0], [1.0]]}),
    ],
)
def test_refused(message: str, error: type[Exception], options: dict[str, Any]) -> None:
    if "indices" in options:
        at = torch.tensor(options["indices"])
        options["indices"] = at.long() if at.numel() == 0 else at
    with pytest.raises(error, match=message) as caught:
        fastkd.topk_from_logits(torch.randn(2, 5), **options)
    assert len(str(caught.value)) < 500


def test_indices_that_are_no_tensor() -> None:
    with pytest.raises(TypeError, match="indices: got list"):
        fastkd.topk_from_logits(torch.randn(2, 5), indices=[[0], [1]])  # type: ignore[arg-type]


def test_a_bad_index_that_nobody_looks_at(monkeypatch: Any, backend: Backend) -> None:
    for module in ("fastkd.topk", "fastkd.engine.topk_rows"):
        monkeypatch.setattr(f"{module}.reads_values", lambda x: False)
    at = torch.tensor([[0, 2], [1, 5], [-7, 2], [1, 2**40 + 1]], device=backend.device)
    teacher, student = torch.randn(2, 4, 5, device=backend.device)
    kept = fastkd.topk_from_logits(teacher, indices=at)
    got = fastkd.kl_div(student, kept, reduction="none")
    assert got.isnan().tolist() == [False, True, True, True]


def test_nothing_is_waited_for() -> None:
    with unreadable():
        x = torch.randn(3, 40)
        fastkd.topk_from_logits(x, indices=x.topk(3).indices)
        assert fastkd.topk_from_logits(x, 4, top_p=0.5).shape == (3, 4)
