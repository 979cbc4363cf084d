"""Losses of embeddings, against their formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
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


PARTS = [(3, 3), (5, 1), (6, 0)]  # rows of each of two ranks


def compared(q: Tensor, d: Tensor, t: Tensor, e: Tensor, group: Any = None) -> list[Tensor]:
    """A loss of one set of embeddings, of pairs, and of pairs without their own."""
    own: dict[str, Any] = {"temperature": 0.5, "group": group}
    return [
        distill.in_batch_similarity(q, t, **own),
        distill.in_batch_similarity((q, d), (t, e), **own),
        distill.in_batch_similarity((q, d), (t, e), diagonal=False, **own),
    ]


def over_ranks(given: list[Tensor], x: Tensor) -> Any:
    """This rank's shares of losses and its gradients; its trained weights; what is refused."""
    rank, group = dist.get_rank(), dist.group.WORLD
    found = []
    for counts in PARTS:
        q, d, t, e = (y.split(counts)[rank].clone() for y in given)
        for y in (q, d):
            y.requires_grad_()
        share = counts[rank] / sum(counts)
        losses = [share * loss for loss in compared(q, d, t, e, group)]
        torch.stack(losses).sum().backward()
        assert q.grad is not None and d.grad is not None
        found.append([torch.stack(losses).tolist(), q.grad.tolist(), d.grad.tolist()])
    with pytest.raises(ValueError, match=r"student: got rows of \[4, 5\] on the ranks") as error:
        distill.in_batch_similarity(torch.randn(2, 4 + rank), torch.randn(2, 3), group=group)
    return found, trained(x.split(PARTS[1])[rank], group).tolist(), str(error.value)


def trained(x: Tensor, group: Any = None) -> Tensor:
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3).double(), nn.Linear(4, 5).double()
    model = student if group is None else nn.parallel.DistributedDataParallel(student)
    term = distill.embedding(distill.in_batch_similarity, group=group)
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    distill.train(model, [x, x + 1], term, teacher=teacher, optimizer=sgd, progress=False)
    return student.weight.detach()


def test_similarities_over_ranks_are_those_of_the_whole_batch() -> None:
    given = [torch.randn(6, size).double() for size in (3, 3, 5, 5)]
    x = torch.randn(6, 4).double()
    results = ranks.run(2, over_ranks, given, x)
    q, d = (y.clone().requires_grad_() for y in given[:2])
    losses = torch.stack(compared(q, d, *given[2:]))
    losses.sum().backward()
    for i in range(len(PARTS)):
        value, *grads = zip(*(found[i] for found, *_ in results), strict=True)
        torch.testing.assert_close(torch.tensor(value, dtype=torch.float64).sum(0), losses.detach())
        for (one, two), want in zip(grads, (q.grad, d.grad), strict=True):
            torch.testing.assert_close(torch.tensor(one + two, dtype=torch.float64), want)
    for _, weight, said in results:
        torch.testing.assert_close(torch.tensor(weight, dtype=torch.float64), trained(x))
        assert said == results[0][2]
    with pytest.raises(TypeError, match="group: got 'world', expected a process group"):
        distill.in_batch_similarity(x, x, group="world")


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
