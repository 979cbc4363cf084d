"""Checkpoints: a run that was interrupted ends in the bits of one that was not."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, nn
from trainer_runs import Data, Stop, a_run, equal, mlp, quiet, seed_all, weights

from fastkd import distill
from fastkd.distill import Term
from fastkd.distill.checkpoint import pack, unpack

STEPS = 9  # 22 samples in 6 batches, two to a step, three epochs


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Tensor], list[distill.Step]]:
    return a_run(None)


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("stop_at", range(STEPS))
def test_run_that_was_interrupted_ends_in_the_same_bits(
    stop_at: int, every: int, tmp_path: Path, whole: Any
) -> None:
    expected, steps = whole
    with pytest.raises(Stop):
        a_run(distill.Checkpoints(tmp_path, every=every), stop_at)
    # with other weights and random numbers than those of the checkpoint, where there is one
    seed = 6 if stop_at >= every else 5
    got, after = a_run(distill.Checkpoints(tmp_path, every=every, resume=True), seed=seed)
    assert equal(got, expected)
    assert after == steps[len(steps) - len(after) :]
    # the step at which it stopped had not reached its own checkpoint
    assert len(after) == STEPS - stop_at // every * every


def test_resume_with_an_order_from_the_global_generator(tmp_path: Path) -> None:
    expected, _ = a_run(None, own_generator=False)
    with pytest.raises(Stop):
        a_run(distill.Checkpoints(tmp_path, every=2), 5, own_generator=False)
    points = distill.Checkpoints(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"loader.*0 random generators, expected 1"):
        a_run(points)
    got, _ = a_run(points, seed=6, own_generator=False)
    assert equal(got, expected)


def test_resume_with_workers(tmp_path: Path) -> None:
    """They draw batches ahead of their use, and random numbers of their own."""

    def run(stop_at: int | None, **options: Any) -> dict[str, Tensor]:
        seed_all(3)
        student = mlp(dropout=0.3)
        loader = torch.utils.data.DataLoader(Data(), batch_size=4, shuffle=True, num_workers=2)

        def on_step(epoch: int, step: int, loss: Tensor) -> None:
            if step == stop_at:
                raise Stop

        with contextlib.suppress(Stop):
            quiet(student, loader, distill.hard(), epochs=2, on_step=on_step, **options)
        return weights(student)

    expected = run(None)
    run(8, checkpoint=distill.Checkpoints(tmp_path, every=4))
    assert equal(run(None, checkpoint=distill.Checkpoints(tmp_path, resume=True)), expected)


def test_run_can_be_made_longer(tmp_path: Path) -> None:
    expected, steps = a_run(None, epochs=4)
    a_run(distill.Checkpoints(tmp_path), epochs=2)
    got, after = a_run(distill.Checkpoints(tmp_path, resume=True), epochs=4, seed=6)
    assert equal(got, expected) and after == steps[6:]
    got, after = a_run(distill.Checkpoints(tmp_path, resume=True), epochs=4, seed=6)
    assert equal(got, expected) and after == []


def test_checkpoints_beyond_keep_go_and_the_best_stays(tmp_path: Path, loader: Any) -> None:
    student = mlp()
    metrics = iter([0.1, 0.9, 0.4])
    at: list[dict[str, Tensor]] = []

    def validate(model: nn.Module) -> float:
        at.append(weights(model))
        return next(metrics)

    told: list[tuple[dict[str, float], int]] = []
    quiet(
        student,
        loader,
        distill.hard(),
        epochs=3,
        validate=validate,
        checkpoint=distill.Checkpoints(tmp_path, every=4, keep=3),
        log=lambda values, step: told.append((values, step)),
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.safetensors", *(f"step-{n:08d}.safetensors" for n in (12, 16, 18))]
    best = mlp()
    assert distill.load(best, tmp_path / "best.safetensors") == {"metric": 0.9, "step": 12}
    assert equal(weights(best), at[1])
    assert [(v["metric"], s) for v, s in told if "metric" in v] == [(0.1, 5), (0.9, 11), (0.4, 17)]
    assert [s for v, s in told if "loss" in v] == list(range(18))


def test_folder_with_a_checkpoint_needs_resume(tmp_path: Path, loader: Any) -> None:
    quiet(mlp(), loader, distill.hard(), checkpoint=tmp_path)
    cure = re.escape(f"distill.Checkpoints({str(tmp_path)!r}, resume=True)")
    with pytest.raises(ValueError, match=rf"which has step-00000006.*expected {cure} to go on"):
        quiet(mlp(), loader, distill.hard(), checkpoint=tmp_path)


def another_model(loader: Any, **options: Any) -> Any:
    return quiet(mlp(9), loader, distill.hard(), **options)


def another_loss(loader: Any, **options: Any) -> Any:
    return quiet(mlp(), loader, Term("mine", lambda s, t, b: s.logits.mean()), **options)


def another_teacher(loader: Any, **options: Any) -> Any:
    return quiet(mlp(), loader, distill.hard(), teacher=mlp(), **options)


def another_optimizer(loader: Any, **options: Any) -> Any:
    student = mlp()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return quiet(student, loader, distill.hard(), optimizer=optimizer, **options)


def fewer_parameters(loader: Any, **options: Any) -> Any:
    student = mlp()
    optimizer = torch.optim.AdamW(student[3].parameters(), lr=0.1)
    return quiet(student, loader, distill.hard(), optimizer=optimizer, **options)


def an_average(loader: Any, **options: Any) -> Any:
    student = mlp()
    return quiet(student, loader, distill.hard(), ema=distill.EMATeacher(student), **options)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (another_model, r"the student's '0.bias' of shape \(8,\), expected \(9,\)"),
        (another_loss, r"terms \['hard'\], expected \['mine'\]"),
        (another_teacher, r"teacher None, expected \['Sequential', '\w+'\.\.\. \(64 long\)\]$"),
        (another_optimizer, "optimizer 'AdamW', expected 'SGD'"),
        (fewer_parameters, r"\[4\] parameters in the optimizer's groups, expected \[2\]"),
        (an_average, "no average of the student"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    tmp_path: Path, loader: Any, run: Callable[..., Any], message: str
) -> None:
    quiet(mlp(), loader, distill.hard(), checkpoint=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        run(loader, checkpoint=distill.Checkpoints(tmp_path, resume=True), epochs=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_teacher_made_anew_is_another_one(tmp_path: Path, loader: Any) -> None:
    another_teacher(loader, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"with teacher \['Sequential', .*drawn anew is another"):
        another_teacher(loader, checkpoint=distill.Checkpoints(tmp_path, resume=True))


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, whole: Any) -> None:
    expected, _ = whole
    with pytest.raises(Stop):
        a_run(distill.Checkpoints(tmp_path, every=2), 6)
    newest = distill.Checkpoints(tmp_path).files()[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"{newest.name} cannot be read"):
        got, after = a_run(distill.Checkpoints(tmp_path, resume=True), seed=6)
    assert equal(got, expected) and len(after) == STEPS - 4


def killed(folder: str) -> None:
    """A run that ends by SIGKILL once half of the second file is written."""
    import safetensors.torch

    real, written = safetensors.torch.save_file, []

    def save_file(state: Any, path: Any, metadata: Any) -> None:
        written.append(path)
        real(state, path, metadata=metadata)
        if len(written) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = save_file
    six_steps(folder)


def six_steps(folder: str) -> list[distill.Step]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = [(torch.randn(8, 5), torch.randint(0, 3, (8,))) for _ in range(6)]
    points = distill.Checkpoints(folder, every=2, resume=True)
    return distill.train(nn.Linear(5, 3), data, distill.hard(), checkpoint=points, progress=False)


def test_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    run = ranks.context().Process(target=killed, args=(str(tmp_path),))
    run.start()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert [p.name for p in distill.Checkpoints(tmp_path).files()] == ["step-00000002.safetensors"]
    after = six_steps(str(tmp_path))
    assert (after[0].step, len(after)) == (2, 4)
    assert not list(tmp_path.glob(".*.tmp")), "what the killed run left is cleaned up"


def test_pack_round_trip() -> None:
    tree = {"a/b": torch.ones(2), "a": {"b": torch.zeros(1)}, 3: (1, [None, True, 1e-300, "x"])}
    tensors: dict[str, Tensor] = {}
    back = unpack(pack(tree, tensors), tensors)
    assert back["a/b"].sum() == 2 and back["a"]["b"].sum() == 0 and back[3] == tree[3]
    with pytest.raises(TypeError, match="got object at '/x'"):
        pack({"x": object()}, {})
