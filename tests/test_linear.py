"""Logits that are never built, by real products: values, gradients of every part, chunks, options.

That every divergence and option is right for a linear operand is shown by the tests of dense
logits, in their linear forms (common.FORMS). Here are the products themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import (
    Backend,
    assert_gradients,
    assert_values,
    each_dtype,
    each_name,
    oracle,
    plain,
)
from pairwise import pairwise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import LinearLogits
from fastkd.divergence import Divergence

NAN = float("nan")
KL = fastkd.divergences.kl
N, V, HS, HT = 11, 37, 16, 24
NAMES = ("hidden_s", "weight_s", "bias_s", "hidden_t", "weight_t", "bias_t")
each_way = pytest.mark.parametrize("reduction", ["mean", "none"])
Parts = dict[str, Tensor]

EXACT = {"bias": True, "scale": 0.5}  # logits without a rounding
HEADS: dict[str, dict[str, Any]] = {
    "bare": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "scaled-bias": {"bias": True, "scale": -1.7},
    "softcap": {"softcap": 4.0},
    "everything": {"bias": True, "scale": 0.7, "softcap": 3.0},
}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


def _parts(
    backend: Backend, dtype: torch.dtype = torch.float32, n: int = N, v: int = V, v_t: int = 0
) -> Parts:
    """Multiples of 1/4 from -1 to 1: their logits are exact in every dtype, as sums of few."""
    shapes = {"hidden_s": (n, HS), "weight_s": (v, HS), "bias_s": (v,)}
    shapes |= {"hidden_t": (n, HT), "weight_t": (v_t or v, HT), "bias_t": (v_t or v,)}
    made = {name: torch.randint(-4, 5, shape) / 4 for name, shape in shapes.items()}
    return {name: x.to(backend.device, dtype) for name, x in made.items()}


def _linear(parts: Parts, side: str, bias: bool = False, **options: Any) -> LinearLogits:
    given = parts[f"bias_{side}"] if bias else None
    return LinearLogits(parts[f"hidden_{side}"], parts[f"weight_{side}"], given, **options)


def _built(
    parts: Parts, side: str, bias: bool = False, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The logits as a model's own code makes them."""
    z = parts[f"hidden_{side}"] @ parts[f"weight_{side}"].t()
    z = z + parts[f"bias_{side}"] if bias else z
    z = z * scale if scale != 1.0 else z
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def _differentiate(
    loss: Callable[[Parts], Tensor], parts: Parts, wrt: tuple[str, ...], upstream: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: x.detach().requires_grad_(name in wrt) for name, x in parts.items()}
    value = loss(leaves)
    by = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    grads = torch.autograd.grad(value, [leaves[name] for name in wrt], by)
    return value.detach(), dict(zip(wrt, grads, strict=True))


def _check(
    parts: Parts,
    head: dict[str, Any],
    labels: Tensor | None = None,
    *,
    sides: str = "st",
    wrt: tuple[str, ...] | None = None,
    upstream: Tensor | None = None,
    chunk_size: int | None = 4,
    pack: bool = False,
    divergence: Divergence = KL,
    **options: Any,
) -> dict[str, Tensor]:
    """The tolerance rule for the loss and the gradient of every part.

    sides: those that are linear. What a product rounds differs from ours to torch's, at random, so
    that a row's value is measured by the largest error of torch's, as gradients are.
    """
    if wrt is None:
        wrt = tuple(name for name in NAMES if head.get("bias") or not name.startswith("bias"))
    call = {"alpha": 0.0, "temperature": 1.0, "t_squared": False, "divergence": divergence}
    call |= options

    def ours(leaves: Parts) -> Tensor:
        operands = [
            _linear(leaves, side, **head, chunk_size=chunk_size, pack=pack)
            if side in sides
            else _built(leaves, side, **head)
            for side in "st"
        ]
        return fastkd.distillation_loss(*operands, labels, **call)

    def torchs(leaves: Parts) -> Tensor:
        return plain(_built(leaves, "s", **head), _built(leaves, "t", **head), labels, **call)

    value, grads = _differentiate(ours, parts, wrt, upstream)
    near, near_grads = _differentiate(torchs, parts, wrt, upstream)
    true = {name: oracle(x) for name, x in parts.items()}
    exact, exact_grads = _differentiate(torchs, true, wrt, upstream)
    assert_values(value, exact + (near - exact).abs().max(), exact)
    for name in wrt:
        assert grads[name].shape == parts[name].shape
        assert grads[name].dtype == parts[name].dtype
        assert_gradients(grads[name], near_grads[name], exact_grads[name])
    return grads


