"""Feature losses: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import unreadable
from feature_losses import (
    FUNCTIONS,
    SHAPES,
    assert_low_precision_only_at_the_ends,
    pair,
    shapes,
    vectors,
)
from oracle import FLOORS
from torch import Tensor, nn

from fastkd.distill.losses import features

functions = pytest.mark.parametrize("name", FUNCTIONS)


def rows(x: Tensor) -> list[list[Tensor]]:
    """The unit map of every channel, sample by sample."""
    if x.dim() == 2:
        samples = [[x[:, c] for c in range(x.size(1))]]
    elif x.dim() == 3:
        samples = [[x[n, :, c] for c in range(x.size(2))] for n in range(x.size(0))]
    else:
        samples = [[x[n, c].flatten() for c in range(x.size(1))] for n in range(x.size(0))]
    return [[row / row.norm() for row in sample] for sample in samples]


def mmd(student: Tensor, teacher: Tensor, kernel: Callable[[Tensor, Tensor], Any]) -> float:
    def mean(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float(kernel(x, y)) for x in a for y in b) / (len(a) * len(b))

    samples = list(zip(rows(student), rows(teacher), strict=True))
    return sum(mean(t, t) + mean(s, s) - 2 * mean(s, t) for s, t in samples) / len(samples)


def moment(x: Tensor) -> Tensor:
    found = vectors(x)
    total = torch.zeros(len(found[0]), len(found[0]), dtype=x.dtype)
    for f in found:
        for i in range(len(f)):
            for j in range(len(f)):
                total[i, j] += f[i] * f[j] / len(found)
    return total


def definition(name: str, s: Tensor, t: Tensor) -> float:
    numbers = list(zip(s.flatten().tolist(), t.flatten().tolist(), strict=True))
    if name == "l2":
        return sum((a - b) ** 2 for a, b in numbers) / len(numbers)
    if name == "l1":
        return sum(abs(a - b) for a, b in numbers) / len(numbers)
    if name == "cosine":
        both = list(zip(vectors(s), vectors(t), strict=True))
        return sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in both) / len(both)
    if name == "second-moment":
        return float((moment(s) - moment(t)).square().sum())
    kernels: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "nst-polynomial": lambda a, b: (a @ b) ** 2,
        "nst-cubic": lambda a, b: (a @ b + 0.5) ** 3,
        "nst-linear": lambda a, b: a @ b,
        "nst-gaussian": lambda a, b: math.exp(-float((a - b).square().sum()) / (2 * 0.7)),
    }
    return mmd(s, t, kernels[name])


@functions
@shapes
def test_value_is_the_definition(name: str, shape: tuple[int, ...]) -> None:
    s, t = pair(shape)
    assert float(FUNCTIONS[name](s, t)) == pytest.approx(definition(name, s, t), rel=1e-9)


def test_gaussian_bandwidth_is_the_mean_squared_distance() -> None:
    s, t = pair((1, 3, 2, 2))
    distances = [float((a - b).square().sum()) for a in rows(s)[0] for b in rows(t)[0]]
    width = sum(distances) / len(distances)

    def kernel(a: Tensor, b: Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (2 * width))

    usual = features.nst(s, t, kernel="gaussian")
    assert float(usual) == pytest.approx(mmd(s, t, kernel), rel=1e-9)


def test_nst_compares_other_numbers_of_channels_and_sizes() -> None:
    s, t = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 5, 8, 8).double()
    small = t.reshape(2, 5, 4, 2, 4, 2).mean((3, 5))
    expected = mmd(s, small, lambda a, b: (a @ b) ** 2)
    assert float(features.nst(s, t)) == pytest.approx(expected, rel=1e-9)
    assert float(features.nst(t, s)) == pytest.approx(expected, rel=1e-9)


def test_second_moment_takes_other_numbers_of_samples() -> None:
    s, t = torch.randn(4, 3).double(), torch.randn(2, 3, 5, 5).double()
    expected = (moment(s) - moment(t)).square().sum()
    assert float(features.second_moment(s, t)) == pytest.approx(float(expected), rel=1e-9)


def test_vid_is_the_gaussian_likelihood() -> None:
    for shape in SHAPES.values():
        channels = 1 if len(shape) == 4 else -1
        s, t = torch.randn(shape).double(), torch.randn(shape).double()
        t = t.narrow(channels, 0, 4)
        vid = features.VID(6, 4, floor=1e-3).double()
        with torch.no_grad():
            vid.log_variance.copy_(torch.randn(4))
        vid.requires_grad_(False)
        normal = torch.distributions.Normal(0.0, 1.0)
        total, weight, bias = 0.0, vid.mean.linear.weight, vid.mean.linear.bias
        pairs = list(zip(vectors(s), vectors(t), strict=True))
        for a, b in pairs:
            for c in range(4):
                deviation = (vid.log_variance[c].exp() + 1e-3).sqrt()
                z = (b[c] - weight[c] @ a - bias[c]) / deviation
                total += float(deviation.log() - normal.log_prob(z)) - math.log(2 * math.pi) / 2
        assert float(vid(s, t)) == pytest.approx(total / (4 * len(pairs)), rel=1e-9)


def test_mgd_masks_and_generates() -> None:
    s, t = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    mgd = features.MGD(4, 6, ratio=0.4)
    torch.manual_seed(7)
    value = mgd(s, t)
    torch.manual_seed(7)
    kept = torch.rand(3, 1, 5, 5) >= 0.4
    expected = (mgd.generate(mgd.align(s) * kept) - t).square().mean()
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(value, expected)
    assert not torch.equal(value, mgd(s, t))  # another mask


def test_mgd_drops_positions_of_maps_and_single_features() -> None:
    seen: list[Tensor] = []
    for mgd, x in (
        (features.MGD(4, 4, ratio=0.5), torch.ones(8, 4, 6, 6)),
        (features.MGD(4, 4, ratio=0.5, spatial=False), torch.ones(200, 4)),
    ):
        mgd.generate.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        mgd(x, x)
    maps, single = seen
    assert (maps == maps[:, :1]).all() and 0.3 < float(maps.mean()) < 0.7
    assert (single != single[:, :1]).any() and 0.3 < float(single.mean()) < 0.7


@functions
@shapes
def test_gradient(name: str, shape: tuple[int, ...]) -> None:
    s, t = (x.requires_grad_() for x in pair(shape))
    assert torch.autograd.gradcheck(FUNCTIONS[name], (s, t))


@pytest.mark.parametrize("spatial", [True, False])
def test_gradient_of_modules(spatial: bool) -> None:
    shape = (2, 3, 3, 3) if spatial else (2, 3)
    s, t = (x.requires_grad_() for x in pair(shape))
    vid, mgd = features.VID(3, 3).double(), features.MGD(3, 3, spatial=spatial).double()

    def masked(s: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return mgd(s, t)

    assert torch.autograd.gradcheck(lambda s, t, *_: vid(s, t), (s, t, *vid.parameters()))
    assert torch.autograd.gradcheck(masked, (s, t, *mgd.parameters()))


@functions
@shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_for_the_same_features(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    s = pair(shape, dtype)[0].requires_grad_()
    value = FUNCTIONS[name](s, s.detach().clone())
    value.backward()
    floor = FLOORS[value.dtype]
    assert value.dim() == 0 and abs(float(value.detach())) <= 4 * floor
    assert s.grad is not None and float(s.grad.abs().max()) <= 4 * floor


@functions
@shapes
def test_order_of_samples_does_not_matter(name: str, shape: tuple[int, ...]) -> None:
    s, t = pair(shape)
    order = torch.randperm(shape[0])
    torch.testing.assert_close(FUNCTIONS[name](s, t), FUNCTIONS[name](s[order], t[order]))


@functions
@shapes
@pytest.mark.parametrize("samples", [1, 2])
def test_finite_at_the_edges(name: str, shape: tuple[int, ...], samples: int) -> None:
    shape = (samples, *shape[1:])
    some = torch.randn(shape)
    same = some[:1].expand(shape).clone()
    for s, t in ((some, same), (same, some), (same, same), (some * 0, some), (some, some * 0)):
        s = s.clone().requires_grad_()
        value = FUNCTIONS[name](s, t)
        value.backward()
        assert value.isfinite() and s.grad is not None and s.grad.isfinite().all()


@functions
@shapes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_only_at_the_ends(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert_low_precision_only_at_the_ends(FUNCTIONS[name], *pair(shape, dtype), FLOORS[dtype], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_modules_take_other_dtypes(dtype: torch.dtype) -> None:
    s, t = pair((2, 3, 4, 4), dtype)
    for module in (features.VID(3, 3), features.MGD(3, 3)):
        value = module(s.requires_grad_(), t)
        value.backward()
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert s.grad is not None and s.grad.dtype == dtype


MODULES: dict[str, Callable[[], nn.Module]] = {
    "vid": lambda: features.VID(6, 6),
    "mgd": lambda: features.MGD(6, 6),
}


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_no_value_is_read(name: str) -> None:
    with unreadable():
        loss = MODULES[name]() if name in MODULES else FUNCTIONS[name]
        s, t = torch.randn(2, 6, 3, 4, requires_grad=True), torch.randn(2, 6, 3, 4)
        loss(s, t).backward()
        assert s.grad is not None
    with pytest.raises(Exception, match="_local_scalar_dense"), unreadable():
        float(torch.randn(()))


@functions
def test_compiles_whole(name: str) -> None:
    s, t = pair((2, 6, 3, 4), torch.float32)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(s, t), FUNCTIONS[name](s, t))
