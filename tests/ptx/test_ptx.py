"""The executor of PTX finds the faults that it is there for; and a sample of the cases."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptx import operations, record
from ptx.conftest import shares
from ptx.machine import execute
from ptx.memory import Fault, Global
from ptx.parser import parse

ROOT = Path(__file__).parents[2]

# ---- planted faults, in kernels of a few lines


def program(body: str, threads: int = 64) -> Any:
    """x and y are in %rd1 and %rd2, n in %r1, the thread in %r2."""
    return parse(f"""
.extern .shared .align 16 .b8 smem[];
.visible .entry k(
  .param .u64 .ptr .global .align 1 k_param_0,
  .param .u64 .ptr .global .align 1 k_param_1,
  .param .u32 k_param_2
)
.reqntid {threads}
{{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<30>;
  .reg .b64 %rd<30>;
  ld.param.b64 %rd1, [k_param_0];
  ld.param.b64 %rd2, [k_param_1];
  ld.param.b32 %r1, [k_param_2];
  mov.u32 %r2, %tid.x;
  mul.wide.u32 %rd3, %r2, 4;
{body}
  ret;
}}
""")


def run(
    body: str, x: torch.Tensor, y: torch.Tensor, n: int = 0, grid: int = 1, **options: Any
) -> Counter[str]:
    memory = Global({"x": x, "y": y})
    params = {"k_param_0": memory.address(x), "k_param_1": memory.address(y), "k_param_2": n}
    threads = options.pop("threads", 64)
    counts = execute(program(body, threads), memory, params, grid, **options)
    memory.write_back()
    return counts


def f32(*of: float, n: int = 64) -> torch.Tensor:
    return torch.tensor(of) if of else torch.zeros(n)


COPY = """
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  setp.lt.u32 %p1, %r2, %r1;
"""
MASKED = (
    "@%p1 ld.global.b32 {{ %r3 }}, [ %rd4 + 0 ];\n @{}%p1 st.global.b32 [ %rd5 + 0 ], {{ %r3 }};"
)


def test_a_masked_copy() -> None:
    x, y = torch.randn(50), f32(n=50)
    counts = run(COPY + MASKED.format(""), x, y, 50)
    assert torch.equal(x, y) and counts["ld.global.b32"] == 2


def test_an_unmasked_tail() -> None:
    body = COPY + "ld.global.b32 %r3, [%rd4];\n @%p1 st.global.b32 [%rd5], %r3;"
    with pytest.raises(Fault, match=r"read of 4 bytes outside of a tensor: 14 threads.*byte 200"):
        run(body, torch.randn(50), f32(n=50), 50)


def test_a_mask_that_is_one_too_wide() -> None:
    with pytest.raises(Fault, match="read of 4 bytes outside of a tensor: 1 threads"):
        run(COPY + MASKED.format(""), torch.randn(50), f32(n=51), 51)


def test_a_mask_that_is_the_wrong_way_round() -> None:
    with pytest.raises(Fault, match="write of 4 bytes outside of a tensor"):
        run(COPY + MASKED.format("!"), torch.randn(50), f32(n=50), 50)


def test_a_wide_read_past_the_end() -> None:
    """A tensor that ends within the 16 bytes."""
    body = """
  shl.b64 %rd6, %rd3, 2;
  add.s64 %rd4, %rd1, %rd6;
  setp.lt.u32 %p1, %r2, 3;
  @%p1 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd4 + 0 ];
"""
    run(body, torch.randn(12), f32())
    with pytest.raises(Fault, match=r"read of 16 bytes outside of a tensor: 1 threads.*byte 32"):
        run(body, torch.randn(11), f32())


def test_a_misaligned_vector_load() -> None:
    body = COPY + "@%p1 ld.global.v2.b32 { %r3, %r4 }, [ %rd4 + 0 ];"
    with pytest.raises(Fault, match="misaligned read of 8 bytes"):
        run(body, torch.randn(66), f32(), 64)


REVERSED = """
  cvt.u32.u64 %r4, %rd3;
  sub.s32 %r5, 252, %r4;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  ld.global.b32 %r3, [%rd4];
  st.shared.b32 [%r4], %r3;
  {}
  ld.shared.b32 %r6, [%r5];
  st.global.b32 [%rd5], %r6;
