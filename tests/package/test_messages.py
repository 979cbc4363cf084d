"""Messages quote type, size and the first few values of an argument, never the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import NAMED

import fastkd
from fastkd import distill
from fastkd.arguments.messages import describe, shown
from fastkd.teachers import store

MOST = 500


class Huge:
    def __repr__(self) -> str:
        return "huge\n" * 10**5


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)

MONSTERS: dict[str, Any] = {
    "list": [0.5] * 6400,
    "nested": [[-1.0] * 1000] * 64,
    "tensors": (torch.randn(64, 3),) * 2,
    "dict": {f"key {i}": torch.randn(9) for i in range(1000)},
    "array": torch.randn(100, 100).numpy(),
    "text": "x" * 10**6,
    "bytes": b"x" * 10**6,
    "huge": Huge(),
    "silent": Silent(),
    "silents": [Silent()] * 99,
    "circle": CIRCLE,
    "number": 10**5000,
    "module": torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(500))),
    "type": type("T" * 5000, (), {})(),
    "sizes": torch.ones([1] * 60),
    "set": set(range(10**5)),
}


@pytest.mark.parametrize("name", MONSTERS)
def test_a_quotation_is_short(name: str) -> None:
    x = MONSTERS[name]
    assert len(describe(x)) <= 200 and len(shown(x)) <= 100
    assert "\n" not in describe(x) and (
        type(x).__name__[:20] in describe(x) or isinstance(x, torch.Tensor)
    )


def test_a_quotation_says_size_and_first_values() -> None:
    assert (
        describe([[-1.0] * 1000] * 2) == "list [[-1.0, ...] (1000 long), [-1.0, ...] (1000 long)]"
    )
    assert describe([1, 2, 3, 4]) == "list [1, 2, 3, ...] (4 long)"
    assert describe((torch.ones(2, 3), None)) == "tuple (tensor[2, 3], None)"
    assert (
        describe(torch.ones(2, 4).numpy())
        == "ndarray [2, 4] of float32 [1.0, 1.0, 1.0, ...] (8 long)"
    )
    assert describe("2") == "str '2'" and describe(2.0) == "float 2.0" and shown("avg") == "'avg'"


# ---- the public face

S, T = torch.randn(3, 5), torch.randn(3, 5)
LABELS = torch.tensor([0, 1, 2])
LOSSES = {loss.__name__: loss for loss in (*NAMED.values(), fastkd.distillation_loss)}
ROWS = (
    *("labels", "ignore_index", "weight", "reduction", "normalizer", "vocab_size", "temperature"),
    *("student", "teacher"),
)


def cases() -> dict[str, tuple[Callable[..., Any], dict[str, Any], str]]:
    """The call, its good arguments and the one to replace."""
    found: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {}

    def add(name: str, call: Callable[..., Any], good: dict[str, Any], *options: str) -> None:
        for option in options:
            found[f"{name}-{option}"] = call, good, option

    for name, loss in LOSSES.items():
        own = {"js_div": ("beta",), "skew_kl_div": ("alpha",), "skew_reverse_kl_div": ("alpha",)}
        own["distillation_loss"] = ("alpha", "divergence", "label_smoothing", "z_loss")
        good = dict(student=S, teacher=T, labels=LABELS)
        add(name, loss, good, *ROWS, *own.get(name, ()))
    stored = dict(logprobs=S.log_softmax(-1), indices=LABELS[:, None] * 0 + torch.arange(5))
    add("TopK", fastkd.TopK, stored, *stored, "tail_logprob", "temperature", "tail")
    linear = dict(hidden=S, weight=T)
    add("LinearLogits", fastkd.LinearLogits, linear, *linear, "bias", "scale", "softcap")
    add("LinearLogits", fastkd.LinearLogits, linear, "chunk_size")
    add("topk_from_logits", fastkd.topk_from_logits, dict(logits=S, k=2), "k", "method", "tail")
    add("topk_from_logits", fastkd.topk_from_logits, dict(logits=S, k=2), "temperature")
    add("js", fastkd.divergences.js, {}, "beta")
    add("DistillationLoss", fastkd.nn.DistillationLoss, {}, "alpha", "divergence", "temperature")
    add(
        "DistillationLoss", fastkd.nn.DistillationLoss, {}, "reduction", "label_smoothing", "z_loss"
    )
    add("use_backend", lambda backend: fastkd.use_backend(backend).__enter__(), {}, "backend")
    return found


CASES = cases()


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_is_short_and_names_the_argument(case: str) -> None:
    call, good, option = CASES[case]
    for name, monster in MONSTERS.items():
        if isinstance(monster, torch.Tensor) and option in ("student", "teacher", "logits"):
            continue  # a row of many dimensions is none
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            call(**{**good, option: monster})
        said = str(error.value)
        assert len(said) <= MOST, (name, said[:200])
        assert option in said, (name, said)


def test_an_unknown_option_of_any_length() -> None:
    with pytest.raises(TypeError, match="unexpected option") as error:
        fastkd.kl_div(S, T, **{"x" * 10**6: 1})  # type: ignore[call-arg]
    assert len(str(error.value)) <= MOST
    with pytest.raises(ValueError, match="divergence") as found:
        fastkd.divergences["x" * 10**6]
    assert len(str(found.value)) <= MOST
    with pytest.raises(AttributeError) as missing:
        getattr(fastkd.divergences, "x" * 10**6)
    assert len(str(missing.value)) <= MOST


WORDS: dict[str, Callable[[Any], Any]] = {
    "rows": lambda x: distill.soft(rows=x),
    "encoding": lambda x: store.Writer("unused", vocab_size=5, k=2, encoding=x),
    "tail": lambda x: store.Writer("unused", vocab_size=5, k=2, tail=x),
}


@pytest.mark.parametrize("option", ["rows", "encoding", "tail"])
@pytest.mark.parametrize("monster", ["text", "huge", "silent", "module", "number"])
def test_a_refusal_of_the_trainer_is_short(option: str, monster: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        WORDS[option](MONSTERS[monster])
    assert len(str(error.value)) <= MOST and option in str(error.value)
