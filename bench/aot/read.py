"""Compiling one case, and reading what came out: registers, spills, calls, accesses, counts."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.aot.build import build
from bench.aot.cases import ODD, Case, recorded


@dataclass
class TileLoop:
    """A loop that reads rows, per column."""

    special: float  # exp, log, reciprocal units
    instructions: float
    writes: bool


@dataclass
class Report(Case):
    registers: int | None = 0  # None: decided on the device
    threads: int = 0
    spills: int | None = 0  # local-memory instructions (CUDA), spilled registers (HIP)
    shared: int = 0
    bytes: int = 0  # the narrowest access to a row inside a loop
    narrow: int = 0  # accesses below 16 bytes outside the loops: one per scalar, none per tile
    calls: int = 0
    loops: list[TileLoop] = field(default_factory=list)
    pointers: int = 0
    rows: bool = True  # whether it is the rows' columns that it loops over
    share: float | None = None  # of the floor, at most, by the counts: see `budget`
    problems: list[str] = field(default_factory=list)

    @property
    def special(self) -> list[float]:
        return [loop.special for loop in self.loops]

    @property
    def instructions(self) -> list[float]:
        return [loop.instructions for loop in self.loops]


class Loops(NamedTuple):
    inside: list[list[str]]  # the instructions of each innermost loop
    outside: list[str]


def compile_one(case: Case) -> Report:
    import torch

    launch = recorded(case)
    assert launch is not None, f"{case.divergence} does without {case.kernel}"
    const, built = launch.constants, build(launch, case.target)
    report = Report(
        **asdict(case),
        shared=built.shared,
        threads=launch.threads,
        pointers=sum(isinstance(value, torch.Tensor) for value in built.values.values()),
        rows="LANES" in const or "BLOCK" in const,
    )
    columns = const["LANES"] * const["GROUP"] if "LANES" in const else const.get("BLOCK", 1)
    read = {"sm": read_cuda, "gf": read_hip, "xp": read_xpu}[case.target[:2]]
    read(report, built.asm, columns / (built.warps * built.warp))
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


def count(
    report: Report, found: Loops, load: str, store: str, special: str, columns: float
) -> None:
    for body in found.inside:
        if any(re.search(load, line) for line in body):
            hits = sum(bool(re.search(special, line)) for line in body)
            writes = any(re.search(store, line) for line in body)
            loop = TileLoop(round(hits / columns, 2), round(len(body) / columns, 1), writes)
            report.loops.append(loop)


def gathers(report: Report) -> bool:
    """Whether only its wide loads are of whole rows; where no load is wide nobody can tell."""
    return report.kernel == "cooperative" or (report.kernel == "topk" and report.vocab != ODD)


def widths(report: Report, found: Loops, access: str, width: Any) -> None:
    loops = [[width(m) for x in body if (m := re.search(access, x))] for body in found.inside]
    if gathers(report):  # named columns, or numbers that are waited for
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
    loads = r"\bLDG\S*\.128\b" if gathers(report) else r"\bLDG\b"
    count(report, in_sass, loads, r"\bSTG\b", r"\bMUFU\b", columns)


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
    loads += "_dwordx4" if gathers(report) else ""
    stores = r"\b(?:global|buffer)_store"
    count(report, found, loads, stores, r"\bv_(?:exp|log|rcp)_", columns)


def read_xpu(report: Report, asm: dict[str, Any], columns: float) -> None:
    """Of the LLVM IR: from SPIR-V on the device's own compiler goes on, and says how well.

    Loops are not read: LLVM may have parted a whole load, for that compiler to join.
    """
    report.registers = report.spills = None
    report.rows = False
    # what SPIR-V and OpenCL know bears a mangled name
    report.calls = len(re.findall(r"\bcall\b[^@]*@(?!llvm\.|_Z)", asm["llir"]))
    if re.search(r"\balloca\b", asm["llir"]):
        report.problems.append("an array in a thread's own memory")
