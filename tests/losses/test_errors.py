"""Bad input: the exception, and a message with the argument, what came, what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from common import NAMED, TABLE, Backend, imported_anew
from torch import Tensor

import fastkd

NAN, INF = float("nan"), float("inf")
N, V = 4, 9


def _s(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape or (N, V), **options)


class Bad:
    """Arguments that replace good ones, the exception, and what its message has to contain."""

    def __init__(self, error: type[Exception], says: list[str], **arguments: Any) -> None:
        self.error, self.says, self.arguments = error, says, arguments


LABELS = torch.tensor([0, 1, 2, 3])

# for every loss
ROWS = {
    "student-not-a-tensor": Bad(TypeError, ["student", "list", "tensor"], student=[1.0]),
    "teacher-not-a-tensor": Bad(TypeError, ["teacher", "None", "tensor"], teacher=None),
    "student-integers": Bad(
        TypeError, ["student", "torch.int64", "float32"], student=torch.ones(N, V).long()
    ),
    "teacher-integers": Bad(
        TypeError, ["teacher", "torch.int32", "float32"], teacher=torch.ones(N, V).int()
    ),
    "student-bool": Bad(TypeError, ["student", "torch.bool"], student=torch.ones(N, V).bool()),
    "student-complex": Bad(
        TypeError, ["student", "complex64"], student=torch.ones(N, V, dtype=torch.complex64)
    ),
    "teacher-float8": Bad(
        TypeError, ["teacher", "float8"], teacher=torch.ones(N, V).to(torch.float8_e4m3fn)
    ),
    "student-sparse": Bad(
        TypeError, ["student", "sparse", "dense"], student=torch.eye(N, V).to_sparse()
    ),
    "student-0-d": Bad(ValueError, ["student", "[]", "V >= 1"], student=torch.tensor(1.0)),
    "no-columns": Bad(ValueError, ["student", "[4, 0]", "V >= 1"], student=_s(N, 0)),
    "teacher-no-columns": Bad(ValueError, ["teacher", "[4, 0]", "V >= 1"], teacher=_s(N, 0)),
    "fewer-rows": Bad(ValueError, ["teacher", "[3, 9]", "[4, 9]"], teacher=_s(3, V)),
    "one-row-is-not-broadcast": Bad(ValueError, ["teacher", "[1, 9]", "[4, 9]"], teacher=_s(1, V)),
    "other-leading-dimensions": Bad(
        ValueError, ["teacher", "[2, 2, 9]", "[4, 9]"], teacher=_s(2, 2, V)
    ),
    "other-vocabulary": Bad(
        ValueError, ["teacher", "8 columns", "student's 9", "vocab_size"], teacher=_s(N, 8)
    ),
    "student-strided-columns": Bad(
        ValueError, ["student", "stride 4", "expected 1", "contiguous"], student=_s(V, N).t()
    ),
    "teacher-strided-columns": Bad(
        ValueError, ["teacher", "stride 2", "expected 1"], teacher=_s(N, 2 * V)[:, ::2]
    ),
    "teacher-expanded-columns": Bad(
        ValueError, ["teacher", "stride 0", "expected 1"], teacher=_s(N, 1).expand(N, V)
    ),
    "other-device": Bad(ValueError, ["teacher", "meta", "cpu"], teacher=_s(N, V, device="meta")),
    "temperature-zero": Bad(ValueError, ["temperature", "0", "positive"], temperature=0.0),
    "temperature-negative": Bad(ValueError, ["temperature", "-1", "positive"], temperature=-1),
    "temperature-nan": Bad(ValueError, ["temperature", "nan", "finite"], temperature=NAN),
    "temperature-inf": Bad(ValueError, ["temperature", "inf", "finite"], temperature=INF),
    "temperature-text": Bad(TypeError, ["temperature", "'2'", "number"], temperature="2"),
    "temperature-bool": Bad(TypeError, ["temperature", "True", "number"], temperature=True),
    "temperature-tensor": Bad(
        TypeError, ["temperature", "tensor", "number"], temperature=torch.tensor(2.0)
    ),
    "reduction": Bad(
        ValueError, ["reduction", "'avg'", "mean", "batchmean", "sum", "none"], reduction="avg"
    ),
    "reduction-none": Bad(ValueError, ["reduction", "None", "mean"], reduction=None),
    "unknown-option": Bad(TypeError, ["weigth", "did you mean 'weight'"], weigth=LABELS),
    "labels-not-a-tensor": Bad(TypeError, ["labels", "list", "integers"], labels=[1, 2, 3, 4]),
    "labels-floats": Bad(TypeError, ["labels", "float32", "integers"], labels=LABELS.float()),
    "labels-bool": Bad(TypeError, ["labels", "torch.bool", "integers"], labels=LABELS.bool()),
    "labels-shape": Bad(ValueError, ["labels", "[3]", "[4]"], labels=LABELS[:3]),
    "labels-one-hot": Bad(
        ValueError, ["labels", "[4, 9]", "[4]"], labels=torch.zeros(N, V, dtype=torch.int64)
    ),
    "labels-device": Bad(ValueError, ["labels", "meta", "cpu"], labels=LABELS.to("meta")),
    "label-too-large": Bad(ValueError, ["labels", "9", "< 9", "-100"], labels=LABELS + 6),
    "label-negative": Bad(ValueError, ["labels", "-1", "0 <=", "-100"], labels=LABELS - 1),
    "label-beyond-vocab-size": Bad(
        ValueError, ["labels", "3 in row 3", "< 3"], labels=LABELS, vocab_size=3
    ),
    "ignore-index-float": Bad(
        TypeError, ["ignore_index", "1.5", "integer"], labels=LABELS, ignore_index=1.5
    ),
    "ignore-index-none": Bad(
        TypeError, ["ignore_index", "None", "integer"], labels=LABELS, ignore_index=None
    ),
    "weight-not-a-tensor": Bad(TypeError, ["weight", "float 2.0", "floats"], weight=2.0),
    "weight-integers": Bad(TypeError, ["weight", "int64", "floats"], weight=LABELS),
    "weight-shape": Bad(ValueError, ["weight", "[9]", "[4]"], weight=torch.ones(V)),
    "weight-device": Bad(
        ValueError, ["weight", "meta", "cpu"], weight=torch.ones(N, device="meta")
    ),
    "normalizer-with-sum": Bad(
        ValueError, ["normalizer", "'sum'", "mean"], normalizer=3, reduction="sum"
    ),
    "normalizer-negative": Bad(ValueError, ["normalizer", "-1", ">= 0"], normalizer=-1),
    "normalizer-nan": Bad(ValueError, ["normalizer", "nan", "finite"], normalizer=NAN),
    "normalizer-text": Bad(TypeError, ["normalizer", "'3'", "number"], normalizer="3"),
    "normalizer-vector": Bad(ValueError, ["normalizer", "[4]", "0-d"], normalizer=torch.ones(N)),
    "vocab-size-zero": Bad(ValueError, ["vocab_size", "0", "1 <="], vocab_size=0),
    "vocab-size-too-large": Bad(ValueError, ["vocab_size", "10", "<= 9"], vocab_size=10),
    "vocab-size-beyond-the-teacher": Bad(
        ValueError, ["vocab_size", "9", "<= 8", "teacher 8"], vocab_size=9, teacher=_s(N, 8)
    ),
    "vocab-size-float": Bad(TypeError, ["vocab_size", "8.0", "integer"], vocab_size=8.0),
    "vocab-size-bool": Bad(TypeError, ["vocab_size", "True", "integer"], vocab_size=True),
    "group": Bad(RuntimeError, ["group", "init_process_group"], group=object()),
}

# for distillation_loss
DISTILLATION = {
    "unknown-divergence": Bad(
        ValueError, ["divergence", "'nonsense'", "kl", "js", "tv"], divergence="nonsense"
    ),
    "divergence-not-an-entry": Bad(
        TypeError, ["divergence", "function", "name", "entry"], divergence=len
    ),
    "alpha-too-large": Bad(ValueError, ["alpha", "1.5", "0 to 1"], alpha=1.5),
    "alpha-negative": Bad(ValueError, ["alpha", "-0.1", "0 to 1"], alpha=-0.1),
    "alpha-nan": Bad(ValueError, ["alpha", "nan", "0 to 1"], alpha=NAN),
    "alpha-text": Bad(TypeError, ["alpha", "'1'", "number"], alpha="1"),
    "no-labels": Bad(ValueError, ["labels", "None", "alpha=0.5", "alpha=0"], labels=None),
    "label-smoothing": Bad(ValueError, ["label_smoothing", "2.0", "0 to 1"], label_smoothing=2.0),
    "z-loss": Bad(ValueError, ["z_loss", "-1.0", "0 or more"], z_loss=-1.0),
    "z-loss-nan": Bad(ValueError, ["z_loss", "nan", "0 or more"], z_loss=NAN),
    "z-loss-inf": Bad(ValueError, ["z_loss", "inf", "finite"], z_loss=float("inf")),
    "z-loss-text": Bad(TypeError, ["z_loss", "'1'", "number"], z_loss="1"),
    "label-smoothing-bool": Bad(
        TypeError, ["label_smoothing", "True", "number"], label_smoothing=True
    ),
}

PARAMETERS = {
    (entry.name, value): entry.parameter
    for entry in TABLE
    if entry.parameter
    for value in (0.0, 1.0, 0, 1, -0.5, 1.5, NAN)
}


def _refused(call: Callable[[], object], error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    for part in says:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("bad", ROWS.values(), ids=ROWS.keys())
def test_refused(backend: Backend, bad: Bad) -> None:
    if backend.device.type != "cpu":
        pytest.skip("the cases are CPU tensors; checks do not depend on the device")
    arguments = {"student": _s().requires_grad_(), "teacher": _s(), **bad.arguments}
    operands = [
        x for x in arguments.values() if isinstance(x, Tensor) and x.layout == torch.strided
    ]
    before = [x.detach().clone() for x in operands if x.device.type == "cpu"]
    _refused(lambda: fastkd.kl_div(**arguments), bad.error, bad.says)
    after = [x for x in operands if x.device.type == "cpu"]
    assert all(_same(x, y) for x, y in zip(before, after, strict=True))


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(
        x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x,
        y.view(torch.uint8) if y.dtype == torch.float8_e4m3fn else y,
    )


@pytest.mark.parametrize("bad", ROWS.values(), ids=ROWS.keys())
def test_refused_by_every_loss(bad: Bad) -> None:
    arguments = {"student": _s(), "teacher": _s(), **bad.arguments}
    for loss in NAMED.values():
        _refused(partial(loss, **arguments), bad.error, bad.says)


@pytest.mark.parametrize("bad", {**ROWS, **DISTILLATION}.values(), ids={**ROWS, **DISTILLATION})
def test_refused_by_distillation_loss(bad: Bad) -> None:
    arguments = {"student": _s(), "teacher": _s(), "labels": LABELS, **bad.arguments}
    _refused(lambda: fastkd.distillation_loss(**arguments), bad.error, bad.says)


@pytest.mark.parametrize(("name", "value"), PARAMETERS, ids=str)
def test_parameter_out_of_range(name: str, value: float) -> None:
    parameter = str(PARAMETERS[name, value])
    says = [parameter, repr(value), "strictly between 0 and 1"]
    given = {parameter: value}
    _refused(lambda: NAMED[name](_s(), _s(), **given), ValueError, says)
    _refused(lambda: fastkd.divergences[name](**given), ValueError, says)


@pytest.mark.parametrize("value", ["0.5", None, True, torch.tensor(0.5)], ids=repr)
def test_parameter_of_the_wrong_type(value: object) -> None:
    _refused(
        lambda: fastkd.divergences.js(beta=value), TypeError, ["beta", "strictly between 0 and 1"]
    )


def test_parameter_of_another_divergence() -> None:
    _refused(lambda: fastkd.divergences.js(alpha=0.5), TypeError, ["js", "'alpha'", "'beta'"])
    _refused(lambda: fastkd.divergences.kl(beta=0.5), TypeError, ["kl", "'beta'", "none"])


def test_unknown_name_in_the_table() -> None:
    _refused(lambda: fastkd.divergences["jsd"], ValueError, ["'jsd'", "kl", "tv"])
    _refused(lambda: fastkd.divergences.jsd, AttributeError, ["'jsd'", "kl", "tv"])


@pytest.mark.parametrize("wrong", [9, 30, -1])
def test_labels_out_of_range_are_named_with_their_row(backend: Backend, wrong: int) -> None:
    student, teacher = _s().to(backend.device), _s().to(backend.device)
    labels = torch.tensor([1, 2, -100, wrong], device=backend.device)
    message = rf"{wrong} in row 3.*0 <= label < 9"
    for loss in (fastkd.kl_div, fastkd.distillation_loss):
        with fastkd.checked(), pytest.raises(ValueError, match=message):
            loss(student, teacher, labels=labels)


def test_nothing_is_written_before_a_refusal(kernels: Backend) -> None:
    """inplace and a label out of range: the logits are as they were."""
    computed = _s().to(kernels.device).requires_grad_() * 1
    before = computed.detach().clone()
    labels = torch.tensor([1, 2, 3, 30], device=kernels.device)
    with fastkd.checked(), pytest.raises(ValueError, match="labels"):
        fastkd.kl_div(computed, _s().to(kernels.device), labels=labels, inplace=True)
    assert torch.equal(computed, before) and computed._version == 0


# ---- inplace


def test_inplace_on_a_leaf(backend: Backend) -> None:
    leaf, teacher = (_s().to(backend.device) for _ in range(2))
    leaf.requires_grad_()
    for student, of in ((leaf, teacher), (leaf[:, :5], teacher[:, :5])):
        with pytest.raises(ValueError, match=r"inplace.*leaf that requires grad.*expected"):
            fastkd.kl_div(student, of, inplace=True)


def test_inplace_on_rows_that_share_memory(backend: Backend) -> None:
    row = _s(1, V).to(backend.device).requires_grad_() * 1
    with pytest.raises(ValueError, match=r"inplace.*share memory.*\[4, 9\]"):
        fastkd.kl_div(row.expand(N, V), _s().to(backend.device), inplace=True)


def test_inplace_on_rows_that_overlap(backend: Backend) -> None:
    x = _s(40).to(backend.device).requires_grad_() * 1
    with pytest.raises(ValueError, match=r"inplace.*share memory"):
        fastkd.kl_div(x.as_strided((N, V), (5, 1)), _s().to(backend.device), inplace=True)


def test_inplace_over_the_teacher(backend: Backend) -> None:
    x = _s(N + 1, V).to(backend.device).requires_grad_() * 1
    with pytest.raises(ValueError, match=r"inplace.*student and teacher overlap"):
        fastkd.kl_div(x[:-1], x[1:].detach(), inplace=True)


# ---- backends


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"use_backend.*'cuda'.*reference, cpu, gpu"):
        fastkd.use_backend("cuda").__enter__()


def test_unknown_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"FASTKD_BACKEND.*'fast'.*reference, cpu, gpu"):
        imported_anew("fastkd.backends.choice")


def test_gpu_backend_on_cpu_tensors_without_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("fastkd.engine.dispatch._known", {})  # read once in a process
    with fastkd.use_backend("gpu"), pytest.raises(RuntimeError, match=r"'gpu'.*cpu.*interpreter"):
        fastkd.kl_div(_s(), _s())


def test_use_backend_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), fastkd.use_backend("reference"):
        raise KeyError
    assert fastkd.info()["backend"] == "auto"


def test_messages_of_options_list_what_there_is() -> None:
    with pytest.raises(TypeError) as caught:
        fastkd.kl_div(_s(), _s(), reductoin="sum")
    assert re.search(r"kl_div\(\).*'reductoin'.*did you mean 'reduction'", str(caught.value))


def test_fake_tensors_are_refused_where_nobody_traces() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, head = torch.randn(3, 4), fastkd.LinearLogits(torch.randn(3, 4), torch.randn(4, 4))
        stored = fastkd.TopK(torch.randn(3, 2), torch.zeros(3, 2, dtype=torch.int64))
        for student, teacher, name in (
            (x, x, "student"),
            (head, x, "student"),
            (head, stored, "student"),
        ):
            with pytest.raises(TypeError, match=f"{name}: got a FakeTensor"):
                fastkd.kl_div(student, teacher)


class Loss(torch.nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.kl_div(student, teacher)


def test_torch_export_traces_the_losses() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    exported = torch.export.export(Loss(), (x, y), strict=False)
    assert exported.module()(x, y) == Loss()(x, y)


@pytest.mark.parametrize("wrong, right", [("temprature", "temperature"), ("alhpa", "alpha")])
def test_an_unknown_option_is_compared_with_the_losss_own_too(wrong: str, right: str) -> None:
    s, t = torch.randn(2, 3, 5)
    with pytest.raises(TypeError, match=f"did you mean '{right}'"):
        fastkd.distillation_loss(s, t, torch.zeros(3).long(), **{wrong: 0.5})
    with pytest.raises(TypeError, match=f"did you mean '{right}'"):
        fastkd.skew_kl_div(s, t, **{wrong: 0.5})
