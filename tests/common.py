"""The inputs, the shapes, the plain torch formulas and the one tolerance rule of all tests."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd.divergence import Divergence

INF = math.inf


class Backend(NamedTuple):
    """A backend in force and the device of its tensors."""

    name: str
    device: torch.device


def require(name: str) -> None:
    """Skips the test where the backend cannot run; fails it where the run promised the backend."""
    if name == "gpu":
        pytest.importorskip("triton")
    if name == "cpu":
        try:
            importlib.import_module("fastkd._C")
        except ImportError:
            if os.environ.get("FASTKD_REQUIRE_CPU") == "1":
                raise
            pytest.skip("the C++ extension is not built")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter that imports the package under test."""
    root = str(Path(fastkd.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": root, **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def imported_anew(name: str) -> Any:
    """The module as a process with this environment would import it, beside the one in use."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def unreadable() -> Iterator[None]:
    """Tensors made within have no values: to read one, for which a GPU would wait, is an error."""
    with FakeTensorMode(), fastkd.use_backend("reference"):
        yield


# ---- dtypes, divergences, shapes, inputs: the axes of the tests

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
PAIRS = {
    **{name: (dtype, dtype) for name, dtype in DTYPES.items()},
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "fp16-bf16": (torch.float16, torch.bfloat16),
    "fp64-fp32": (torch.float64, torch.float32),
    "fp16-fp64": (torch.float16, torch.float64),
}


def label_of(divergence: Divergence) -> str:
    """Its id in a test: "kl", "js(0.5)"."""
    return f"{divergence.name}({divergence.param:g})" if divergence.parameter else divergence.name


TABLE = [fastkd.divergences[name] for name in fastkd.divergences]
# every entry with its default, and a second parameter on the other side of 1/2
DIVERGENCES = TABLE + [entry(**{entry.parameter: 0.8}) for entry in TABLE if entry.parameter]
# the public function of each entry, by the entry's name: "kl" has kl_div
NAMED = {
    name: getattr(fastkd, public)
    for name in fastkd.divergences
    for public in fastkd.__all__
    if re.fullmatch(f"{name}_(div|distance|loss)", public)
}
# those whose loss and gradient are exactly 0 where both sides are equal
EXACT = ("kl", "reverse_kl", "tv", "acceptance")
# those whose slope jumps where p = q
KINKED = ("tv", "acceptance")

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=label_of)
each_name = pytest.mark.parametrize("divergence", TABLE, ids=lambda entry: entry.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())


class Shape(NamedTuple):
    """Rows, columns, and why this shape is in the table."""

    rows: int
    vocab: int
    reason: str


SHAPES = [
    Shape(3, 1, "one-column"),
    Shape(4, 5, "less-than-a-vector"),
    Shape(3, 17, "one-over-a-vector"),
    Shape(5, 1000, "many-vectors-and-a-tail"),
    Shape(2, 2047, "block-minus-one"),
    Shape(2, 2048, "one-block"),
    Shape(2, 2049, "block-plus-one"),
    Shape(33, 257, "more-rows-than-threads"),
    Shape(2, 32_000, "a-real-vocabulary"),
]
INTERPRETED = {"less-than-a-vector", "one-over-a-vector", "block-plus-one"}

each_shape = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(
            shape,
            id=f"{shape.rows}x{shape.vocab}-{shape.reason}",
            marks=() if shape.reason in INTERPRETED else pytest.mark.not_interpreted,
        )
        for shape in SHAPES
    ],
)


def _random(n: int, v: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(n, v), 3 * torch.randn(n, v)


def _peaked(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Nearly all mass on one column: the same one on both sides in even rows, another in odd."""
    s, t = _random(n, v)
    row = torch.arange(n)
    s[row, row % v] += 40
    t[row, (row + row % 2) % v] += 40
    return s, t


def _equal(n: int, v: int) -> tuple[Tensor, Tensor]:
    s, _ = _random(n, v)
    return s, s.clone()


def _disjoint(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Each side's mass where the other's underflows to 0."""
    s, t = _random(n, v)
    s[:, : v // 2] -= 200
    t[:, v // 2 :] -= 200
    return s, t


def _large(n: int, v: int) -> tuple[Tensor, Tensor]:
    return 2e4 * torch.rand(n, v) - 1e4, 2e4 * torch.rand(n, v) - 1e4


def _offset(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Ordinary differences far from 0, on either side of it."""
    s, t = _random(n, v)
    return s + 1e4, t - 1e4


def _one_token(n: int, v: int) -> tuple[Tensor, Tensor]:
    """A one-hot teacher: -inf everywhere but in one column."""
    s, t = _random(n, v)
    hot = F.one_hot(torch.arange(n) % v, v).bool()
    return s, t.masked_fill(~hot, -INF)


def _ties(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Few different values, the largest one many times."""
    return torch.randint(-2, 3, (n, v)).float(), torch.randint(-2, 3, (n, v)).float()


def _minus_inf(n: int, v: int) -> tuple[Tensor, Tensor]:
    """A third of the columns impossible on both sides, as under a mask of the vocabulary."""
    s, t = _random(n, v)
    dead = torch.rand(n, v) < 1 / 3
    dead[:, 0] = False
    return s.masked_fill(dead, -INF), t.masked_fill(dead, -INF)


INPUTS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "random": _random,
    "peaked": _peaked,
    "equal": _equal,
    "disjoint": _disjoint,
    "large": _large,
    "offset": _offset,
    "one-token": _one_token,
    "ties": _ties,
    "minus-inf": _minus_inf,
}

# ---- operands: logits that are given, and logits that are never built

# The hidden states of a linear form are the logits and its weight is the identity: such a product
# is exact, and the gradient of the hidden states is that of the logits. So a test's body, its
# oracle and its tolerance hold as they are. Infinities do not go through a product (0 * inf).
FORMS = {
    "dense": (False, False),
    "linear-student": (True, False),
    "linear-teacher": (False, True),
    "linear": (True, True),
}
FORM_CHUNK = 2  # rows, so that a test's few rows are several chunks

each_form = pytest.mark.parametrize("form", FORMS)
REDUCTIONS = ["mean", "batchmean", "sum", "none"]
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

# What a linear form adds does not depend on the rest, so it runs few of a test's cases. Infinities
# do not go through a product at all.
FORM_PAIRS = [PAIRS[name] for name in ("fp32", "bf16", "bf16-fp32")]
FORM_DTYPES = [DTYPES[name] for name in ("fp32", "bf16")]
FORM_INPUTS = [INPUTS[name] for name in ("random", "equal", "large")]
FORM_DIVERGENCES = [fastkd.divergences[name] for name in ("kl", "js")]
FORM_REDUCTIONS = ["mean", "none"]  # one number, or one of each row
FORM_AXES: dict[str, list[Any]] = {
    "pair": FORM_PAIRS,
    "make": FORM_INPUTS,
    "dtype": FORM_DTYPES,
    "divergence": FORM_DIVERGENCES,
    "reduction": FORM_REDUCTIONS,
}


def runs_in_its_form(arguments: dict[str, Any], sampled: bool = True) -> bool:
    """Whether a case of a test, of these arguments, is run: all that are dense."""
    if arguments.get("form", "dense") == "dense":
        return True
    given = {name: value for name, value in arguments.items() if name in FORM_AXES}
    if given.get("make") not in INPUTS.values():  # another test's own
        given.pop("make", None)
    always = ("pair", "make")
    return all(given[name] in FORM_AXES[name] for name in given if sampled or name in always)


def in_form(student: Tensor, teacher: Tensor, form: str) -> tuple[Any, Any]:
    """The operands as the form has them."""
    pair = zip((student, teacher), FORMS[form], strict=True)
    return tuple(_linear(x) if linear else x for x, linear in pair)


def _linear(x: Tensor) -> fastkd.LinearLogits:
    weight = torch.eye(x.size(-1), dtype=x.dtype, device=x.device)
    return fastkd.LinearLogits(x, weight, chunk_size=FORM_CHUNK)


each_input = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())


def some_labels(backend: Backend, n: int, v: int, ignored: float = 0.0) -> Tensor:
    """Labels [n], of which about a share of `ignored` is -100."""
    labels = torch.randint(v, (n,), device=backend.device)
    return labels.masked_fill(torch.rand(n, device=backend.device) < ignored, -100)


def logits(
    backend: Backend,
    n: int,
    v: int,
    pair: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    make: Callable[[int, int], tuple[Tensor, Tensor]] = _random,
) -> tuple[Tensor, Tensor]:
    """Student and teacher [n, v] on the backend's device, rounded to their dtypes."""
    s, t = make(n, v)
    return s.to(backend.device, pair[0]), t.to(backend.device, pair[1])
