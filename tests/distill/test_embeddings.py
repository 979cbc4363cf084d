"""Losses of embeddings, against their formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import unreadable
from torch import Tensor, nn

from fastkd import distill


def pair(n: int = 5, student: int = 4, teacher: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, student).double(), torch.randn(n, teacher).double()


def divergence(sims: list[list[tuple[float, float]]]) -> float:
    """Mean over rows of KL of the softmax of the second numbers against that of the first."""
    total = 0.0
    for row in sims:
        p, q = ([math.exp(x[side]) for x in row] for side in (1, 0))
        total += sum(
            a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True)
        )
    return total / len(sims)


def like(a: Tensor, b: Tensor, kind: str) -> float:
    return float(a @ b / (a.norm() * b.norm() if kind == "cosine" else 1))


def plain(
    s: Any,
    t: Any,
    T: float = 0.05,
    T_t: float | None = None,
    kind: str = "cosine",
    diag: Any = None,
) -> float:
    both = [x if isinstance(x, tuple) else (x, x) for x in (s, t)]
    whole = isinstance(s, tuple) if diag is None else diag
    (a, b), (c, d) = both
    rows = [
        [
            (like(a[i], b[j], kind) / T, like(c[i], d[j], kind) / (T_t or T))
            for j in range(len(b))
            if whole or i != j
        ]
        for i in range(len(a))
    ]
    return divergence(rows)


@pytest.mark.parametrize("kind", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_distance(kind: str, dtype: torch.dtype) -> None:
    s, t = (x.to(dtype).requires_grad_() for x in pair(teacher=4))
    a, b = s.detach().double(), t.detach().double()
    each = (a - b).square().mean(-1) if kind == "l2" else 1 - F.cosine_similarity(a, b)
    rows = distill.embedding_loss(s, t, kind=kind, reduction="none")
    torch.testing.assert_close(rows.detach().double(), each, rtol=1e-5, atol=1e-6)
    weight = torch.rand(5)
    got = distill.embedding_loss(s, t, kind=kind, weight=weight)
    want = (weight * each).sum() / weight.sum()
    torch.testing.assert_close(got.detach().double(), want, rtol=1e-5, atol=1e-6)
    got.backward()
    assert s.grad is not None and s.grad.dtype == dtype
    if dtype == torch.float64:
        same = lambda s, t: distill.embedding_loss(s, t, kind=kind)  # noqa: E731
        assert torch.autograd.gradcheck(same, (s, t))


@pytest.mark.parametrize("kind", ["cosine", "dot"])
@pytest.mark.parametrize("diagonal", [None, True, False])
def test_similarities(kind: str, diagonal: bool | None) -> None:
    s, t = pair()
    names: dict[str, Any] = {"similarity": kind, "diagonal": diagonal}
    for T, T_t in ((0.5, None), (0.7, 0.3)):
        got = distill.in_batch_similarity(s, t, temperature=T, teacher_temperature=T_t, **names)
        assert float(got) == pytest.approx(plain(s, t, T, T_t, kind, diagonal), rel=1e-9)
    documents = pair(5 if diagonal is False else 7)
    queries = (s, documents[0]), (t, documents[1])
    got = distill.in_batch_similarity(*queries, temperature=0.5, **names)
    assert float(got) == pytest.approx(plain(*queries, 0.5, None, kind, diagonal), rel=1e-9)


def test_similarities_have_a_gradient() -> None:
    s, t = (x.requires_grad_() for x in pair(4))
    d, e = (x.requires_grad_() for x in pair(3))

    def pairs(s: Tensor, t: Tensor, d: Tensor, e: Tensor) -> Tensor:
        return distill.in_batch_similarity((s, d), (t, e), temperature=0.5)

    alone = lambda s, t: distill.in_batch_similarity(s, t, temperature=0.5)  # noqa: E731
    assert torch.autograd.gradcheck(alone, (s, t))
    assert torch.autograd.gradcheck(pairs, (s, t, d, e))
    same = distill.in_batch_similarity(s, s.detach().clone())
    same.backward()
    assert same == 0 and s.grad is not None and not s.grad.any()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_samples(n: int) -> None:
    s = torch.randn(n, 4, requires_grad=True)
    value = distill.in_batch_similarity(s, torch.randn(n, 6))
    value.backward()
    assert value == 0 and s.grad is not None and not s.grad.any()  # one other, at most
    zero = torch.zeros(3, 4, requires_grad=True)
    value = distill.in_batch_similarity(zero, torch.randn(3, 6))
    value.backward()
    assert value.isfinite() and zero.grad is not None and not zero.grad.any()


def test_low_precision_only_at_the_ends() -> None:
    s, t = (x.bfloat16() for x in pair())
    with torch.autocast("cpu", torch.bfloat16):
        value = distill.in_batch_similarity(s, t)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(plain(s.double(), t.double()), rel=1e-5)


class Encoder(nn.Module):
    """Returns a dict, as encoders of sentences do."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, dim)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"token_embeddings": x, "sentence_embedding": self.layer(x)}


