"""Transforms of torch.func, forward-mode AD, tracers and tensors that are no plain memory.

A kernel reads the numbers beneath what it is given, so each of these either runs on the reference
or is refused by name; never does one give numbers without the derivative that was asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from common import require
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import fastkd
from fastkd import distill
from fastkd.engine import autograd as upstreams

Loss = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def a_backend_that_a_kernel_runs_on() -> Iterator[None]:
    require("cpu")
    yield
    torch._dynamo.reset()


def _student() -> Tensor:
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(3))


def _losses() -> dict[str, Loss]:
    draw = torch.Generator().manual_seed(5)
    teacher, weight, other = (torch.randn(x, generator=draw) for x in ((4, 9), (9, 5), (9, 6)))
    hidden = torch.randn(4, 6, generator=draw)
    labels, stored = torch.tensor([1, -100, 0, 8]), fastkd.topk_from_logits(teacher, 4)
    per_row = torch.rand(4, generator=draw)

    def linear(s: Tensor) -> Tensor:
        sides = fastkd.LinearLogits(s[:, :5], weight), fastkd.LinearLogits(hidden, other)
        return fastkd.skew_kl_div(*sides, labels=labels)

    return {
        "kl": lambda s: fastkd.kl_div(s, teacher, temperature=2.0),
        "rows": lambda s: fastkd.js_div(s, teacher, reduction="none").sum(),
        "labels": lambda s: fastkd.distillation_loss(s, teacher, labels, label_smoothing=0.1),
        "hard": lambda s: fastkd.distillation_loss(s, teacher, labels, alpha=1.0),
        "tv": lambda s: fastkd.tv_distance(s, teacher, weight=per_row),
        "topk": lambda s: fastkd.reverse_kl_div(s, stored),
        "linear": linear,
        "inplace": lambda s: fastkd.kl_div(1.0 * s, teacher, inplace=True),
    }


LOSSES = _losses()
each_loss = pytest.mark.parametrize("name", LOSSES)


def _gradient(loss: Loss, at: Tensor) -> Tensor:
    """The one that backward gives, from the kernels."""
    x = at.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x)
    return found


def _direction(s: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.0, s.numel()).view(s.shape)


def _dual(loss: Loss) -> Loss:
    """The derivative in one direction, in forward mode."""

    def tangent(s: Tensor) -> Tensor:
        with forward_ad.dual_level():
            out = loss(forward_ad.make_dual(s, _direction(s)))
            return forward_ad.unpack_dual(out).tangent

    return tangent


@each_loss
def test_torch_func_is_backward(name: str) -> None:
    loss, s = LOSSES[name], _student()
    expected = _gradient(loss, s)
    assert expected.any()
    along = (_direction(s) * expected).sum()
    for way in (grad, jacrev, jacfwd):
        torch.testing.assert_close(way(loss)(s), expected)
    torch.testing.assert_close(jvp(loss, (s,), (_direction(s),))[1], along)
    torch.testing.assert_close(_dual(loss)(s), along)
    both = torch.stack([s, s.flip(0)])
    torch.testing.assert_close(vmap(loss)(both), torch.stack([loss(x) for x in both]))
    torch.testing.assert_close(
        vmap(grad(loss))(both), torch.stack([_gradient(loss, x) for x in both])
    )


WAYS: dict[str, Callable[[Loss], Loss]] = {
    "grad": grad,
    "vmap of grad": lambda loss: lambda s: vmap(grad(loss))(torch.stack([s, s.flip(0)])),
    "jvp": lambda loss: lambda s: jvp(loss, (s,), (_direction(s),))[1],
    "forward mode": _dual,
}


@pytest.mark.parametrize(
    ("name", "way"),
    [("labels", "vmap of grad"), ("labels", "jvp"), ("linear", "grad"), ("linear", "forward mode")],
)
def test_torch_func_within_a_graph(name: str, way: str) -> None:
    """A registered operator has no derivative in forward mode, and torch would make it 0."""
    make, s = WAYS[way](LOSSES[name]), _student()
    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")(s)
    assert compiled.any()
    torch.testing.assert_close(compiled, make(s))


@each_loss
def test_many_upstream_gradients_at_once(name: str) -> None:
    s, upstream = _student().requires_grad_(), torch.tensor([1.0, -3.0])
    upstreams._places.of.clear()
    if name == "inplace":  # after steps of one upstream gradient, the next is written in forward
        for _ in range(4):
            LOSSES[name](s).backward()
    loss = LOSSES[name](s)
    if name == "inplace":
        with pytest.raises(RuntimeError, match="batched gradients need; use inplace=False"):
            torch.autograd.grad(loss, s, upstream, is_grads_batched=True)
        return
    (found,) = torch.autograd.grad(loss, s, upstream, is_grads_batched=True)
    expected = _gradient(LOSSES[name], s)
    torch.testing.assert_close(found, torch.stack([expected, -3.0 * expected]))


def test_a_vectorized_jacobian_of_losses_per_row() -> None:
    teacher, s = torch.randn(4, 9), _student()
    found = torch.autograd.functional.jacobian(
        lambda x: fastkd.js_div(x, teacher, reduction="none"), s, vectorize=True
    )
    grads = _gradient(lambda x: fastkd.js_div(x, teacher, reduction="sum"), s)
    torch.testing.assert_close(found, torch.diag_embed(grads.t()).permute(1, 2, 0))


def test_a_hessian_is_double_backward() -> None:
    loss, s = LOSSES["labels"], _student()
    torch.testing.assert_close(hessian(loss)(s), torch.autograd.functional.hessian(loss, s))


def test_vmap_over_rows_labels_and_stored_teachers() -> None:
    s, teacher, labels = _student(), torch.randn(4, 9), torch.tensor([1, 2, 0, 8])
    rows = vmap(fastkd.distillation_loss)(s, teacher, labels)
    torch.testing.assert_close(rows, fastkd.distillation_loss(s, teacher, labels, reduction="none"))
    kept = fastkd.topk_from_logits(teacher, 4)
    made = vmap(lambda t: fastkd.topk_from_logits(t, 4).logprobs)(teacher)
    torch.testing.assert_close(made, kept.logprobs)

    def of_parts(s: Tensor, logprobs: Tensor, indices: Tensor) -> Tensor:
        return fastkd.kl_div(s, fastkd.TopK(logprobs, indices, tail="drop"))

    whole = fastkd.TopK(kept.logprobs, kept.indices, tail="drop")
    torch.testing.assert_close(
        vmap(of_parts)(s, kept.logprobs, kept.indices),
        fastkd.kl_div(s, whole, reduction="none"),
    )


def _responses() -> dict[str, Callable[..., Tensor]]:
    """Of rowwise formulas with gradients made by hand: (student, teacher, labels) -> loss."""
    return {
        "dkd": distill.dkd,
        "nkd": distill.nkd,
        "zscore": distill.zscore,
        "cosine": distill.cosine,
        "dist": distill.dist,
        "uld": distill.uld_loss,
        "uld of the top": partial(distill.uld_loss, top=3),
        "uld of pairs": partial(distill.uld_loss, alignment="truncate"),
    }


@pytest.mark.parametrize("in_chunks", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", _responses())
def test_losses_of_responses_inside_transforms(
    name: str, in_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients that they make by hand, a few rows at a time, give way to torch's own."""
    if in_chunks:
        monkeypatch.setattr("fastkd.distill.losses.chunked.HOST_ELEMENTS", 8)
    draw = torch.Generator().manual_seed(6)
    s, t, direction = (torch.randn(2, 3, 7, generator=draw).double() for _ in range(3))
    labels = torch.tensor([[1, -100, 0], [6, 3, 3]])
    t[0, 1] = torch.nan  # of a row that does not count
    function = _responses()[name]

    def loss(s: Tensor) -> Tensor:
        return function(s, t, labels)

    expected = _gradient(loss, s)
    along = (direction * expected).sum()
    assert expected.any()
    for way in (grad, jacrev, jacfwd):
        torch.testing.assert_close(way(loss)(s), expected)
    torch.testing.assert_close(jvp(loss, (s,), (direction,))[1], along)
    with forward_ad.dual_level():
        out = loss(forward_ad.make_dual(s, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, along)
    both = torch.stack([s, s.flip(-1)])
    torch.testing.assert_close(vmap(loss)(both), torch.stack([loss(x) for x in both]))
    torch.testing.assert_close(
        vmap(grad(loss))(both), torch.stack([_gradient(loss, x) for x in both])
    )
    torch.testing.assert_close(hessian(loss)(s), torch.autograd.functional.hessian(loss, s))


def test_labels_of_responses_under_vmap() -> None:
    draw = torch.Generator().manual_seed(6)
    s, t = (torch.randn(4, 1, 7, generator=draw).double() for _ in range(2))
    labels = torch.tensor([[1], [9], [-100], [6]])
    found = vmap(distill.dkd)(s, t, labels)
    assert found.isnan().tolist() == [False, True, False, False]
    for at in (0, 2, 3):
        torch.testing.assert_close(found[at], distill.dkd(s[at], t[at], labels[at]))
    found = vmap(distill.uld_loss)(s, t, labels.clamp(max=6))
    for at in range(4):
        expected = distill.uld_loss(s[at], t[at], labels[at].clamp(max=6))
        torch.testing.assert_close(found[at], expected)


def test_a_bad_label_under_vmap_is_nan() -> None:
    """There is no one value to look at, as on a GPU."""
    s, labels = _student(), torch.tensor([1, 99, 0, 8])
    rows = vmap(fastkd.distillation_loss)(s, s.flip(0), labels)
    assert rows.isnan().tolist() == [False, True, False, False]


def test_a_model_in_functional_form() -> None:
    """Per-sample gradients of a model's weights."""
    model, x, teacher = torch.nn.Linear(5, 9), torch.randn(3, 5), torch.randn(3, 9)
    weights = dict(model.named_parameters())

    def loss(weights: Any, x: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.kl_div(torch.func.functional_call(model, weights, (x,)), teacher)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, teacher)["bias"]
    for row in range(3):
        one = torch.autograd.grad(fastkd.kl_div(model(x[row]), teacher[row]), model.bias)[0]
        torch.testing.assert_close(found[row], one)


def test_a_kernel_chosen_by_hand_is_refused() -> None:
    with fastkd.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was requested.*func"):
        grad(LOSSES["kl"])(_student())


def test_a_split_vocabulary_is_refused_inside_a_transform() -> None:
    teacher = torch.randn(4, 9)
    with pytest.raises(NotImplementedError, match=r"group: torch\.func and forward-mode AD over a"):
        grad(lambda s: fastkd.kl_div(s, teacher, group="tensor parallel"))(_student())


# ---- tracers


@pytest.mark.parametrize("name", ["kl", "rows", "linear", "topk"])
def test_tracers_of_torchs_own_operations_are_refused(name: str) -> None:
    for trace in (
        lambda: torch.jit.trace(LOSSES[name], (_student(),), check_trace=False),
        lambda: make_fx(LOSSES[name])(_student()),
    ):
        with (
            warnings.catch_warnings(),
            pytest.raises(RuntimeError, match=r"write down torch's own"),
        ):
            warnings.simplefilter("ignore")
            trace()


def test_the_reference_can_be_traced() -> None:
    loss, s = LOSSES["kl"], _student()
    with warnings.catch_warnings(), fastkd.use_backend("reference"):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(loss, (s,)), make_fx(loss)(s)
    for other in (s, s.flip(0)):
        for one in traced:
            torch.testing.assert_close(one(other), loss(other))


class _WithLoss(torch.nn.Module):
    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.body, self.head, self.linear = torch.nn.Linear(5, 6), torch.nn.Linear(6, 9), linear

    def forward(self, x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        hidden = self.body(x)
        student = self.head(hidden)
        if self.linear:
            student = fastkd.LinearLogits(hidden, self.head.weight, self.head.bias)
        return fastkd.distillation_loss(student, teacher, labels)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "traced"])