"""


def test_a_missing_barrier() -> None:
    x, y = torch.randn(64), f32()
    run(REVERSED.format("bar.sync 0;"), x, y, shared=256)
    assert torch.equal(y, x.flip(0))
    with pytest.raises(Fault, match="race: read at byte"):
        run(REVERSED.format(""), x, y, shared=256)
    # within a warp nothing is missing
    run(REVERSED.replace("252", "124").format(""), x[:32].clone(), y, shared=128, threads=32)


def test_past_the_end_of_shared_memory() -> None:
    with pytest.raises(Fault, match="shared memory"):
        run(REVERSED.format("bar.sync 0;"), torch.randn(64), f32(), shared=128)


def test_a_barrier_for_some() -> None:
    body = "setp.lt.u32 %p1, %r2, 40;\n @!%p1 bra $L1;\n bar.sync 0;\n$L1:"
    with pytest.raises(Fault, match="a barrier that only a part"):
        run(body, f32(), f32())


def test_blocks_that_write_to_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "mov.u32 %r3, %ctaid.x;\n add.s64 %rd5, %rd2, %rd3;\n st.global.b32 [%rd5], %r3;"
    run(body, f32(), f32())
    with pytest.raises(Fault, match="race: two threads write different numbers"):
        run(body, f32(), f32(), grid=2)
    monkeypatch.setattr("ptx.machine.LANES", 64)  # one block after the other
    with pytest.raises(Fault, match="race: write"):
        run(body, f32(), f32(), grid=2)


def test_a_shuffle_by_half_a_warp() -> None:
    body = "setp.lt.u32 %p1, %r2, 40;\n @%p1 shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;"
    with pytest.raises(Fault, match="part of a warp"):
        run(body, f32(), f32())


def test_an_operation_that_is_not_known() -> None:
    with pytest.raises(NotImplementedError, match=r"wgmma"):
        run("wgmma.fence.sync.aligned;", f32(), f32())


# ---- what it computes


def test_threads_part_and_meet() -> None:
    """Each thread goes round a loop as often as its number says."""
    body = """
  mov.b32 %r3, 0;
$L1:
  setp.ge.u32 %p1, %r3, %r2;
  @%p1 bra $L2;
  add.s32 %r3, %r3, 1;
  bra $L1;
$L2:
  bar.sync 0;
  add.s64 %rd5, %rd2, %rd3;
  st.global.b32 [%rd5], %r3;
"""
    y = torch.zeros(64, dtype=torch.int32)
    run(body, f32(), y)
    assert y.tolist() == list(range(64))


def test_bits_are_counted() -> None:
    y = torch.zeros(64, dtype=torch.int32)
    run("popc.b32 %r3, %r2;\n add.s64 %rd5, %rd2, %rd3;\n st.global.b32 [%rd5], %r3;", f32(), y)
    assert y.tolist() == [number.bit_count() for number in range(64)]


WAITS = """
  mov.u32 %r4, %ctaid.x;
  setp.ne.u32 %p1, %r2, 0;
  @%p1 bra $L9;
  setp.eq.u32 %p2, %r4, 0;
  @!%p2 bra $L3;
$L1:
  ld.volatile.global.b32 %r3, [%rd1];
  setp.eq.u32 %p3, %r3, 0;
  @%p3 bra $L1;
  st.global.b32 [%rd2], %r3;
  bra $L9;
$L3:
  atom.global.gpu.relaxed.exch.b32 %r5, [ %rd1 + 0 ], %r1;