def _labels(backend: Backend, n: int = N, v: int = V) -> Tensor:
    labels = torch.randint(v, (n,), device=backend.device)
    labels[[0, 5, n - 1]] = -100
    return labels


# ---- values and gradients


@pairwise
@each_name
@each_dtype
@each_way
def test_every_part_of_both_sides(
    backend: Backend, divergence: Divergence, dtype: torch.dtype, reduction: str
) -> None:
    parts = _parts(backend, dtype)
    options = {"alpha": 0.3, "temperature": 2.0, "t_squared": True, "label_smoothing": 0.1}
    _check(
        parts,
        EXACT,
        _labels(backend),
        divergence=divergence,
        reduction=reduction,
        **options,
    )


@pairwise
@each_head
@each_dtype
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_heads(
    backend: Backend, head: dict[str, Any], dtype: torch.dtype, chunk_size: int | None
) -> None:
    """Whatever the size of a chunk: results change by rounding only."""
    _check(_parts(backend, dtype), head, chunk_size=chunk_size, reduction="none")


@pairwise
@pytest.mark.parametrize("sides", ["s", "t"])
@each_head
@each_way
def test_the_other_side_is_given(
    backend: Backend, sides: str, head: dict[str, Any], reduction: str
) -> None:
    upstream = torch.rand(N if reduction == "none" else (), device=backend.device) + 0.5
    _check(_parts(backend), head, sides=sides, reduction=reduction, upstream=upstream)


WANTED = [
    ("hidden_s",),
    ("weight_s",),
    ("bias_s",),
    ("hidden_t", "bias_t"),
    ("weight_t",),
    ("hidden_s", "weight_t"),
]


@pytest.mark.parametrize("wrt", WANTED, ids="+".join)
@each_way
def test_parts_by_themselves(backend: Backend, wrt: tuple[str, ...], reduction: str) -> None:
    _check(_parts(backend), HEADS["everything"], wrt=wrt, reduction=reduction)


@pytest.mark.parametrize("v", [1, 63, 64, 65, 129])
def test_vocabularies_of_any_width(backend: Backend, v: int) -> None:
    _check(_parts(backend, torch.bfloat16, v=v), HEADS["bias"])


@each_dtype
def test_dtypes_of_the_two_sides_may_differ(backend: Backend, dtype: torch.dtype) -> None:
    parts = _parts(backend)
    parts |= {name: parts[name].to(dtype) for name in ("hidden_t", "weight_t", "bias_t")}
    _check(parts, HEADS["bias"])


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 2)], ids=str)
@each_way
def test_leading_dimensions(backend: Backend, lead: tuple[int, ...], reduction: str) -> None:
    parts = _parts(backend, torch.float64, n=max(1, torch.Size(lead).numel()))
    shaped = {**parts, "hidden_s": parts["hidden_s"].view(*lead, HS)}
    shaped["hidden_t"] = parts["hidden_t"].view(*lead, HT)
    ours = fastkd.kl_div(_linear(shaped, "s"), _linear(shaped, "t"), reduction=reduction)
    flat = fastkd.kl_div(_linear(parts, "s"), _linear(parts, "t"), reduction=reduction)
    torch.testing.assert_close(ours, flat.view(lead if reduction == "none" else ()))