@pytest.mark.parametrize("linear", [False, True], ids=["dense", "linear"])
def test_export_of_a_module_with_a_loss(linear: bool, strict: bool) -> None:
    module = _WithLoss(linear)
    example = torch.randn(4, 5), torch.randn(4, 9), torch.tensor([1, -100, 0, 8])
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"x": {0: rows}, "teacher": {0: rows}, "labels": {0: rows}}
    program = torch.export.export(module, example, strict=strict, dynamic_shapes=shapes)
    more = torch.randn(7, 5), torch.randn(7, 9), torch.tensor([1, 2, -100, 3, 4, 5, 8])
    torch.testing.assert_close(program.module()(*more), module(*more))


# ---- tensors that are no plain memory


def _nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        parts = [torch.randn(2, 9), torch.randn(3, 9)]
        return torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    x, dense = _nested(layout), torch.randn(4, 9)
    for call, name in (
        (lambda: fastkd.kl_div(x, x), "student"),
        (lambda: fastkd.kl_div(dense, x), "teacher"),
        (lambda: fastkd.kl_div(dense, dense, labels=x), "labels"),
        (lambda: fastkd.kl_div(dense, dense, weight=x), "weight"),
        (lambda: fastkd.LinearLogits(x, dense), "hidden"),
        (lambda: fastkd.TopK(x, x), "logprobs"),
        (lambda: fastkd.topk_from_logits(x, 2), "student"),
    ):
        with pytest.raises(TypeError, match=rf"{name}: got .*(nested|Nested|jagged).* a dense"):
            call()


