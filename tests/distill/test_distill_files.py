"""Evaluation of a model, and files that appear complete or not at all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainer_runs import Loader, equal, mlp, weights

from fastkd import distill


def test_evaluate_equals_the_definition_over_uneven_batches() -> None:
    model = mlp(dropout=0.9).train()
    inputs, labels = torch.randn(17, 4, 5), torch.randint(0, 3, (17, 4))
    labels[::3, 1] = -100
    got = distill.evaluate(model, zip(inputs.split(5), labels.split(5), strict=True))
    assert model.training
    logits = model.eval()(inputs).double()
    kept = labels != -100
    assert got.rows == kept.sum()
    assert got.accuracy == (logits.argmax(-1) == labels)[kept].double().mean()
    expected = F.cross_entropy(logits[kept], labels[kept]).item()
    assert got.cross_entropy == pytest.approx(expected, rel=1e-6)


def test_agreement_counts_equal_predictions() -> None:
    a, b = mlp(), mlp()
    inputs = torch.randn(1000, 5)
    same = a(inputs).argmax(-1) == b(inputs).argmax(-1)
    assert distill.agreement(a, b, inputs.split(300)) == same.double().mean()
    assert distill.agreement(a, a, [inputs]) == 1.0
    labels = torch.where(same, -100, 0)
    assert distill.agreement(a, b, [(inputs, labels)]) == 0.0
    # a count in bfloat16 would stop at 256
    a, b, inputs = a.bfloat16(), b.bfloat16(), inputs.bfloat16()
    same = a(inputs).argmax(-1) == b(inputs).argmax(-1)
    assert distill.agreement(a, b, [inputs]) == same.double().mean()


def test_evaluation_without_rows_or_labels(loader: Loader) -> None:
    inputs = loader[0][0]
    nothing = [(inputs, torch.full((len(inputs),), -100))]
    for call in (
        lambda: distill.evaluate(mlp(), nothing),
        lambda: distill.agreement(mlp(), mlp(), nothing),
    ):
        with pytest.raises(ValueError, match="only rows labelled -100"):
            call()
    with pytest.raises(ValueError, match="inputs alone"):
        distill.evaluate(mlp(), [inputs])


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, other = mlp().bfloat16(), mlp().bfloat16()
    model[3].weight.data = model[3].weight.data.t().contiguous().t()  # not contiguous
    metadata = {"accuracy": 0.5, "layers": [5, 8, 3], "name": "digits \u00e9"}
    distill.save(model, path, metadata)
    assert distill.load(other, path) == metadata
    assert equal(weights(model), weights(other))
    assert list(tmp_path.iterdir()) == [path]
    distill.save(model, path)
    assert distill.load(other, path) is None


def test_tied_weights_survive(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    distill.save(model, tmp_path / "m.safetensors")
    distill.load(other, tmp_path / "m.safetensors")
    assert equal(weights(model), weights(other)) and other[0].weight is other[1].weight


def test_saved_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    distill.save(mlp(), tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("at", ["safetensors.torch.save_file", "os.fsync", "os.replace"])
def test_crash_in_the_middle_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    distill.save(mlp(), path, "old")
    old = path.read_bytes()

    def crash(*arguments: Any, **_: Any) -> None:
        if at.endswith("save_file"):
            Path(arguments[1]).write_bytes(b"half a fi")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(at, crash)
        with pytest.raises(OSError, match="disk full"):
            distill.save(mlp(), path, "new")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_what_json_or_safetensors_cannot_hold_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> object:
            return object()

        def set_extra_state(self, state: object) -> None:
            pass

    for model, metadata, error in (
        (mlp(), {"loss": math.nan}, ValueError),
        (mlp(), {"model": object()}, TypeError),
        (Odd(2, 2), None, TypeError),
    ):
        with pytest.raises(error):
            distill.save(model, tmp_path / "m.safetensors", metadata)
    assert list(tmp_path.iterdir()) == []


def test_file_of_another_model_leaves_this_one_untouched(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    wider = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4))
    for theirs, name in ((wider, "3.bias"), (nn.Sequential(nn.Linear(5, 8)), "3.bias")):
        distill.save(theirs, path)
        model = mlp()
        before = weights(model)
        with pytest.raises(ValueError, match=rf"'{name}' of shape .* expected \(3,\)"):
            distill.load(model, path)
        assert equal(weights(model), before)