def test_hidden_states_without_the_last_position(backend: Backend) -> None:
    """The shift of a language model: neither hidden states nor given logits are one block."""
    hidden = torch.randn(2, 6, HS, device=backend.device)
    teacher = torch.randn(2, 6, V, device=backend.device)
    weight = torch.randn(V, HS, device=backend.device)
    for pack in (False, True):
        grads = []
        for x, t in (
            (hidden[:, :-1], teacher[:, 1:]),
            (hidden[:, :-1].contiguous(), teacher[:, 1:].contiguous()),
        ):
            x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
            labels = torch.tensor([[0, 1, -100, 2, 3]] * 2, device=backend.device)
            loss = fastkd.js_div(LinearLogits(x, weight, chunk_size=3, pack=pack), t, labels=labels)
            grads.append(torch.autograd.grad(loss, (x, t)))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


@each_way
def test_no_rows(backend: Backend, reduction: str) -> None:
    parts = {name: x.requires_grad_() for name, x in _parts(backend, n=0).items()}
    operands = _linear(parts, "s", bias=True), _linear(parts, "t", bias=True)
    loss = fastkd.kl_div(*operands, reduction=reduction).sum()
    for grad in torch.autograd.grad(loss, list(parts.values())):
        assert not grad.any()


# ---- options


@pairwise
@each_way
@pytest.mark.parametrize("pack", [False, True], ids=["all", "packed"])
@each_head
def test_ignored_rows_do_not_matter(
    backend: Backend, reduction: str, pack: bool, head: dict[str, Any]
) -> None:
    """Whatever their hidden states hold: 0 * NaN in a product for a gradient would be NaN."""
    parts, labels = _parts(backend), _labels(backend)
    usual = _check(parts, head, labels, alpha=0.4, reduction=reduction, pack=pack)
    spoilt = {name: x.clone() for name, x in parts.items()}
    for name in ("hidden_s", "hidden_t"):
        spoilt[name][labels < 0] = NAN

    def loss(leaves: Parts) -> Tensor:
        sides = (_linear(leaves, side, **head, chunk_size=4, pack=pack) for side in "st")
        options = {"alpha": 0.4, "temperature": 1.0, "t_squared": False, "reduction": reduction}
        return fastkd.distillation_loss(*sides, labels, **options)

    value, grads = _differentiate(loss, spoilt, tuple(usual), None)
    assert value.isfinite().all()
    for name, grad in grads.items():
        assert torch.equal(grad, usual[name]), name
        if name.startswith("hidden"):
            assert not grad[labels < 0].any()


@pytest.mark.parametrize("pack", [False, True], ids=["all", "packed"])
@each_way
def test_all_rows_ignored(backend: Backend, pack: bool, reduction: str) -> None:
    parts = {name: torch.full_like(x, NAN) for name, x in _parts(backend).items()}
    labels = torch.full((N,), -100, device=backend.device)
    leaves = {name: parts[name].requires_grad_() for name in ("hidden_s", "hidden_t")}
    leaves |= {name: torch.ones_like(x) for name, x in parts.items() if name not in leaves}
    sides = (_linear(leaves, side, pack=pack) for side in "st")
    loss = fastkd.kl_div(*sides, labels=labels, reduction=reduction)
    assert not loss.any()
    for grad in torch.autograd.grad(loss.sum(), (leaves["hidden_s"], leaves["hidden_t"])):
        assert not grad.any()


