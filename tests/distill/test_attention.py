"""Attention losses: values, gradients, masks."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from attention_scores import SCORES, mask_of, pair, scores
from common import INF
from torch import Tensor

from fastkd.distill.losses import attention

Side = tuple[Tensor, Tensor, Tensor]


masks = pytest.mark.parametrize("kind", ["none", "padding", "causal", "both"])


def qkv(n: int, length: int, d: int, dtype: torch.dtype = torch.float64) -> Side:
    q, k, v = (torch.randn(n, length, d).to(dtype) for _ in range(3))
    return q, k, v


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
