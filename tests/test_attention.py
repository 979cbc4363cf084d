"""Attention losses: their values by loops in float64, masks, edges, and terms that learn."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import INF, unreadable
from oracle import FLOORS
from torch import Tensor, nn

from fastkd import distill
from fastkd.distill.losses import attention, features

Side = tuple[Tensor, Tensor, Tensor]

# [N, H, L, L] scores of both sides
SCORES: dict[str, Callable[..., Tensor]] = {
    "kl": attention.attention_kl,
    "tinybert": attention.tinybert,
}
scores = pytest.mark.parametrize("name", SCORES)
masks = pytest.mark.parametrize("kind", ["none", "padding", "causal", "both"])


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def qkv(n: int, length: int, d: int, dtype: torch.dtype = torch.float64) -> Side:
    q, k, v = (torch.randn(n, length, d).to(dtype) for _ in range(3))
    return q, k, v


def mask_of(kind: str, n: int, length: int) -> Tensor | None:
    """The last sample is one token long."""
    if kind == "none":
        return None
    padding = torch.ones(n, length, dtype=torch.long)
    padding[-1, 1:] = 0
    causal = torch.ones(length, length).tril().expand(n, -1, -1)
    return {"padding": padding, "causal": causal, "both": causal * padding[:, None, :]}[kind]


def seen(kind: str, n: int, length: int) -> list[list[list[int]]]:
    """The keys that each query of each sample looks at, none for padding."""
    out = []
    for sample in range(n):
        tokens = 1 if sample == n - 1 and kind in ("padding", "both") else length
        rows = []
        for query in range(length):
            causal = kind in ("causal", "both")
            keys = [key for key in range(tokens) if not causal or key <= query]
            # with [N, queries, keys] only the keys say what is padding
            rows.append([] if kind == "padding" and query >= tokens else keys)
        out.append(rows)
    return out


# values by their definition


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def divergence(s: Tensor, t: Tensor, kind: str) -> float:
    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(x) for x in row)
        return [math.exp(x) / total for x in row]

    losses = []
    for n, rows in enumerate(seen(kind, s.size(0), s.size(2))):
        for head in range(s.size(1)):
            for query, keys in enumerate(rows):
                if keys:
                    q, p = (softmax([float(x[n, head, query, k]) for k in keys]) for x in (s, t))
                    losses.append(sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)))
    return mean(losses)


def squares(s: Tensor, t: Tensor, kind: str) -> float:
    return mean(
        [
            float(s[n, head, query, k] - t[n, head, query, k]) ** 2
            for n, rows in enumerate(seen(kind, s.size(0), s.size(2)))
            for head in range(s.size(1))
            for query, keys in enumerate(rows)
            for k in keys
        ]
    )


def related(x: Tensor, y: Tensor, heads: int) -> Tensor:
    n, length, d = x.shape
    size = d // heads
    out = torch.zeros(n, heads, length, length, dtype=x.dtype)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(length):
            for j in range(length):
                out[:, head, i, j] = (x[:, i, part] * y[:, j, part]).sum(-1) / math.sqrt(size)
    return out


DEFINITIONS = {"kl": divergence, "tinybert": squares}


@scores
@masks
def test_value_is_the_definition(name: str, kind: str) -> None:
    s, t = pair(2, 3, 4, 4)
    value = SCORES[name](s, t, mask=mask_of(kind, 2, 4))
    assert float(value) == pytest.approx(DEFINITIONS[name](s, t, kind), rel=1e-9)


@masks
@pytest.mark.parametrize("relations", [("qk", "vv"), ("qq", "kk", "vv"), ("vk",)])
def test_relations_of_heads_that_differ(kind: str, relations: tuple[str, ...]) -> None:
    s, t = qkv(2, 4, 6), qkv(2, 4, 9)
    value = attention.minilm(s, t, heads=3, relations=relations, mask=mask_of(kind, 2, 4))
    letters = {"q": 0, "k": 1, "v": 2}
    expected = 0.0
    for x, y in relations:
        both = [related(side[letters[x]], side[letters[y]], 3) for side in (s, t)]
        expected += divergence(*both, kind)
    assert float(value) == pytest.approx(expected, rel=1e-9)


def test_probabilities_are_as_good_as_scores() -> None:
    s, t = pair(2, 3, 4, 4)
    for kind in ("none", "padding", "causal"):
        mask = mask_of(kind, 2, 4)
        expected = attention.attention_kl(s, t, mask=mask)
        probabilities = [x.softmax(-1) for x in (s, t)]
        value = attention.attention_kl(*probabilities, mask=mask, probabilities=True)
        torch.testing.assert_close(value, expected)
    zeros = [x.masked_fill(torch.ones(4, 4).triu(1).bool(), -INF) for x in (s, t)]
    given = [x.softmax(-1).requires_grad_() for x in zeros]
    value = attention.attention_kl(*given, probabilities=True)
    torch.testing.assert_close(value, attention.attention_kl(s, t, mask=mask_of("causal", 2, 4)))
    value.backward()
    assert given[0].grad is not None and given[0].grad.isfinite().all()


def test_map_is_the_sum_of_powers() -> None:
    x = torch.randn(2, 3, 2, 4).double()
    for power in (1.0, 2.0, 3.5):
        for n in range(2):
            a = [
                sum(abs(float(x[n, c, i, j])) ** power for c in range(3))
                for i in range(2)
                for j in range(4)
            ]
            norm = math.sqrt(sum(value * value for value in a))
            found = attention.attention_map(x, power=power)[n].tolist()
            assert found == pytest.approx([value / norm for value in a], rel=1e-9)


def test_transfer_between_maps_of_other_sizes() -> None:
    s, t = torch.randn(2, 3, 2, 4).double(), torch.randn(2, 5, 4, 8).double()
    small = t.reshape(2, 5, 2, 2, 4, 2).mean((3, 5))
    a, b = attention.attention_map(s).tolist(), attention.attention_map(small).tolist()
    expected = mean([(x - y) ** 2 for n in range(2) for x, y in zip(a[n], b[n], strict=True)])
    assert float(attention.at(s, t)) == pytest.approx(expected, rel=1e-9)
    assert float(attention.at(t, s)) == pytest.approx(expected, rel=1e-9)


def test_layers_and_heads_are_mapped() -> None:
    ours = [torch.randn(2, 2, 3, 3).double() for _ in range(2)]
    theirs = [torch.randn(2, 4, 3, 3).double() for _ in range(4)]
    for layers, used in ((None, (1, 3)), ((3, 0), (3, 0))):
        value = attention.tinybert(ours, theirs, layers=layers, heads=(3, 0))
        expected = sum(
            squares(s, theirs[at][:, [3, 0]], "none") for s, at in zip(ours, used, strict=True)
        )
        assert float(value) == pytest.approx(expected, rel=1e-9)


def test_hidden_states() -> None:
    ours = [torch.randn(2, 3, 4).double() for _ in range(2)]
    theirs = [torch.randn(2, 3, 4).double() for _ in range(4)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    pairs = [(ours[0], theirs[1]), (ours[1], theirs[3])]
    plain = sum(float((a - b).square().mean()) for a, b in pairs)
    masked = sum(float((a - b)[mask.bool()].square().mean()) for a, b in pairs)
    assert float(attention.tinybert_hidden(ours, theirs)) == pytest.approx(plain, rel=1e-9)
    value = attention.tinybert_hidden(ours, theirs, mask=mask)
    assert float(value) == pytest.approx(masked, rel=1e-9)


# gradients and identities


@scores
@masks
def test_gradient(name: str, kind: str) -> None:
    s, t = (x.requires_grad_() for x in pair(2, 2, 3, 3))
    call = functools.partial(SCORES[name], mask=mask_of(kind, 2, 3))
    assert torch.autograd.gradcheck(call, (s, t))


@masks
def test_gradient_of_relations(kind: str) -> None:
    sides = [x.requires_grad_() for x in (*qkv(2, 3, 2), *qkv(2, 3, 4))]

    def call(*x: Tensor) -> Tensor:
        return attention.minilm(x[:3], x[3:], heads=2, mask=mask_of(kind, 2, 3))

    assert torch.autograd.gradcheck(call, sides)


def test_gradient_of_maps_and_states() -> None:
    s, t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 2, 4, 4).double()
    inputs = s.requires_grad_(), t.requires_grad_()
    for power in (1.0, 2.0, 3.0):
        assert torch.autograd.gradcheck(functools.partial(attention.at, power=power), inputs)
    states = [x.requires_grad_() for x in pair(2, 3, 4)]
    mask = mask_of("padding", 2, 3)
    call = functools.partial(attention.tinybert_hidden, mask=mask)
    assert torch.autograd.gradcheck(call, states)


@scores
@masks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_for_the_same_scores(name: str, kind: str, dtype: torch.dtype) -> None:
    s = pair(2, 3, 4, 4, dtype=dtype)[0].requires_grad_()
    value = SCORES[name](s, s.detach().clone(), mask=mask_of(kind, 2, 4))
    value.backward()
    assert value == 0 and s.grad is not None and (s.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_for_the_same_layers(dtype: torch.dtype) -> None:
    side = qkv(2, 4, 6, dtype)
    assert attention.minilm(side, side, heads=2) == 0
    maps = pair(2, 3, 4, 4, dtype=dtype)[0]
    assert attention.at(maps, maps) == 0


# masks


@scores
@pytest.mark.parametrize("value", [1e30, INF, -INF, math.nan])
def test_padding_is_never_read(name: str, value: float) -> None:
    s, t = pair(2, 3, 4, 4, dtype=torch.float32)
    mask = mask_of("padding", 2, 4)
    expected = SCORES[name](s, t, mask=mask)
    for x in (s, t):
        x[-1, :, 1:], x[-1, :, :, 1:] = value, value
    s.requires_grad_()
    found = SCORES[name](s, t, mask=mask)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found, s)
    assert grad.isfinite().all() and (grad[0] != 0).all()
    assert (grad[-1, :, 1:] == 0).all() and (grad[-1, :, :, 1:] == 0).all()


def test_padding_changes_nothing_in_relations_and_states() -> None:
    s, t = qkv(2, 3, 4), qkv(2, 3, 6)
    alone = attention.minilm(s, t, heads=2)
    padded = [tuple(torch.cat([x, torch.randn(2, 2, x.size(2)) * 9], 1) for x in y) for y in (s, t)]
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    torch.testing.assert_close(attention.minilm(*padded, heads=2, mask=mask), alone)
    value = attention.tinybert_hidden(padded[0][0], padded[0][1], mask=mask)
    torch.testing.assert_close(value, attention.tinybert_hidden(s[0], s[1]))


@scores
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 4)])
def test_nothing_kept_is_zero_connected_to_the_graph(name: str, shape: tuple[int, ...]) -> None:
    s, t = pair(2, 3, 4, 4)
    value = SCORES[name](s.requires_grad_(), t, mask=torch.zeros(shape))
    value.backward()
    assert value == 0 and s.grad is not None and (s.grad == 0).all()


@scores
def test_causal_scores_need_no_mask(name: str) -> None:
    s, t = pair(2, 3, 4, 4)
    later = torch.ones(4, 4).triu(1).bool()
    a, b = (x.masked_fill(later, -INF).requires_grad_() for x in (s, t))
    value = SCORES[name](a, b)
    value.backward()
    assert a.grad is not None and a.grad.isfinite().all()
    if name == "kl":
        expected = divergence(s, t, "causal")
        assert float(value.detach()) == pytest.approx(expected, rel=1e-9)


# edges


@scores
@pytest.mark.parametrize("n", [1, 2])
def test_finite_at_the_edges(name: str, n: int) -> None:
    some = torch.randn(n, 2, 3, 3)
    kinds = (some, some[:1].expand(n, 2, 3, 3), some * 0, some * 1e4)
    for values in kinds:
        for t in kinds:
            s = values.clone().requires_grad_()
            value = SCORES[name](s, t)
            value.backward()
            assert value.isfinite() and s.grad is not None and s.grad.isfinite().all()


@pytest.mark.parametrize("n", [1, 2])
def test_dead_layers_have_finite_gradients(n: int) -> None:
    zero, some = torch.zeros(n, 4, 4, requires_grad=True), torch.randn(n, 4, 4)
    for value in (
        attention.minilm([zero] * 3, [some] * 3, heads=2),
        attention.at(zero.unsqueeze(1), some.unsqueeze(1)),
        attention.at(zero.unsqueeze(1), zero.unsqueeze(1)),
        attention.tinybert_hidden(zero, some),
    ):
        (grad,) = torch.autograd.grad(value, zero)
        assert value.isfinite() and grad.isfinite().all()


def test_order_of_samples_does_not_matter() -> None:
    s, t = pair(4, 3, 5, 5)
    order = torch.randperm(4)
    mask = mask_of("both", 4, 5)
    assert mask is not None
    for call in SCORES.values():
        expected = call(s, t, mask=mask)
        torch.testing.assert_close(call(s[order], t[order], mask=mask[order]), expected)
    torch.testing.assert_close(attention.at(s[order], t[order]), attention.at(s, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_only_at_the_ends(dtype: torch.dtype) -> None:
    """Beside the same numbers in float64, only float32's rounding; also where autocast is on."""
    calls: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = [
        (attention.attention_kl, (2, 3, 4, 4)),
        (attention.tinybert, (2, 3, 4, 4)),
        (attention.at, (2, 3, 4, 4)),
        (attention.tinybert_hidden, (2, 3, 4)),
        (lambda s, t: attention.minilm([s] * 3, [t] * 3, heads=2), (2, 3, 4)),
    ]
    for call, shape in calls:
        s, t = (x.requires_grad_() for x in pair(*shape, dtype=dtype))
        exact_s, exact_t = (x.detach().double().requires_grad_() for x in (s, t))
        exact = call(exact_s, exact_t)
        with torch.autocast("cpu", torch.bfloat16):
            value = call(s, t)
        assert value.dtype == torch.float32
        assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
        value.backward()
        exact.backward()
        assert s.grad is not None and exact_s.grad is not None and s.grad.dtype == dtype
        error = (s.grad.double() - exact_s.grad).abs().max()
        # three gradients of [s] * 3 are stored and added in the dtype
        allowed = (4 * FLOORS[dtype] + FLOORS[torch.float32]) * exact_s.grad.abs().max()
        assert error <= allowed + torch.finfo(dtype).smallest_normal


