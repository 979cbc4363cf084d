"""The nn.Module twins: the functions' numbers, and a repr that says what is computed."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from common import Backend, logits

import fastkd

TWINS: dict[str, tuple[type[torch.nn.Module], Any, dict[str, Any], str]] = {
    "kl": (fastkd.nn.KLDiv, fastkd.kl_div, {"temperature": 2.0}, "KL(p || q), T=2"),
    "reverse_kl": (fastkd.nn.ReverseKLDiv, fastkd.reverse_kl_div, {}, "KL(q || p), T=1"),
    "js": (
        fastkd.nn.JSDiv,
        fastkd.js_div,
        {"beta": 0.25},
        "0.25 KL(p || m) + 0.75 KL(q || m), m = 0.25 p + 0.75 q",
    ),
    "skew_kl": (
        fastkd.nn.SkewKLDiv,
        fastkd.skew_kl_div,
        {"alpha": 0.2},
        "KL(p || 0.2 p + 0.8 q)",
    ),
    "skew_reverse_kl": (
        fastkd.nn.SkewReverseKLDiv,
        fastkd.skew_reverse_kl_div,
        {"alpha": 0.2},
        "KL(q || 0.8 p + 0.2 q)",
    ),
    "tv": (fastkd.nn.TVDistance, fastkd.tv_distance, {}, "1/2 sum |p - q|"),
    "acceptance": (
        fastkd.nn.AcceptanceLoss,
        fastkd.acceptance_loss,
        {},
        "-log sum min(p, q)",
    ),
    "distillation": (
        fastkd.nn.DistillationLoss,
        fastkd.distillation_loss,
        {
            "alpha": 0.3,
            "temperature": 4.0,
            "label_smoothing": 0.1,
            "z_loss": 0.01,
            "divergence": fastkd.divergences.js(beta=0.2),
        },
        "0.3 CE(label_smoothing=0.1) + 0.7 T^2 js(beta=0.2)(p, q) + 0.01 lse^2, T=4",
    ),
}
each_twin = pytest.mark.parametrize(
    ("twin", "function", "options", "says"), TWINS.values(), ids=TWINS.keys()
)
Twin = type[torch.nn.Module]


def test_every_divergence_has_a_module() -> None:
    assert set(TWINS) == {*fastkd.divergences, "distillation"}


@each_twin
def test_twin_is_the_function(
    backend: Backend, twin: Twin, function: Any, options: dict[str, Any], says: str
) -> None:
    student, teacher = logits(backend, 4, 12)
    labels = torch.tensor([1, 7, 3, 0], device=backend.device)
    weight = torch.rand(4, device=backend.device)
    rows = {"ignore_index": 7, "vocab_size": 9}
    for reduction in ("mean", "none"):
        module = twin(**options, **rows, reduction=reduction)
        calls = [{"weight": weight}]
        if reduction == "mean":
            calls.append({"normalizer": 3.0})
        for given in calls:
            ours = module(student, teacher, labels, **given)
            direct = function(
                student, teacher, labels=labels, **options, **rows, reduction=reduction, **given
            )
            assert torch.equal(ours, direct)


@each_twin
def test_repr_is_the_active_formula(
    twin: Twin, function: Any, options: dict[str, Any], says: str
) -> None:
    text = repr(twin(**options, reduction="sum", vocab_size=9, ignore_index=0, inplace=True))
    assert text.startswith(f"{twin.__name__}({says}")
    for part in ("reduction='sum'", "vocab_size=9", "ignore_index=0", "inplace=True"):
        assert part in text


@each_twin
def test_defaults_are_the_functions(
    twin: Twin, function: Any, options: dict[str, Any], says: str
) -> None:
    module = twin()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name != "divergence":
            ours = getattr(module, name, module.divergence.param)
            assert ours == parameter.default, name
    rows = {"ignore_index": -100, "reduction": "mean", "vocab_size": None, "inplace": False}
    assert {name: getattr(module, name) for name in rows} == rows


@each_twin
def test_unknown_options(twin: Twin, function: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match="tempreature"):
        twin(tempreature=2.0)
    with pytest.raises(TypeError):
        twin(2.0)  # no positional options
    with pytest.raises(ValueError, match=r"reduction: got 'avg'.*batchmean"):
        twin(reduction="avg")
    with pytest.raises(ValueError, match=r"temperature: got 0\.0"):
        twin(temperature=0.0)


def test_parameters_out_of_range() -> None:
    for make, name in (
        (lambda: fastkd.nn.JSDiv(beta=1.0), "beta"),
        (lambda: fastkd.nn.SkewKLDiv(alpha=0.0), "alpha"),
        (lambda: fastkd.nn.SkewReverseKLDiv(alpha=-1.0), "alpha"),
        (lambda: fastkd.nn.DistillationLoss(alpha=2.0), "alpha"),
        (lambda: fastkd.nn.DistillationLoss(label_smoothing=-0.1), "label_smoothing"),
        (lambda: fastkd.nn.DistillationLoss(divergence="nonsense"), "divergence"),
    ):
        with pytest.raises(ValueError, match=f"{name}: got"):
            make()


@pytest.mark.parametrize("divergence", [3, None, len], ids=repr)
def test_divergence_of_the_wrong_type(divergence: object) -> None:
    """At the constructor, where the mistake is, not at the first batch."""
    with pytest.raises(TypeError, match="divergence: got"):
        fastkd.nn.DistillationLoss(divergence=divergence)


def test_repr_without_t_squared() -> None:
    assert "0.5 CE + 0.5 kl(p, q), T=2" in repr(fastkd.nn.DistillationLoss(t_squared=False))


def test_modules_have_no_state_and_train() -> None:
    module = fastkd.nn.DistillationLoss()
    assert not list(module.parameters()) and not module.state_dict()
    student = torch.nn.Linear(4, 9)
    loss = module(student(torch.randn(3, 4)), torch.randn(3, 9), torch.tensor([1, 2, 3]))
    loss.backward()
    assert student.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("twin", "function", "name"),
    [
        (fastkd.nn.JSDiv, fastkd.js_div, "beta"),
        (fastkd.nn.SkewKLDiv, fastkd.skew_kl_div, "alpha"),
        (fastkd.nn.SkewReverseKLDiv, fastkd.skew_reverse_kl_div, "alpha"),
        (fastkd.nn.DistillationLoss, fastkd.distillation_loss, "alpha"),
    ],
)
def test_a_parameter_that_a_schedule_sets(twin: Any, function: Any, name: str) -> None:
    """As temperature is; in one module of two, and in its copies."""
    torch.manual_seed(0)
    rows = (torch.randn(3, 9), torch.randn(3, 9), torch.tensor([1, 2, 3]))
    labels = {"labels": rows[2]}
    other, module = twin(**{name: 0.3}), twin(**{name: 0.3})
    setattr(module, name, 0.7)
    for one, value in ((module, 0.7), (copy.deepcopy(module), 0.7), (other, 0.3)):
        assert getattr(one, name) == value and f"{value:g}" in repr(one)
        assert torch.equal(one(*rows), function(*rows[:2], **labels, **{name: value}))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for value in (0.7, 0.4):
        setattr(module, name, value)
        want = function(*rows[:2], **labels, **{name: value})
        torch.testing.assert_close(compiled(*rows), want)


@pytest.mark.parametrize("name", ["beta", "alpha"])
def test_a_parameter_set_out_of_range(name: str) -> None:
    module = fastkd.nn.JSDiv() if name == "beta" else fastkd.nn.SkewKLDiv()
    with pytest.raises(ValueError, match=rf"^{name}: got 1\.5"):
        setattr(module, name, 1.5)


@each_twin
def test_faults_at_the_constructor(
    twin: Twin, function: Any, options: dict[str, Any], says: str
) -> None:
    """Where the mistake is, not at the first batch."""
    for rows, error, says in (
        ({"ignore_index": "x"}, TypeError, "ignore_index: got str"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: got"),
        ({"vocab_size": 3.0}, TypeError, "vocab_size: got float"),
        ({"vocab_size": 0}, ValueError, "vocab_size: got 0, expected at least 1"),
    ):
        with pytest.raises(error, match=says):
            twin(**rows)


def test_unknown_options_name_the_module_and_what_is_near() -> None:
    with pytest.raises(TypeError, match=r"^JSDiv\(\) .*'bta', has beta, .*mean 'beta'\?$"):
        fastkd.nn.JSDiv(bta=0.3)
    with pytest.raises(TypeError, match=r"^KLDiv\(\) .*'alpha', has temperature, ignore_index"):
        fastkd.nn.KLDiv(alpha=0.3)


@pytest.mark.parametrize(
    ("loss", "option", "owner"),
    [
        (fastkd.kl_div, "class_weight", "distillation_loss"),
        (fastkd.js_div, "label_smoothing", "distillation_loss"),
        (fastkd.binary_kl_div, "alpha", "binary_distillation_loss"),
        (lambda *_, **options: fastkd.nn.KLDiv(**options), "z_loss", "distillation_loss"),
    ],
)
def test_an_option_of_another_loss_is_sent_there(loss: Any, option: str, owner: str) -> None:
    x = torch.zeros(2, 5)
    with pytest.raises(TypeError, match=rf"'{option}', has .*; it belongs to fastkd\.{owner}$"):
        loss(x, x + 1, **{option: 0.5})
