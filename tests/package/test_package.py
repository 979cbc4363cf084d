"""What a user finds: names, signatures, docstrings, versions, the command line."""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from common import NAMED, TABLE, imported_anew, run_python

import fastkd
from fastkd import losses, nn
from fastkd.__main__ import main
from fastkd.backends import reference
from fastkd.engine import dispatch, validate
from fastkd.losses import RowOptions

# keyword-only parameters and their defaults, before **rows
KEYWORDS: dict[str, dict[str, Any]] = {
    **{
        NAMED[entry.name].__name__: {
            **({entry.parameter: entry.default} if entry.parameter else {}),
            "temperature": 1.0,
        }
        for entry in TABLE
        if entry.name in NAMED
    },
    "distillation_loss": {
        "temperature": 2.0,
        "alpha": 0.5,
        "divergence": "kl",
        "label_smoothing": 0.0,
        "t_squared": True,
        "z_loss": 0.0,
        "class_weight": None,
    },
}
PUBLIC = {*KEYWORDS, "__version__", "checked", "divergences", "info", "nn", "use_backend"}
ROW_OPTIONS = {
    "labels",
    "ignore_index",
    "weight",
    "reduction",
    "normalizer",
    "vocab_size",
    "class_dim",
    "inplace",
    "group",
    "return_outputs",
}


def test_public_names() -> None:
    assert set(fastkd.__all__) >= PUBLIC
    assert all(hasattr(fastkd, name) for name in fastkd.__all__)
    assert fastkd.__all__ == sorted(fastkd.__all__)


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", fastkd.__version__)
    assert fastkd.info()["fastkd"] == fastkd.__version__


@pytest.mark.parametrize("name", KEYWORDS)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(fastkd, name)).parameters
    positional = [
        key for key, value in parameters.items() if value.kind is value.POSITIONAL_OR_KEYWORD
    ]
    labels = ["labels"] if name == "distillation_loss" else []
    assert positional == ["student", "teacher", *labels]
    keywords = {
        key: value.default for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY
    }
    assert keywords == KEYWORDS[name]
    assert [key for key, value in parameters.items() if value.kind is value.VAR_KEYWORD] == ["rows"]


def test_row_options() -> None:
    """The places where an option of every loss is named; `group` has no place in a module."""
    assert set(RowOptions.__annotations__) == ROW_OPTIONS, "fastkd/losses.py"
    assert set(dispatch.loss.__kwdefaults__) == ROW_OPTIONS, "fastkd/engine/dispatch.py"
    assert set(validate.OPTIONS) == ROW_OPTIONS, "fastkd/engine/validate.py"
    of_a_module = ROW_OPTIONS - {"labels", "weight", "normalizer", "group"}
    assert set(nn.Options.__annotations__) - {"temperature"} == of_a_module, "fastkd/nn.py"
    for module in (nn.KLDiv(), nn.DistillationLoss()):
        assert of_a_module <= set(module._rows(None, None)), "_rows of fastkd/nn.py"
        assert all(hasattr(module, name) for name in of_a_module), "fastkd/nn.py"
    for name in ROW_OPTIONS:
        assert re.search(f"^    {name} +", losses.__doc__ or "", re.MULTILINE), name
        assert name in re.findall(r"\w+", fastkd.kl_div.__doc__ or ""), name


def test_the_first_page_has_a_row_for_every_loss_and_option() -> None:
    page = (Path(fastkd.__file__).parents[1] / "README.md").read_text()
    rows = " ".join(re.findall(r"^\|.*", page, re.MULTILINE))
    named = {*re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", rows)))}
    assert {*KEYWORDS, *ROW_OPTIONS}.union(*KEYWORDS.values()) <= named


@pytest.mark.parametrize("name", KEYWORDS)
def test_docstring(name: str) -> None:
    text = inspect.getdoc(getattr(fastkd, name)) or ""
    for part in ("Args:", "Returns:", "Raises:", "student", "teacher", "temperature", "T^2"):
        assert part in text, part
    operands = typing.get_args(typing.get_type_hints(getattr(fastkd, name))["teacher"])
    assert all(operand.__name__ in text for operand in operands if operand is not torch.Tensor)
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    assert re.search(r"^    (\S.*)?(sum_v|KL\(|CE\()", text, re.MULTILINE), "no formula"


def test_docstring_names_the_source_of_the_table() -> None:
    for name, public in NAMED.items():
        arxiv = re.search(r"arXiv \S+", fastkd.divergences[name].source)
        assert arxiv is not None and arxiv.group() in (public.__doc__ or ""), name


@pytest.mark.parametrize("name", ["checked", "info", "use_backend"])
def test_other_docstrings(name: str) -> None:
    assert len(inspect.getdoc(getattr(fastkd, name)) or "") > 60


HEAVY = ["triton", "fastkd._C", "fastkd.backends.gpu", "sklearn", "matplotlib"]
SCRIPT = f"""
import runpy, sys
import fastkd
print([m for m in {HEAVY} if m in sys.modules])
sys.argv = ["fastkd", "info", "--json"]
runpy.run_module("fastkd", run_name="__main__")
"""


def test_importing_is_light_and_info_on_the_command_line() -> None:
    """Neither Triton nor the extension is loaded before a loss asks for it."""
    ran = run_python("-c", SCRIPT, FASTKD_BACKEND="reference")
    assert ran.returncode == 0, ran.stderr
    heavy, _, said = ran.stdout.partition("\n")
    assert heavy == "[]"
    facts = json.loads(said)
    assert facts["fastkd"] == fastkd.__version__ and facts["backend"] == "reference"


def test_info() -> None:
    facts = fastkd.info()
    assert {"fastkd", "python", "torch", "triton", "backend", "cpu", "gpu"} <= set(facts)
    assert facts["torch"] == torch.__version__ and facts["backend"] == "auto"
    if facts["cpu"] is not None:
        assert {"isa", "isas", "openmp", "compiler", "threads"} <= set(facts["cpu"])
        assert facts["cpu"]["isa"] in facts["cpu"]["isas"]
        assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert (facts["gpu"] is not None) == torch.cuda.is_available()
    assert json.loads(json.dumps(facts)) == facts


def test_info_knows_the_backend_chosen_by_hand() -> None:
    with fastkd.use_backend("reference"):
        assert fastkd.info()["backend"] == "reference"
    assert fastkd.info()["backend"] == "auto"


def test_info_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for part in ("fastkd", "torch", "backend", "cpu", "gpu"):
        assert re.search(rf"^{part}\s", said, re.MULTILINE), part


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 2 and "nonsense" in capsys.readouterr().err


def test_an_empty_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_BACKEND", "")
    assert imported_anew("fastkd.backends.choice").pick_name(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("version", ["3.2.0", "2.3.1"])
def test_a_triton_that_cannot_launch_the_kernels(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.6 brings one: the losses run on the reference, and say why."""
    triton = pytest.importorskip("triton")
    imported_anew("fastkd.backends.gpu")
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(ImportError, match=rf"{version}, expected 3.3"):
        imported_anew("fastkd.backends.gpu")
    monkeypatch.delitem(sys.modules, "fastkd.backends.gpu", raising=False)
    choice = imported_anew("fastkd.backends.choice")
    with pytest.warns(RuntimeWarning, match=f"{version}.*reference"):
        assert choice._load("gpu") is None
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(choice, "_own", lambda _: "gpu")
        assert choice.pick(torch.device("cpu")) is reference.BACKEND


def test_typed() -> None:
    assert (Path(fastkd.__file__).parent / "py.typed").exists()
