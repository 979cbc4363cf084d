"""What users make of a loss before backward: one rounding, no extra pass, the same bits always."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from common import Backend, each_name
from pairwise import pairwise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.backends import products as products_of
from fastkd.backends.base import Backend as Passes
from fastkd.divergence import Divergence
from fastkd.engine import autograd as upstreams

N, V = 5, 300  # rows: each is a program, which Triton's interpreter runs one after another
T = 2.0
FACTORS = [2.0**-10, 2.0**4, 65536.0, 2.0**20, 0.3, -1.7, 1234.5]
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
each_factor = pytest.mark.parametrize("factor", FACTORS, ids=lambda x: f"{x:g}")
each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES.keys())
each_operand = pytest.mark.parametrize("operand", ["logits", "topk", "linear"])
Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    upstreams._places.of.clear()
    yield
    upstreams._places.of.clear()


def inputs(backend: Backend, dtype: torch.dtype, operand: str) -> tuple[Any, Any, Tensor]:
    """Student, teacher, and the leaf whose gradient is looked at."""
    s, t = (3 * torch.randn(N, V, device=backend.device) for _ in "st")
    leaf = s.to(dtype).requires_grad_()
    if operand == "topk":
        return leaf, fastkd.topk_from_logits(t, 8, temperature=T), leaf
    if operand == "linear":
        leaf = (torch.randint(-4, 5, (N, 8), device=backend.device) / 4).to(dtype).requires_grad_()
        weight = (torch.randint(-4, 5, (V, 8), device=backend.device) / 4).to(dtype)
        return fastkd.LinearLogits(leaf, weight), t.to(dtype), leaf
    return leaf, t.to(dtype), leaf


def loss_of(divergence: Divergence, reduction: str = "mean", **options: Any) -> Loss:
    def loss(student: Any, teacher: Any) -> Tensor:
        value = fastkd.distillation_loss(
            student, teacher, alpha=0.0, temperature=T, divergence=divergence, t_squared=False,
            reduction=reduction, **options,
        )  # fmt: skip
        return value.sum() if reduction == "none" else value

    return loss


def exact(loss: Loss, student: Any, teacher: Any, leaf: Tensor, factor: float) -> Tensor:
    """The gradient in float64, by the reference."""
    wide = leaf.detach().double().requires_grad_()
    if isinstance(student, fastkd.LinearLogits):
        student = fastkd.LinearLogits(wide, student.weight.double())
    else:
        student = wide
    teacher = teacher.double() if isinstance(teacher, Tensor) else teacher
    with fastkd.use_backend("reference"):
        (grad,) = torch.autograd.grad(loss(student, teacher) * factor, wide)
    return grad


def away(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


@pairwise
@each_operand
@each_name
@each_half
@each_factor
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("products", [None, torch.float32], ids=["16 bits", "float32"])
@pytest.mark.interpreted(6)
def test_a_gradient_is_rounded_once_with_its_factor(
    kernels: Backend,
    operand: str,
    divergence: Divergence,
    dtype: torch.dtype,
    factor: float,
    reduction: str,
    products: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products_of, "multiplied_in", lambda own, _: products or own)
    s, t, leaf = inputs(kernels, dtype, operand)
    loss = loss_of(divergence, reduction)
    truth = exact(loss, s, t, leaf, factor)
    if not bool(truth.to(dtype).isfinite().all()):
        pytest.skip("beyond float16")
    once = away(truth.to(dtype), truth)
    # in 16 bits the logits' gradient is rounded, too, and the sum of products
    most = 2.5 if operand == "linear" and not products else 1.1
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss(s, t) * factor, leaf)
        assert away(grad, truth) <= most * once + 1e-7


# ---- the same bits, whatever happened before


@pairwise
@each_operand
@each_name
@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.interpreted(3)
def test_bits_do_not_depend_on_what_happened_before(
    kernels: Backend, operand: str, divergence: Divergence, inplace: bool, dtype: torch.dtype
) -> None:
    s, t, leaf = inputs(kernels, dtype, operand)
    loss = loss_of(divergence, inplace=inplace and operand != "linear")

    def step(factor: float) -> Tensor:
        own = leaf.detach().clone().requires_grad_()
        student = own * 1 if operand != "linear" else fastkd.LinearLogits(own, s.weight)
        (loss(student, t) * factor).backward()
        assert own.grad is not None
        return own.grad

    factors = [3.7, 3.7, 3.7, 0.11, 8.0] if not inplace else [3.7, 3.7, 3.7, 3.7]
    fresh = {}
    for factor in set(factors):
        upstreams._places.of.clear()
        fresh[factor] = step(factor)
    if inplace and kernels.name == "gpu":  # where a wrong guess is not seen on the host
        fresh[3.7] = step(3.7)
    else:
        upstreams._places.of.clear()
    for factor in factors:
        torch.testing.assert_close(step(factor), fresh[factor], rtol=0, atol=0)


@each_operand
@pytest.mark.interpreted(3)
def test_a_second_backward_gives_the_first_one_s_gradient(kernels: Backend, operand: str) -> None:
    s, t, leaf = inputs(kernels, torch.bfloat16, operand)
    for _ in range(2):
        value = loss_of(fastkd.divergences.kl)(s, t) * 0.7
        first = torch.autograd.grad(value, leaf, retain_graph=True)[0].clone()
        second = torch.autograd.grad(value, leaf, retain_graph=True)[0]
        assert torch.equal(first, second)
        double = torch.autograd.grad(value, leaf, torch.tensor(2.0, device=leaf.device))[0]
        assert torch.equal(double, 2 * first)


# ---- no extra pass


class Passed:
    """How often which passes were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastkd.backends import cpu

        self.calls: list[str] = []
        for name in ("fused_total", "fused", "topk", "multiply"):
            monkeypatch.setattr(cpu.CPU, name, self._counted(getattr(cpu.CPU, name), name))

    def _counted(self, pass_: Any, name: str) -> Any:
        def counted(backend: Passes, *args: Any) -> Any:
            grad = name == "multiply" or any(x is args[4] for x in args[4:5] if x is not None)
            self.calls.append(name if name == "multiply" else "gradient" if grad else "loss")
            return pass_(backend, *args)

        return counted

    def take(self) -> list[str]:
        made, self.calls = self.calls, []
        return made


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Passed:
    pytest.importorskip("fastkd._C")
    return Passed(monkeypatch)