def test_terms() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    student, teacher, projector = Encoder(4), Encoder(8), nn.Linear(4, 8)
    s, t = (m(x)["sentence_embedding"].detach() for m in (student, teacher))
    want = 2 * distill.embedding_loss(projector(s), t) + distill.in_batch_similarity(s, t)
    entry = "sentence_embedding"
    terms = [
        distill.embedding(weight=2.0, output=entry, projector=projector),
        distill.embedding(distill.in_batch_similarity, output=entry),
    ]
    seen: list[float] = []
    before = projector.weight.detach().clone()
    options: dict[str, Any] = dict(epochs=1, progress=False)
    distill.train(
        student, [x], terms, teacher=teacher,
        on_step=lambda _, __, loss: seen.append(float(loss)), **options,
    )  # fmt: skip
    assert seen == pytest.approx([float(want.detach())], rel=1e-5)
    assert not torch.equal(projector.weight, before)  # it is learnt
    l2 = distill.embedding(kind="l2")
    distill.train(nn.Linear(3, 4), [x], l2, teacher=nn.Linear(3, 4), **options)
    stored = {"inputs": x, "teacher": torch.randn(6, 4)}
    term = distill.embedding(output=entry)
    distill.train(student, [stored], term, teacher=distill.CachedTeacher(), **options)
    with pytest.raises(ValueError, match="output: got no tensor 'pooled' in the student's output"):
        distill.train(student, [x], distill.embedding(output="pooled"), teacher=teacher, **options)
    with pytest.raises(ValueError, match=r"output: got None .*'sentence_embedding'\], expected"):
        distill.train(student, [x], distill.embedding(), teacher=teacher, **options)


def test_no_value_is_read() -> None:
    with unreadable():
        s = torch.randn(3, 4, requires_grad=True)
        distill.in_batch_similarity(s, torch.randn(3, 6)).backward()
        assert s.grad is not None


X = torch.randn(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: distill.embedding_loss(X, X, kind="l3"), ValueError, "kind: got 'l3'"),
        (
            lambda: distill.embedding_loss(X, torch.randn(3, 5)),
            ValueError,
            r"teacher: got embeddings \[3, 5\].*\[3, 2\].*nn.Linear\(2, 5\)",
        ),
        (lambda: distill.embedding_loss(X, X[:2], kind="l2"), ValueError, "teacher: got shape"),
        (lambda: distill.embedding_loss(X, X, mask=X), TypeError, "unexpected options.*mask"),
        (lambda: distill.in_batch_similarity(X, X[:2]), ValueError, r"teacher: got.*\[2, 2\]"),
        (lambda: distill.in_batch_similarity((X, X[:2]), X), ValueError, "teacher: got embed"),
        (lambda: distill.in_batch_similarity((X, 3), X), TypeError, "student: got int"),
        (lambda: distill.in_batch_similarity(X, X.long()), TypeError, "teacher: got .*int64"),
        (lambda: distill.in_batch_similarity(X[None], X[None]), ValueError, "pooled"),
        (lambda: distill.in_batch_similarity(X, X, diagonal="no"), TypeError, "diagonal: got 'no'"),
        (lambda: distill.in_batch_similarity(X, X, temperature=0), ValueError, "temperature: got"),
        (
            lambda: distill.in_batch_similarity(X, X, teacher_temperature=-1),
            ValueError,
            "teacher_temperature: got -1",
        ),
        (lambda: distill.in_batch_similarity(X, X, similarity="l2"), ValueError, "similarity: got"),
        (
            lambda: distill.in_batch_similarity((X, X[:2]), (X, X[:2]), diagonal=False),
            ValueError,
            "diagonal: got False.*N = M",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
