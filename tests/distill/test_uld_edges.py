"""ULD: alignments, edges, autograd and wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from common import INF, INPUTS
from response_losses import Made
from sorted_losses import NONE, S, T, classes, run, uld
from torch import Tensor

from fastkd import distill


def gathered(s: Tensor, t: Tensor, pairs: list[tuple[int, int]], **options: Any) -> Tensor:
    mine, its = (torch.tensor(x) for x in zip(*pairs, strict=True))
    return uld(s.flatten(0, -2)[mine], t.flatten(0, -2)[its], **options)


@pytest.mark.parametrize("top", [None, 4])
def test_rows_beside_each_other(in_chunks: bool, top: int | None) -> None:
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
def test_nan_stays_in_its_row(in_chunks: bool, top: int | None) -> None:
    s, t = INPUTS["random"](7, 10)
    clean = run(uld, s, t, reduction="none", top=top)
    s[2, 3], t[5, 0] = math.nan, math.nan
    value, grad = run(uld, s, t, reduction="none", top=top)
    others = [0, 1, 3, 4, 6]
    assert value[[2, 5]].isnan().all() and grad[[2, 5]].isnan().all()
    assert torch.equal(value[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])


@pytest.mark.parametrize("top", [None, 4])
def test_ignored_rows_are_never_read(in_chunks: bool, top: int | None) -> None:
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


def test_strided_operands(in_chunks: bool) -> None:
    s, t = INPUTS["random"](8, 12)
    a, b = s[::2, 1:11], t.mT.contiguous().mT[1::2, 2:]
    ours, true = run(uld, a, b), run(uld, a.contiguous(), b.contiguous())
    assert torch.equal(ours[0], true[0]) and torch.equal(ours[1], true[1])


def test_backward_again_and_upstream(in_chunks: bool) -> None:
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
def test_second_derivative(in_chunks: bool, top: int | None) -> None:
    s, t = (x.double() / 3 for x in INPUTS["random"](4, 5))
    alignment = distill.Alignment(torch.tensor([3, 1, 1]), torch.tensor([0, 1, 2]), (2, 2), (2, 2))
    s.requires_grad_()
    for at in (None, alignment):
        assert torch.autograd.gradgradcheck(
            lambda x, at=at: uld(x.view(2, 2, 5), t.view(2, 2, 5), top=top, alignment=at), s
        )


def test_weight_gets_its_gradient(in_chunks: bool) -> None:
    s, t = INPUTS["random"](7, 10)
    y, weight = classes(7, 10), torch.rand(7, requires_grad=True)
    (grad,) = torch.autograd.grad(uld(s, t, y, weight=weight, reduction="sum"), weight)
    torch.testing.assert_close(grad, uld(s, t, y, reduction="none"))


def test_teacher_made_in_inference_mode(in_chunks: bool) -> None:
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
    s, t = INPUTS["random"](64, 16_384)
    for top in (None, 64):
        with Made() as made:
            run(uld, s, t[:, :16_000], top=top)
        assert sum(size >= s.numel() for size in made.sizes) == 1


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