CPU = Backend("cpu", torch.device("cpu"))


@pytest.mark.parametrize("factor", [1.0, 4.0, 0.37, -2.0])
@each_operand
def test_a_steady_step_makes_one_pass(passed: Passed, operand: str, factor: float) -> None:
    s, t, leaf = inputs(CPU, torch.bfloat16, operand)
    loss = loss_of(fastkd.divergences.kl)
    made = []
    for _ in range(4):
        torch.autograd.grad(loss(s, t) * factor, leaf)
        made.append(passed.take())
    assert made[1:] == [["gradient"]] * 3
    assert len(made[0]) == (1 if factor == 1.0 else 2)


def test_losses_of_a_step_have_places_of_their_own(passed: Passed) -> None:
    s, t, _leaf = inputs(CPU, torch.bfloat16, "logits")
    loss = loss_of(fastkd.divergences.kl)
    for _ in range(3):
        passed.take()
        parts = [factor * loss(s, t + factor) for factor in (2.0, 3.0, -0.2)]  # one line
        (sum(parts) + 2 * loss(s, t * 2)).backward()
    assert passed.take() == ["gradient"] * 4


def test_evaluation_between_steps_changes_nothing(passed: Passed) -> None:
    s, t, leaf = inputs(CPU, torch.bfloat16, "logits")
    loss = loss_of(fastkd.divergences.kl)
    for _ in range(3):
        passed.take()
        torch.autograd.grad(loss(s, t) * 3, leaf)
        with torch.no_grad():
            loss(s, t)
        loss(s, t)  # with a graph that nobody goes back through
    assert passed.take() == ["gradient", "loss", "gradient"]


def test_factors_that_always_change_are_left_to_backward(passed: Passed) -> None:
    s, t, leaf = inputs(CPU, torch.bfloat16, "logits")
    loss = loss_of(fastkd.divergences.kl)
    made = []
    for step in range(5):
        torch.autograd.grad(loss(s, t) * (1.5 + step), leaf)
        made.append(passed.take())
    assert made[0] == made[1] == ["gradient", "gradient"]
    assert made[2:] == [["loss", "gradient"]] * 3
    for _ in range(3):  # and when it stops
        torch.autograd.grad(loss(s, t) * 9.0, leaf)
        made.append(passed.take())
    assert made[-1] == ["gradient"]


def test_factors_that_take_turns_are_expected(passed: Passed) -> None:
    s, t, leaf = inputs(CPU, torch.bfloat16, "logits")
    loss = loss_of(fastkd.divergences.kl)
    made = []
    for step in range(16):
        torch.autograd.grad(loss(s, t) * (2.0, 0.3, 7.0)[step % 3], leaf)
        made.append(len(passed.take()))
    assert made[8:] == [1] * 8


def test_lines_have_places_of_their_own(passed: Passed) -> None:
    s, t, leaf = inputs(CPU, torch.bfloat16, "logits")
    loss = loss_of(fastkd.divergences.kl)
    made = []
    for step in range(4):
        torch.autograd.grad(loss(s, t) * (step + 1), leaf)
        torch.autograd.grad(loss(s, t) * 3.0, leaf)
        passed.take()
        torch.autograd.grad(loss(s, t), leaf)
        made.append(len(passed.take()))
    assert made == [1] * 4


