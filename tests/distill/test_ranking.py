"""Losses of rerankers' scores, against their formulas written out."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import unreadable
from oracle import assert_gradients, assert_values, differentiate
from torch import Tensor, nn

from fastkd import distill

INF, NAN = math.inf, math.nan
COUNTS = [4, 3, 2, 1, 0]


def scores(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of five queries with at most four candidates."""
    s, t = (3 * torch.randn(5, 4) for _ in range(2))
    return s.to(dtype), t.to(dtype)


def places() -> Tensor:
    return torch.arange(4) < torch.tensor(COUNTS).unsqueeze(-1)


def normalized(x: Tensor, kind: str) -> Tensor:
    if kind == "minmax":
        return (x - x.min()) / (x.max() - x.min())
    return (x - x.mean()) / x.std() if kind == "zscore" else x


def plain_listwise(s: Tensor, t: Tensor, *, normalize: str, temperature: float) -> Tensor:
    """[5], 0 for queries of fewer than two candidates."""
    found = [s.new_zeros(())] * 5
    for i, n in enumerate(COUNTS[:3]):
        a, b = (normalized(x[i, :n], normalize) / temperature for x in (s, t))
        p = b.softmax(0)
        found[i] = temperature**2 * (p * (p.log() - a.log_softmax(0))).sum()
    return torch.stack(found)


def plain_margins(s: Tensor, t: Tensor) -> Tensor:
    found = [s.new_zeros(())] * 5
    for i, n in enumerate(COUNTS[:3]):
        errors = [((s[i, 0] - s[i, j]) - (t[i, 0] - t[i, j])) ** 2 for j in range(1, n)]
        found[i] = torch.stack(errors).mean()
    return torch.stack(found)


CASES: list[Any] = [
    (distill.margin_mse, plain_margins, {}),
    *(
        (distill.listwise_loss, plain_listwise, {"normalize": kind, "temperature": T})
        for kind, T in (("none", 1.0), ("none", 2.0), ("minmax", 0.5), ("zscore", 1.0))
    ),
]
each_case = pytest.mark.parametrize(("loss", "plain", "options"), CASES)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients(
    loss: Any, plain: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    s, t = scores(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = differentiate(loss, s, t, reduction="none", lengths=COUNTS, **options)
    its = differentiate(plain, s.float() if dtype == torch.bfloat16 else s, t, **options)
    true = differentiate(plain, s.double(), t.double(), **options)
    assert_values(found.value, its.value, true.value, 8.0)
    assert found.student is not None and found.student.dtype == dtype
    assert_gradients(found.student, its.student.to(dtype), true.student)


@each_case
def test_gradients_of_both_sides(loss: Any, plain: Any, options: dict[str, Any]) -> None:
    s, t = (x.requires_grad_() for x in scores())
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, lengths=COUNTS, **options), (s, t))


@each_case
def test_every_way_to_pad_is_one_loss(loss: Any, plain: Any, options: dict[str, Any]) -> None:
    s, t = scores()
    here = places()
    want = plain(s, t, **options)
    flat = [x[here] for x in (s, t)]
    bad = [torch.where(here, x, NAN) for x in (s, t)]
    infinite = [torch.where(here, x, -INF) for x in (s, t)]
    lengths = torch.tensor(COUNTS)
    ways: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (*bad, {"mask": here}),
        (*bad, {"lengths": lengths}),
        (*infinite, {}),
        (s, infinite[1], {}),
        (infinite[0], t, {}),
        (*flat, {"lengths": COUNTS}),
        (flat[0].unsqueeze(-1), infinite[1], {"lengths": lengths}),
    ]
    for a, b, how in ways:
        found = differentiate(loss, a, b, reduction="none", **how, **options)
        torch.testing.assert_close(found.value, want)
        assert found.student is not None and found.student.isfinite().all()
        if a.shape == s.shape:
            assert not found.student[~here].any() and not found.student[3:].any()
        torch.testing.assert_close(loss(a, b, **how, **options), want[:3].mean())
        torch.testing.assert_close(loss(a, b, reduction="sum", **how, **options), want.sum())
    weight = torch.rand(5, dtype=torch.float64)
    got = loss(*bad, mask=here, weight=weight, **options)
    torch.testing.assert_close(got, (want * weight).sum() / weight[:3].sum())
    got = loss(*bad, mask=here, normalizer=7.0, **options)
    torch.testing.assert_close(got, want.sum() / 7)
    assert loss(s, t, mask=torch.zeros_like(here), **options) == 0


