"""Messages quote type, size and the first few values of an argument, never the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import NAMED

import fastkd
from fastkd import distill
from fastkd.arguments.messages import describe, shown
from fastkd.teachers import Served, formats, store

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


def made_of(folder: str) -> dict[str, Any]:
    """Objects of the workflow by the repr that they are to have."""
    model = torch.nn.Linear(2, 2)
    served = Served("http://localhost:1", k=64, headers={"Authorization": "secret"})
    head = dict(vocab_size=2, k=1)
    with store.Writer(folder, **head) as writer:  # type: ignore[arg-type]
        writer.add_batch(fastkd.topk_from_logits(torch.zeros(3, 1, 2), 1))
    reader, terms = store.Reader(folder), distill.soft()
    return {
        "Served('http://localhost:1', k=64)": served,
        "PromptedTeacher(Served('http://localhost:1', k=64), 'hint')": distill.PromptedTeacher(
            served, "hint"
        ),
        "Checkpoints('run', every=100, resume=True)": distill.Checkpoints(
            "run", every=100, resume=True
        ),
        "CSVLogger('run.csv')": distill.CSVLogger("run.csv"),
        "ModelTeacher(Linear)": distill.ModelTeacher(model),
        "EMATeacher(decay=0.9)": distill.EMATeacher(model, decay=0.9),
        "EnsembleTeacher([ModelTeacher(Linear)], weights=[1.0])": distill.EnsembleTeacher([model]),
        "RoutedTeacher([ModelTeacher(Linear)])": distill.RoutedTeacher({"a": model}),
        "CallableTeacher(relu)": distill.CallableTeacher(torch.relu),
        "PeerTeacher(Linear, optimizer=AdamW)": distill.PeerTeacher(model, terms),
        "BaseTeacher()": distill.BaseTeacher(),
        "Hooks(Linear, [''])": distill.Hooks(model, [""]),
        "Writer('cache')": writer,
        "Reader('cache')": reader,
        "CachedTeacher(reader=Reader('cache'))": distill.CachedTeacher(reader),
        "Paired([1, 2, 3], Reader('cache'))": store.Paired([1, 2, 3], reader),
        "Views([1, 2], transform=relu, seed=3)": store.Views([1, 2], torch.relu, seed=3),
        "Reading('vllm', 0 sequences so far)": formats.read("vllm", {}),
    }


def test_an_object_says_what_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = made_of("cache")
    assert [repr(x) for x in made.values()] == [*made]
    public = {getattr(room, name) for room in (distill, store) for name in room.__all__}
    classes = {x for x in public if isinstance(x, type) and x.__module__.startswith("fastkd.")}
    assert not [x for x in classes if x.__repr__ is object.__repr__]
