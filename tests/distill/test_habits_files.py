"""Files and students of wrapped models: bare names, whatever stood around the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastkd import distill

DDP = nn.parallel.DistributedDataParallel
compiled: Any = lambda model: torch.compile(model, backend="eager")  # noqa: E731


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def part_compiled(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(compiled(model[0]), *model[1:])


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda model: model,
    "DataParallel": nn.DataParallel,
    "compile": compiled,
    "DDP": DDP,
    "compiled DDP": lambda model: compiled(DDP(model)),
    "DDP of compiled": lambda model: DDP(compiled(model)),
    "compiled part": part_compiled,
    "DDP of compiled part": lambda model: DDP(part_compiled(model)),
}


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch._dynamo.reset()  # code compiled in another test does not see this one's taps
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def same(a: nn.Module, b: nn.Module) -> None:
    x = torch.randn(5, 4)
    torch.testing.assert_close(a(x), b(x))


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_files_have_bare_names(name: str, tmp_path: Path) -> None:
    """Which is all that a file says of the wrapper: any other takes it."""
    path, model = tmp_path / "student.safetensors", net()
    distill.save(WRAPPERS[name](model), path, {"epoch": 3})
    assert set(load_file(path)) == set(net().state_dict())
    following = [*WRAPPERS, *WRAPPERS][[*WRAPPERS].index(name) + 1]
    for into in (name, following):
        other = net()
        assert distill.load(WRAPPERS[into](other), path) == {"epoch": 3}
        same(model, other)


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_files_with_the_names_of_a_wrapper(name: str, tmp_path: Path) -> None:
    path, model, other = tmp_path / "student.safetensors", net(), net()
    save_file(WRAPPERS[name](model).state_dict(), path)
    distill.load(other, path)
    same(model, other)


@pytest.mark.parametrize("prefix", ["model", "architecture", "a.b"])
def test_a_foreign_prefix_is_named(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    state = net().state_dict()
    save_file({f"{prefix}.{name}": x for name, x in state.items()}, path)
    with pytest.raises(ValueError, match=f"file's names begin with '{prefix}.'"):
        distill.load(net(), path)
    save_file(state, path)
    outer = nn.Sequential()
    outer.add_module("architecture", net())
    with pytest.raises(ValueError, match=r"model's names begin with 'architecture\.'"):
        distill.load(outer, path)


def test_a_wrapped_run_saves_in_validate(tmp_path: Path) -> None:
    path, model, other = tmp_path / "student.safetensors", net(), net()

    def validate(student: nn.Module) -> float:
        distill.save(student, path)
        return 0.0

    batch = torch.randn(8, 4), torch.randint(3, (8,))
    options: dict[str, Any] = {"validate": validate, "progress": False}
    distill.train(DDP(model), [batch], distill.hard(), **options)
    distill.load(other, path)
    same(model, other)


@pytest.mark.parametrize("into", ["bare", "compile", "compiled part"])
@pytest.mark.parametrize("name", ["bare", "compile", "compiled part", "DDP of compiled part"])
def test_a_run_has_bare_names(name: str, into: str, tmp_path: Path) -> None:
    """The best student's file and a checkpoint fit the model however it is wrapped later."""
    torch.manual_seed(0)
    start, teacher, other = net(), net(), net()
    batch, up = (torch.randn(8, 4), torch.randint(3, (8,))), torch.randn(3, 6)

    def run(model: nn.Module, wrap: Any, folder: str, epochs: int) -> distill.EMATeacher:
        average = distill.EMATeacher(model)
        peer = distill.PeerTeacher(wrap(copy.deepcopy(start)), distill.hard())
        learnt = wrap(copy.deepcopy(start[2]))
        term = distill.Term(
            "learnt", lambda s, *_: learnt(s.raw @ up).square().mean(), module=learnt
        )
        distill.train(
            model,
            [batch],
            [distill.soft(), term],
            teacher=[wrap(copy.deepcopy(teacher)), peer],
            epochs=epochs,
            ema=average,
            validate=lambda _: 1.0,
            checkpoint=distill.Checkpoints(tmp_path / folder, resume=True),
            progress=False,
        )
        return average

    first = WRAPPERS[name](copy.deepcopy(start))
    run(first, WRAPPERS[name] if name == "compile" else lambda model: model, "cut", 1)
    best = tmp_path / "cut" / "best.safetensors"
    assert set(load_file(best)) == set(start.state_dict())
    distill.load(WRAPPERS[into](other), best)
    same(other, first)
    again = WRAPPERS[into](copy.deepcopy(start))
    average = run(again, lambda model: model, "cut", 2)
    whole = copy.deepcopy(start)
    same(average.model, run(whole, lambda model: model, "whole", 2).model)
    same(again, whole)


def test_a_teacher_with_a_compiled_part_is_the_same_teacher(tmp_path: Path) -> None:
    student, teacher, batch = net(), net(), (torch.randn(8, 4), torch.randint(3, (8,)))
    for epochs, model in enumerate((teacher, part_compiled(teacher), compiled(teacher)), 1):
        folder = distill.Checkpoints(tmp_path, resume=True)
        options: dict[str, Any] = {"epochs": epochs, "checkpoint": folder, "progress": False}
        assert len(distill.train(student, [batch], distill.soft(), teacher=model, **options)) == 1


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_students_of_wrapped_teachers(name: str, tmp_path: Path) -> None:
    model, wrap = net(), WRAPPERS[name]
    want = distill.prune(model, keep=0.5)
    same(distill.prune(wrap(copy.deepcopy(model)), keep=0.5), want)
    other = net()
    distill.copy_layers(wrap(other), wrap(model), {"0": "0", "2": "2"})
    same(model, other)
    x = torch.randn(4, 4)
    paths = distill.export(wrap(model), x, tmp_path / "over", formats=["safetensors"])
    distill.load(other, paths["safetensors"])
    average = distill.EMATeacher(wrap(model))
    same(average.model, model)
    with distill.freeze(wrap(model), ["0"]):
        assert not model[0].weight.requires_grad
    term = distill.feature("0", "0", distill.features.hint)
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    steps = distill.train(
        wrap(net()), [batch], [distill.hard(), term], teacher=wrap(model), progress=False
    )
    assert steps[0].loss > 0


@pytest.mark.parametrize("name", ["bare", "DataParallel", "compile", "compiled part"])
def test_the_head_of_a_wrapped_model(name: str) -> None:
    model = WRAPPERS[name](net())
    assert distill.replace_head(model, "2", 5) is model
    assert model(torch.randn(2, 4)).shape == (2, 5)
    distill.replace_head(model, "0", 6)
    assert model(torch.randn(2, 4)).shape == (2, 5)


@pytest.mark.parametrize("name", ["DDP", "compiled DDP", "DDP of compiled"])
def test_a_head_that_ddp_would_not_see_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="got DistributedDataParallel"):
        distill.replace_head(WRAPPERS[name](net()), "2", 5)


def test_shards_are_saved_whole(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    path, model, other, third = tmp_path / "s.safetensors", net(), net(), net()
    x = torch.randn(3, 4)
    want: Tensor = model(x)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    distill.save(model, path)
    distill.load(other, path)
    torch.testing.assert_close(other(x), want)
    fully_shard(third, mesh=mesh)
    distill.load(third, path)
    torch.testing.assert_close(third(x), want)


def test_a_quantised_model_is_refused_by_name(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, torch.qint8)
    with pytest.raises(TypeError, match="model: got "):
        distill.save(model, tmp_path / "s.safetensors")