def test_margins_may_be_stored() -> None:
    s, t = scores()
    for given, stored in (
        (places(), t[:, :1] - t[:, 1:]),
        (None, torch.where(places()[:, 1:], t[:, :1] - t[:, 1:], -INF)),
    ):
        got = distill.margin_mse(s, stored, mask=given, reduction="none")
        torch.testing.assert_close(got[:4], plain_margins(s, t)[:4])
    pair = distill.margin_mse(s[:, :2], (t[:, 0] - t[:, 1]).unsqueeze(-1))
    torch.testing.assert_close(pair, F.mse_loss(s[:, 0] - s[:, 1], t[:, 0] - t[:, 1]))
    assert distill.margin_mse(s[:, :2], t[:, 0] - t[:, 1]) == pair


@pytest.mark.parametrize("lengths", [[], [0, 0], torch.zeros(2, dtype=torch.int64)])
def test_no_candidates(lengths: Any) -> None:
    for loss in (distill.listwise_loss, distill.margin_mse):
        s = torch.randn(0, 1, requires_grad=True)
        value = loss(s, torch.randn(0), lengths=lengths)
        value.backward()
        assert value == 0 and s.grad is not None


def test_lengths_in_a_compiled_graph() -> None:
    s, t = scores()
    lengths = torch.tensor(COUNTS)
    compiled = torch.compile(
        lambda *both: distill.listwise_loss(*both, lengths=lengths), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(s, t), distill.listwise_loss(s, t, lengths=lengths))


@pytest.mark.parametrize("normalize", ["minmax", "zscore"])
def test_normalised_scores_have_no_unit(normalize: str) -> None:
    s, t = scores()
    want = distill.listwise_loss(s, t, normalize=normalize)
    got = distill.listwise_loss(7 * s + 1e3, 0.1 * t - 5, normalize=normalize)
    torch.testing.assert_close(got, want)
    if normalize == "minmax":
        inside = (t - t.amin(-1, True)) / (t.amax(-1, True) - t.amin(-1, True))
        torch.testing.assert_close(distill.listwise_loss(s, inside, normalize="minmax"), want)
    equal = torch.full((2, 3), 0.1, requires_grad=True)  # of no order
    value = distill.listwise_loss(equal, torch.randn(2, 3), normalize=normalize)
    value.backward()
    assert value.isfinite() and equal.grad is not None and not equal.grad.any()
    assert distill.listwise_loss(equal, equal.detach(), normalize=normalize) == 0
    s[1, 1] = NAN
    rows = distill.listwise_loss(s, t, normalize=normalize, reduction="none")
    assert rows.isnan().tolist() == [False, True, False, False, False]


def test_other_divergences() -> None:
    s, t = scores()
    want = [fl.item() for fl in (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1)]
    got = distill.listwise_loss(s, t, divergence="reverse_kl")
    assert float(got) == pytest.approx(statistics.fmean(want))