@each_dtype
@each_way
def test_vocab_size(backend: Backend, dtype: torch.dtype, reduction: str) -> None:
    """Rows of the weight beyond it are never read, and their gradient is exactly 0."""
    parts = _parts(backend, dtype, v=48, v_t=41)
    for name in ("weight_s", "bias_s", "weight_t", "bias_t"):
        parts[name][33:] = NAN
    leaves = {name: x.requires_grad_() for name, x in parts.items()}
    sides = [_linear(leaves, side, bias=True, chunk_size=4) for side in "st"]
    loss = fastkd.kl_div(*sides, vocab_size=33, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    short = {
        name: (x if name.startswith("hidden") else x[:33]).detach().requires_grad_()
        for name, x in parts.items()
    }
    sides = [_linear(short, side, bias=True, chunk_size=4) for side in "st"]
    usual = fastkd.kl_div(*sides, reduction=reduction)
    torch.testing.assert_close(loss, usual)
    expected = torch.autograd.grad(usual.sum(), list(short.values()))
    for name, grad, of_short in zip(parts, grads, expected, strict=True):
        cut = len(of_short)
        torch.testing.assert_close(grad[:cut], of_short)
        assert name.startswith("hidden") or not grad[33:].any()


def test_weight_and_normalizer_get_their_gradients(backend: Backend) -> None:
    parts = _parts(backend, torch.float64)
    grads = []
    for make in (_linear, _built):
        weight = torch.arange(1.0, N + 1, device=backend.device, dtype=torch.float64)
        normalizer = torch.tensor(3.0, device=backend.device, dtype=torch.float64)
        leaves = weight.requires_grad_(), normalizer.requires_grad_(), parts["weight_s"]
        leaves[2].requires_grad_()
        loss = fastkd.kl_div(
            make(parts, "s"), make(parts, "t"), weight=leaves[0], normalizer=leaves[1]
        )
        grads.append(torch.autograd.grad(loss, leaves))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_inplace_changes_nothing(backend: Backend) -> None:
    parts = _parts(backend)
    given = _built(parts, "s").requires_grad_() * 1
    before = given.detach().clone()
    teacher = _linear(parts, "t")
    loss = fastkd.kl_div(given, teacher, inplace=True)
    torch.autograd.grad(loss, given)
    assert torch.equal(given, before)
    hidden = parts["hidden_s"].requires_grad_()
    results = [
        torch.autograd.grad(fastkd.kl_div(_linear(parts, "s"), teacher, inplace=inplace), hidden)
        for inplace in (False, True)
    ]
    assert torch.equal(results[0][0], results[1][0])


def test_modules_take_linear_logits(backend: Backend) -> None:
    parts, labels = _parts(backend), _labels(backend)
    sides = _linear(parts, "s"), _linear(parts, "t")
    for module, function in (
        (fastkd.nn.JSDiv(beta=0.3), lambda s, t, at: fastkd.js_div(s, t, beta=0.3, labels=at)),
        (fastkd.nn.DistillationLoss(), fastkd.distillation_loss),
    ):
        assert torch.equal(module(*sides, labels), function(*sides, labels))


# ---- what is not needed is not computed


class Products(TorchDispatchMode):
    """Counts the matrix products inside, by the sizes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and out.numel():
            self.made.append(list(out.shape))
        return out


@pytest.mark.parametrize(
    "wrt", [(), ("hidden_s",), ("weight_s",), ("hidden_s", "weight_s")], ids=str
)
def test_frozen_parts_cost_no_product(kernels: Backend, wrt: tuple[str, ...]) -> None:
    parts = {name: x.requires_grad_(name in wrt) for name, x in _parts(kernels).items()}
    sides = [_linear(parts, side) for side in "st"]
    with Products() as products:
        loss = fastkd.kl_div(*sides)
        if wrt:
            torch.autograd.grad(loss, [parts[name] for name in wrt])
    expected = [[N, V], [N, V]]
    expected += [[N, HS]] if "hidden_s" in wrt else []
    expected += [[V, HS]] if "weight_s" in wrt else []
    assert products.made == expected


def test_packed_rows_take_no_product(kernels: Backend) -> None:
    parts, labels = _parts(kernels), _labels(kernels)
    kept = int((labels >= 0).sum())
    with Products() as products:
        fastkd.kl_div(_linear(parts, "s", pack=True), _linear(parts, "t"), labels=labels)
    assert products.made == [[kept, V], [kept, V]] and kept < N


def test_the_only_chunks_weight_product_waits_for_backward(kernels: Backend) -> None:
    parts = {name: x.requires_grad_(name == "weight_s") for name, x in _parts(kernels).items()}
    sides = [_linear(parts, side) for side in "st"]
    with Products() as products:
        loss = fastkd.kl_div(*sides)
        assert products.made == [[N, V], [N, V]]
        loss.backward()
    assert products.made[2:] == [[V, HS]]


def test_a_teacher_that_has_no_part_takes_no_product(kernels: Backend) -> None:
    """Only the labels count: it is not read, and what it is made of has a gradient of 0."""
    parts = _parts(kernels)
    parts["hidden_t"].fill_(NAN)
    parts = {name: x.requires_grad_() for name, x in parts.items()}
    teacher = _linear(parts, "t", bias=True)
    with Products() as products:
        loss = fastkd.distillation_loss(_linear(parts, "s"), teacher, _labels(kernels), alpha=1.0)
    assert products.made == [[N, V], [N, HS]]
    for name, grad in zip(
        NAMES[3:], torch.autograd.grad(loss, [parts[n] for n in NAMES[3:]]), strict=True
    ):
        assert not grad.any(), name


# ---- tied weights, autocast, modes of autograd


def test_tied_embeddings(backend: Backend) -> None:
    """One parameter, looked up and multiplied by: the two gradients meet in it."""
    tokens = torch.randint(V, (N,), device=backend.device)
    teacher = torch.randn(N, V, device=backend.device)
    weight = torch.randn(V, HS, device=backend.device).requires_grad_()
    grads = []
    for make in (LinearLogits, torch.nn.functional.linear):
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        loss = fastkd.kl_div(make(hidden, weight), teacher)
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads)


def test_one_weight_on_both_sides(backend: Backend) -> None:
    weight = torch.randn(V, HS, device=backend.device).requires_grad_()
    x, y = (torch.randn(N, HS, device=backend.device) for _ in range(2))
    grads = []
    for make in (LinearLogits, torch.nn.functional.linear):
        loss = fastkd.skew_kl_div(make(x, weight), make(y, weight))
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads)


@pairwise
@pytest.mark.parametrize("inside", [True, False], ids=["loss-inside", "loss-outside"])
@pytest.mark.parametrize("chunk_size", [4, None])
@each_way
def test_autocast(backend: Backend, inside: bool, chunk_size: int | None, reduction: str) -> None:
    """float32 parameters, products in bfloat16 as the model's own would be, float32 gradients."""
    parts = {name: x.requires_grad_() for name, x in _parts(backend).items()}
    results = []
    for linear in (True, False):
        with torch.autocast(backend.device.type, dtype=torch.bfloat16):
            if linear:
                sides: Any = [
                    _linear(parts, side, bias=True, chunk_size=chunk_size) for side in "st"
                ]
                assert sides[0].dtype == torch.bfloat16
            else:
                sides = [
                    torch.nn.functional.linear(
                        *(parts[f"{x}_{side}"] for x in ("hidden", "weight", "bias"))
                    )
                    for side in "st"
                ]
            loss = fastkd.js_div(*sides, reduction=reduction) if inside else None
        loss = fastkd.js_div(*sides, reduction=reduction) if loss is None else loss
        results.append((loss, *torch.autograd.grad(loss.sum(), list(parts.values()))))
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def test_made_without_grad(backend: Backend) -> None:
    """As logits would be: made under no_grad, it takes no part in autograd."""
    parts = {name: x.requires_grad_() for name, x in _parts(backend).items()}
    with torch.no_grad():
        teacher = _linear(parts, "t", bias=True)
    assert not teacher.requires_grad and _linear(parts, "s").requires_grad
    loss = fastkd.kl_div(_linear(parts, "s"), teacher)
    assert torch.autograd.grad(loss, parts["weight_t"], allow_unused=True) == (None,)


def test_a_teacher_of_inference_mode(backend: Backend) -> None:
    parts = {name: x.requires_grad_(name.endswith("_s")) for name, x in _parts(backend).items()}
    with torch.inference_mode():
        teacher = LinearLogits(parts["hidden_t"] * 1, parts["weight_t"])
    for reduction in ("mean", "none"):
        loss = fastkd.kl_div(_linear(parts, "s"), teacher, reduction=reduction).sum()
        once = torch.autograd.grad(loss, parts["weight_s"], retain_graph=True)
        again = torch.autograd.grad(loss, parts["weight_s"])
        assert torch.equal(once[0], again[0]) and once[0].any()


# ---- backward


@pairwise
@pytest.mark.parametrize("chunk_size", [4, None])
@each_dtype
@each_way
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_second_backward_gives_the_same_bits(
    backend: Backend, chunk_size: int | None, dtype: torch.dtype, reduction: str, upstream: float
) -> None:
    """Also after the first gradients were overwritten by whoever received them."""
    leaves = {name: x.requires_grad_() for name, x in _parts(backend, dtype).items()}
    sides = [_linear(leaves, side, bias=True, chunk_size=chunk_size) for side in "st"]
    loss = upstream * fastkd.js_div(*sides, reduction=reduction).sum()
    inputs = list(leaves.values())
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.fill_(NAN)
    for _ in range(2):
        again = torch.autograd.grad(loss, inputs, retain_graph=True)
        for one, other in zip(again, kept, strict=True):
            assert torch.equal(one, other)


@pairwise
@each_dtype
@pytest.mark.parametrize("chunk_size", [4, None])
@pytest.mark.parametrize("upstream", [0.0, 0.3, -2.0, 1024.0])
def test_upstream_gradient(
    backend: Backend, dtype: torch.dtype, chunk_size: int | None, upstream: float
) -> None:
    by = torch.tensor(upstream, device=backend.device)
    _check(_parts(backend, dtype), HEADS["bias"], chunk_size=chunk_size, upstream=by)


def test_hidden_states_overwritten_before_backward(backend: Backend) -> None:
    """The gradients are those of the forward that was."""
    parts = {name: x.requires_grad_() for name, x in _parts(backend).items()}
    usual = torch.autograd.grad(
        fastkd.kl_div(*(_linear(parts, x) for x in "st")), parts["weight_s"]
    )
    hidden = parts["hidden_s"] * 1
    loss = fastkd.kl_div(LinearLogits(hidden, parts["weight_s"]), _linear(parts, "t"))
    with torch.no_grad():
        hidden.fill_(NAN)
    if backend.name == "reference":
        with pytest.raises(RuntimeError, match="inplace"):
            torch.autograd.grad(loss, parts["weight_s"])
    else:
        grad = torch.autograd.grad(loss, parts["weight_s"], retain_graph=True)
        assert torch.equal(grad[0], usual[0])
        with pytest.raises(RuntimeError, match="inplace"):  # a second one needs them anew
            torch.autograd.grad(loss, parts["weight_s"])


@pytest.mark.not_interpreted  # hundreds of losses, three minutes of them
@each_head
@each_way
def test_gradcheck(backend: Backend, head: dict[str, Any], reduction: str) -> None:
    parts = {
        name: x.requires_grad_() for name, x in _parts(backend, torch.float64, n=3, v=4).items()
    }
    labels = torch.tensor([1, -100, 2], device=backend.device)

    def loss(*tensors: Tensor) -> Tensor:
        leaves = dict(zip(NAMES, tensors, strict=True))
        sides = (_linear(leaves, side, **head, chunk_size=2) for side in "st")
        return fastkd.distillation_loss(*sides, labels, reduction=reduction)

    inputs = tuple(parts[name] for name in NAMES)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("chunk_size", [None, 300])
def test_half_precision_leaves_room_for_the_gradients_scale(
    kernels: Backend, chunk_size: int | None
) -> None:
    """A mean over many rows is small; float16 underflows before a loss scaler's factor comes."""
    parts = _parts(kernels, torch.float16, n=1000, v=3000)
    by = torch.tensor(32768.0, device=kernels.device)
    _check(parts, {}, upstream=by, wrt=("hidden_s", "weight_s"), chunk_size=chunk_size)
