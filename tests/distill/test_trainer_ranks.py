"""The trainer on several ranks: the weights of one process, and checkpoints for any number."""

from __future__ import annotations

import importlib
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastkd
from fastkd import distill
from fastkd.distill.logging import Record

N, D, V, GLOBAL = 32, 5, 3, 8
WRITER = "torch.distributed.checkpoint.HuggingFaceStorageWriter"  # of checkpoints in shards
SHARDS = hasattr(importlib.import_module(WRITER.rpartition(".")[0]), WRITER.rpartition(".")[2])
KINDS = ("ddp", "fsdp") if SHARDS else ("ddp",)


class Rows:
    """This rank's rows of each global batch, in an order that a generator draws every epoch."""

    def __init__(self, rank: int = 0, world: int = 1, micro: int = 1, short: int = 0) -> None:
        self.rank, self.world, self.micro, self.short = rank, world, micro, short
        self.generator = torch.Generator().manual_seed(5)
        draw = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(N, D, generator=draw)
        self.labels = torch.randint(V, (N,), generator=draw)
        self.labels[: N // 3] = -100

    def __len__(self) -> int:
        return N // GLOBAL * self.micro - self.short

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(N, generator=self.generator)
        batches = [
            part
            for rows in order.split(GLOBAL)
            for part in rows.tensor_split(self.world)[self.rank].tensor_split(self.micro)
        ]
        for rows in batches[: len(self)]:
            yield self.inputs[rows], self.labels[rows]


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, V))


def shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model[0], model):  # type: ignore[index]
        fully_shard(part, mesh=mesh)


