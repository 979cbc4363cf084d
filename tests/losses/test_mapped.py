"""A draft model's vocabulary: a student of some of its teacher's columns, and their map."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import INF, Backend, each_name
from mapped_teachers import (
    V_S,
    V_T,
    assert_as_good_as_torch,
    differentiated,
    each_normalize,
    operands,
    ours,
)
from pairwise import pairwise
from torch import Tensor, nn

import fastkd
from fastkd.divergence import Divergence

# ---- the habit


def test_a_draft_model_of_eagle(backend: Backend) -> None:
    """A draft head of 20 of 64 tokens learns from the target's own head; d2t holds offsets."""
    torch.manual_seed(0)
    target_head = nn.Linear(16, 64, bias=False).to(backend.device).requires_grad_(False)
    hidden = torch.randn(2, 7, 16, device=backend.device)  # of the target model
    d2t = torch.arange(20, device=backend.device) * 2 + 3  # draft token i is token i + d2t[i]
    draft, draft_head = (nn.Linear(16, n).to(backend.device) for n in (16, 20))
    optimizer = torch.optim.AdamW([*draft.parameters(), *draft_head.parameters()], lr=1e-2)
    columns = d2t + torch.arange(len(d2t), device=d2t.device)
    t2d = torch.zeros(64, dtype=torch.bool, device=d2t.device).index_fill(0, columns, True)
    assert torch.equal(t2d.nonzero().squeeze(-1), columns)
    losses = []
    for _ in range(12):
        teacher = fastkd.MappedLogits(target_head(hidden), columns)
        spoken = t2d[target_head(hidden).argmax(-1)]  # positions whose best token the draft has
        labels = torch.where(spoken, 0, -100)
        loss = fastkd.kl_div(draft_head(draft(hidden)), teacher, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    linear = fastkd.MappedLogits(fastkd.LinearLogits(hidden, target_head.weight), columns)
    again = fastkd.kl_div(draft_head(draft(hidden)), linear, labels=labels)
    dense = fastkd.kl_div(draft_head(draft(hidden)), teacher, labels=labels)
    torch.testing.assert_close(again, dense)


def test_one_minus_tv_is_the_rate_of_acceptance(backend: Backend) -> None:
    """Of a token drawn from the draft, accepted with min(1, p / q): sum of min(p, q)."""
    student, teacher, columns = operands(backend)
    tv = fastkd.tv_distance(student, fastkd.MappedLogits(teacher, columns, normalize="all"))
    p = teacher.double().softmax(-1)[:, columns]
    rate = torch.minimum(p, student.double().softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(1 - tv.double(), rate, rtol=1e-5, atol=1e-6)


# ---- values


@each_name
@each_normalize
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.interpreted(8)
def test_values(
    backend: Backend, divergence: Divergence, normalize: str, temperature: float
) -> None:
    given = operands(backend)
    assert_as_good_as_torch(*given, normalize, divergence=divergence, temperature=temperature)


PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.float32, torch.float64),
    (torch.float64, torch.bfloat16),
]


@pairwise
@each_normalize
@pytest.mark.parametrize(
    "pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", "")
)
@pytest.mark.parametrize("widths", [(1, 2), (5, 5), (300, 2100)], ids=str)
@pytest.mark.interpreted(8)
def test_dtypes_and_widths(
    backend: Backend, normalize: str, pair: Any, widths: tuple[int, int]
) -> None:
    given = operands(backend, (2, 3), widths, pair)
    for name in ("kl", "js"):
        assert_as_good_as_torch(*given, normalize, divergence=fastkd.divergences[name])


@each_normalize
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.interpreted(4)
def test_with_hard_labels(
    backend: Backend, normalize: str, smoothing: float, temperature: float
) -> None:
    given = operands(backend, (3, 2))
    labels = torch.randint(0, V_S, (3, 2), device=backend.device)
    labels[0, 1] = labels[2] = -100
    given[0][2], given[1][0, 1] = math.nan, math.nan  # of rows that nobody reads
    for name in ("kl", "tv"):
        mine = assert_as_good_as_torch(
            *(x.nan_to_num(0.0) if x.is_floating_point() else x for x in given),
            normalize,
            labels,
            divergence=fastkd.divergences[name],
            temperature=temperature,
            alpha=0.3,
            label_smoothing=smoothing,
        )
        again = differentiated(
            ours,
            *given,
            normalize,
            labels,
            divergence=name,
            temperature=temperature,
            alpha=0.3,
            label_smoothing=smoothing,
        )
        assert torch.equal(again.value, mine.value) and again.student is not None
        assert torch.equal(again.student, mine.student) and not again.student[2].any()


