"""Operands that are DTensors: loss and gradients are those of the whole, on every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from test_group import near, raised, same_on_all
from torch import Tensor, nn

import fastkd

B, S, H = 3, 5, 6


def _tensor() -> Any:
    import torch.distributed.tensor as tensor

    return tensor


@functools.cache  # a mesh makes groups, which costs connections
def mesh_of(*shape: int) -> Any:
    names = ("dp", "tp")[-len(shape) :]
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def meshes() -> Iterator[Any]:
    world = dist.get_world_size()
    yield mesh_of(world)
    if world == 4:
        yield mesh_of(2, 2)
        yield mesh_of(1, 4)


def layouts(mesh: Any) -> Iterator[list[Any]]:
    """Placements of logits [B, S, V], every one that is understood."""
    R, P = _tensor().Replicate(), _tensor().Shard
    if mesh.ndim == 1:
        yield from ([P(2)], [P(-1)], [P(0)], [P(1)], [R])
    else:
        yield from ([P(0), P(2)], [P(1), P(2)], [P(2), P(0)], [P(0), P(1)], [R, P(2)], [P(0), R])


def of_rows(layout: list[Any]) -> list[Any]:
    """The same for labels [B, S]."""
    plain = _tensor().Replicate()
    return [plain if p.is_shard() and p.dim % 3 == 2 else p for p in layout]


def draw(vocab: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(B, S, vocab, generator=generator) for _ in range(2))
    labels = torch.randint(vocab, (B, S), generator=generator)
    labels[0, 1:] = -100
    labels[2, 3] = -100
    return {"s": s, "t": t, "labels": labels, "weight": torch.rand(B, S, generator=generator)}


OPTIONS: list[dict[str, Any]] = [
    {"labels": True, "alpha": 0.3},
    {"labels": True, "alpha": 0.3, "weight": True, "label_smoothing": 0.1},
    {"alpha": 0.0, "divergence": "reverse_kl"},
    {"alpha": 0.0, "weight": True, "reduction": "batchmean", "divergence": "js"},
    {"labels": True, "alpha": 0.5, "reduction": "sum", "vocab_size": 7, "divergence": "tv"},
    {"labels": True, "alpha": 0.0, "normalizer": 11.0, "divergence": "skew_kl"},
]


def placed_like(grad: Any, x: Any) -> bool:
    """As the operand, or where torch itself puts such a gradient (2.6 gathers some shards')."""
    if grad.placements == x.placements:
        return True
    other = x.detach().requires_grad_()
    other.to_local().square().sum().backward()
    return grad.placements == other.grad.placements


def dense() -> None:
    """Each layout with a sharded or replicated teacher, DTensors or plain rows of labels."""
    distribute = _tensor().distribute_tensor
    number = 0
    for mesh in meshes():
        for layout in layouts(mesh):
            for options in OPTIONS:
                number += 1
                if dist.get_world_size() != 2 and (number + number // len(OPTIONS)) % 3:
                    continue  # each layout with two of the options: two ranks have all
                given = draw(11, number)
                options = dict(options)
                given["labels"].clamp_(max=options.get("vocab_size", 11) - 1)
                rows = {k: given[k] for k in ("labels", "weight") if options.pop(k, False)}
                whole = {k: given[k].clone().requires_grad_() for k in ("s", "t")}
                if "weight" in rows:
                    rows["weight"].requires_grad_(number % 2 == 0)
                expected = fastkd.distillation_loss(whole["s"], whole["t"], **rows, **options)
                expected.backward()

                theirs = [_tensor().Replicate()] * mesh.ndim if number % 3 == 0 else layout
                leaf = distribute(given["s"], mesh, layout).requires_grad_()
                other = distribute(given["t"], mesh, theirs).requires_grad_()
                placed = {
                    k: distribute(v.detach(), mesh, of_rows(layout)).requires_grad_(v.requires_grad)
                    for k, v in rows.items()
                }
                if number % 4 == 1:
                    placed = {k: v.to_local() for k, v in placed.items()}
                loss = fastkd.distillation_loss(leaf, other, **placed, **options)
                loss.backward()

                what = f"{number}: {mesh} {layout} {options}"
                assert type(loss) is Tensor, what
                near(loss, expected, torch.float32, what)
                same_on_all(loss, what)
                for name, x in (("s", leaf), ("t", other)):
                    grad: Any = x.grad
                    assert placed_like(grad, x), what
                    near(grad.full_tensor(), whole[name].grad, torch.float32, what + name)
                if "weight" in rows and rows["weight"].requires_grad and number % 4 != 1:
                    grad = placed["weight"].grad
                    near(grad.full_tensor(), rows["weight"].grad, torch.float32, what + "weight")


def twice() -> None:
    """A gradient of gradients, where rows are split: every rank's loss has a part in each other's.

    Of a learnt weight, by what all of them divide by, and of what is done with the loss itself.
    """
    tensor, mesh = _tensor(), mesh_of(dist.get_world_size())
    given = draw(11, 4)
    leaf = tensor.distribute_tensor(given["weight"], mesh, [tensor.Shard(1)]).requires_grad_()
    (own,) = torch.autograd.grad(leaf.to_local().square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(own.square().sum(), leaf, allow_unused=True)
    if second is None:
        return  # torch 2.6: a DTensor has no second gradient, whatever is done with it
    found = []
    for placed in (False, True):
        leaves = [given[k].clone() for k in ("s", "weight")]
        if placed:
            leaves = [tensor.distribute_tensor(x, mesh, [tensor.Shard(1)]) for x in leaves]
        s, weight = (x.requires_grad_() for x in leaves)
        t = tensor.distribute_tensor(given["t"], mesh, [tensor.Shard(1)]) if placed else given["t"]
        loss = fastkd.js_div(s, t, weight=weight)
        grads = torch.autograd.grad(loss.square(), [s, weight], create_graph=True)
        again = torch.autograd.grad(sum(x.square().sum() for x in grads), [s, weight])
        found.append([getattr(x, "full_tensor", lambda x=x: x)() for x in (*grads, *again)])
    for at, (got, expected) in enumerate(zip(found[1], found[0], strict=True)):
        near(got, expected, torch.float32, f"gradient {at} of (s, weight, and both again)")


def linear() -> None:
    """Weights split on the vocabulary, hidden states on rows or not at all."""
    tensor = _tensor()
    distribute, R, P = tensor.distribute_tensor, tensor.Replicate(), tensor.Shard
    for number, mesh in enumerate(meshes()):
        cases = [([R], [P(0)]), ([P(0)], [R]), ([P(1)], [R])]
        if mesh.ndim == 2:
            cases = [([P(0), R], [R, P(0)]), ([R, P(1)], [P(0), R])]
        for of_hidden, of_weight in cases:
            given = draw(11, number)
            generator = torch.Generator().manual_seed(number)
            hidden, weight, bias = (
                torch.randn(*shape, generator=generator) for shape in ((B, S, H), (11, H), (11,))
            )
            leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
            head = fastkd.LinearLogits(*leaves, softcap=5.0)
            expected = fastkd.distillation_loss(head, given["t"], given["labels"])
            expected.backward()

            layouts = (of_hidden, of_weight, of_weight)
            mine = [
                distribute(x, mesh, layout).requires_grad_()
                for x, layout in zip((hidden, weight, bias), layouts, strict=True)
            ]
            teacher = distribute(given["t"], mesh, [R] * mesh.ndim)
            split = [p if p.is_shard() else R for p in of_hidden]
            labels = distribute(given["labels"], mesh, split)
            loss = fastkd.distillation_loss(
                fastkd.LinearLogits(*mine, softcap=5.0), teacher, labels
            )
            loss.backward()
            near(loss, expected, torch.float32, f"{mesh} {of_hidden}")
            for x, leaf in zip(mine, leaves, strict=True):
                grad: Any = x.grad
                assert placed_like(grad, x)
                near(grad.full_tensor() / 4, leaf.grad / 4, torch.float32, f"{mesh} {of_hidden}")


class Model(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.body = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, vocab)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.body(x).tanh())


def parallelized() -> None:
    """A column-parallel lm_head that leaves its logits where they are; an uneven vocabulary."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = mesh_of(dist.get_world_size())
    torch.manual_seed(0)
    alone, split, teacher = Model(13), Model(13), Model(13)
    split.load_state_dict(alone.state_dict())
    x, labels = torch.randn(B, S, H), torch.randint(13, (B, S))
    labels[0] = -100
    said = teacher(x).detach()
    expected = fastkd.distillation_loss(alone(x), said, labels)
    expected.backward()
    for model in (split, teacher):
        colwise = ColwiseParallel(use_local_output=False)
        parallelize_module(model, mesh, {"lm_head": colwise})
    logits = split(x)
    assert isinstance(logits, _tensor().DTensor) and logits.placements[0].is_shard(2)
    for theirs in (teacher(x).detach(), said):  # split alike, or plain and whole on every rank
        split.zero_grad()
        loss = fastkd.distillation_loss(split(x), theirs, labels, inplace=True)
        loss.backward()
        near(loss, expected, torch.float32, "parallelize_module")
        for (name, p), q in zip(split.named_parameters(), alone.parameters(), strict=True):
            grad: Any = p.grad
            if name.startswith("lm_head"):
                assert grad.placements == p.placements
                grad = grad.full_tensor()
            near(grad, q.grad, torch.float32, name)


def rows_of_a_rank() -> None:
    """reduction="none" is this rank's rows; a plain stored teacher has this rank's rows too."""
    tensor, mesh = _tensor(), mesh_of(dist.get_world_size())
    given = draw(11, 0)
    stored = fastkd.topk_from_logits(given["t"], 4)
    for layout in ([tensor.Shard(1)], [tensor.Shard(2)]):
        student = tensor.distribute_tensor(given["s"], mesh, layout)
        rows = tensor.distribute_tensor(torch.arange(S), mesh, [tensor.Shard(0)]).to_local()
        rows = rows if layout[0].dim == 1 else torch.arange(S)
        found = fastkd.kl_div(student, stored[:, rows], reduction="none")
        near(found, fastkd.kl_div(given["s"], stored, reduction="none")[:, rows], torch.float32, "")
        total = fastkd.kl_div(student, stored[:, rows])
        near(total, fastkd.kl_div(given["s"], stored), torch.float32, "stored")


def parallel_sequences() -> None:
    """Plain rows on each rank, normalised by the tokens of all: their sum is the whole's loss."""
    rank, world = dist.get_rank(), dist.get_world_size()
    given = draw(11, 3)
    expected = given["s"].clone().requires_grad_()
    loss = fastkd.distillation_loss(expected, given["t"], given["labels"])
    loss.backward()
    mine = given["s"].tensor_split(world, 1)[rank].clone().requires_grad_()
    theirs, labels = (given[k].tensor_split(world, 1)[rank] for k in ("t", "labels"))
    for group in (None, dist.group.WORLD, mesh_of(world)):
        tokens = fastkd.token_count(labels, group)
        assert tokens == (given["labels"] != -100).sum()
    part = fastkd.distillation_loss(mine, theirs, labels, normalizer=tokens)
    part.backward()
    total = part.detach().clone()
    dist.all_reduce(total)
    near(total, loss, torch.float32, "sum of the ranks")
    assert expected.grad is not None
    near(mine.grad, expected.grad.tensor_split(world, 1)[rank], torch.float32, "gradient")


def compiled() -> None:
    tensor, mesh = _tensor(), mesh_of(dist.get_world_size())
    given = draw(11, 0)
    s, t = (tensor.distribute_tensor(given[k], mesh, [tensor.Shard(2)]) for k in "st")

    @torch.compile(backend="eager")
    def loss(s: Tensor, t: Tensor) -> Tensor:
        return fastkd.kl_div(s, t)

    near(loss(s, t), fastkd.kl_div(given["s"], given["t"]), torch.float32, "compiled")


def refused() -> list[str]:
    tensor, mesh = _tensor(), mesh_of(dist.get_world_size())
    R, P, partial = tensor.Replicate(), tensor.Shard, tensor.Partial()
    x = torch.randn(B, S, 8)

    def of(*layout: Any, on: Any = mesh, x: Tensor = x) -> Tensor:
        return tensor.DTensor.from_local(x, on, layout, run_check=False)

    twice = mesh_of(2, dist.get_world_size() // 2)
    calls: list[Callable[[], Any]] = [
        lambda: fastkd.kl_div(of(partial), of(R)),
        lambda: fastkd.kl_div(of(P(2)), of(partial)),
        lambda: fastkd.kl_div(of(P(2)), of(P(0))),
        lambda: fastkd.kl_div(of(P(2)), of(P(2)), group=dist.group.WORLD),
        lambda: fastkd.kl_div(of(P(2)), of(P(2), R, on=twice)),
        lambda: fastkd.kl_div(
            fastkd.LinearLogits(torch.randn(B, S, 4 * mesh.size()), of(P(1), x=torch.randn(8, 4))),
            x,
        ),
        lambda: fastkd.kl_div(of(P(0)), of(P(0)), labels=torch.zeros(B * mesh.size(), S).long()),
        lambda: fastkd.kl_div(of(P(2)).requires_grad_(), of(P(2)), inplace=True),
        lambda: fastkd.kl_div(of(P(2), P(2), on=twice), of(P(2), P(2), on=twice)),
    ]
    return [raised(call) for call in calls]


EXPECTED = (
    r"ValueError: student: .*Partial.*expected Replicate\(\) or a Shard of rows or vocabulary in "
    r".*student.redistribute\(placements=\[Replicate\(\)\]\)",
    r"teacher: got a DTensor .*teacher.redistribute",
    r"teacher: got dimension 0 of the logits split over mesh dimension 0, where student has "
    "dimension 2 split",
    "group: got one beside a DTensor",
    r"teacher: got a DTensor on .*expected the mesh of student",
    r"student.weight: .*Shard of the vocabulary \(dim=0\).*student.weight.redistribute",
    r"labels: got shape .* expected \[3, 5\]",
    "inplace: the student is a leaf",
    r"student: got a vocabulary split over 2 dimensions .* expected one: call student.redistribute"
    r"\(placements=\[S(hard)?\((dim=)?2\), Replicate\(\)\]\)",
)


def everything() -> list[str]:
    dense()
    twice()
    linear()
    parallelized()
    rows_of_a_rank()
    parallel_sequences()
    if dist.get_world_size() == 2:
        compiled()
    return refused()


@pytest.mark.parametrize("world", [2, 4])
def test_dtensors_over(world: int) -> None:
    pytest.importorskip("torch.distributed.tensor")
    for said in ranks.run(world, everything):
        for at, (got, expected) in enumerate(zip(said, EXPECTED, strict=True)):
            if world == 2 and at == len(EXPECTED) - 1:
                continue  # a mesh of 2 x 1 splits the vocabulary once
            with pytest.raises(AssertionError, match=expected):
                raise AssertionError(got)


def test_tokens_without_a_group() -> None:
    labels = torch.tensor([[1, -100], [0, 3]])
    assert fastkd.token_count(labels) == 3
    assert fastkd.token_count(labels, ignore_index=0) == 3