def _wrapped(x: Tensor) -> Tensor:
    return TwoTensor(x, x.clone())


def test_tensors_that_wrap_others_are_refused() -> None:
    s, t, w = torch.randn(4, 9), torch.randn(4, 9), torch.randn(9, 9)
    kept, labels = fastkd.topk_from_logits(t, 3), torch.tensor([1, 2, 3, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        masked = torch.masked.masked_tensor(s, s > 0)
    wrong: list[Callable[[], Any]] = [
        lambda: fastkd.kl_div(masked, t),
        lambda: fastkd.kl_div(s, masked),
        lambda: fastkd.kl_div(_wrapped(s), t),
        lambda: fastkd.kl_div(s, t, weight=_wrapped(torch.rand(4))),
        lambda: fastkd.kl_div(s, t, labels=_wrapped(labels)),
        lambda: fastkd.kl_div(s, t, normalizer=_wrapped(torch.tensor(2.0))),
        lambda: fastkd.kl_div(fastkd.LinearLogits(_wrapped(s), w), t),
        lambda: fastkd.kl_div(fastkd.LinearLogits(s, _wrapped(w)), t),
        lambda: fastkd.kl_div(s, fastkd.TopK(kept.logprobs, _wrapped(kept.indices))),
        lambda: fastkd.topk_from_logits(_wrapped(t), 3),
    ]
    for call in wrong:
        with pytest.raises(TypeError, match=r"got a (TwoTensor|MaskedTensor), .* a plain tensor"):
            call()
    with fastkd.use_backend("reference"):
        value = fastkd.kl_div(_wrapped(s), t)
        assert isinstance(value, TwoTensor)
        torch.testing.assert_close(value.a, fastkd.kl_div(s, t))


def test_a_subclass_with_memory_of_its_own_is_a_tensor_like_others() -> None:
    class Named(Tensor):
        pass

    s, t = torch.randn(4, 9), torch.randn(4, 9)
    assert torch.equal(
        fastkd.kl_div(s.as_subclass(Named), t).as_subclass(Tensor), fastkd.kl_div(s, t)
    )
