"""Relation losses: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from common import unreadable
from feature_losses import assert_low_precision_only_at_the_ends
from oracle import FLOORS
from relation_losses import FUNCTIONS, samples
from torch import Tensor, nn

from fastkd.distill.losses import relations

functions = pytest.mark.parametrize("name", FUNCTIONS)


def huber(a: float, b: float) -> float:
    d = abs(a - b)
    return d * d / 2 if d < 1 else d - 0.5


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def distances(x: Tensor) -> list[float]:
    found = [float((x[i] - x[j]).norm()) for i, j in permutations(range(len(x)), 2)]
    return [d / (sum(found) / len(found)) for d in found]


def angles(x: Tensor) -> list[float]:
    triplets = permutations(range(len(x)), 3)
    return [cosine(x[i] - x[j], x[k] - x[j]) for i, j, k in triplets]


def similarity(x: Tensor) -> list[float]:
    table = [[float(a @ b) for b in x] for a in x]
    return [g / math.sqrt(sum(h * h for h in row)) for row in table for g in row]


def congruence(x: Tensor) -> list[float]:
    def kernel(c: float) -> float:
        return math.exp(-0.8) * sum(0.8**p / math.factorial(p) * c**p for p in range(3))

    return [kernel(cosine(a, b)) for a in x for b in x]


def picks(x: Tensor, i: int) -> list[float]:
    kernel = [(1 + cosine(x[i], x[j])) / 2 for j in range(len(x)) if j != i]
    return [k / sum(kernel) for k in kernel]


def definition(name: str, s: Tensor, t: Tensor) -> float:
    if name == "pkt":
        both = [zip(picks(t, i), picks(s, i), strict=True) for i in range(len(s))]
        return sum(p * math.log(p / q) for row in both for p, q in row) / len(s)
    of: dict[str, tuple[Callable[[Tensor], list[float]], Callable[[float, float], float]]] = {
        "rkd_distance": (distances, huber),
        "rkd_angle": (angles, huber),
        "sp": (similarity, lambda a, b: (a - b) ** 2),
        "cc": (congruence, lambda a, b: (a - b) ** 2),
    }
    relation, distance = of[name]
    pairs = list(zip(relation(s), relation(t), strict=True))
    return sum(distance(a, b) for a, b in pairs) / len(pairs)


@functions
def test_value_is_the_definition(name: str) -> None:
    s, t = samples(6)
    s[0] *= 30  # so that the Huber has both its branches
    assert float(FUNCTIONS[name](s, t)) == pytest.approx(definition(name, s, t), rel=1e-9)


@functions
def test_samples_are_flattened(name: str) -> None:
    s, t = torch.randn(4, 2, 3, 2).double(), torch.randn(4, 5, 2).double()
    expected = definition(name, s.flatten(1), t.flatten(1))
    assert float(FUNCTIONS[name](s, t)) == pytest.approx(expected, rel=1e-9)


def test_congruence_tends_to_the_gaussian() -> None:
    s, t = (x / x.norm(dim=1, keepdim=True) for x in samples())

    def gaussian(x: Tensor) -> Tensor:
        return torch.exp(-0.7 * (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1))

    expected = (gaussian(s) - gaussian(t)).square().mean()
    torch.testing.assert_close(relations.cc(s, t, gamma=0.7, order=30), expected)


def flow(first: Tensor, second: Tensor) -> Tensor:
    """[N, C_1, C_2] of [N, C, positions]."""
    n, positions = first.size(0), first.size(2)
    out = torch.zeros(n, first.size(1), second.size(1), dtype=first.dtype)
    for i in range(first.size(1)):
        for j in range(second.size(1)):
            for at in range(positions):
                out[:, i, j] += first[:, i, at] * second[:, j, at] / positions
    return out


def test_flow_between_layers() -> None:
    for s, t in (
        (((2, 3, 4, 4), (2, 5, 4, 4)), ((2, 3, 2, 6), (2, 5, 2, 6))),
        (((2, 7, 3), (2, 7, 5)), ((2, 4, 3), (2, 4, 5))),
        (((2, 3), (2, 5)), ((2, 3), (2, 5))),
    ):
        sides = [tuple(torch.randn(shape).double() for shape in side) for side in (s, t)]
        dims = len(s[0])
        plain = [
            [x.unsqueeze(-1) if dims == 2 else x.mT if dims == 3 else x.flatten(2) for x in side]
            for side in sides
        ]
        expected = (flow(*plain[0]) - flow(*plain[1])).square().mean()
        torch.testing.assert_close(relations.fsp(*sides), expected)


def test_flow_averages_the_larger_layer() -> None:
    large, small = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 5, 2, 2).double()
    halved = large.reshape(2, 3, 2, 2, 2, 2).mean((3, 5))
    other = (torch.randn(2, 3, 2, 2).double(), torch.randn(2, 5, 2, 2).double())
    expected = flow(halved.flatten(2), small.flatten(2)) - flow(*(x.flatten(2) for x in other))
    torch.testing.assert_close(relations.fsp((large, small), other), expected.square().mean())


@pytest.mark.parametrize("training", [True, False])
def test_contrast_is_the_noise_contrastive_objective(training: bool) -> None:
    crd = relations.CRD(4, 6, negatives=20, dim=5, temperature=0.5).double().train(training)
    z: list[float] = []
    for _ in range(2):
        s, t = samples(3)
        a, b = (
            [x / x.norm() for x in f(y).detach()] for f, y in ((crd.student, s), (crd.teacher, t))
        )
        banks = crd.teacher_bank.clone(), crd.student_bank.clone()
        if not z or not training:  # of the first call in train mode, then a constant
            z = [
                sum(math.exp(float(x @ n) / 0.5) for x in side for n in bank) / (3 * 20)
                for side, bank in zip((a, b), banks, strict=True)
            ]
        total = 0.0
        for x, y in zip(a, b, strict=True):
            for one, other, bank, mean in ((x, y, banks[0], z[0]), (y, x, banks[1], z[1])):
                for n, sign in ((other, 1), *((n, -1) for n in bank)):
                    p = math.exp(float(one @ n) / 0.5)
                    h = p / (p + 20 * mean)
                    total -= math.log(h if sign > 0 else 1 - h)
        value = crd(s, t)
        assert float(value.detach()) == pytest.approx(total / 3, rel=1e-9)
        if not training:
            assert torch.equal(banks[1], crd.student_bank) and crd.log_z.isnan().all()
    if training:
        torch.testing.assert_close(crd.student_bank[3:6], torch.stack(a))
        torch.testing.assert_close(crd.teacher_bank[3:6], torch.stack(b))
        assert torch.equal(crd.teacher_bank[6:], banks[0][6:]) and int(crd.place) == 6


def test_bank_is_a_ring() -> None:
    crd = relations.CRD(4, 6, negatives=5, dim=3)
    latest = crd.student_bank.clone()
    place = 0
    for n in (2, 2, 2):  # the third goes round the end
        s, t = samples(n, dtype=torch.float32)
        crd(s, t)
        for x in crd.student(s).detach():
            latest[place] = x / x.norm()
            place = (place + 1) % 5
        torch.testing.assert_close(crd.student_bank, latest)
        assert int(crd.place) == place
    s, t = samples(7, dtype=torch.float32)  # more than it holds: the last five stay
    crd(s, t)
    last = nn.functional.normalize(crd.teacher(t).detach()[-5:])
    torch.testing.assert_close((crd.teacher_bank @ last.T).amax(0), torch.ones(5))


@functions
@pytest.mark.parametrize("n", [2, 3, 5])
def test_gradient(name: str, n: int) -> None:
    s, t = (x.requires_grad_() for x in samples(n))
    assert torch.autograd.gradcheck(FUNCTIONS[name], (s, t))


def test_gradient_of_flow_and_contrast() -> None:
    maps = [torch.randn(2, c, h, h).double().requires_grad_() for c, h in ((3, 4), (2, 2)) * 2]
    assert torch.autograd.gradcheck(lambda a, b, c, d: relations.fsp((a, b), (c, d)), maps)
    crd = relations.CRD(4, 6, negatives=9, dim=3, temperature=0.5).double()
    crd(*samples(3))  # Z is a constant from the first call on
    crd.eval()

    s, t = (x.requires_grad_() for x in samples(3))
    assert torch.autograd.gradcheck(lambda s, t, *_: crd(s, t), (s, t, *crd.parameters()))


@functions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_for_the_same_features(name: str, dtype: torch.dtype) -> None:
    s = samples(dtype=dtype)[0].requires_grad_()
    value = FUNCTIONS[name](s, s.detach().clone())
    value.backward()
    assert value.dim() == 0 and abs(float(value.detach())) <= FLOORS[value.dtype]
    assert s.grad is not None and float(s.grad.abs().max()) <= FLOORS[value.dtype]


@functions
def test_order_of_samples_does_not_matter(name: str) -> None:
    s, t = samples()
    order = torch.randperm(5)
    torch.testing.assert_close(FUNCTIONS[name](s, t), FUNCTIONS[name](s[order], t[order]))


@functions
def test_what_the_relation_does_not_see(name: str) -> None:
    s, t = samples()
    rotation = torch.linalg.qr(torch.randn(4, 4).double()).Q
    value = FUNCTIONS[name](s, t)
    torch.testing.assert_close(FUNCTIONS[name](7.0 * s @ rotation, t), value)
    shifted = FUNCTIONS[name](s + torch.randn(4).double(), t)
    assert torch.allclose(shifted, value) == name.startswith("rkd")
    skewed = FUNCTIONS[name](s * torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), t)
    assert not torch.allclose(skewed, value)


@functions
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_the_edges(name: str, n: int, dtype: torch.dtype) -> None:
    some = torch.randn(n, 4).to(dtype)
    same = some[:1].expand(n, 4).clone()
    twins = some.clone()
    twins[: n // 2] = some[-1]
    opposite = same * torch.tensor([1.0, -1.0, 1.0, -1.0]).to(dtype)[:n, None]
    kinds = (some, same, twins, opposite, some * 0, some * 1e-12)
    for values in kinds:
        for t in kinds:
            s = values.clone().requires_grad_()
            value = FUNCTIONS[name](s, t)
            value.backward()
            assert value.isfinite() and s.grad is not None and s.grad.isfinite().all()


@functions
def test_one_sample_has_no_relation(name: str) -> None:
    s, t = samples(1, dtype=torch.float32)
    value = FUNCTIONS[name](s.requires_grad_(), t)
    value.backward()
    assert abs(float(value.detach())) <= FLOORS[torch.float32]
    assert s.grad is not None and float((s.grad * s.detach()).abs().max()) <= FLOORS[torch.float32]


def test_distances_of_duplicates_have_no_gradient() -> None:
    s = torch.randn(1, 4).repeat(5, 1).requires_grad_()
    for loss in (relations.rkd_distance, relations.rkd_angle):
        (grad,) = torch.autograd.grad(loss(s, torch.randn(5, 4)), s)
        assert (grad == 0).all()


@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_only_at_the_ends(name: str, dtype: torch.dtype) -> None:
    floors = FLOORS[dtype] + FLOORS[torch.float32]
    assert_low_precision_only_at_the_ends(FUNCTIONS[name], *samples(dtype=dtype), floors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_contrast_takes_other_dtypes(dtype: torch.dtype) -> None:
    s, t = (x.requires_grad_() for x in samples(dtype=dtype))
    value = relations.CRD(4, 6, negatives=10, dim=3)(s, t)
    value.backward()
    assert value.dtype == torch.float32  # the embeddings' own
    assert s.grad is not None and s.grad.dtype == dtype and s.grad.isfinite().all()


@pytest.mark.parametrize("name", [*FUNCTIONS, "fsp", "crd"])
def test_no_value_is_read(name: str) -> None:
    with unreadable():
        s, t = torch.randn(3, 4, requires_grad=True), torch.randn(3, 6)
        if name == "fsp":
            relations.fsp((s, s), (s, t[:, :4])).backward()
        else:
            loss = relations.CRD(4, 6, negatives=5) if name == "crd" else FUNCTIONS[name]
            loss(s, t).backward()
        assert s.grad is not None


@functions
def test_compiles_whole(name: str) -> None:
    s, t = samples(dtype=torch.float32)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(s, t), FUNCTIONS[name](s, t))