def test_a_scaler_that_grows_and_backs_off(passed: Passed) -> None:
    """Two passes where the scale changes, one elsewhere."""
    s, t, leaf = inputs(CPU, torch.float16, "logits")
    loss = loss_of(fastkd.divergences.kl)
    made = []
    for scale in [1024.0] * 4 + [2048.0] * 4 + [1024.0] * 4:
        torch.autograd.grad(loss(s, t) * scale, leaf)
        made.append(len(passed.take()))
    assert made == [2, 1, 1, 1] * 3


def test_threads_do_not_disturb_each_other(passed: Passed) -> None:
    s, t, leaf = inputs(CPU, torch.float32, "logits")
    loss = loss_of(fastkd.divergences.kl)
    made: dict[float, list[int]] = {2.0: [], 3.0: []}
    turn = threading.Barrier(2)
    lock = threading.Lock()

    def train(factor: float) -> None:
        for _ in range(4):
            turn.wait()
            with lock:
                passed.take()
                torch.autograd.grad(loss(s, t) * factor, leaf)
                made[factor].append(len(passed.take()))

    threads = [threading.Thread(target=train, args=(factor,)) for factor in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {2.0: [2, 1, 1, 1], 3.0: [2, 1, 1, 1]}


# ---- factors that are no ordinary numbers


@each_operand
@pytest.mark.parametrize("factor", [0.0, -0.0, float("inf"), float("nan")])
@pytest.mark.interpreted(3)
def test_upstreams_of_0_and_beyond_numbers(kernels: Backend, operand: str, factor: float) -> None:
    s, t, leaf = inputs(kernels, torch.float32, operand)
    labels = torch.zeros(N, dtype=torch.long, device=kernels.device)
    labels[3] = -100
    loss = loss_of(fastkd.divergences.kl, labels=labels)
    for _ in range(3):
        (grad,) = torch.autograd.grad(loss(s, t) * factor, leaf)
        assert bool((grad[3] == 0).all()) or operand == "linear"
        kept = torch.cat((grad[:3], grad[4:]))
        if factor == 0.0:
            assert bool((kept == 0).all())
        else:
            assert not bool(kept.isfinite().any())
    (grad,) = torch.autograd.grad(loss(s, t) * 2.0, leaf)
    assert bool(grad.isfinite().all())


# ---- where training code puts it


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, V))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    net, x, t = model(), torch.randn(N, 6, requires_grad=True), torch.randn(N, V)

    def whole(x: Tensor) -> Tensor:
        return fastkd.kl_div(net(x), t, temperature=T)

    grads = []
    for run in range(6):
        value = checkpoint(whole, x, use_reentrant=reentrant) if run % 2 else whole(x)
        (value * T * T / 3).backward()
        grads.append(x.grad)
        x.grad = None
    for grad in grads[1:]:
        assert grad is not None
        torch.testing.assert_close(grad, grads[0], rtol=0, atol=0)


def test_a_loop_with_a_gradient_scaler_is_that_of_torch() -> None:
    """Accumulated, mixed with a cross-entropy, under float16's scaler."""
    x, t = torch.randn(4, N, 6), torch.randn(4, N, V)
    labels = torch.randint(V, (4, N))

    def train(divergence: Loss) -> list[Tensor]:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for _step in range(6):
            for part in range(4):
                with torch.autocast("cpu", torch.float16):
                    logits = net(x[part])
                soft = divergence(logits, t[part])
                hard = torch.nn.functional.cross_entropy(logits.float(), labels[part])
                scaler.scale((0.7 * soft * T * T + 0.3 * hard) / 4).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [p.detach() for p in net.parameters()]

    def plain(s: Tensor, t: Tensor) -> Tensor:
        log_q, log_p = (s.float() / T).log_softmax(-1), (t / T).log_softmax(-1)
        return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    ours = train(lambda s, t: fastkd.kl_div(s, t, temperature=T))
    for a, b in zip(ours, train(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_without_synchronisation_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's form, on tensors whose values nobody may read."""
    guess = upstreams.OnDevice(upstreams.taken("kind"), torch.device("meta"), torch.float32)
    assert guess.expected.is_meta
    assert guess.settle(torch.ones((), device="meta")).is_meta


def test_places_are_given_back_and_bounded() -> None:
    s, t, _leaf = inputs(CPU, torch.float32, "logits")
    held = [fastkd.kl_div(s, t) for _ in range(upstreams.MOST_PLACES + 9)]
    (places,) = upstreams._places.of.values()
    assert len(places) == upstreams.MOST_PLACES and all(place.busy for place in places)
    (sum(held) * 2).backward()  # type: ignore[union-attr]
    assert not any(place.busy for place in places)
    upstreams._places.of.clear()
    value = fastkd.kl_div(s, t)
    (places,) = upstreams._places.of.values()
    assert places[0].busy
    del value
    assert not places[0].busy
