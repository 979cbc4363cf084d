"""What is expected of the factor behind a loss: no extra pass, and a place for each loss."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from factor_parts import CPU, each_operand, inputs, loss_of, nothing_remembered  # noqa: F401

import fastkd
from fastkd.backends.base import Backend as Passes
from fastkd.engine import autograd as upstreams


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