LINEAR = ["linear-teacher", "linear-student", "linear"]


@each_normalize
@pytest.mark.parametrize("form", LINEAR)
@pytest.mark.parametrize("name", ["kl", "skew_kl"])
@pytest.mark.interpreted(6)
def test_linear(backend: Backend, normalize: str, form: str, name: str) -> None:
    """Products with the identity: the logits themselves, a few rows at a time."""
    student, teacher, columns = operands(backend)

    def linear(s: Tensor, t: Tensor, *args: Any, **options: Any) -> Tensor:
        sides = [
            fastkd.LinearLogits(x, torch.eye(x.size(-1), device=x.device), chunk_size=2)
            if side in form or form == "linear"
            else x
            for x, side in ((s, "student"), (t, "teacher"))
        ]
        return ours(*sides, *args, **options)

    assert_as_good_as_torch(
        student, teacher, columns, normalize, function=linear, divergence=fastkd.divergences[name]
    )


@each_normalize
def test_a_real_head(backend: Backend, normalize: str) -> None:
    """With a bias, a scale and a softcap; a pack, and a gradient of the student's weight."""
    hidden, weight, bias = torch.randn(6, 8), 3 * torch.randn(40, 8), torch.randn(40)
    draft, head = torch.randn(6, 5), torch.randn(9, 5)
    columns, labels = torch.randperm(40)[:9], torch.tensor([1, -100, 2, 3, -100, 0])
    hidden, weight, bias, draft, head, columns, labels = (
        x.to(backend.device) for x in (hidden, weight, bias, draft, head, columns, labels)
    )
    made = fastkd.LinearLogits(hidden, weight, bias, scale=0.5, softcap=4.0, chunk_size=2)
    dense = torch.tanh(0.5 * F.linear(hidden, weight, bias) / 4.0) * 4.0
    results = []
    for teacher, student in (
        (made, lambda x: fastkd.LinearLogits(draft, x, chunk_size=2, pack=True)),
        (dense, lambda x: draft @ x.t()),
    ):
        x = head.clone().requires_grad_()
        loss = ours(student(x), teacher, columns, normalize, labels, alpha=0.5)
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@each_name
def test_a_map_of_all_columns_is_no_map(backend: Backend, divergence: Divergence) -> None:
    student, teacher, columns = operands(backend, widths=(30, 30))
    for normalize in ("mapped", "all"):
        got = differentiated(ours, student, teacher, columns, normalize, divergence=divergence)
        want = differentiated(
            fastkd.distillation_loss,
            student,
            teacher[:, columns].contiguous(),
            alpha=0.0,
            temperature=1.0,
            divergence=divergence,
        )
        torch.testing.assert_close(got.value, want.value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.student, want.student, rtol=1e-4, atol=1e-6)


def test_kl_over_all_weighs_by_the_mass_on_the_map(backend: Backend) -> None:
    student, teacher, columns = operands(backend)
    mass = teacher.double().softmax(-1)[:, columns].sum(-1)
    apart = ours(student, teacher, columns, "mapped", reduction="none").double()
    whole = ours(student, teacher, columns, "all", reduction="none").double()
    torch.testing.assert_close(whole, mass * apart + mass * mass.log(), rtol=1e-4, atol=1e-5)


# ---- options


@each_normalize
def test_options(backend: Backend, normalize: str) -> None:
    student, teacher, columns = operands(backend, (6,))
    each = ours(student, teacher, columns, normalize, reduction="none")
    weight = torch.rand(6, device=backend.device)
    for reduction, want in (
        ("sum", (each * weight).sum()),
        ("mean", (each * weight).sum() / weight.sum()),
        ("batchmean", (each * weight).sum() / 6),
    ):
        got = ours(student, teacher, columns, normalize, reduction=reduction, weight=weight)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    padded = F.pad(student, (0, 4), value=7.0)
    got = ours(padded, teacher, columns, normalize, vocab_size=V_S, reduction="none")
    torch.testing.assert_close(got, each)
    few = ours(student, teacher, columns, normalize, vocab_size=9, reduction="none")
    want = ours(student[:, :9].contiguous(), teacher, columns[:9], normalize, reduction="none")
    torch.testing.assert_close(few, want)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1.0
    loss = ours(logits, teacher, columns, normalize, inplace=True)
    plainly = ours(leaf, teacher, columns, normalize)
    torch.testing.assert_close(*(torch.autograd.grad(x * 3, leaf)[0] for x in (loss, plainly)))
    nothing = ours(
        leaf, teacher, columns, normalize, torch.zeros(6).long().to(backend.device), alpha=1.0
    )
    torch.testing.assert_close(
        nothing, F.cross_entropy(student, torch.zeros(6).long().to(backend.device))
    )