def test_no_value_is_read() -> None:
    """`kl_div` itself looks at labels on the host, so a mask is left out there."""
    with unreadable():
        mask = torch.ones(2, 4)
        for value in (
            attention.attention_kl(a := torch.randn(2, 3, 4, 4, requires_grad=True), a.detach()),
            attention.tinybert(a, a.detach(), mask=mask),
            attention.at(a, a.detach()),
            attention.tinybert_hidden(a[0], a[1].detach(), mask=torch.ones(3, 4)),
            attention.minilm([a[0]] * 3, [a[1].detach()] * 3, heads=2),
        ):
            value.backward()


def test_compiles_whole() -> None:
    a, b = pair(2, 3, 4, 4, dtype=torch.float32)
    mask = mask_of("both", 2, 4)

    def all_of_them(a: Tensor, b: Tensor) -> Tensor:
        return (
            attention.attention_kl(a, b, mask=mask)
            + attention.tinybert(a, b, mask=mask)
            + attention.at(a, b)
            + attention.minilm([a[0]] * 3, [b[0]] * 3, heads=2)
        )

    compiled = torch.compile(all_of_them, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(a, b), all_of_them(a, b))


# errors


def test_what_cannot_be_compared_is_named() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    x, y = torch.randn(2, 4, 6), torch.randn(2, 4, 9)
    both = r"\[2, 3, 4, 4\] of the student and \[2, 5, 4, 4\] of the teacher"
    for call, message in (
        (lambda: attention.attention_kl(a, b), both),
        (lambda: attention.tinybert(a, b), both),
        (lambda: attention.tinybert(a, b, heads=(0, 1)), both),
        (lambda: attention.tinybert(a, b, heads=(0, 1, 5)), both),
        (lambda: attention.tinybert(x, x), r"expected \[N, H, queries, keys\]"),
        (lambda: attention.attention_kl(x, x), r"expected \[N, H, queries, keys\]"),
        (lambda: attention.tinybert_hidden(x, y), r"\[2, 4, 6\].*\[2, 4, 9\]"),
        (lambda: attention.at(a, x), r"\[2, 3, 4, 4\].*\[2, 4, 6\]"),
        (lambda: attention.at(a, b[:1]), r"\[2, 3, 4, 4\].*\[1, 5, 4, 4\]"),
        (lambda: attention.attention_map(x), r"\[2, 4, 6\], expected \[N, C, H, W\]"),
        (lambda: attention.attention_map(a, power=0.5), "power: got 0.5"),
        (lambda: attention.minilm([x] * 3, [x] * 3, heads=4), "heads=4"),
        (lambda: attention.minilm([x] * 3, [x] * 3, heads=2, relations=()), "relations: got"),
        (lambda: attention.minilm([x] * 3, [x] * 3, heads=2, relations=("qx",)), "relations: got"),
        (lambda: attention.minilm([x, y, x], [x] * 3, heads=3), "a head of 2 with one of 3"),
        (
            lambda: attention.minilm([x] * 3, [x[:, :3]] * 3, heads=2),
            r"\[2, 2, 4, 4\].*\[2, 2, 3, 3\]",
        ),
        (lambda: attention.attention_kl(a, a, mask=torch.ones(2, 3)), r"mask: got \[2, 3\]"),
        (lambda: attention.tinybert_hidden(x, x, mask=torch.ones(4)), r"mask: got \[4\]"),
        (lambda: attention.tinybert([a, a], [a] * 3), "layers: got None for 2"),
        (lambda: attention.tinybert([a], [a], layers=(1,)), "from 0 to 0"),
        (lambda: attention.tinybert([a, a], [a] * 3, layers=(1,)), "expected 2 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: attention.minilm(x, x, heads=2),
        lambda: attention.minilm([x] * 2, [x] * 3, heads=2),
        lambda: attention.at(a, (a, a)),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"got (one tensor|2 tensors|tuple)"):
            call()


# in the trainer


class Attending(nn.Module):
    """One layer of attention, whose parts hooks can reach."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(4, d) for _ in range(3))
        self.scores, self.hidden, self.head = nn.Identity(), nn.Identity(), nn.Linear(d, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        projected = (f(inputs) for f in (self.q, self.k, self.v))
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projected)
        scores = self.scores(q @ k.transpose(2, 3) / math.sqrt(q.size(3)))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(self.hidden(mixed).mean(1))


@pytest.mark.parametrize("name", ["kl", "tinybert", "minilm", "hidden"])
def test_a_term_lowers_its_loss(name: str) -> None:
    teacher, student = Attending(12, 2), Attending(8, 2)
    loader = [
        distill.Batch(torch.randn(8, 5, 4), extra={"mask": mask_of("padding", 8, 5)})
        for _ in range(4)
    ]
    layers: Any = {"minilm": ("q", "k", "v"), "hidden": "hidden"}.get(name, "scores")
    function: Any = {
        **SCORES,
        "minilm": functools.partial(attention.minilm, heads=4),
        "hidden": attention.tinybert_hidden,
    }[name]
    projector = nn.Linear(8, 12) if name == "hidden" else None

    def masked(s: distill.Outputs, t: distill.Outputs, batch: distill.Batch) -> Tensor:
        mine, theirs = (
            x.features[layers]
            if isinstance(layers, str)
            else [x.features[layer] for layer in layers]
            for x in (s, t)
        )
        mine = mine if projector is None else projector(mine)
        return function(mine, theirs, mask=batch.extra["mask"])

    names = (layers,) if isinstance(layers, str) else layers
    term = distill.Term("masked", masked, 1.0, "samples", names, names, projector)
    plain = distill.feature(layers, layers, function, 0.5, projector=projector)
    for terms in ([term], [plain]):
        steps = distill.train(
            student, loader, terms, teacher=teacher, epochs=20, lr=1e-2, progress=False
        )
        losses = [step.loss for step in steps]
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_maps_are_transferred_in_training() -> None:
    def convolutional(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
        )

    teacher, student = convolutional(8), convolutional(4)
    loader = [torch.randn(8, 1, 6, 6) for _ in range(4)]
    for model in (teacher, student):
        model(loader[0])
    term = distill.feature("1", "1", attention.at, 1000.0)
    steps = distill.train(
        student, loader, term, teacher=teacher, epochs=20, lr=1e-2, progress=False
    )
    losses = [step.loss for step in steps]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_one_projector_for_several_layers_is_checkpointed(tmp_path: Path) -> None:
    """TinyBERT's hidden states share theirs."""
    teacher = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    student = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
    shared = nn.Linear(4, 4)
    projector = features.Each(shared, shared)

    def run(projector: nn.Module, epochs: int, resume: bool) -> None:
        term = distill.feature(
            ("0", "1"), ("0", "1", "2", "3"), attention.tinybert_hidden, projector=projector
        )
        distill.train(
            student,
            [torch.randn(2, 3, 4)],
            term,
            teacher=teacher,
            epochs=epochs,
            checkpoint=distill.Checkpoints(tmp_path, resume=resume),
            progress=False,
        )

    before, names = shared.weight.detach().clone(), set(student.state_dict())
    run(projector, 2, False)
    assert not torch.equal(before, shared.weight) and set(student.state_dict()) == names
    other = nn.Linear(4, 4)
    run(features.Each(other, other), 2, True)  # nothing left to do but to load
    assert torch.equal(other.weight, shared.weight)
