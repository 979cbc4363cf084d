"""Compiles the kernels for systems that are not at hand: `python tests/kernels/cross.py`.

Zig's C++ compiler (pip install ziglang) brings the headers of macOS and Windows. All is compiled
with setup.py's flags, and nothing is run. module.cpp takes this Python's headers, which macOS
accepts. Windows needs its own headers, so that module.cpp is left out there.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from binary import ROOT, SETUP

X86 = ("threads", "isa_baseline", *SETUP["ISA_FLAGS"])
TARGETS = {
    "aarch64-macos": ("module", "threads", "isa_baseline"),
    "x86_64-macos": ("module", *X86),
    "x86_64-windows-gnu": X86,
    "aarch64-windows-gnu": ("threads", "isa_baseline"),
}


def command(target: str, name: str, to: Path) -> list[str]:
    flags = ["-std=c++17", *SETUP["FLAGS"], "-fopenmp-simd", "-Wall", "-Wextra", "-Werror"]
    flags += ["-DFASTKD_X86=1"] if target.startswith("x86_64") else []
    flags += SETUP["ISA_FLAGS"].get(name, [])
    if name == "module":
        flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    source = ROOT / "csrc" / f"{name}.cpp"
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", target]
    return [*zig, *flags, "-c", str(source), "-o", str(to)]


def main(targets: list[str]) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for target in targets or TARGETS:
            for name in TARGETS[target]:
                to = Path(folder) / f"{target}-{name}.o"
                done = subprocess.run(command(target, name, to), capture_output=True, text=True)
                said = f"{to.stat().st_size} bytes" if done.returncode == 0 else done.stderr
                print(f"{target} {name}: {said}", flush=True)
                failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
