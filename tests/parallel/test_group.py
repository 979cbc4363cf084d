"""A vocabulary split over ranks: loss and gradients are those of the whole, on every rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import common
import oracle
import pytest
import ranks
import torch
import torch.distributed as dist
from group_cases import INF, H, N, bounds, cases, compare, logits, near, over_ranks, same_on_all
from torch import Tensor

import fastkd
from fastkd.backends import cpu
from fastkd.divergence import divergences
from fastkd.parallel import vocab_parallel


def of_this_world() -> Iterator[tuple[int, random.Random, dict[str, Any], dict[str, Any]]]:
    """The numbered cases: two ranks have them all, one or four each third of a divergence."""
    for number, case in enumerate(cases()):
        if dist.get_world_size() == 2 or (number + number // 6) % 3 == 0:
            yield number, *case


def dense() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for number, chance, case, options in of_this_world():
        vocab, pad = case["vocab"], 3 if case["padded"] else 0
        torch.manual_seed(number)
        s, t = chance.choice(list(common.INPUTS.values()))(N, vocab)
        s, t = (torch.cat([x, 9 * torch.randn(N, pad)], -1) for x in (s, t))
        pair = chance.choice(list(common.PAIRS.values()))
        s, t = (x.to(dtype) for x, dtype in zip((s, t), pair, strict=True))
        labels = torch.randint(vocab, (N,))
        labels[3] = -100
        given = {**options, "vocab_size": vocab if pad else None}
        if options["weight"]:
            given["weight"] = torch.rand(N)
        else:
            del given["weight"]
        if case["labels"]:
            given |= {"alpha": case["alpha"], "label_smoothing": chance.choice((0.0, 0.1))}
            s[3, 0] = torch.nan  # an ignored row is never read
        widths = bounds(chance, vocab + pad, world)
        start = sum(widths[:rank])
        mine = slice(start, start + widths[rank])
        with pytest.MonkeyPatch.context() as patch, fastkd.use_backend(case["backend"]):
            vocab_parallel = over_ranks(mine, case["replicated"])
            patch.setattr(fastkd, "distillation_loss", vocab_parallel)
            try:
                got = oracle.assert_as_good_as_torch(
                    *(s, t, labels if case["labels"] else None),
                    divergence=fastkd.divergences[case["divergence"]],
                    wrt="both" if case["teacher_grad"] else "student",
                    upstream=torch.rand(N) if given["reduction"] == "none" else torch.rand(()),
                    **given,
                )
            except AssertionError as error:
                said = f"case {number}: {case} {given} {pair} {widths}"
                raise AssertionError(f"{said}: {error}") from error
        same_on_all(got.value, f"case {number}")


def inplace_and_exact_zeros() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    x = 4 * torch.randn(N, 10 * world, generator=torch.Generator().manual_seed(1))
    mine = slice(10 * rank, 10 * rank + 10)
    leaf = x[:, mine].clone().requires_grad_()
    own = leaf * 1.0
    address = own.data_ptr()
    loss = fastkd.kl_div(own, x[:, mine].roll(1, 0), group=dist.group.WORLD, inplace=True)
    (grad,) = torch.autograd.grad(loss, own)
    assert grad.data_ptr() == address
    whole = x.clone().requires_grad_()
    rolled = torch.cat([x[:, 10 * r : 10 * r + 10].roll(1, 0) for r in range(world)], 1)
    fastkd.kl_div(whole, rolled).backward()
    assert whole.grad is not None
    near(grad, whole.grad[:, mine], torch.float32, "in place")
    for name in common.EXACT:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            s = x[:, mine].to(dtype).requires_grad_()
            loss = fastkd.distillation_loss(
                s, s.detach(), alpha=0.0, divergence=name, group=dist.group.WORLD
            )
            loss.backward()
            assert loss.item() == 0 and s.grad is not None and s.grad.eq(0).all(), name


def linear() -> None:
    for case in of_this_world():
        linear_case(*case)


def linear_case(
    number: int, chance: random.Random, case: dict[str, Any], options: dict[str, Any]
) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    what = f"case {number}: {case} {options}"
    vocab, dtype = case["vocab"], case["dtype"]
    generator = torch.Generator().manual_seed(number)
    hidden, theirs = (torch.randn(N, H, generator=generator).to(dtype) for _ in range(2))
    weight, other = (torch.randn(vocab, H, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(vocab, generator=generator).to(dtype)
    labels = torch.randint(vocab, (N,), generator=generator)
    labels[3] = -100
    kind = chance.choice(("both", "student", "teacher"))
    chunk = chance.choice((None, 2, 3))

    def run(mine: slice, teacher: slice, **more: Any) -> dict[str, Any]:
        leaves = {
            "hidden": hidden.clone(),
            "weight": weight[mine].clone(),
            "bias": bias[mine].clone(),
            "theirs": theirs.clone(),
            "other": other[teacher].clone(),
        }
        wanted = ["hidden", "weight", "bias"]
        wanted += ["theirs", "other"] if case["teacher_grad"] else []
        for name in wanted:
            leaves[name].requires_grad_()
        s: Any = fastkd.LinearLogits(
            leaves["hidden"], leaves["weight"], leaves["bias"], chunk_size=chunk, softcap=5.0
        )
        t: Any = fastkd.LinearLogits(leaves["theirs"], leaves["other"], chunk_size=chunk)
        if kind == "teacher":  # a dense student, of its own columns
            wanted = [*wanted[3:], "student"]
            s = (hidden.double() @ weight.double().T).to(dtype)[:, mine]
            s = leaves["student"] = s.clone().requires_grad_()
        if kind == "student":
            wanted = [name for name in wanted if name not in ("theirs", "other")]
            t = (theirs.double() @ other.double().T).to(dtype)[:, teacher]
        with fastkd.use_backend("cpu"):
            loss = fastkd.distillation_loss(
                *(s, t, labels if case["labels"] else None),
                alpha=case["alpha"] if case["labels"] else 0.0,
                divergence=case["divergence"],
                temperature=options["temperature"],
                reduction=options["reduction"],
                **more,
            )
            loss.sum().backward()
        return {"loss": loss.detach(), "grads": {name: leaves[name].grad for name in wanted}}

    widths = bounds(chance, vocab, world)
    start = sum(widths[:rank])
    mine, every = slice(start, start + widths[rank]), slice(None)
    part = run(mine, every if case["replicated"] else mine, group=dist.group.WORLD)
    whole = run(every, every)
    near(part["loss"], whole["loss"], torch.float32 if dtype != torch.float64 else dtype, what, 1.0)
    # sums over ranks of products that are rounded to the operands' dtype on each
    loose = dtype if dtype != torch.float64 else torch.float64
    for name, grad in whole["grads"].items():
        got = part["grads"][name]
        if got.shape != grad.shape:
            grad = grad[:, mine] if name == "student" else grad[mine]
        near(got / 4, grad / 4, loose, f"{what} {kind}: gradient of {name}")


def stored() -> None:
    for case in of_this_world():
        stored_case(*case)


def stored_case(
    number: int, chance: random.Random, case: dict[str, Any], options: dict[str, Any]
) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    vocab, dtype = case["vocab"], case["dtype"]
    generator = torch.Generator().manual_seed(number)
    s, t = (logits(generator, vocab, dtype) for _ in range(2))
    tail = chance.choice(("bucket", "renormalize", "restrict", "drop"))
    k = chance.randint(1, min(vocab, 9))
    labels = torch.randint(vocab, (N,), generator=generator)
    labels[3] = -100
    T = options["temperature"]
    teacher = fastkd.topk_from_logits(t, k, temperature=T, tail=tail)
    if case["divergence"] == "reverse_kl" and tail == "renormalize":
        return  # +inf by definition, with no gradient to compare
    what = f"case {number}: {case} {options} tail={tail} k={k}"
    linear_student = chance.random() < 0.3

    def run(mine: slice, **more: Any) -> dict[str, Any]:
        x = s[:, mine].clone().requires_grad_()
        student: Any = x
        if linear_student:  # logits = identity @ x, so that the weight's gradient is x's
            student = fastkd.LinearLogits(torch.eye(N, dtype=dtype), x.t().contiguous())
        loss = fastkd.distillation_loss(
            *(student, teacher, labels if case["labels"] else None),
            alpha=case["alpha"] if case["labels"] else 0.0,
            divergence=case["divergence"],
            temperature=T,
            reduction=options["reduction"],
            label_smoothing=0.1 if case["alpha"] else 0.0,
            **more,
        )
        loss.sum().backward()
        return {"loss": loss.detach(), "grads": {"student": x.grad}}

    widths = bounds(chance, vocab, world)
    start = sum(widths[:rank])
    mine = slice(start, start + widths[rank])
    part = run(mine, group=dist.group.WORLD)
    compare(run(slice(None)), part, mine, dtype, what)
    same_on_all(part["loss"], what)


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused() -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    x = torch.randn(4, 5)
    alone = dist.new_group([0])
    leaf = torch.randn(4, 5, requires_grad=True)

    def twice() -> None:
        loss = fastkd.kl_div(leaf, x, group=group)
        torch.autograd.grad(loss, leaf, create_graph=True)

    labels = torch.full((4,), 5 * world)
    kept = fastkd.topk_from_logits(x, 2)
    learnt = fastkd.TopK(kept.logprobs.clone().requires_grad_(), kept.indices)
    head = fastkd.LinearLogits(torch.eye(4), leaf.t())
    return [
        raised(lambda: fastkd.kl_div(x, x[:, : 3 + rank], group=group)),
        raised(lambda: fastkd.kl_div(x[: 2 + rank], x[: 2 + rank], group=group)),
        raised(lambda: fastkd.kl_div(x, x, group=group, vocab_size=4 + rank)),
        raised(lambda: fastkd.kl_div(x, x, group=group, vocab_size=100)),
        raised(lambda: fastkd.kl_div(x, x, group=group, temperature=1.0 + rank)),
        raised(lambda: fastkd.kl_div(x, x, group=group, labels=labels)),
        raised(lambda: fastkd.kl_div(x, x, group="tp")),
        raised(lambda: fastkd.kl_div(x[:, :0], x[:, :0], group=group)),
        raised(twice),
        raised(lambda: fastkd.kl_div(x, learnt, group=group)),
        raised(lambda: fastkd.kl_div(head, learnt, group=group)),
        # of one rank alone: the others would wait for it until the group's timeout
        raised(lambda: fastkd.kl_div(x, learnt if rank else kept, group=group)),
        raised(lambda: fastkd.kl_div(x, x.requires_grad_(rank == 0), group=group)),
        raised(lambda: fastkd.kl_div(x, x, group=alone))
        if rank
        else "ValueError: group: not in it",
    ]


def weights_and_compile() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(N, 4 * world, generator=generator) for _ in range(2))
    mine = slice(4 * rank, 4 * rank + 4)
    got = []
    for at, more in ((slice(None), {}), (mine, {"group": dist.group.WORLD})):
        weight = torch.linspace(0.5, 1.5, N, requires_grad=True)
        fastkd.js_div(s[:, at], t[:, at], weight=weight, **more).backward()
        got.append(weight.grad)
    near(got[1], got[0], torch.float32, "gradient of weight")
    if world > 2:  # the graph is that of two
        return

    @torch.compile(backend="eager")
    def step(s: Tensor, t: Tensor) -> Tensor:
        return fastkd.kl_div(s * 2, t, group=dist.group.WORLD)

    near(step(s[:, mine], t[:, mine]), fastkd.kl_div(s * 2, t), torch.float32, "compiled")


def in_steps() -> None:
    """The same bits whatever rows go together and however many threads; strange rows are redone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    vocab = 3000 * world
    generator = torch.Generator().manual_seed(3)
    s, t = (3 * torch.randn(N, vocab, generator=generator) for _ in range(2))
    labels = torch.randint(vocab, (N,), generator=generator)
    labels[3] = -100
    mine = slice(3000 * rank, 3000 * (rank + 1))
    redone: list[int] = []
    general = vocab_parallel.VocabParallel._in_passes

    def counted(self: vocab_parallel.VocabParallel, student: Tensor, *args: Any) -> Tensor:
        redone.append(student.size(0) * student.size(1))
        return general(self, student, *args)

    def run(name: str, s: Tensor, t: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        x = s.clone().requires_grad_()
        loss = fastkd.distillation_loss(
            *(x, t, labels),
            divergence=name,
            label_smoothing=0.1,
            reduction="none",
            **more,
        )
        loss.sum().backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    with pytest.MonkeyPatch.context() as patch, fastkd.use_backend("cpu"):
        patch.setattr(vocab_parallel.VocabParallel, "_in_passes", counted)
        for name in divergences if world == 2 else ("kl", "js"):  # one and two exchanges
            got = []
            for waiting, threads in ((cpu.WAITING, 1), (1, 1), (1, 2), (300_000, 2)):
                patch.setattr(cpu, "WAITING", waiting)
                torch.set_num_threads(threads)
                got.append(run(name, s[:, mine], t[:, mine], group=dist.group.WORLD))
                torch.set_num_threads(1)
            assert not redone, name
            for loss, grad in got[1:]:
                assert torch.equal(loss, got[0][0]) and torch.equal(grad, got[0][1]), name
            loss, grad = run(name, s, t)
            near(got[0][0], loss, torch.float32, name, 1.0)
            near(got[0][1], grad[:, mine], torch.float32, name)
            far_s, far_t = s.clone(), t.clone()
            far_s[1] *= 1e30  # scores beyond a float's sums
            far_t[5, 7] = INF  # NaN
            got[0] = run(name, far_s[:, mine], far_t[:, mine], group=dist.group.WORLD)
            assert redone == [2, 2], name  # once for the loss, once for the gradient
            redone.clear()
            loss, grad = run(name, far_s, far_t)
            near(got[0][0], loss, torch.float32, name, 1.0)
            near(got[0][1], grad[:, mine], torch.float32, name)


def everything() -> list[str]:
    dense()
    in_steps()
    inplace_and_exact_zeros()
    linear()
    stored()
    weights_and_compile()
    return refused()


EXPECTED = (
    r"ValueError: teacher: got \[3, 4.*beside the student's \[5, 5.*or all 1?\d+ of them",
    "ValueError: group: ranks . and . differ in rows",
    "ValueError: group: ranks . and . differ in vocab_size",
    r"ValueError: vocab_size: got 100, expected at most",
    r"ValueError: group: ranks . and . differ in call \(kl_div, kl 0, T=",
    r"ValueError: labels: got .* expected 0 <= label < ",
    "TypeError: group: got str 'tp', expected a ProcessGroup or a DeviceMesh",
    "ValueError: student: got no column on any rank",
    "NotImplementedError: group: create_graph=True",
    "NotImplementedError: group: a gradient of this teacher",
    "NotImplementedError: group: a gradient of this teacher",
    *(r"ValueError: group: ranks . and . differ in call \(kl_div, kl 0, T=1",) * 2,
    "ValueError: group: .*not in it",
)


@pytest.mark.parametrize("world", [2, 4])
def test_split_over(world: int) -> None:
    for said in ranks.run(world, everything):
        for got, expected in zip(said, EXPECTED, strict=True):
            with pytest.raises(AssertionError, match=expected):
                raise AssertionError(got)


def test_one_rank_is_the_whole() -> None:
    ranks.run(1, dense)
