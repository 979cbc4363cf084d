# The extension module, as fastkd/backends/cpu.py calls it. An address is that of a contiguous
# array, or 0 for an argument that is not given. wide: 1 where sums and per-row arrays are float64,
# else 0 (float32).

from collections.abc import Sequence

_Rows = tuple[int, int, int, int, int]  # address, dtype, inner size, outer stride, inner stride
_Spec = tuple[int, float, float, float, float, float, int, int, float]

def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def divergences() -> list[str]: ...
def openmp() -> bool: ...
def compiler() -> str: ...
def math_error_bounds() -> dict[str, float]: ...
def exp2(x: int, y: int, n: int, /) -> None: ...
def log(x: int, y: int, n: int, /) -> None: ...
def fused(
    wide: int,
    rows: int,
    threads: int,
    student: _Rows,
    teacher: _Rows,
    spec: _Spec,
    keep: int,
    label: int,
    scale: int,
    factor: float,
    grad: _Rows,
    width: int,
    out: int,
    outputs: int,
    /,
) -> None: ...
def topk(
    wide: int,
    rows: int,
    threads: int,
    student: _Rows,
    teacher: tuple[int, int, int, int, bool],  # logprobs, indices, tail, k, restricted
    centre: float,
    spec: _Spec,
    keep: int,
    label: int,
    scale: int,
    factor: float,
    grad: _Rows,
    width: int,
    out: int,
    outputs: int,
    /,
) -> None: ...
def validate_topk(
    wide: int,
    rows: int,
    k: int,
    logprobs: int,
    indices: int,
    keep: int,
    vocab: int,
    /,
) -> tuple[int, int, int]: ...
def stats(
    wide: int,
    rows: int,
    threads: int,
    x: _Rows,
    temperature: float,
    vocab: int,
    keep: int,
    out: int,
    /,
) -> None: ...
def loss(
    wide: int,
    rows: int,
    threads: int,
    student: _Rows,
    teacher: _Rows,
    spec: _Spec,
    stats_s: int,
    stats_t: int,
    keep: int,
    out: int,
    /,
) -> None: ...
def grad(
    wide: int,
    rows: int,
    threads: int,
    student: _Rows,
    teacher: _Rows,
    spec: _Spec,
    stats_s: int,
    stats_t: int,
    stats_hard: int,
    pairs: int,
    keep: int,
    label: int,
    scale: int,
    factor: float,
    out: _Rows,
    width: int,
    /,
) -> None: ...

_StepRows = tuple[int, int, int, int, int]  # first row, rows, what is sent, sums, rates

most_columns: int

def step_bytes(vocab: int, kept: bool, /) -> int: ...
def scratch(bytes: int, /) -> int: ...
def vocab_parallel_step(
    number: int,
    place: tuple[int, int, int, int],  # ranks, rank, threads, rows of the whole call
    student: _Rows,
    teacher: _Rows,
    spec: _Spec,
    keep: int,
    label: int,
    scale: int,
    factor: float,
    grad: _Rows,
    width: int,
    out: int,
    redo: int,
    memory: int,
    some: _StepRows,
    others: _StepRows,
    /,
) -> None: ...
def fused_total(
    wide: int,
    rows: int,
    threads: int,
    student: _Rows,
    teacher: _Rows,
    spec: _Spec,
    keep: int,
    label: int,
    scale: int,
    factor: float,
    grad: _Rows,
    width: int,
    out: int,
    outputs: int,
    upstream: float,
    /,
) -> None: ...
def count_labels(
    n: int, label: int, ignore_index: int, vocab: int, keep: int, /
) -> tuple[int, int]: ...
def row_scale(wide: int, n: int, keep: int, weight: int, mean: bool, scale: int, /) -> None: ...
def weighted_sum(wide: int, loss: int, scale: int, factor: float, n: int, out: int, /) -> None: ...
def multiply(grad: _Rows, rows: int, width: int, threads: int, wide: int, by: int, /) -> None: ...
def bernoulli(
    wide: int,
    n: int,
    threads: int,
    sides: tuple[int, int, int, int, int, int],
    ignored: Sequence[int],
    weight: tuple[int, int, int],
    pos_weight: tuple[int, int, int],
    spec: tuple[int, float, float, float, float, float],
    upstream: int,
    grad_s: int,
    grad_t: int,
    values: int,
    /,
) -> float: ...
def count_elements(
    wide: int,
    n: int,
    threads: int,
    sides: tuple[int, int, int, int, int, int],
    ignored: Sequence[int],
    weight: tuple[int, int, int],
    /,
) -> float: ...
def transpose(
    a: int, b: int, c: int, bytes: int, threads: int, source: int, to: int, /
) -> None: ...
