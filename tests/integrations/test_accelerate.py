"""The trainer under accelerate: the weights of a run without it, in one process and in two."""

from __future__ import annotations

import doctest
import os
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastkd import distill
from fastkd.distill import precision

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


@pytest.fixture(autouse=True)
def no_state_of_another_test() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _models() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 3)


def _data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (16,), generator=draw)
    labels[1:8] = -100
    return torch.randn(16, 5, generator=draw), labels


def _terms(projector: nn.Module) -> list[distill.Term]:
    hint = distill.feature("", "", nn.functional.mse_loss, projector=projector)
    return [distill.hard(), distill.soft(), hint]


def _plain(batch: int, accumulate: int, **options: Any) -> dict[str, Tensor]:
    student, teacher, projector = _models()
    distill.train(
        student,
        DataLoader(TensorDataset(*_data()), batch),
        _terms(projector),
        teacher=teacher,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9),
        epochs=2,
        accumulate=accumulate,
        progress=False,
        **options,
    )
    return nn.ModuleList([student, projector]).state_dict()


def _accelerated(batch: int, options: dict[str, Any], **made: Any) -> dict[str, Tensor]:
    student, teacher, projector = _models()
    accelerator = accelerate.Accelerator(cpu=True, **made)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(*_data()), batch)
    prepared, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    distill.train(
        prepared,
        loader,
        _terms(projector),
        teacher=teacher,
        optimizer=optimizer,
        accelerator=accelerator,
        epochs=2,
        progress=False,
        **options,
    )
    return nn.ModuleList([student, projector]).state_dict()


def _assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_one_process_is_the_trainer_alone(accumulate: int, clip_norm: float | None) -> None:
    """Micro-batches with 1 label and 4: the mean runs over the step's labels, not over batches."""
    expected = _plain(4, accumulate, clip_norm=clip_norm)
    found = _accelerated(4, {"clip_norm": clip_norm}, gradient_accumulation_steps=accumulate)
    _assert_same(found, expected)


def test_what_another_training_left_does_not_matter() -> None:
    """A Trainer that ended within a step leaves all optimizers of accelerate at rest."""
    expected = _plain(4, 1)
    GradientState().sync_gradients = False
    _assert_same(_accelerated(4, {}), expected)


def _rank() -> list[dict[str, Any]]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # of a group that there is already
    found = []
    for accumulate in (1, 2):
        found.append(_accelerated(4 // accumulate, {}, gradient_accumulation_steps=accumulate))
        state = AcceleratorState()
        assert state.num_processes == 2 and state.distributed_type.name == "MULTI_CPU"
    student, _, _ = _models()
    with pytest.raises(ValueError, match=r"one of 2 processes, expected what accelerator\.prepare"):
        accelerator = accelerate.Accelerator(cpu=True)
        distill.train(student, [_data()], distill.hard(), accelerator=accelerator, progress=False)
    # as numbers: the memory of a tensor goes with the process that made it
    return [{name: value.tolist() for name, value in each.items()} for each in found]


def test_two_processes_take_the_steps_of_one() -> None:
    """Each has half of every step, with other numbers of labels; in one micro-batch and in two.

    A student that was not prepared, whose processes would go their own ways, is refused.
    """
    expected = _plain(8, 1)
    for of_rank in ranks.run(2, _rank):
        for found in of_rank:
            _assert_same({name: torch.tensor(x) for name, x in found.items()}, expected)


def test_precision_is_the_accelerators() -> None:
    dtypes = []

    class Teacher(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            dtypes.append(super().forward(x).dtype)
            return super().forward(x)

    student, teacher = nn.Linear(5, 3), Teacher(5, 3)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(student)
    before = student.weight.detach().clone()
    steps = distill.train(
        prepared, [_data()], distill.soft(), teacher=teacher, accelerator=accelerator, lr=0.1
    )
    assert dtypes == [torch.bfloat16] and student.weight.dtype == torch.float32
    assert len(steps) == 1 and not torch.equal(student.weight, before)


def test_the_example_runs() -> None:
    found = doctest.testmod(precision)
    assert found.attempted > 4 and not found.failed


# ---- bad input: before the first step


def _refused(match: str, kind: type[Exception], accelerator: Any, **options: Any) -> None:
    student, teacher, _ = _models()
    before = student.weight.detach().clone()
    with pytest.raises(kind, match=match):
        distill.train(
            student,
            [_data()],
            distill.soft(),
            teacher=teacher,
            accelerator=accelerator,
            progress=False,
            **options,
        )
    assert torch.equal(student.weight, before)


def test_what_is_no_accelerator_is_refused() -> None:
    _refused("accelerator: got object, expected an accelerate.Accelerator", TypeError, object())


def test_amp_beside_an_accelerator_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    _refused("amp: got torch.bfloat16 with an acc", ValueError, accelerator, amp=torch.bfloat16)


@pytest.mark.parametrize("version", ["0.34.2", "2.0.0"])
def test_a_version_out_of_range_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(accelerate, "__version__", version)
    _refused(rf"accelerate: got version {version}, expected 1\.x", RuntimeError, accelerator)


def test_a_kind_of_training_that_splits_the_model_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    kind = accelerate.DistributedType.FSDP
    monkeypatch.setattr(type(accelerator), "distributed_type", kind)
    _refused("accelerator: got distributed type FSDP, expected one of NO", ValueError, accelerator)
