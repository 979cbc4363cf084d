"""Universal logit distillation against its formula, and what it promises at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import INF, INPUTS, Backend
from oracle import FLOORS, assert_gradients, assert_values, oracle, row_factor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import distill
from fastkd.distill.batch import Batch, Outputs
from fastkd.distill.losses import chunked, sorted_probabilities
from fastkd.distill.objective import Objective

uld = distill.uld_loss
WIDTHS = [(10, 14), (14, 10), (10, 10)]


def plain(s: Tensor, t: Tensor, *, temperature: float = 1.0, top: int | None = None) -> Tensor:
    """The paper's sum over ranks [n]; with `top`, of the ranks from there on as one."""
    q, p = ((x / temperature).softmax(-1).sort(-1, descending=True).values for x in (s, t))
    width = max(q.size(-1), p.size(-1))
    q, p = (F.pad(x, (0, width - x.size(-1))) for x in (q, p))
    if top is not None:
        q, p = (torch.cat((x[:, :top], x[:, top:].sum(-1, keepdim=True)), -1) for x in (q, p))
    return (q - p).abs().sum(-1)


def reduced(s: Tensor, t: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Of the rows that count."""
    names = ("weight", "reduction", "normalizer")
    rows = {"reduction": "mean"} | {k: options.pop(k) for k in names if k in options}
    keep, factor = row_factor(s, y, **rows)
    value = plain(s[keep], t[keep], **options)
    value = value.new_zeros(keep.shape).masked_scatter(keep, value) * factor.to(value.dtype)
    return value if rows["reduction"] == "none" else value.sum()


def run(loss: Any, s: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    s = s.detach().requires_grad_()
    value = loss(s, *others, **options)
    (grad,) = torch.autograd.grad(value, s, torch.ones_like(value))
    return value.detach(), grad


def assert_right(s: Tensor, t: Tensor, y: Tensor, **options: Any) -> None:
    """The tolerance rule of all tests, for the value and the student's gradient."""
    value, grad = run(uld, s, t, y, **options)
    assert grad.dtype == s.dtype and grad.shape == s.shape
    theirs = run(reduced, s.to(value.dtype), t.to(value.dtype), y, **options)
    true = run(reduced, oracle(s), oracle(t), y, **options)
    assert_values(value, theirs[0], true[0])
    rounding = FLOORS[value.dtype] * 2 / options.get("temperature", 1.0)
    assert_gradients(grad, theirs[1], true[1], rounding)
    assert (grad[y == -100] == 0).all()


def classes(n: int, v: int) -> Tensor:
    y = torch.arange(n) % v
    y[0] = y[-2] = -100
    return y


@pytest.fixture(params=[False, True], ids=["whole", "in-chunks"])
def in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(chunked, "HOST_ELEMENTS", 30)


# ---- values and gradients


@pytest.mark.parametrize("name", [name for name in INPUTS if name != "ties"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("top", [None, 1, 4, 12, 99])
def test_value_and_gradient(
    backend: Backend, in_chunks: None, name: str, widths: tuple[int, int], top: int | None
) -> None:
    s, t = (x.to(backend.device) for x in INPUTS[name](7, max(widths)))
    y = classes(7, 10).to(backend.device)
    for temperature in (1.0, 4.0, 1000.0):
        s, t = s[:, : widths[0]], t[:, : widths[1]]
        assert_right(s, t, y, temperature=temperature, top=top)


@pytest.mark.parametrize("vocab", [1, 2, 40_000])
@pytest.mark.parametrize("top", [None, 50])
def test_few_and_many_columns(vocab: int, top: int | None) -> None:
    s, t = INPUTS["random"](9, vocab)
    assert_right(s, t[:, : max(1, vocab - 7)], classes(9, 10) * 0 + 0, top=top)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(in_chunks: None, dtype: torch.dtype) -> None:
    # far enough apart for no two logits of a row to be equal once rounded
    s, t = (x.argsort(-1).to(dtype) / 4 for x in INPUTS["random"](7, 10))
    t = t * 1.5
    value, grad = run(uld, s, t.float(), classes(7, 10))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_right(s, t.float(), classes(7, 10))


def test_equal_logits_take_the_ranks_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without NumPy's sort: the first of them is the lowest; either is a subgradient."""
    s, t = INPUTS["ties"](64, 33)
    s[0, :5] = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0])
    fast = run(uld, s, t)
    monkeypatch.setattr(sorted_probabilities, "_numpy", lambda: None)
    slow = run(uld, s, t)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-7)
    assert_values(fast[0], fast[0], reduced(oracle(s), oracle(t), torch.arange(64)))
    assert (fast[1].sum(-1).abs() < 1e-6).all()