def split(model: nn.Module) -> None:
    """Two by two: the head's columns over one dimension, and all of it in shards over the other."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"2": ColwiseParallel(use_local_output=False)})
    fully_shard(model, mesh=mesh["dp"])


def run(kind: str, *, micro: int = 1, rank: int = 0, world: int = 1, **more: Any) -> dict[str, Any]:
    """Three epochs of the student in one process (""), in "ddp" or in "fsdp" with its teacher."""
    student, teacher = net(0), net(1)
    torch.manual_seed(2 + rank)  # the terms' own weights begin as rank 0 has them
    projector = nn.Linear(7, 7)
    average = distill.EMATeacher(student, 0.9)
    sharded = {"fsdp": shard, "2d": split}.get(kind)
    if sharded:
        shard(teacher.requires_grad_(False))
        for model in (student, average.model):
            sharded(model)
    trained = nn.parallel.DistributedDataParallel(student) if kind == "ddp" else student
    terms = [
        distill.hard(),
        distill.soft(0.5),
        distill.feature("1", "1", nn.functional.mse_loss, projector=projector),
    ]
    adam = more.pop("adam", True)
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    loader = more.pop("loader", None) or Rows(rank, world, micro)
    options: dict[str, Any] = {"epochs": 3, "clip_norm": 0.3, "lr": 0.02, "progress": False}
    steps = distill.train(
        trained,
        loader,
        terms,
        teacher=teacher,
        optimizer=None if adam else sgd,
        ema=average,
        accumulate=micro,
        **(options | more),
    )
    if sharded:  # the teacher lies in shards between its calls, the outermost part as well
        assert all(type(p).__name__ == "DTensor" for p in teacher.parameters())
    state = nn.ModuleDict({"s": student, "e": average.model, "p": projector}).state_dict()
    found: dict[str, Any] = {}
    for name, x in state.items():
        if sharded and not name.startswith("p"):
            assert type(x).__name__ == "DTensor"
        found[name] = getattr(x, "full_tensor", lambda x=x: x)().detach().clone()
    return {"state": found, "steps": steps}


def here(kind: str, **more: Any) -> dict[str, Any]:
    return run(kind, rank=dist.get_rank(), world=dist.get_world_size(), **more)


def assert_same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        error = float((found["state"][name] - value).abs().max())
        assert error <= 1e-6, f"{what}: {name} differs by {error:.1e}"
    assert len(found["steps"]) > 0
    for mine, theirs in zip(found["steps"][::-1], expected["steps"][::-1], strict=False):
        assert mine.step == theirs.step and mine.lr == theirs.lr
        assert abs(mine.loss - theirs.loss) <= 1e-5, f"{what}: {mine} {theirs}"


def two(folder: str) -> None:
    steps_of_one_process()
    peers_of_one_process()
    what_is_told(Path(folder))
    what_stops_all()
    checkpoints(Path(folder))


def steps_of_one_process() -> None:
    for adam in (True, False):
        expected = run("", adam=adam)
        for kind in KINDS:
            micro = 1 + ((kind == "ddp") == adam)  # each pair of kind, micro-batches and optimizer
            found = here(kind, micro=micro, adam=adam)
            assert_same(found, expected, f"{kind}, {micro} micro-batches, adam={adam}")


def peers_of_one_process() -> None:
    """A peer that learns, whole on every rank."""
    states = []
    for rank, world in ((0, 1), (dist.get_rank(), dist.get_world_size())):
        student, other = net(0), net(1)
        wrapped = nn.parallel.DistributedDataParallel(student) if world > 1 else student
        terms = [distill.hard(), distill.soft()]
        distill.train(
            wrapped,
            Rows(rank, world),
            terms,
            teacher=distill.PeerTeacher(other, terms, lr=0.02),
            lr=0.02,
            progress=False,
        )
        states.append(nn.ModuleList([student, other]).state_dict())
    for name, value in states[0].items():
        assert (states[1][name] - value).abs().max() <= 1e-6, name


def what_is_told(folder: Path) -> None:
    """By the first rank alone, of all ranks; the best student is that of their mean metric."""
    for kind in KINDS:
        told_of(kind, folder / f"told-{kind}")


def told_of(kind: str, folder: Path) -> None:
    rank = dist.get_rank()
    told: list[tuple[dict[str, float], int]] = []
    drawn: list[Any] = []
    metrics = iter((1.0, 5.0, 3.0) if rank else (1.0, 2.0, 3.9))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "draw", lambda self, total: drawn.append(total))
        found = here(
            kind,
            log=lambda values, step: told.append((values, step)),
            progress=True,
            validate=lambda student: next(metrics),
            checkpoint=folder,
        )
    assert len(drawn) == (0 if rank else 1)
    assert not told if rank else told[0][0]["loss"] == found["steps"][0].loss
    assert rank or [v["metric"] for v, _ in told if "metric" in v] == [1.0, 3.5, 3.45]
    dist.barrier()
    best = net(7)
    said = distill.load(best, folder / "best.safetensors")
    assert said == {"metric": 3.5, "step": 2 * N // GLOBAL}


def what_stops_all() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    with pytest.raises(
        ValueError, match=r"loader: got no more batches on 1 of 2 ranks \(here (o|n)"
    ):
        here("ddp", loader=Rows(rank, world, short=rank))
    bad = Rows(rank, world)
    if rank == 1:
        bad.inputs[:] = torch.nan
    with pytest.raises(FloatingPointError, match="loss: got nan at epoch 0, step 0"):
        here(KINDS[-1], loader=bad)
    if not SHARDS:
        return
    shards = net(0)
    shard(shards)
    with pytest.raises(ValueError, match=r"student: got one in shards.*before fully_shard"):
        distill.EMATeacher(shards)
    with pytest.raises(ValueError, match="weight_noise: got a student of shards"):
        distill.train(shards, Rows(), distill.hard(), weight_noise=0.1, progress=False)


def checkpoints(folder: Path) -> None:
    """Seven steps with one at the sixth, on two ranks; then all of them."""
    for kind in KINDS:

        def stop(epoch: int, step: int, loss: Tensor) -> None:
            if step == 6:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            kept = distill.Checkpoints(folder / kind, every=3, keep=1)
            here(kind, checkpoint=kept, on_step=stop)
        dist.barrier()
        (path,) = kept.files()
        assert path.name == "step-00000006" + (".safetensors" if kind == "ddp" else "")
        if dist.get_rank() == 0:
            for at in range(4):
                os.system(f"cp -r {folder / kind} {folder / kind}-{at}")
        dist.barrier()
        found = here(kind, checkpoint=distill.Checkpoints(folder / f"{kind}-0", resume=True))
        expected = here(kind)
        assert len(found["steps"]) == 6
        for name, value in expected["state"].items():
            assert torch.equal(found["state"][name], value), name


def four(folder: str) -> None:
    """Checkpoints of two ranks, whole and in shards, go on as shards of four."""
    expected = run("")
    for kind in KINDS:
        kept = distill.Checkpoints(Path(folder) / f"{kind}-1", resume=True)
        found = here("fsdp", checkpoint=kept)
        assert len(found["steps"]) == 6
        assert_same(found, expected, f"{kind} on four ranks")
    rank = dist.get_rank() // 2
    kept = distill.Checkpoints(Path(folder) / "2d", every=5)
    assert_same(run("2d", rank=rank, world=2, checkpoint=kept), expected, "two by two")
    told: list[int] = []
    kept = distill.Checkpoints(Path(folder) / "fsdp-0", resume=True)
    loader = Rows(rank, 2)
    found = run("2d", loader=loader, rank=rank, checkpoint=kept, log=lambda _, at: told.append(at))
    assert len(found["steps"]) == 0 and not told  # of a run that was over
    for name, value in expected["state"].items():
        assert (found["state"][name] - value).abs().max() <= 1e-6, name


def test_two_ranks_and_their_checkpoints(tmp_path: Path) -> None:
    ranks.run(2, two, str(tmp_path))
    expected = run("")
    for kind in KINDS:
        for at, micro in ((2, 1), (3, 2)):  # one process, with whole batches and in two of half
            kept = distill.Checkpoints(tmp_path / f"{kind}-{at}", resume=True)
            found = run("", micro=micro, checkpoint=kept)
            assert len(found["steps"]) == 6
            assert_same(found, expected, f"{kind} in one process")
    if not SHARDS:
        pytest.skip(f"fully_shard: torch {torch.__version__} has no {WRITER}; the rest has run")
    ranks.run(4, four, str(tmp_path))


SCRIPT = """
    import sys
    import torch
    from torch import nn
    from fastkd import distill

    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    student = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
    rows = [(torch.randn(4, 5), torch.randint(3, (4,)))] * 10

    def end(epoch, step, loss):
        if step == 3 and torch.distributed.get_rank() == 1:
            raise KeyError("of the second rank")

    distill.train(student, rows, distill.hard(), checkpoint=sys.argv[1], on_step=end)
