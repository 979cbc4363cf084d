"""The losses of responses against their formulas, and what they promise at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from common import INF, INPUTS, Backend
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from oracle import FLOORS, assert_gradients, assert_values, oracle, row_factor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import distill
from fastkd.distill.batch import Batch, Outputs
from fastkd.distill.losses import chunked
from fastkd.distill.objective import Objective

# ---- the formulas, as the papers write them: logits [n, V] and classes [n] to the loss [n]


def _rest(x: Tensor, labels: Tensor) -> Tensor:
    """[n, V - 1]: the classes other than the label's."""
    other = torch.arange(x.size(-1), device=x.device) != labels.unsqueeze(-1)
    return x[other].view(x.size(0), -1)


def _at(x: Tensor, labels: Tensor) -> Tensor:
    return x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


def plain_mse(s: Tensor, t: Tensor, y: Tensor, *, centred: bool = True) -> Tensor:
    if centred:
        s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    return (s - t).square().sum(-1) / (2 * s.size(-1))


def plain_dkd(
    s: Tensor, t: Tensor, y: Tensor, *, temperature: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    binary, rest = [], []
    for x in (t / temperature, s / temperature):
        log = x.log_softmax(-1)
        binary.append(torch.stack((_at(log, y), _rest(log, y).logsumexp(-1)), -1))
        rest.append(_rest(x, y).log_softmax(-1))
    return temperature**2 * (alpha * _kl(*binary) + beta * _kl(*rest))


def plain_nkd(s: Tensor, t: Tensor, y: Tensor, *, temperature: float, gamma: float = 1.5) -> Tensor:
    target = _at(t.softmax(-1), y) * _at(s.log_softmax(-1), y)
    p, logq = _rest(t / temperature, y).softmax(-1), _rest(s / temperature, y).log_softmax(-1)
    return -target - gamma * temperature**2 * (p * logq).sum(-1)


def plain_zscore(s: Tensor, t: Tensor, y: Tensor, *, temperature: float) -> Tensor:
    s, t = ((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) for x in (s, t))
    logp, logq = ((x / temperature).log_softmax(-1) for x in (t, s))
    return temperature**2 * _kl(logp, logq)


def plain_cosine(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(s, t, -1)


def plain_dist(
    s: Tensor, t: Tensor, y: Tensor, *, temperature: float, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """0-d: not a loss of rows."""
    logq, logp = ((x / temperature).log_softmax(-1) for x in (s, t))
    # relative to the class's largest one: a correlation does not see it, and e^-5000 would be 0
    over_batch = [(x - x.detach().amax(0)).exp() for x in (logq, logp)]
    inter = 1 - _pearson(logq.exp(), logp.exp(), -1).mean()
    return beta * inter + gamma * (1 - _pearson(*over_batch, 0).mean())


def _pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    square_x, square_y = (z.square().sum(dim) for z in (x, y))
    one, both = (square_x == 0) | (square_y == 0), (square_x == 0) & (square_y == 0)
    r = (x * y).sum(dim) / torch.where(one, 1.0, square_x * square_y).sqrt()
    return torch.where(both, 1.0, torch.where(one, 0.0, r))


class Loss(NamedTuple):
    """A loss, its formula, and which options and inputs it has."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    temperature: bool = True
    labels: bool = False  # needs them
    masked: bool = False  # -inf is an input
    zero: bool = True  # at student = teacher

    @property
    def name(self) -> str:
        return self.ours.__name__


LOSSES = [
    Loss(distill.logit_mse, plain_mse, temperature=False),
    Loss(distill.dkd, plain_dkd, labels=True, masked=True),
    Loss(distill.nkd, plain_nkd, labels=True, masked=True, zero=False),
    Loss(distill.zscore, plain_zscore),
    Loss(distill.cosine, plain_cosine, temperature=False),
    Loss(distill.dist, plain_dist, masked=True),
]
BY_NAME = {loss.name: loss for loss in LOSSES}
PER_ROW = [loss for loss in LOSSES if loss.name != "dist"]
HEATED = [loss for loss in LOSSES if loss.temperature]


def each(losses: list[Loss]) -> Any:
    return pytest.mark.parametrize("loss", losses, ids=lambda loss: loss.name)


def _one_at_200(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Student and teacher sure beyond what a probability can say, of the same or another class."""
    s, t = torch.randn(n, v), torch.randn(n, v)
    row = torch.arange(n)
    s[row, row % v] = 200.0
    t[row, (row + row % 2) % v] = 200.0
    return s, t


LOGITS = {
    **{k: INPUTS[k] for k in ("random", "peaked", "equal", "disjoint", "large", "minus-inf")},
    "offset": INPUTS["offset"],
    "one-at-200": _one_at_200,
}
CASES = [
    pytest.param(loss, make, temperature, id=f"{loss.name}-{name}-{temperature:g}")
    for loss in LOSSES
    for name, make in LOGITS.items()
    for temperature in ([1.0, 4.0, 1000.0] if loss.temperature else [1.0])
    if name != "minus-inf" or loss.masked
]


@pytest.fixture(params=[False, True], ids=["whole", "in-chunks"])
def in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A batch at once, as small ones are, or two rows at a time."""
    if request.param:
        monkeypatch.setattr(chunked, "HOST_ELEMENTS", 20)
    return bool(request.param)


def classes(n: int, v: int) -> Tensor:
    """A label for each row, two of them ignored: the first and the last but one."""
    y = torch.arange(n) % v
    y[0] = y[-2] = -100
    return y


def run(loss: Callable[..., Tensor], *operands: Any, **options: Any) -> tuple[Tensor, Tensor]:
    s, *others = operands
    s = s.detach().requires_grad_()
    value = loss(s, *others, **options)
    (grad,) = torch.autograd.grad(value, s, torch.ones_like(value))
    return value.detach(), grad


def reduced(loss: Loss, s: Tensor, t: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The formula on the rows that count, reduced."""
    names = ("weight", "reduction", "normalizer")
    rows = {name: options.pop(name) for name in names if name in options}
    keep, factor = row_factor(s, y, weight=rows.pop("weight", None), **{"reduction": "mean"} | rows)
    value = loss.plain(s[keep], t[keep], y[keep], **options)
    if not value.dim():
        return value
    value = value.new_zeros(keep.shape).masked_scatter(keep, value) * factor.to(value.dtype)
    return value if rows.get("reduction") == "none" else value.sum()


def assert_right(loss: Loss, s: Tensor, t: Tensor, y: Tensor, **options: Any) -> None:
    """The tolerance rule of all tests, for the value and the student's gradient."""
    value, grad = run(loss.ours, s, t, y, **options)
    assert grad.dtype == s.dtype and grad.shape == s.shape
    theirs = run(lambda *a, **k: reduced(loss, *a, **k), s, t, y, **options)
    true = run(lambda *a, **k: reduced(loss, *a, **k), oracle(s), oracle(t), y, **options)
    T = options.get("temperature", 1.0)
    nat = {"dkd": 9 * T * T, "nkd": 1.5 * T * T, "zscore": T * T}.get(loss.name, 1.0)
    assert_values(value, theirs[0], true[0], nat)
    # what the gradient is the difference of: probabilities times nat / T, directions over a norm
    kept = oracle(s)[y != -100]
    size = {"logit_mse": 0.0, "dist": 2 / T}.get(loss.name, nat / T)
    if loss.name == "zscore":
        size /= float(kept.std(-1).min())
    if loss.name == "cosine":
        size /= float(kept.norm(dim=-1).min())
    rounding = FLOORS[value.dtype] * size
    assert_gradients(grad, theirs[1], true[1], rounding)
    assert (grad[y == -100] == 0).all()


# ---- values and gradients


@pytest.mark.parametrize(("loss", "make", "temperature"), CASES)
def test_value_and_gradient(
    backend: Backend,
    in_chunks: bool,
    loss: Loss,
    make: Callable[[int, int], tuple[Tensor, Tensor]],
    temperature: float,
) -> None:
    options = {"temperature": temperature} if loss.temperature else {}
    s, t = (x.to(backend.device) for x in make(7, 10))
    y = classes(7, 10).to(backend.device)
    if make is INPUTS["minus-inf"]:
        y = torch.where(y == -100, y, 0)  # the column that is never masked
    assert_right(loss, s, t, y, **options)


@each(LOSSES)
@pytest.mark.parametrize("vocab", [2, 3, 40_000])
def test_few_and_many_classes(loss: Loss, vocab: int) -> None:
    """The last one in chunks as they come."""
    s, t = INPUTS["random"](9, vocab)
    assert_right(
        loss, s, t, classes(9, vocab), **({"temperature": 2.0} if loss.temperature else {})
    )


@each(LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(in_chunks: bool, loss: Loss, dtype: torch.dtype) -> None:
    """The loss is float32, or float64, and the gradient as exact as its dtype."""
    s, t = (x.to(dtype) for x in INPUTS["random"](7, 10))
    y = classes(7, 10)
    value, grad = run(loss.ours, s, t.float(), y)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == wide and grad.dtype == dtype
    options = {"temperature": defaults(loss)["temperature"]} if loss.temperature else {}
    true = run(lambda *a: reduced(loss, *a, **options), oracle(s), oracle(t.float()), y)
    assert_values(value, true[0], true[0], 9 * options.get("temperature", 1.0) ** 2)
    assert_gradients(grad, true[1], true[1], FLOORS[wide] * 9 * options.get("temperature", 1.0))


def warm(loss: Loss) -> dict[str, Any]:
    return {"temperature": 2.0} if loss.temperature else {}


def defaults(loss: Loss) -> dict[str, Any]:
    return dict(loss.ours.__kwdefaults__)


@each(PER_ROW)
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions(in_chunks: bool, loss: Loss, reduction: str, weighted: bool) -> None:
    s, t = INPUTS["random"](7, 10)
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(7)
    elif reduction == "mean":
        options["normalizer"] = torch.tensor(3)
    if loss.temperature:
        options["temperature"] = 2.0
    assert_right(loss, s, t, classes(7, 10), **options)


@each(PER_ROW)
def test_leading_dimensions_and_columns_in_use(in_chunks: bool, loss: Loss) -> None:
    s, t = (x.view(2, 3, 11) for x in INPUTS["random"](6, 11))
    y = torch.randint(0, 8, (2, 3))
    t = F.pad(t, (0, 2), value=math.nan)
    s[..., 8:] = math.nan
    value, grad = run(loss.ours, s, t, y, vocab_size=8, reduction="none")
    assert value.shape == (2, 3)
    flat = (x[..., :8].reshape(6, 8) for x in (s, t))
    alone, its = run(loss.ours, *flat, y.view(6), reduction="none")
    torch.testing.assert_close(value.view(6), alone)
    torch.testing.assert_close(grad[..., :8].reshape(6, 8), its)
    assert (grad[..., 8:] == 0).all()


@each(LOSSES)
def test_strided_operands(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](8, 12)
    y = torch.randint(0, 10, (4,))
    a, b = s[::2, 1:11], t[1::2, 2:]
    value, grad = run(loss.ours, a, b, y)
    again, its = run(loss.ours, a.contiguous(), b.contiguous(), y)
    torch.testing.assert_close(value, again)
    torch.testing.assert_close(grad, its)


@each([loss for loss in LOSSES if loss.name != "nkd"])
def test_teacher_gets_its_gradient(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    options = warm(loss)
    _, grad = run(lambda b, a, y: loss.ours(a, b, y, **options), t, s, y)
    _, true = run(lambda b, a, y: reduced(loss, a, b, y, **options), oracle(t), oracle(s), y)
    assert_gradients(grad, true, true, FLOORS[grad.dtype] * 20)


def test_nkd_refuses_a_teacher_that_wants_a_gradient() -> None:
    s, t = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"teacher: got .* requires grad, expected .*detach"):
        distill.nkd(s, t, torch.zeros(2, dtype=torch.long))


@each(PER_ROW)
def test_backward_again_and_upstream(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    s.requires_grad_()
    value = loss.ours(s, t, classes(7, 10))
    (first,) = torch.autograd.grad(value, s, retain_graph=True)
    (again,) = torch.autograd.grad(3 * value, s)
    torch.testing.assert_close(again, 3 * first)


@each(LOSSES)
def test_second_derivative(in_chunks: bool, loss: Loss) -> None:
    s, t = (x.double() / 3 for x in INPUTS["random"](4, 5))
    y = torch.tensor([0, 4, -100, 2])
    s.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: loss.ours(x, t, y), s)


@each(PER_ROW)
def test_weight_gets_its_gradient(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    y, weight = classes(7, 10), torch.rand(7, requires_grad=True)
    (grad,) = torch.autograd.grad(loss.ours(s, t, y, weight=weight, reduction="sum"), weight)
    torch.testing.assert_close(grad, loss.ours(s, t, y, reduction="none"))


def test_teacher_made_in_inference_mode(in_chunks: bool) -> None:
    s, t = INPUTS["random"](7, 10)
    with torch.inference_mode():
        other = t.clone()
    for loss in LOSSES:
        torch.testing.assert_close(
            run(loss.ours, s, other, classes(7, 10)), run(loss.ours, s, t, classes(7, 10))
        )


# ---- what holds by definition


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_infinite_temperature_kl_is_centred_mse(dtype: torch.dtype) -> None:
    """T^2 KL(p_T || q_T) -> logit_mse, to 1e-2 at T = 1000."""
    s, t = (x.to(dtype) for x in INPUTS["random"](16, 100))
    T = 1000.0
    kl, slope = run(lambda s, t: T * T * fastkd.kl_div(s, t, temperature=T), s, t)
    mse, grad = run(distill.logit_mse, s, t)
    assert (slope - grad).norm() <= 1e-2 * grad.norm()
    if dtype == torch.float64:  # in float32, T^2 times a unit in the last place is 0.1
        assert abs(kl - mse) <= 1e-2 * mse
    assert abs(distill.logit_mse(s, t, centred=False) - mse) > 1e-2 * mse


def test_uncentred_mse() -> None:
    s, t = INPUTS["random"](7, 10)
    value, grad = run(distill.logit_mse, s, t, classes(7, 10), centred=False)
    plain = Loss(distill.logit_mse, lambda s, t, y: plain_mse(s, t, y, centred=False))
    true = run(lambda *a: reduced(plain, *a), oracle(s), oracle(t), classes(7, 10))
    assert_values(value, true[0], true[0])
    assert_gradients(grad, true[1], true[1])


@each([loss for loss in LOSSES if loss.zero])
def test_zero_where_student_and_teacher_agree(in_chunks: bool, loss: Loss) -> None:
    s, _ = INPUTS["random"](7, 10)
    value, grad = run(loss.ours, s, s.clone(), classes(7, 10))
    assert abs(value) <= FLOORS[value.dtype]
    assert grad.abs().max() <= 8 * FLOORS[value.dtype]


def test_dkd_is_kl_where_beta_is_the_teachers_rest() -> None:
    s, t = (x.double() for x in INPUTS["random"](5, 10))
    y, T = torch.arange(5), 2.0
    for row in range(5):
        one = slice(row, row + 1)
        beta = 1 - float((t[row] / T).softmax(-1)[row])
        ours = distill.dkd(s[one], t[one], y[one], alpha=1.0, beta=beta, temperature=T)
        kl = T * T * fastkd.kl_div(s[one], t[one], temperature=T)
        torch.testing.assert_close(ours, kl)


@each([BY_NAME[name] for name in ("zscore", "cosine", "dist", "logit_mse")])
def test_a_shift_of_the_logits(loss: Loss) -> None:
    """What a softmax does not see; a cosine does."""
    s, t = (x.double() for x in INPUTS["random"](6, 10))
    same = torch.allclose(loss.ours(s + 7.0, t), loss.ours(s, t))
    assert same is (loss.name != "cosine")


@each([BY_NAME[name] for name in ("zscore", "cosine", "logit_mse")])
def test_a_scale_of_the_logits(loss: Loss) -> None:
    s, t = (x.double() for x in INPUTS["random"](6, 10))
    same = torch.allclose(loss.ours(2.5 * s, t), loss.ours(s, t))
    assert same is (loss.name != "logit_mse")


# ---- edges


@each(LOSSES)
def test_ignored_rows_are_never_read(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    bad_s, bad_t = s.clone(), t.clone()
    bad_s[0], bad_t[0], bad_s[-2], bad_t[-2] = math.nan, INF, -INF, math.nan
    clean, dirty = run(loss.ours, s, t, y), run(loss.ours, bad_s, bad_t, y)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert (dirty[1][y == -100] == 0).all()


@each(LOSSES)
def test_all_rows_ignored(in_chunks: bool, loss: Loss) -> None:
    s = torch.full((4, 9), math.nan, requires_grad=True)
    value = loss.ours(s, s.detach(), torch.full((4,), -100))
    value.backward()
    assert value == 0 and s.grad is not None and (s.grad == 0).all()


@each(LOSSES)
def test_no_rows(loss: Loss) -> None:
    s = torch.empty(0, 9, requires_grad=True)
    value = loss.ours(s, torch.empty(0, 9), torch.empty(0, dtype=torch.long))
    value.backward()
    assert value == 0 and s.grad is not None and s.grad.shape == (0, 9)


@each(LOSSES)
def test_one_class(loss: Loss) -> None:
    """Nothing to learn but the logit itself."""
    s, t = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
    value, grad = run(loss.ours, s, t, torch.zeros(2, dtype=torch.long))
    assert value == 0 and (grad == 0).all()


@each(LOSSES)
def test_one_row(loss: Loss) -> None:
    s, t = INPUTS["random"](1, 10)
    assert_right(
        loss, s, t, torch.tensor([3]), **({"temperature": 2.0} if loss.temperature else {})
    )


def test_dist_over_one_row_is_that_over_classes() -> None:
    s, t = INPUTS["random"](1, 10)
    assert distill.dist(s, t) == distill.dist(s, t, gamma=0.0) > 0
    assert distill.dist(s, t, beta=0.0) == 0


def test_constant_rows() -> None:
    s, t = torch.full((1, 10), 12345.678), INPUTS["random"](1, 10)[1]
    uniform = run(distill.zscore, torch.zeros(1, 10), t)
    assert uniform[0] > 0 and (uniform[1] == 0).all()
    assert run(distill.zscore, s, t)[0] == uniform[0] and (run(distill.zscore, s, t)[1] == 0).all()
    assert distill.zscore(s, 2 * s) == 0
    assert distill.dist(s, s + 1) == 0 and distill.dist(s, t, gamma=0.0) == 1
    zero = torch.zeros(1, 10)
    value, grad = run(distill.cosine, zero, t)
    assert abs(value - 1) < 1e-6 and (grad == 0).all()
    assert distill.cosine(zero, zero) == 0


@each([BY_NAME["dkd"], BY_NAME["nkd"]])
def test_label_that_is_impossible(in_chunks: bool, loss: Loss) -> None:
    """At -inf on both sides it costs nothing; where the teacher allows it, infinitely much."""
    s, t = INPUTS["random"](4, 10)
    y = torch.full((4,), 2)
    both_s, both_t = s.clone(), t.clone()
    both_s[:, 2] = both_t[:, 2] = -INF
    value, grad = run(loss.ours, both_s, both_t, y)
    assert value.isfinite() and grad.isfinite().all()
    assert loss.ours(both_s, t, y) == INF
    assert run(loss.ours, s, both_t, y)[1].isfinite().all()


@settings(max_examples=150, deadline=None, database=None)
@seed(1)
@given(
    loss=st.sampled_from(LOSSES),
    rows=st.integers(1, 5),
    vocab=st.integers(1, 6),
    values=st.lists(
        st.one_of(
            st.floats(-1e4, 1e4, width=32),
            st.sampled_from([0.0, 1.0, -1e4, 1e4, 200.0, 1e-30, 1e-7]),
        ),
        min_size=60,
        max_size=60,
    ),
    temperature=st.sampled_from([0.01, 1.0, 4.0, 1000.0]),
)
def test_nothing_is_nan_on_finite_logits(
    loss: Loss, rows: int, vocab: int, values: list[float], temperature: float
) -> None:
    s, t = torch.tensor(values).view(2, -1)[:, : rows * vocab].view(2, rows, vocab)
    y = torch.arange(rows) % vocab
    options = {"temperature": temperature} if loss.temperature else {}
    value, grad = run(loss.ours, s, t, y, **options)
    assert value.isfinite() and grad.isfinite().all()
    assert value >= -9e-6 * max(1.0, temperature**2)


# ---- wrong arguments


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_missing_labels(name: str) -> None:
    with pytest.raises(ValueError, match="labels: got None, expected"):
        BY_NAME[name].ours(torch.randn(2, 3), torch.randn(2, 3), None)


S, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@each(LOSSES)
@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        ((S, S[:, :2], Y), ValueError, r"teacher: got shape \[2, 2\], expected the student's"),
        ((S, S[:1], Y), ValueError, r"teacher: got shape \[1, 3\], expected the student's"),
        ((S.long(), S, Y), TypeError, "student: got torch.int64, expected logits in"),
        ((S, None, Y), TypeError, "teacher: got NoneType, expected a tensor of logits"),
        ((S[:, :0], S[:, :0], Y), ValueError, r"student: got shape \[2, 0\]"),
        ((S, S.to("meta"), Y), ValueError, "teacher: got a tensor on meta"),
        ((S, S, Y.float()), TypeError, "labels: got torch.float32, expected integers"),
        ((S, S, Y[:1]), ValueError, r"labels: got shape \[1\], expected \[2\]"),
        ((S, S, Y + 3), ValueError, "labels: got 3 in row 0, expected 0 <= label < 3"),
    ],
)
def test_wrong_operands(
    loss: Loss, operands: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loss.ours(*operands)


@each(HEATED)
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, INF, True, "4"])
def test_wrong_temperature(loss: Loss, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="temperature: got"):
        loss.ours(S, S, Y, temperature=value)


@pytest.mark.parametrize(
    ("name", "option"),
    [("dkd", "alpha"), ("dkd", "beta"), ("nkd", "gamma"), ("dist", "beta"), ("dist", "gamma")],
)
@pytest.mark.parametrize("value", [-1.0, INF, "1"])
def test_wrong_coefficient(name: str, option: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{option}: got"):
        BY_NAME[name].ours(S, S, Y, **{option: value})


@each(PER_ROW)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction: got 'max', expected one of mean"),
        ({"weight": Y}, "weight: got torch.int64, expected floats"),
        ({"weight": S}, r"weight: got shape \[2, 3\], expected \[2\]"),
        ({"normalizer": -1}, "normalizer: got -1, expected"),
        ({"normalizer": S}, r"normalizer: got shape \[2, 3\], expected 0-d"),
        ({"normalizer": 2, "reduction": "sum"}, "normalizer: got one with reduction='sum'"),
        ({"vocab_size": 4}, "vocab_size: got 4, expected 1 <= vocab_size <= 3"),
        ({"vocab_size": 2.0}, "vocab_size: got 2.0, expected an integer"),
        ({"wieght": S}, r"unexpected options \['wieght'\]"),
    ],
)
def test_wrong_options(loss: Loss, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        loss.ours(S, S, Y, **options)


# ---- as terms of a loss


@each(LOSSES)
def test_term(loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    s.requires_grad_()
    term = distill.response(loss.ours, 2.0, rows="labelled")
    total, (value,) = Objective([term])(Outputs(s), Outputs(t), Batch(s, y, samples=7))
    assert term.name == loss.name and value == loss.ours(s, t, y) and total == 2 * value


def test_term_of_all_rows_and_a_schedule() -> None:
    s, t = INPUTS["random"](7, 10)
    term = distill.response(distill.zscore, temperature=lambda step: 1.0 + step, name="soft")
    batch = Batch(s, classes(7, 10), samples=7, step=3)
    assert term.name == "soft" and term.mean == "samples"
    assert term.function(Outputs(s), Outputs(t), batch) == distill.zscore(s, t, temperature=4.0)
    with pytest.raises(ValueError, match="term 'soft': got no teacher"):
        term.function(Outputs(s), Outputs(None), batch)


def test_term_with_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"dkd: got unexpected options \['gamma'\]"):
        distill.response(distill.dkd, gamma=1.0)
    with pytest.raises(ValueError, match="rows: got 'all' for nkd, expected 'labelled'"):
        distill.response(distill.nkd, rows="all")
    with pytest.raises(ValueError, match="rows: got 'some' for cosine, expected 'all' or"):
        distill.response(distill.cosine, rows="some")


@each([BY_NAME["dkd"], BY_NAME["logit_mse"]])
def test_term_is_exact_over_micro_batches(loss: Loss) -> None:
    """Ragged masks: the gradient of a step is that of the whole batch."""
    inputs, teacher = torch.randn(8, 5), torch.nn.Linear(5, 4)
    y = torch.tensor([0, -100, -100, 1, 2, 3, -100, 0])
    first = torch.nn.Linear(5, 4)
    ends = []
    for size in (8, 2):
        student = torch.nn.Linear(5, 4)
        student.load_state_dict(first.state_dict())
        distill.train(
            student,
            list(zip(inputs.split(size), y.split(size), strict=True)),
            distill.response(loss.ours, rows="labelled"),
            teacher=teacher,
            accumulate=8 // size,
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            epochs=1,
            progress=False,
        )
        ends.append(student.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
    assert not torch.equal(ends[0], first.weight)


def test_compiled() -> None:
    """One graph: torch sees the formula, not the chunks."""
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    for loss in LOSSES:
        whole = torch.compile(loss.ours, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(whole, s, t, y), run(loss.ours, s, t, y))


def test_memory_of_a_trip_is_one_gradient() -> None:
    """Beside the gradient nothing of the operands' size is made."""
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            out = f(*args, **(kw or {}))
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
                made.append(out.numel())
            return out

    s, t = INPUTS["random"](64, 16_384)
    for loss in PER_ROW:
        made.clear()
        with Watch():
            run(loss.ours, s, t, torch.zeros(64, dtype=torch.long))
        assert sum(size >= s.numel() for size in made) == 1, loss.name
