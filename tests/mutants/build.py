"""The C++ of a copy of the tree, built as cheaply as it can be: one object of kernels.

`csrc/isa_baseline.cpp` alone, which has every dtype, compiled without optimisation and, where
the processor has it, with AVX2. The extension and the kernels' own test are linked from it and
from objects that the fault does not reach, which are compiled once for all faults.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sysconfig
from pathlib import Path

COMPILER = os.environ.get("CXX") or "c++"
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-pthread", "-fopenmp"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-w"]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# whose faults reach one object, and not the kernels'
ALONE = {"module.cpp": "module", "threads.cpp": "threads"}


class DoesNotBuild(Exception):
    """The compiler's own words."""


def isa_flags() -> list[str]:
    """AVX2 where this processor has it, never AVX-512: the faults are in the code for AVX2."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return ["-mavx2", "-mfma", "-mf16c"] if {"avx2", "fma", "f16c"} <= set(words) else []


def _source(tree: Path, unit: str) -> Path:
    return tree / ("tests/kernels" if unit == "check" else "csrc") / f"{unit}.cpp"


def _flags(tree: Path, unit: str) -> list[str]:
    if unit == "module":
        import pybind11

        include = sysconfig.get_paths()["include"]
        return [f"-I{pybind11.get_include()}", f"-I{include}", "-fvisibility=hidden"]
    if unit == "check":  # its arithmetic costs more than the kernels'
        return ["-O2", f"-I{tree / 'csrc'}"]
    return isa_flags() if unit == "isa_baseline" else []


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise DoesNotBuild(done.stderr[-2000:])


def compiled(tree: Path, unit: str, cache: Path) -> Path:
    """The object of a source; taken from the cache where one of the same text is there."""
    flags = [*FLAGS, *_flags(tree, unit)]
    digest = hashlib.sha256(repr([x for x in flags if not x.startswith("-I")]).encode())
    folders = [tree / "csrc", *([tree / "tests" / "kernels"] if unit == "check" else [])]
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        if path.suffix in (".h", ".inl") or path == _source(tree, unit):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    to = cache / f"{unit}-{digest.hexdigest()[:16]}.o"
    if not to.exists():
        part = to.with_suffix(f".{os.getpid()}.part")
        run([COMPILER, *flags, "-c", str(_source(tree, unit)), "-o", str(part)])
        part.replace(to)
    return to


def objects(tree: Path, plain: Path, cache: Path, units: list[str], file: str | None) -> list[Path]:
    """Of the faulty tree what the fault in `file` reaches, of the plain tree the rest."""
    reached = {ALONE.get(file, "isa_baseline")} if file else set()
    return [compiled(tree if unit in reached else plain, unit, cache) for unit in units]


def extension(tree: Path, plain: Path, cache: Path, file: str | None) -> None:
    """Builds `fastkd._C` into the tree."""
    made = objects(tree, plain, cache, ["isa_baseline", "module", "threads"], file)
    to = tree / "fastkd" / f"_C{SUFFIX}"
    to.unlink(missing_ok=True)
    run([COMPILER, "-shared", "-fopenmp", "-pthread", *map(str, made), "-o", str(to)])


def binary(tree: Path, plain: Path, cache: Path, file: str | None) -> Path:
    """Builds the kernels' own test."""
    # the kernels first: of an inline function in both, the linker takes the first
    made = objects(tree, plain, cache, ["isa_baseline", "check"], file)
    to = tree / "build-check"
    run([COMPILER, "-fopenmp", "-pthread", *map(str, made), "-o", str(to)])
    return to