$L9:
"""


def test_blocks_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.zeros(1, dtype=torch.int32)
    for seed in range(4):
        run(WAITS, torch.zeros(1, dtype=torch.int32), y, 7, grid=2, seed=seed)
        assert y.item() == 7
    monkeypatch.setattr("ptx.machine.PATIENCE", 500)
    with pytest.raises(Fault, match="wait for ever"):
        run(WAITS, torch.zeros(1, dtype=torch.int32), y, 0, grid=2)


def test_sectors_of_a_request() -> None:
    """128 bytes that lie together are 4 sectors, every second column 8, one column 1."""
    for shift, sectors in ((2, 4), (3, 8), (7, 32)):
        x = torch.zeros(4096)
        memory = Global({"x": x})
        body = f"cvt.u64.u32 %rd6, %r2;\n shl.b64 %rd6, %rd6, {shift};\n"
        body += "add.s64 %rd4, %rd1, %rd6;\n ld.global.b32 %r3, [%rd4];"
        params = {"k_param_0": memory.address(x), "k_param_1": 0, "k_param_2": 0}
        execute(program(body, 32), memory, params, 1)
        assert memory.requests["x", "read"] == 1
        assert abs(memory.sectors["x", "read"] - sectors) <= 1


def test_conversions_round_once() -> None:
    x = torch.cat((torch.randn(4000) * 10.0 ** torch.randint(-9, 5, (4000,)), f32(0.0, -0.0)))
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        found = operations.to_bits(x.numpy(), kind)
        assert np.array_equal(found, x.to(dtype).view(torch.int16).numpy().view(np.uint16))
        back = operations.to_float(found, kind)
        cut = operations.to_float(operations.to_bits(x.numpy(), kind, True), kind)
        assert np.array_equal(back, x.to(dtype).float().numpy())
        assert (np.abs(cut) <= np.abs(x.numpy())).all() and (cut != back).any()


def test_pairs_are_compared_each_by_itself() -> None:
    """Twice a bfloat16 in a register: p is of the lower number, q of the upper one."""
    x = torch.tensor([1.0, 3.0, 3.0, 1.0, torch.nan, 1.0], dtype=torch.bfloat16)
    y = torch.full((6,), 2.0, dtype=torch.bfloat16)
    out = torch.zeros(3, dtype=torch.int32)
    body = """
  setp.lt.u32 %p3, %r2, 3;
  add.s64 %rd4, %rd1, %rd3;
  mov.b32 %r3, 1073758208;
  @%p3 ld.global.b32 %r4, [%rd4];
  setp.lt.bf16x2 %p1|%p2, %r4, %r3;
  selp.b32 %r5, 1, 0, %p1;
  selp.b32 %r6, 2, 0, %p2;
  add.s32 %r7, %r5, %r6;
  add.s64 %rd5, %rd2, %rd3;
  @%p3 st.global.b32 [%rd5], %r7;
"""
    assert y.view(torch.int32)[0] == 1073758208
    run(body, x, out)
    assert out.tolist() == [1, 2, 2]


def test_fma_rounds_once() -> None:
    a, b, c = (torch.randn(20_000) for _ in range(3))
    c = -(a * b) * (1 + c * 2.0**-20)  # nearly cancels
    found = operations.fused(*(x.numpy() for x in (a, b, c)))
    exact = a.numpy().astype(np.longdouble) * b.numpy() + c.numpy()
    assert np.array_equal(found, exact.astype(np.float32))


# ---- what `make ptx` runs

AXES = [[f"{axis}{i}" for i in range(n)] for axis, n in (("d", 7), ("t", 3), ("l", 5))]


def test_each_case_on_one_architecture_and_each_pair_on_all() -> None:
    rows = [list(row) for row in itertools.product(*AXES)]
    parts = shares(rows)
    assert set().union(*parts) == set(range(len(rows)))
    every = {pair for row in rows for pair in itertools.combinations(row, 2)}
    for part in parts:
        assert {pair for i in part for pair in itertools.combinations(rows[i], 2)} == every
    assert sum(map(len, parts)) < 1.2 * len(rows)
    assert shares(rows[:4]) == [set(range(4))] * 3


def test_the_record_is_written_once_all_have_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RECORD", tmp_path / "record.json")
    for arch in record.ARCHITECTURES:
        with pytest.raises(SystemExit, match="no record yet"):
            record.write(tmp_path, {})
        (tmp_path / arch).mkdir()
        (tmp_path / arch / "wanted.json").write_text('{"of": 3, "wanted": ["a", "b"]}')
        (tmp_path / arch / "passed").write_text("a\nb\n" if arch == "sm_90" else "a\nc\n")
    with pytest.raises(SystemExit, match="no record yet"):
        record.write(tmp_path, {})
    for arch in record.ARCHITECTURES:
        (tmp_path / arch / "passed").write_text("b\na\n")
    record.write(tmp_path, {"sources": "s"})
    found = json.loads(record.RECORD.read_text())
    assert found["cases"] == 3 and found["sources"] == "s"
    assert found["ran"] == {"sm_80": 2, "sm_90": 2, "sm_100": 2}


# ---- the kernels


def test_a_sample_of_the_kernels() -> None:
    """`*_cases.py` in a process without the interpreter: each case for one of the GPUs."""
    pytest.importorskip("triton")
    cases = sorted(str(path) for path in Path(__file__).parent.glob("*_cases.py"))
    command = [sys.executable, "-m", "pytest", "-n", "0", "--tb=short", *cases]
    command += ["-p", "no:hypothesispytest"]  # loads all of it for its summary
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INT", "PYTEST_"))}
    env["FASTKD_TEST_PTX"] = "sm_80,sm_90,sm_100"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