@each_normalize
def test_rows_have_bits_of_their_own(
    kernels: Backend, normalize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone or in a batch, in blocks or at once, whatever the factor of the gradient."""
    student, teacher, columns = operands(kernels, (3,))

    def gradient(s: Tensor, t: Tensor, by: float = 1.0) -> tuple[Tensor, Tensor]:
        s = s.detach().requires_grad_()
        rows = ours(s, t, columns, normalize, reduction="none", divergence="js")
        total = ours(s, t, columns, normalize, reduction="sum", divergence="js") * by
        return rows.detach(), torch.autograd.grad(total, s)[0]

    loss, grad = gradient(student, teacher)
    for row in range(3):
        own, its = gradient(student[row : row + 1], teacher[row : row + 1])
        assert torch.equal(own[0], loss[row]) and torch.equal(its[0], grad[row])
    monkeypatch.setattr("fastkd.engine.mapped_rows.BLOCK", 2 * V_S)
    for by in (1.0, 4.0, 4.0):
        again = gradient(student, teacher, by)
        assert torch.equal(again[0], loss) and torch.equal(again[1], grad * by)


@each_normalize
def test_strides(backend: Backend, normalize: str) -> None:
    student, teacher, columns = operands(backend, (3, 4))
    want = differentiated(ours, student, teacher, columns, normalize, divergence="tv")
    wide = torch.randn(4, 3, V_T + 5, device=backend.device)
    wide[..., 2 : V_T + 2] = teacher.transpose(0, 1)
    s = student.transpose(0, 1).contiguous().transpose(0, 1)
    got = differentiated(
        ours, s, wide[..., 2 : V_T + 2].transpose(0, 1), columns, normalize, divergence="tv"
    )
    torch.testing.assert_close(got.value, want.value)
    torch.testing.assert_close(got.student, want.student)


def test_edges(backend: Backend) -> None:
    student, teacher, columns = operands(backend, (3,))
    for normalize in ("mapped", "all"):
        empty = ours(student[:0], teacher[:0], columns, normalize, reduction="none")
        assert empty.shape == (0,)
        assert float(ours(student[:0], teacher[:0], columns, normalize)) == 0.0
        one = ours(student[0], teacher[0], columns, normalize, reduction="none")
        assert one.shape == ()
        certain = torch.full_like(teacher, -INF).index_fill(-1, columns[3], 0.0)
        got = ours(student, certain, columns, normalize, reduction="none")
        want = -student.log_softmax(-1)[:, 3]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        spoilt = teacher.clone()
        spoilt[1, columns[0]] = math.nan
        got = ours(student, spoilt, columns, normalize, reduction="none")
        assert got.isnan().tolist() == [False, True, False]
    off = torch.ones(V_T, dtype=torch.bool, device=backend.device).index_fill(0, columns, False)
    never = teacher.masked_fill(~off, -INF)  # a teacher that says nothing of what the draft has
    for name, want in (("kl", 0.0), ("tv", 1.0), ("reverse_kl", INF)):
        x = student.clone().requires_grad_()
        loss = ours(x, never, columns, "all", divergence=name)
        assert float(loss.detach()) == pytest.approx(want, abs=1e-6)
        if want < INF:
            (grad,) = torch.autograd.grad(loss, x)
            assert grad.abs().max() < 1e-6


@each_normalize
def test_a_negated_view(backend: Backend, normalize: str) -> None:
    """Whose memory holds the numbers without their sign."""
    student, teacher, columns = operands(backend, dtypes=(torch.float32, torch.bfloat16))
    got = ours(student, torch._neg_view(-teacher), columns, normalize)
    assert torch.equal(got, ours(student, teacher, columns, normalize))