def test_more_threads_change_no_bit() -> None:
    s, t = INPUTS["random"](7, 30_000)
    one = run(uld, s, t[:, :20_000])
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            several = run(uld, s, t[:, :20_000])
            assert torch.equal(one[0], several[0]) and torch.equal(one[1], several[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions(in_chunks: None, reduction: str, weighted: bool) -> None:
    s, t = INPUTS["random"](7, 10)
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(7)
    elif reduction == "mean":
        options["normalizer"] = torch.tensor(3)
    assert_right(s, t[:, :8], classes(7, 10), **options)


def test_columns_in_use(in_chunks: None) -> None:
    s, t = (x.view(2, 3, 14) for x in INPUTS["random"](6, 14))
    s[..., 8:], t[..., 11:] = math.nan, math.nan
    value, grad = run(uld, s, t, vocab_size=(8, 11), reduction="none")
    alone, its = run(uld, s[..., :8], t[..., :11], reduction="none")
    assert value.shape == (2, 3) and torch.equal(value, alone)
    assert torch.equal(grad[..., :8], its) and (grad[..., 8:] == 0).all()
    both = run(uld, s, t, vocab_size=8)[0]
    assert both == uld(s[..., :8], t[..., :8])


# ---- what holds by definition


@pytest.mark.parametrize("vocab", [1, 7, 1000, 4099])
@pytest.mark.parametrize(
    ("dtype", "top"),  # with `top` a sum in float64 depends on its order
    [(torch.float64, None)]
    + [(dtype, top) for dtype in (torch.float32, torch.bfloat16) for top in (None, 3, 20)],
    ids=str,
)
def test_exactly_zero_between_permuted_vocabularies(
    vocab: int, dtype: torch.dtype, top: int | None
) -> None:
    s = INPUTS["random"](5, vocab)[0].to(dtype)
    t = s[:, torch.randperm(vocab)]
    for other in (t, F.pad(t, (3, 6), value=-INF)):
        for temperature in (0.1, 1.0, 3.0):
            value, grad = run(uld, s, other, temperature=temperature, top=top)
            assert value == 0 and (grad == 0).all()


def test_top_is_short_by_at_most_twice_the_smaller_rest(in_chunks: None) -> None:
    s, t = (x.double() for x in INPUTS["random"](200, 50))
    q, p = (x.softmax(-1).sort(-1, descending=True).values for x in (s, t))
    whole = uld(s, t, reduction="none")
    for top in (1, 5, 25, 49):
        some = uld(s, t, top=top, reduction="none")
        short = 2 * torch.minimum(q[:, top:].sum(-1), p[:, top:].sum(-1))
        assert (some <= whole + 1e-12).all() and (whole <= some + short + 1e-12).all()
        assert (whole - some).max() > 0


@pytest.mark.parametrize("measured", [False, True])
def test_stored_teacher_is_the_teachers_top(in_chunks: None, measured: bool) -> None:
    s, t = (x.double() for x in INPUTS["random"](7, 12))
    log, at = (t / 2).log_softmax(-1).topk(5)
    tail = torch.log1p(-log.exp().sum(-1)) if measured else None
    order = torch.randperm(5)
    stored = fastkd.TopK(log[:, order], at[:, order], tail_logprob=tail, temperature=2.0)
    for top in (None, 3, 9):
        ours = run(uld, s[:, :9], stored, classes(7, 9), temperature=2.0, top=top)
        true = run(uld, s[:, :9], t, classes(7, 9), temperature=2.0, top=min(top or 5, 5))
        torch.testing.assert_close(ours, true)


def test_stored_teacher_that_is_renormalized() -> None:
    """Padding has no mass, and another temperature is known."""
    s, t = (x.double() for x in INPUTS["random"](7, 12))
    log, at = t.log_softmax(-1).topk(5)
    at[:, 4] = -1
    stored = fastkd.TopK(log, at, tail="renormalize")
    true = run(uld, s, log[:, :4], temperature=3.0)
    torch.testing.assert_close(run(uld, s, stored, temperature=3.0), true)


@pytest.mark.parametrize(
    ("options", "temperature", "message"),
    [
        ({"tail": "drop"}, 1.0, "tail='drop', expected 'bucket' or 'renormalize'"),
        ({"tail": "restrict"}, 1.0, "tail='restrict', expected"),
        ({"temperature": 2.0}, 1.0, "temperature: got 1 with a teacher stored at 2"),
    ],
)
def test_stored_teacher_that_says_too_little(
    options: dict[str, Any], temperature: float, message: str
) -> None:
    stored = fastkd.TopK(torch.full((2, 1), -1.0), torch.zeros(2, 1, dtype=torch.long), **options)
    with pytest.raises(ValueError, match=message):
        uld(torch.zeros(2, 5), stored, temperature=temperature)


def test_stored_teacher_with_more_than_everything() -> None:
    """But in a row that is not read."""
    stored = fastkd.TopK(torch.tensor([[-1.0], [0.5]]), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logprobs: got a mass of 1.6\d* in row 1, expected"):
        uld(torch.zeros(2, 5), stored)
    assert uld(torch.zeros(2, 5), stored, torch.tensor([0, -100])).isfinite()


# ---- alignments


def gathered(s: Tensor, t: Tensor, pairs: list[tuple[int, int]], **options: Any) -> Tensor:
    mine, its = (torch.tensor(x) for x in zip(*pairs, strict=True))
    return uld(s.flatten(0, -2)[mine], t.flatten(0, -2)[its], **options)


@pytest.mark.parametrize("top", [None, 4])
def test_rows_beside_each_other(in_chunks: None, top: int | None) -> None:
    """Some rows stand alone, one beside two, and labels and weights are the student's."""
    s, t = torch.randn(2, 5, 9), torch.randn(2, 3, 11)
    pairs = [(0, 2), (1, 0), (1, 1), (7, 4), (9, 5)]
    mine, its = (torch.tensor(x) for x in zip(*pairs, strict=True))
    alignment = distill.Alignment(mine, its, (2, 5), (2, 3))
    y, weight = torch.zeros(2, 5, dtype=torch.long), torch.rand(2, 5)
    y[1, 2] = -100
    left = [pair for pair in pairs if pair[0] != 7]
    by = weight.flatten()[[a for a, _ in left]]
    for reduction in ("mean", "sum"):
        ours = run(uld, s, t, y, alignment=alignment, weight=weight, top=top, reduction=reduction)
        true = run(lambda x, r=reduction: gathered(x, t, left, weight=by, top=top, reduction=r), s)
        torch.testing.assert_close(ours, true)
        assert (ours[1].flatten(0, 1)[[2, 3, 4, 5, 6, 7, 8]] == 0).all()
    each, slope = run(uld, s, t, y, alignment=alignment, top=top, reduction="none")
    assert each.shape == (2, 5) and (each.flatten()[[2, 3, 4, 5, 6, 7, 8]] == 0).all()
    torch.testing.assert_close(each.sum(), gathered(s, t, left, top=top, reduction="sum"))
    torch.testing.assert_close(
        slope, run(uld, s, t, y, alignment=alignment, top=top, reduction="sum")[1]
    )


def test_truncated() -> None:
    s, t = torch.randn(2, 5, 9), torch.randn(2, 3, 11)
    torch.testing.assert_close(run(uld, s, t, alignment="truncate")[0], uld(s[:, :3], t))
    torch.testing.assert_close(uld(s[:, :2], t, alignment="truncate"), uld(s[:, :2], t[:, :2]))


def test_labelled_positions_in_turn() -> None:
    y = torch.tensor([[-100, -100, 4, 5, 6], [1, 2, -100, -100, -100]])
    z = torch.tensor([[-100, 7, 7], [-100, -100, -100]])
    found = distill.align_labelled(y, z)
    assert found.student.tolist() == [2, 3] and found.teacher.tolist() == [1, 2]
    assert found.student_shape == (2, 5) and found.teacher_shape == (2, 3)
    with pytest.raises(ValueError, match=r"got labels \[2, 3\] beside the student's \[1, 5\]"):
        distill.align_labelled(y[:1], z)


def test_nothing_beside_anything() -> None:
    """0, and a part of the graph."""
    s = torch.full((2, 5, 9), math.nan, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    alignment = distill.Alignment(none, none, (2, 5), (2, 3))
    value = uld(s, torch.full((2, 3, 4), math.nan), alignment=alignment)
    value.backward()
    assert value == 0 and s.grad is not None and (s.grad == 0).all()


# ---- edges


def test_finite_on_extreme_logits() -> None:
    edge = torch.tensor([-INF, -1e4, 0.0, 1e-30, 1e4])
    rows = torch.cartesian_prod(edge, edge, edge, edge)
    rows = rows[rows.isfinite().any(-1)]
    s, t = rows, rows[torch.randperm(len(rows))][:, :3]
    t = torch.where(t.isfinite().any(-1, keepdim=True), t, 0.0)
    for temperature in (0.01, 1.0, 1000.0):
        for top in (None, 2):
            value, grad = run(uld, s, t, temperature=temperature, top=top, reduction="none")
            assert value.isfinite().all() and grad.isfinite().all()
            assert (value >= 0).all() and (value <= 2 + 1e-5).all()


@pytest.mark.parametrize("top", [None, 4])
def test_nan_stays_in_its_row(in_chunks: None, top: int | None) -> None:
    s, t = INPUTS["random"](7, 10)
    clean = run(uld, s, t, reduction="none", top=top)
    s[2, 3], t[5, 0] = math.nan, math.nan
    value, grad = run(uld, s, t, reduction="none", top=top)
    others = [0, 1, 3, 4, 6]
    assert value[[2, 5]].isnan().all() and grad[[2, 5]].isnan().all()
    assert torch.equal(value[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])


@pytest.mark.parametrize("top", [None, 4])
def test_ignored_rows_are_never_read(in_chunks: None, top: int | None) -> None:
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    bad_s, bad_t = s.clone(), t.clone()
    bad_s[0], bad_t[0], bad_s[-2], bad_t[-2] = math.nan, INF, -INF, math.nan
    clean, dirty = run(uld, s, t, y, top=top), run(uld, bad_s, bad_t, y, top=top)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    whole = torch.compile(uld, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(whole, bad_s, bad_t, y, top=top), clean)


def test_all_rows_ignored_and_none_at_all() -> None:
    s = torch.full((4, 9), math.nan, requires_grad=True)
    value = uld(s, s.detach()[:, :3], torch.full((4,), -100))
    value.backward()
    assert value == 0 and s.grad is not None and (s.grad == 0).all()
    s = torch.empty(0, 9, requires_grad=True)
    value = uld(s, torch.empty(0, 3))
    value.backward()
    assert value == 0 and s.grad is not None and s.grad.shape == (0, 9)


def test_strided_operands(in_chunks: None) -> None:
    s, t = INPUTS["random"](8, 12)
    a, b = s[::2, 1:11], t.mT.contiguous().mT[1::2, 2:]
    ours, true = run(uld, a, b), run(uld, a.contiguous(), b.contiguous())
    assert torch.equal(ours[0], true[0]) and torch.equal(ours[1], true[1])


# ---- autograd


def test_backward_again_and_upstream(in_chunks: None) -> None:
    s, t = INPUTS["random"](7, 10)
    s.requires_grad_()
    value = uld(s, t, classes(7, 10))
    (first,) = torch.autograd.grad(value, s, retain_graph=True)
    (again,) = torch.autograd.grad(3 * value, s, retain_graph=True)
    torch.testing.assert_close(again, 3 * first)
    t.add_(1)
    with pytest.raises(RuntimeError, match="teacher: changed in place"):
        value.backward()


@pytest.mark.parametrize("top", [None, 2])
def test_second_derivative(in_chunks: None, top: int | None) -> None:
    s, t = (x.double() / 3 for x in INPUTS["random"](4, 5))
    alignment = distill.Alignment(torch.tensor([3, 1, 1]), torch.tensor([0, 1, 2]), (2, 2), (2, 2))
    s.requires_grad_()
    for at in (None, alignment):
        assert torch.autograd.gradgradcheck(
            lambda x, at=at: uld(x.view(2, 2, 5), t.view(2, 2, 5), top=top, alignment=at), s
        )


def test_weight_gets_its_gradient(in_chunks: None) -> None:
    s, t = INPUTS["random"](7, 10)
    y, weight = classes(7, 10), torch.rand(7, requires_grad=True)
    (grad,) = torch.autograd.grad(uld(s, t, y, weight=weight, reduction="sum"), weight)
    torch.testing.assert_close(grad, uld(s, t, y, reduction="none"))


def test_teacher_made_in_inference_mode(in_chunks: None) -> None:
    s, t = INPUTS["random"](7, 10)
    with torch.inference_mode():
        other = t.clone()
    torch.testing.assert_close(run(uld, s, other), run(uld, s, t))


@pytest.mark.parametrize("top", [None, 4])
def test_compiled(top: int | None) -> None:
    """One graph: torch sees the formula, not the chunks."""
    s, t = torch.randn(2, 5, 9), torch.randn(2, 3, 11)
    alignment = distill.Alignment(torch.tensor([3, 1, 1]), torch.tensor([0, 1, 2]), (2, 5), (2, 3))
    whole = torch.compile(uld, backend="eager", fullgraph=True)
    for given in ("truncate", alignment):
        options = {"alignment": given, "top": top}
        torch.testing.assert_close(run(whole, s, t, **options), run(uld, s, t, **options))


def test_memory_of_a_call_is_one_gradient() -> None:
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            out = f(*args, **(kw or {}))
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
                made.append(out.numel())
            return out

    s, t = INPUTS["random"](64, 16_384)
    for top in (None, 64):
        made.clear()
        with Watch():
            run(uld, s, t[:, :16_000], top=top)
        assert sum(size >= s.numel() for size in made) == 1


def test_term() -> None:
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    s.requires_grad_()
    term = distill.response(uld, 1.5, rows="labelled")
    total, (value,) = Objective([term])(Outputs(s), Outputs(t[:, :8]), Batch(s, y, samples=7))
    assert term.name == "uld_loss" and value == uld(s, t[:, :8], y) and total == 1.5 * value


class Tokens(torch.nn.Module):
    """[N, L] -> [N, L, vocab]."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.net = torch.nn.Embedding(20, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


def test_term_of_two_tokenizers_over_micro_batches() -> None:
    """The sum over pairs by the labels of the step, however it is cut."""
    teacher, first = Tokens(9), Tokens(6)
    mine, its = torch.randint(20, (4, 5)), torch.randint(20, (4, 3))
    y = torch.randint(6, (4, 5))
    y[0, 1:], y[2] = -100, -100

    def loader(size: int) -> list[dict[str, Any]]:
        found = []
        for at in range(0, 4, size):
            part = slice(at, at + size)
            spans = [[[(i, i + 1) for i in range(5)]] * size, [[(0, 2), (2, 3), (3, 5)]] * size]
            found.append(
                {
                    "inputs": mine[part],
                    "labels": y[part],
                    "teacher_inputs": its[part],
                    "alignment": distill.align(*spans),
                }
            )
        return found

    ends = []
    for size in (4, 1):
        student = Tokens(6)
        student.load_state_dict(first.state_dict())
        distill.train(
            student,
            loader(size),
            [distill.hard(), distill.uld()],
            teacher=teacher,
            accumulate=4 // size,
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            epochs=1,
            progress=False,
        )
        ends.append(student.net.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
    # by hand: the pairs are (1, 0), (2, 1), (4, 2) of each sequence
    net = Tokens(6)
    net.load_state_dict(first.state_dict())
    rows, keep = net(mine)[:, [1, 2, 4]], y[:, [1, 2, 4]] != -100
    far = plain(rows[keep], teacher(its)[keep].detach()).sum() / (y != -100).sum()
    (F.cross_entropy(net(mine).flatten(0, 1), y.flatten()) + 1.5 * far).backward()
    true = first.net.weight - 0.1 * net.net.weight.grad
    torch.testing.assert_close(ends[0], true.detach(), rtol=1e-5, atol=1e-6)


def test_term_without_a_teacher() -> None:
    with pytest.raises(ValueError, match="term 'uld': got no teacher"):
        distill.uld().function(Outputs(S), Outputs(None), Batch(S))


# ---- wrong arguments

S, T, NONE = torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize(
    ("operands", "options", "message"),
    [
        ((S.long(), T), {}, "student: got torch.int64, expected logits in"),
        ((S, None), {}, "teacher: got NoneType, expected a tensor of logits"),
        ((S, T[:1]), {}, r"teacher: got rows \[1\], expected the student's \[2\]; .*align"),
        ((S, T.to("meta")), {}, "teacher: got a tensor on meta"),
        ((S, T.clone().requires_grad_()), {}, "teacher: got .* requires grad, expected .*detach"),
        ((S, T), {"temperature": 0.0}, "temperature: got 0.0"),
        ((S, T), {"top": 0}, "top: got 0, expected a number of ranks"),
        ((S, T), {"top": 2.0}, "top: got 2.0, expected a number of ranks"),
        ((S, T), {"vocab_size": 4}, "vocab_size: got 4 for the student, .* <= 3; .*both"),
        ((S, T), {"vocab_size": (3, 6)}, "vocab_size: got 6 for the teacher"),
        ((S, T), {"vocab_size": 2.0}, "vocab_size: got 2.0, expected an integer"),
        ((S, T), {"reduction": "max"}, "reduction: got 'max'"),
        ((S, T), {"wieght": S}, r"unexpected options \['wieght'\]"),
        ((S, T), {"alignment": "cut"}, "alignment: got 'cut', expected 'truncate'"),
        ((S, T), {"alignment": "truncate"}, r"got rows \[2\] beside the student's \[2\]"),
        ((S, T), {"alignment": (1, 2)}, "alignment: got tuple, expected what distill.align"),
        (
            (S[None], T[None]),
            {"alignment": distill.Alignment(NONE, NONE, (1, 2), (1, 3))},
            r"one of teacher positions \[1, 3\], expected \[1, 2\]",
        ),
        ((S, T, torch.tensor([0, 3])), {}, "labels: got 3 in row 1, expected 0 <= label < 3"),
    ],
)
def test_wrong_arguments(operands: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        uld(*operands, **options)
