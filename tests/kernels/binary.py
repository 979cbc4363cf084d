"""Builds and runs the kernels' own test binary (check.cpp), with the flags of setup.py.

    python tests/kernels/binary.py VARIANT... [--fuzz SECONDS] [--seed N]

runs its fixed cases and then random ones. The variant aarch64 is cross-compiled, runs under
qemu-aarch64 and writes what it saw to aarch64.json, which tests/backends/test_kernels.py holds
against the source. Any other variant writes its VARIANT.json after ten minutes of random cases.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants.build import isa_flags

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORD = HERE / "aarch64.json"
LONG = 600.0  # seconds of fuzz that are worth a record
# Files of the extension that the binary does not contain: it brings its own scratch and threads.
NOT_IN_IT = ("module.cpp", "arguments.h", "host_loops.h", "threads.cpp", "threads.h")
JOBS = 2
CPUINFO = Path("/proc/cpuinfo")

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
THREADS = "-fsanitize=thread"
ONE = "isa_avx2" if isa_flags() else "isa_baseline"
STUB = """namespace fastkd {
struct Kernels;
namespace avx512 {
const Kernels* kernels();
const Kernels* kernels() { return nullptr; }
}  // namespace avx512
}  // namespace fastkd
"""


class Variant(NamedTuple):
    """One way of building the binary: compiler, flags beside setup.py's, what runs it.

    flags are the kernels', own those of check.cpp, whose arithmetic costs more than theirs, and
    one more of them for the table ONE.
    """

    compiler: str
    flags: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    one: tuple[str, ...] = ()
    x86: bool = True
    runner: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """The first tool that is not on this machine."""
        tools = (self.compiler, *self.runner)
        return next((tool for tool in tools if not shutil.which(tool)), None)


def setup() -> dict[str, Any]:
    """The names of setup.py, which is the one place of the kernels' flags."""
    os.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="flags")


SETUP = setup()
HOST = os.environ.get("CXX") or "c++"
VARIANTS = {
    "native": Variant(HOST, x86=SETUP["X86"]),
    "clang": Variant("clang++", x86=SETUP["X86"]),
    # -O1: a quarter of the time of building. What is read and written is the same; as shipped, the
    # kernels run in the extension and in "native".
    "guarded": Variant(HOST, ("-O1",), ("-O1",), x86=SETUP["X86"]),
    # ... and one table under sanitizers, too: half the time of the one that has float64. -O0: 42
    # seconds of building where -O1 takes 113, and the cases take half as long again.
    "sanitize-one": Variant(
        HOST,
        ("-O0",),
        ("-O1", "-DCHECK_ASAN=1"),
        tuple(SANITIZE),
        one=tuple(SANITIZE),
        x86=SETUP["X86"],
    ),
    # -O1: half the time of building, and at -O3 the checks cost what it would win
    "sanitize": Variant(
        HOST, ("-O1", *SANITIZE), ("-DCHECK_ASAN=1",), tuple(SANITIZE), x86=SETUP["X86"]
    ),
    "threads": Variant(HOST, ("-O1", THREADS), link=(THREADS,), x86=SETUP["X86"]),
    "aarch64": Variant(
        "aarch64-linux-gnu-g++", link=("-static",), x86=False, runner=("qemu-aarch64",)
    ),
}


def _jobs(variant: Variant, folder: Path) -> dict[Path, list[str]]:
    """The compiler's command of every object."""
    csrc = ROOT / "csrc"
    isas = ["isa_baseline", *(SETUP["ISA_FLAGS"] if variant.x86 else ())]
    sources = {
        csrc / f"{name}.cpp": [*SETUP["ISA_FLAGS"].get(name, []), *variant.flags] for name in isas
    }
    if variant.one:
        sources[csrc / f"{ONE}.cpp"] += variant.one
    if variant.x86 and not _has_avx512():  # nobody would ask for its table
        del sources[csrc / "isa_avx512.cpp"]
        stub = folder / "no_avx512.cpp"
        stub.write_text(STUB)
        sources[stub] = []
    sources[HERE / "check.cpp"] = [*variant.own]
    common = [variant.compiler, "-std=c++17", *SETUP["FLAGS"], "-fopenmp-simd", "-pthread"]
    common += ["-Wall", "-Wextra", "-Werror", f"-I{csrc}", "-g1"]
    common += ["-DFASTKD_X86=1"] if variant.x86 else []
    return {
        folder / f"{source.stem}.o": [*common, *flags, "-c", str(source)]
        for source, flags in sources.items()
    }


def _has_avx512() -> bool:
    """True where nobody knows."""
    words = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
    return not words or {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= words


def digest(*folders: Path) -> str:
    """Of the names and contents of the C++ files in the folders."""
    together = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        if path.suffix in (".h", ".inl", ".cpp") and path.name not in NOT_IN_IT:
            together.update(path.name.encode() + b"\0" + path.read_bytes())
    return together.hexdigest()


def build(name: str) -> Path:
    """The binary of a variant; built again only where a source or a flag has changed.

    Raises:
        RuntimeError: the compiler's own words.
    """
    variant = VARIANTS[name]
    folder = ROOT / "build" / "kernels" / name
    folder.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(variant, folder)
    binary, stamp = folder / "check", folder / "stamp"
    link = [variant.compiler, *map(str, jobs), "-pthread", *variant.link, "-o", str(binary)]
    state = digest(ROOT / "csrc", HERE) + repr((list(jobs.values()), link, version(variant)))
    with (folder / "lock").open("w") as lock:  # tests may ask for it from several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if binary.exists() and stamp.exists() and stamp.read_text() == state:
            return binary
        stamp.unlink(missing_ok=True)
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(_compile, ([*command, "-o", str(to)] for to, command in jobs.items())))
        _compile(link)
        stamp.write_text(state)
    return binary


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def version(variant: Variant) -> list[str]:
    """The first line that each of the variant's tools says of itself."""
    tools = [variant.compiler, *variant.runner]
    answers = [
        subprocess.run([tool, "--version"], capture_output=True, text=True) for tool in tools
    ]
    return [answer.stdout.splitlines()[0] for answer in answers]


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Builds a variant and runs its binary with the words; a report is in its output."""
    binary = build(name)
    # a fault is reported by the binary itself, with the case in which it happened
    environment = {**os.environ, "ASAN_OPTIONS": "handle_segv=0:handle_sigbus=0:detect_leaks=0"}
    command = [*VARIANTS[name].runner, str(binary), *words]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def record(name: str, reports: dict[str, str]) -> None:
    """Writes down that a variant has passed: when, from what source, with which tools."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    facts = {
        "passed": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "tools": version(VARIANTS[name]),
        "reports": reports,
        "csrc": digest(ROOT / "csrc"),
    }
    RECORD.with_name(f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--fuzz", default="10", metavar="SECONDS")
    parser.add_argument("--seed", default="1")
    options = parser.parse_args()
    for name in options.variants:
        missing = VARIANTS[name].missing()
        if missing is not None:
            print(f"{name}: {missing} is not on this machine", file=sys.stderr)
            return 2
        reports = {}
        for words in (["check"], ["fuzz", options.fuzz, options.seed]):
            done = run(name, *words)
            print(f"{name} {' '.join(words)}: {done.stdout}", end="", flush=True)
            if done.returncode != 0:
                return done.returncode
            reports[" ".join(words)] = done.stdout.strip()
        if name == "aarch64" or float(options.fuzz) >= LONG:
            record(name, reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