def test_terms() -> None:
    """A cross-encoder gives one score a pair; queries have 3, 2 and 1 candidates."""
    torch.manual_seed(0)
    pairs, lengths = torch.randn(6, 4), torch.tensor([3, 2, 1])
    teacher = torch.randn(6, 1)
    student = nn.Linear(4, 1)
    s = student(pairs).detach()
    want = 0.5 * distill.listwise_loss(s, teacher, lengths=lengths, temperature=2.0)
    want = want + distill.margin_mse(s, teacher, lengths=lengths)
    terms = [
        distill.ranking(weight=0.5, lengths="lengths", temperature=lambda step: 2.0 + step),
        distill.ranking(distill.margin_mse, lengths="lengths"),
    ]
    seen: list[float] = []
    batch = {"inputs": pairs, "lengths": lengths, "teacher": teacher}
    distill.train(
        student, [batch], terms, teacher=distill.CachedTeacher(), epochs=1, progress=False,
        on_step=lambda _, __, loss: seen.append(float(loss)),
    )  # fmt: skip
    assert seen == pytest.approx([float(want)], rel=1e-5)
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    batch = {"inputs": pairs[:3], "mask": mask, "teacher": torch.randn(3, 2)}
    masked = distill.ranking(mask="mask", normalize="zscore")
    distill.train(
        nn.Linear(4, 2), [batch], masked, teacher=distill.CachedTeacher(), epochs=1, progress=False
    )
    with pytest.raises(ValueError, match=r"lengths: got no tensor 'n' among the entries.*'mask'"):
        distill.train(
            nn.Linear(4, 2), [batch], distill.ranking(lengths="n"),
            teacher=distill.CachedTeacher(), epochs=1, progress=False,
        )  # fmt: skip
    with pytest.raises(ValueError, match="mask: got 'm' beside lengths"):
        distill.ranking(mask="m", lengths="n")


@each_case
def test_no_value_is_read(loss: Any, plain: Any, options: dict[str, Any]) -> None:
    with unreadable():
        s = torch.randn(5, 4, requires_grad=True)
        loss(s, torch.randn(5, 4), mask=torch.ones(5, 4).bool(), **options).backward()
        assert s.grad is not None


X = torch.randn(3, 2)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(student=[1.0]), TypeError, "student: got list"),
        (dict(teacher=X.long()), TypeError, "teacher: got torch.int64"),
        (dict(teacher=X[:2]), ValueError, r"teacher: got scores \[2, 2\], expected \[3, 2\]"),
        (dict(teacher=X.to("meta")), ValueError, "teacher: got a tensor on meta"),
        (dict(mask=torch.ones(3, 2)), TypeError, r"mask: got .*float32.*expected bool \[3, 2\]"),
        (dict(mask=torch.ones(3).bool()), ValueError, r"mask: got shape \[3\]"),
        (dict(mask=X > 0, lengths=[2, 2, 2]), ValueError, "mask: got one beside lengths"),
        (dict(lengths=[2, 2]), ValueError, r"lengths: got shape \[2\], expected \[3\]"),
        (dict(lengths=[2, 2, 3]), ValueError, "lengths: got 3, expected at most 2"),
        (dict(lengths=torch.ones(3)), TypeError, "lengths: got .*expected integers"),
        (dict(student=X[:, :1], lengths=[2, 2]), ValueError, "student: got scores.*sum is 4"),
        (dict(student=X[:, :1], lengths=[2.0, 1]), TypeError, "lengths: got .*expected integers"),
        (dict(lengths=2), TypeError, "lengths: got .*expected integers"),
        (dict(lengths=["a"]), TypeError, "lengths: got .*expected integers"),
        (dict(lengths=[2, 2, -1]), ValueError, "lengths: got -1"),
        (dict(student=X[:, :1], teacher=X[:, :1]), ValueError, r"student: got scores \[3, 1\]"),
        (dict(weight=torch.ones(2)), ValueError, r"weight: got shape \[2\]"),
        (dict(reduction="avg"), ValueError, "reduction: got 'avg'"),
        (dict(ignore_index=2), TypeError, "unexpected options.*ignore_index"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], says: str) -> None:
    for loss in (distill.listwise_loss, distill.margin_mse):
        with pytest.raises(error, match=says):
            loss(**{"student": X, "teacher": X, **options})


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match="normalize: got 'max', expected one of none, minmax"):
        distill.listwise_loss(X, X, normalize="max")
    with pytest.raises(TypeError, match=r"got listwise_loss, a loss without labels.*ranking"):
        distill.response(distill.listwise_loss)
    with pytest.raises(ValueError, match="temperature: got 0"):
        distill.listwise_loss(X, X, temperature=0)
    with pytest.raises(ValueError, match="expected a positive and negatives"):
        distill.margin_mse(X[:, :1], X[:, :1])
