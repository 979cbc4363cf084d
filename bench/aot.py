"""Compiles every Triton kernel ahead of time, with no GPU, and reads what came out.

`python -m bench.aot` prints a line per kernel, divergence, dtype and target, and fails (exit
status 1) where a kernel spills registers, still calls a function, or reads or writes an aligned row
by less than 16 bytes at a time. Counts are of the machine code inside the loops that read rows,
per column: one number per sweep.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bf16", "fp32")
KERNELS = ("fused", "sparse", "loss", "grad", "stats", "total", "multiply")
NAMED = 64  # columns of a stored teacher
ROWS, VOCAB, SHORT = 8192, 128256, (512, 2048)
SHOWN = (
    *("kernel", "divergence", "dtype", "target", "vocab", "registers", "spills", "shared"),
    *("bytes", "calls", "special", "instructions"),
)


@dataclass
class Case:
    kernel: str
    divergence: str
    dtype: str
    target: str
    vocab: int = VOCAB
    hard: bool = True


@dataclass
class Report(Case):
    registers: int = 0
    spills: int = 0  # local-memory instructions (CUDA), spilled registers (HIP)
    shared: int = 0
    bytes: int = 0  # the narrowest access to a row inside a loop
    narrow: int = 0  # accesses below 16 bytes outside the loops: one per scalar, none per tile
    calls: int = 0
    special: list[float] = field(default_factory=list)  # exp, log, reciprocal units per column
    instructions: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Loops(NamedTuple):
    inside: list[list[str]]  # the instructions of each innermost loop
    outside: list[str]


def cases(quick: bool, targets: list[str], divergences: list[str], dtypes: list[str]) -> list[Case]:
    """Everything, or (quick) each kernel, divergence, dtype and target at least once."""
    per_divergence = [(k, d) for k in KERNELS[:4] for d in divergences]
    plain = [(k, "-") for k in KERNELS[4:]]
    if quick:
        picked = per_divergence + plain + [("fused", divergences[0])] * len(targets)
        return [
            Case(k, d, dtypes[i // len(targets) % len(dtypes)], targets[i % len(targets)])
            for i, (k, d) in enumerate(picked)
        ]
    out = [Case(k, d, t, a) for a in targets for t in dtypes for k, d in per_divergence + plain]
    for target in targets:
        for dtype in dtypes:
            out += [Case("fused", d, dtype, target, hard=False) for d in divergences]
            out += [Case("fused", divergences[0], dtype, target, v) for v in SHORT]
    return out


def recorded(case: Case) -> tuple[Any, dict[str, Any], int]:
    """(kernel, arguments, threads) as the launcher would start it, on tensors without memory."""
    import torch

    from fastkd.backend import Plan, Sparse
    from fastkd.divergence import divergences
    from fastkd.gpu import launch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(case.dtype)
    dtype = dtype or torch.float64
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(*shape: int, dtype: torch.dtype = acc) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = tensor(1, ROWS, case.vocab, dtype=dtype)
    keep, label = tensor(ROWS, dtype=torch.bool), tensor(ROWS, dtype=torch.int64)
    stats, scale, hard = tensor(ROWS, 3), tensor(ROWS), 0.5 if case.hard else 0.0
    name = case.divergence if case.divergence != "-" else next(iter(divergences))
    plan = Plan(name, divergences[name].param, 2.0, 0.5, hard, hard / 5, case.vocab, case.vocab)
    seen: list[tuple[Any, dict[str, Any], int]] = []

    def record(
        kernel: Any, programs: int, args: dict[str, Any], threads: int, device: torch.device
    ) -> None:
        seen.append((kernel, args, threads))

    card = launch.Card(case.target, 32 if case.target.startswith("sm_") else 64)
    with mock.patch.multiple(launch, launch=record, card=lambda device: card):
        if case.kernel == "fused":
            launch.fused(x, x, plan, keep, label, scale, 1.0, x)
        elif case.kernel == "sparse":
            shape = (ROWS, NAMED)
            kept = Sparse(tensor(*shape), tensor(*shape, dtype=torch.int64), tensor(ROWS), False)
            launch.sparse(x, kept, plan, keep, label, scale, 1.0, x)
        elif case.kernel == "loss":
            launch.loss(x, x, stats, stats, plan, keep)
        elif case.kernel == "grad":
            rest = (plan, keep, label, scale, 1.0, x)
            launch.grad(x, x, stats, stats, stats, scale, *rest)
        elif case.kernel == "stats":
            launch.stats(x, 2.0, case.vocab, keep)
        elif case.kernel == "total":
            launch.total(scale, scale, 1.0)
        else:
            launch.multiply(x, tensor())
    return seen[0]


def compile_one(case: Case) -> Report:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastkd.gpu.launch import PINNED

    pointers = {
        **{torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"},
        **{torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"},
    }
    kernel, args, threads = recorded(case)
    signature, constants, attrs = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value, special = args[param.name], not param.do_not_specialize
        if (
            param.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and special)
        ):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = pointers[value.dtype]
        elif isinstance(value, float):
            signature[param.name] = param.annotation_type or "fp32"
        else:
            signature[param.name] = "i32" if abs(value) < 1 << 31 else "i64"
        if not isinstance(value, float) and (
            isinstance(value, torch.Tensor) or (value % 16 == 0 and special)
        ):
            attrs[(i,)] = [["tt.divisibility", 16]]
    cuda = case.target.startswith("sm_")
    if cuda:
        target = GPUTarget("cuda", int(case.target[3:]), 32)
    else:
        target = GPUTarget("hip", case.target, 64)
    ctas = args.get("num_ctas", 1)
    warps = max(1, threads // target.warp_size)
    options = {"num_warps": warps, "num_ctas": ctas, **PINNED}
    source = ASTSource(kernel, signature, constants, attrs)
    out = triton.compile(source, target=target, options=options)
    report = Report(**asdict(case), shared=out.metadata.shared)
    columns = args["LANES"] * args["GROUP"] if "LANES" in args else args["BLOCK"]
    read = read_cuda if cuda else read_hip
    read(report, out.asm, columns / (warps * ctas * target.warp_size))
    judge(report, sum(value.startswith("*") for value in signature.values()))
    return report


def loops(lines: Iterable[str], label: str, branch: str) -> Loops:
    """The innermost loops (a branch back to a label above) and everything else."""
    code: list[str] = []
    at: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in lines:
        if match := re.match(label, line):
            at[match[1]] = len(code)
        elif text := line.split("//")[0].strip():
            code.append(text)
            if (match := re.search(branch, line)) and match[1] in at:
                spans.append((at[match[1]], len(code)))
    inner = [(a, b) for a, b in spans if b - a > 1 and not any(a <= c and d < b for c, d in spans)]
    covered = {i for a, b in inner for i in range(a, b)}
    return Loops([code[a:b] for a, b in inner], [x for i, x in enumerate(code) if i not in covered])


def count(report: Report, found: Loops, load: str, special: str, columns: float) -> None:
    for body in found.inside:
        if any(re.search(load, line) for line in body):
            hits = sum(bool(re.search(special, line)) for line in body)
            report.special.append(round(hits / columns, 2))
            report.instructions.append(round(len(body) / columns, 1))


def widths(report: Report, found: Loops, access: str, width: Any) -> None:
    loops = [[width(m) for x in body if (m := re.search(access, x))] for body in found.inside]
    if report.kernel == "sparse":  # whose named columns are gathered, one by one
        loops = [sizes for sizes in loops if max(sizes, default=0) >= 16]
    inside = [size for sizes in loops for size in sizes]
    outside = [width(m) for line in found.outside if (m := re.search(access, line))]
    report.bytes = min(inside, default=0)
    report.narrow = sum(size < 16 for size in outside)


def read_cuda(report: Report, asm: dict[str, Any], columns: float) -> None:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage, sass = (
            subprocess.run([*tool, cubin], check=True, capture_output=True, text=True).stdout
            for tool in ((tools / "cuobjdump", "-res-usage"), (tools / "nvdisasm", "-c"))
        )
    ptx = [line for line in asm["ptx"].splitlines() if not line.startswith(("\t.loc", "$L__tmp"))]
    in_ptx = loops(ptx, r"(\$L__BB\w+):", r"@\S+\s+bra\S*\s+(\$L__BB\w+)")
    in_sass = loops(sass.splitlines(), r"(\.L_x_\d+):", r"BRA.*`\((\.L_x_\d+)\)")
    match = re.search(r"REG:(\d+)", usage)
    assert match, f"cuobjdump printed no register count: {usage}"
    report.registers = int(match[1])
    report.spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    # not subroutines: a CALL to the kernel's own label is how ptxas leaves a loop on sm_80, and
    # one to shflsync how it shuffles in a branch that it cannot prove uniform
    report.calls = len(re.findall(r"\bCALL\b(?!.*(?:`\(\.L_x_|_cuda_sm70_shflsync))", sass))
    report.calls += len(re.findall(r"\n\s*call\b", asm["ptx"]))
    widths(
        report,
        in_ptx,
        r"\b(?:ld|st)\.global\S*?((?:\.v\d)?)\.[busf](\d+)\b",
        lambda m: int(m[1][2:] or 1) * int(m[2]) // 8,
    )
    loads = r"\bLDG\S*\.128\b" if report.kernel == "sparse" else r"\bLDG\b"
    count(report, in_sass, loads, r"\bMUFU\b", columns)


def read_hip(report: Report, asm: dict[str, Any], columns: float) -> None:
    text = asm["amdgcn"]
    plain = [x.split(";")[0] for x in text.splitlines() if not re.match(r"\s+\.|\.Ltmp|\s*;", x)]
    found = loops(plain, r"(\.LBB\w+):", r"s_cbranch\w*\s+(\.LBB\w+)")

    def note(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        assert match, f"the assembly has no {key}"
        return int(match[1])

    report.registers = note("vgpr_count")
    # scalar registers spill into lanes of a vector register, not into memory
    report.spills = note("vgpr_spill_count")
    report.calls = len(re.findall(r"\bs_swappc", text))
    sizes = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4}
    widths(
        report,
        found,
        r"\b(?:global|buffer|flat)_(?:load|store)_(u?byte|u?short|dword)(?:x(\d))?",
        lambda m: sizes[m[1]] * int(m[2] or 1),
    )
    loads = r"\b(?:global|buffer)_load"
    loads += "_dwordx4" if report.kernel == "sparse" else ""
    count(report, found, loads, r"\bv_(?:exp|log|rcp)_", columns)


def judge(report: Report, pointers: int) -> None:
    if report.spills:
        report.problems.append(f"spills: {report.spills}")
    if report.calls:
        report.problems.append(f"calls: {report.calls}")
    if report.bytes < 16:
        report.problems.append(f"an access of {report.bytes} bytes in a loop over an aligned row")
    if report.narrow > 2 * pointers:
        report.problems.append(f"{report.narrow} narrow accesses for {pointers} pointers")
    if not report.instructions:
        report.problems.append("no loop that reads a row was found")


def run(todo: list[Case], workers: int) -> Iterator[Report]:
    if workers == 1:
        yield from map(compile_one, todo)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(compile_one, todo)


def row(values: Iterable[Any]) -> str:
    texts = ("/".join(map(str, v)) if isinstance(v, list) else str(v) for v in values)
    sizes = (8, 15, 5, 6, 6, 9, 6, 6, 5, 5, 15)
    return " ".join(f"{text:<{size}}" for text, size in zip(texts, (*sizes, 0), strict=True))


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.aot: TRITON_INTERPRET=1 is set, under which nothing compiles; unset it")
        return 2
    from fastkd.divergence import divergences

    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--divergences", default=",".join(divergences))
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of bf16, fp16, fp32, fp64")
    parser.add_argument("--quick", action="store_true", help="each of everything once")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    given = parser.parse_args()
    lists = (given.targets.split(","), given.divergences.split(","), given.dtypes.split(","))
    todo = cases(given.quick, *lists)
    started, reports = time.time(), []
    print(row(SHOWN))
    for report in run(todo, given.workers):
        reports.append(report)
        print(row(getattr(report, name) for name in SHOWN), *report.problems, flush=True)
        print(
            f"{len(reports)}/{len(todo)} {time.time() - started:.0f} s", end="\r", file=sys.stderr
        )
    bad = [report for report in reports if report.problems]
    print(f"{len(reports)} compiled in {time.time() - started:.0f} s, {len(bad)} with problems")
    if given.json:
        Path(given.json).write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
