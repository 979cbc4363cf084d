# What fastkd/backends/cpu.py calls; an address is that of a contiguous array, 0 for one that is not
# given.
# wide: 1 if sums and per-row arrays are float64, else float32.

_Rows = tuple[int, int, int, int, int]  # address, dtype, inner size, outer stride, inner stride
_Spec = tuple[int, float, float, float, float, float, int, int]

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
    /,
) -> None: ...
def admit(
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
    slope: int,
    keep: int,
    label: int,
    scale: int,
    factor: float,
    out: _Rows,
    width: int,
    /,
) -> None: ...

_Turn = tuple[int, int, int, int, int]  # first row, rows, what is sent, sums, rates

most_columns: int

def slot(vocab: int, kept: bool, /) -> int: ...
def scratch(bytes: int, /) -> int: ...
def stage(
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
    some: _Turn,
    others: _Turn,
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
    /,
) -> None: ...
def count(n: int, label: int, ignore_index: int, vocab: int, keep: int, /) -> tuple[int, int]: ...
def weigh(wide: int, n: int, keep: int, weight: int, mean: bool, scale: int, /) -> None: ...
def total(wide: int, loss: int, scale: int, factor: float, n: int, out: int, /) -> None: ...
def multiply(grad: _Rows, rows: int, width: int, threads: int, wide: int, by: int, /) -> None: ...