"""


def test_torchrun_ends_with_the_error_of_a_rank(tmp_path: Path) -> None:
    """And soon: the other waits for it in a step."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    launch = ["--standalone", "--nproc-per-node=2", str(script), str(tmp_path / "kept")]
    ran = ranks.python(
        f"from torch.distributed.run import main; main({launch!r})",
        GLOO_SOCKET_IFNAME="lo",
        PYTHONPATH=str(Path(fastkd.__file__).parents[1]),
    )
    assert ran.returncode != 0
    assert "KeyError: 'of the second rank'" in ran.stderr
    assert ran.stderr.count(" 0/10 [") == 1  # one bar, the first rank's


def dies(folder: str) -> str:
    def end(epoch: int, step: int, loss: Tensor) -> None:
        if step == 7 and dist.get_rank() == 1:
            os._exit(1)

    try:
        here(KINDS[-1], checkpoint=distill.Checkpoints(folder, every=3), on_step=end)
    except RuntimeError as error:
        return str(error)
    return "went on without the dead one"


def goes_on(folder: str) -> None:
    found = here(KINDS[-1], checkpoint=distill.Checkpoints(folder, resume=True))
    assert len(found["steps"]) == 6
    assert_same(found, run(""), "after a death")


def test_a_rank_that_dies_ends_the_run_and_the_last_checkpoint_goes_on(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1: died") as found:
        ranks.run(2, dies, str(tmp_path))
    assert "rank 0" not in str(found.value)
    ranks.run(2, goes_on, str(tmp_path))
