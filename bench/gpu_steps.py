"""The steps of `bench.gpu`: what is run on a machine with a GPU, in which order, for how long."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROCESSES = 8  # of the tests: their time is the compiler's, on the host
OWN = "fastkd,fastkd-inplace"
EVERYONE = f"eager,compile,compile-max,liger,{OWN},fastkd-outputs"
# Threads of a program decide how many rows are in flight, and so what of them the second tile loop
# finds in the cache. As in fastkd/backends/gpu/tune.py.
TILES = ("4096:128", "8192:256", "16384:512", "32768:1024")
WITHOUT_A_GPU = "sm_90"  # what --dry-run writes where there is no GPU to ask
WIDE = "8192x128256"  # where it is decided
# name -> (cases, shapes, dtypes, providers, seconds each, limit)
DECIDES = ("kl_div js_div", WIDE, "bfloat16", f"eager,compile,liger,{OWN}", 0.5, 100)
ALONE = ("kl_div js_div", WIDE, "bfloat16", OWN, 0.5, 40)  # cooperative programs off
LINEAR = f"{WIDE}:4096x4096"
FIT = {  # the rest, by worth
    "cases": ("", "8192x32000,8192x128256", "bfloat16", f"eager,{OWN}", 0.4, 80),
    "peers": ("kl_div js_div", "64x128256,8192x128256", "bfloat16", EVERYONE, 0.6, 120),
    "fp32": ("kl_div", "64x32000,4096x128256", "float32", f"eager,compile,{OWN}", 0.4, 40),
    "wide": ("kl_div", "512x50257,8192x151936,8192x256000", "bfloat16", f"eager,{OWN}", 0.4, 40),
}
# Programs that cooperate on a row (fastkd/backends/gpu/cooperative.py): about as many as it would
# take itself. The tiles are those of one program.
PROGRAMS = ("4", "8", "16")
TILE_SHAPES = "8192x32000,8192x128256,8192x256000"
FITTING = "fit"
WHEELS = "build/wheels"  # of peers, put there before: nothing is downloaded


@dataclass
class Step:
    """A command of the run.

    Args:
        name: of its files.
        command: without the interpreter, which stands before it where it begins with "-m" or a .py.
        limit: seconds it may take; None for no limit but the run's.
        must: its failure is the run's.
        env: added to the environment.
        out: suffix of the file for what it prints; a table is Markdown.
        skip: why it cannot run here; "" where it can.
    """

    name: str
    command: list[str]
    limit: float | None = None
    must: bool = False
    env: dict[str, str] = field(default_factory=dict)
    out: str = "txt"
    skip: str = ""

    @property
    def line(self) -> str:
        """As typed in a shell."""
        words = [*(f"{key}={value}" for key, value in self.env.items()), *self.argv]
        return " ".join(shlex.quote(word) for word in words)

    @property
    def argv(self) -> list[str]:
        first = self.command[0]
        python = first.startswith("-") or first.endswith(".py")
        return [sys.executable, *self.command] if python else self.command


def target() -> str:
    """The GPU as `bench.aot` names it."""
    import torch

    if not torch.cuda.is_available():
        return WITHOUT_A_GPU
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(0).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def sanitizer() -> str | None:
    """compute-sanitizer, on the path or in a CUDA toolkit."""
    found = shutil.which("compute-sanitizer")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return found or (str(home) if home.exists() else None)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _bench(
    results: Path, name: str, cases: str, shapes: str, dtypes: str, providers: str, seconds: float
) -> list[str]:
    return [
        *("-m", "bench", *cases.split(), "--device", "cuda", "--shapes", shapes),
        *("--dtype", dtypes, "--providers", providers, "--seconds", f"{seconds:g}"),
        *_files(results, name),
    ]


def _files(results: Path, name: str) -> list[str]:
    """Its JSON and, where matplotlib is, its plot."""
    plot = ["--plot", str(results / f"gpu-{name}.png")] if has("matplotlib") else []
    return ["--json", str(results / f"gpu-{name}.json"), *plot]


def steps(results: Path, shapes: str, arch: str, linear: str = "gpu") -> list[Step]:
    """All steps in their order; what matters most comes first.

    Args:
        results: folder of all files.
        shapes: "fit" for what fits 13 minutes; ROWSxVOCAB,..., or "" for all shapes, for the
            whole grid of cases, dtypes and providers on them.
        arch: the GPU as `bench.aot` names it.
        linear: shapes of the linear losses.
    """
    limited = shapes == FITTING

    def limit(seconds: float) -> float | None:
        return seconds if limited else None

    xdist = ["-n", str(min(PROCESSES, os.cpu_count() or 1))] if has("xdist") else []
    pytest = ["-m", "pytest", *xdist, "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
    unnamed = "" if shutil.which("nvidia-smi") else "nvidia-smi is not on this machine"
    build = ["setup.py", "build_ext", "--inplace"]

    def tests(name: str, seconds: float, *words: str) -> Step:
        """Tests that begin within so many seconds; the others are skipped."""
        env = {"FASTKD_TEST_SECONDS": f"{seconds:g}"} if limited else {}
        return Step(name, [*pytest, *words], limit(seconds + 30), must=True, env=env)

    def measure(name: str, fit: Sequence[Any], **options: Any) -> Step:
        command = _bench(results, name, *fit[:5])
        return Step(name, command, limit(fit[5]), out="md", **options)

    wheels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / WHEELS).glob("*.whl"))
    first = [
        Step(
            *("wheels", ["-m", "pip", "install", "--no-index", "--no-deps", *wheels], 30),
            skip="" if wheels else f"no wheel of a peer (liger-kernel) lies in {WHEELS}",
        ),
        Step("build", build, 120, env={"FASTKD_REQUIRE_CPU": "1"}),
        Step("driver", query, 20, skip=unnamed),
        Step("info", ["-m", "fastkd", "info", "--json"], 60, must=True),
        tests("tests-passes", 60, *_passes(), "-k", "gpu or topk or tune"),
        measure("bench-decides", DECIDES, must=True),
        measure("alone", ALONE, env={"FASTKD_GPU_COOPERATIVE": "0"}),
    ]
    grid = FIT
    if not limited:
        grid = {"grid": ("", shapes or "gpu", "bfloat16,float32", EVERYONE, 2.0, 0)}
    measured = [measure(f"bench-{name}", fit, must=True) for name, fit in grid.items()]
    tool = sanitizer()
    small = ["-m", "bench", "kl_div", "js_div", "distillation_loss", "kl_div_top64", "--toy"]
    memcheck = [tool or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    aot = ["-m", "bench.aot", "--quick", "--targets", arch]
    shown = LINEAR if limited and linear == "gpu" else linear
    product = ["-m", "bench", "linear", "--device", "cuda", "--shapes", shown, "--seconds", "1"]
    whole = Step("linear", [*product, *_files(results, "linear")], limit(60), out="md")
    check = Step(
        "memcheck",
        [*memcheck, sys.executable, *small, "--device", "cuda", "--providers", OWN],
        60,
        must=True,
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        skip="" if tool else "compute-sanitizer is not on this machine",
    )
    last = [
        tests("tests-all", 120, "tests", "-k", "gpu"),
        Step("aot", [*aot, "--json", str(results / "gpu-aot.json")], limit(60), must=True),
    ]
    programs, tiles = _variants(results, limit(25))
    return [*first, whole, measured[0], check, *programs, *measured[1:], *last, *tiles]


def _passes() -> list[str]:
    """The files of tests about the Triton passes themselves."""
    named = ("test_gpu*.py", "gpu/test_*.py", "test_topk*.py", "test_tune.py")
    found = {path for name in named for path in (ROOT / "tests").rglob(name)}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def _variants(results: Path, limit: float | None) -> tuple[list[Step], list[Step]]:
    """Wide rows by more programs; by other tiles."""
    variants = [(f"programs-{n}", {"FASTKD_GPU_COOPERATIVE": n}) for n in PROGRAMS]
    for text in TILES:
        env = {"FASTKD_GPU_TILE": text, "FASTKD_GPU_COOPERATIVE": "0"}
        variants.append((f"tile-{text.replace(':', '-')}", env))
    grid = ("kl_div js_div", TILE_SHAPES, "bfloat16", "fastkd-inplace", 0.2)
    steps = [
        Step(name, _bench(results, name, *grid), limit, env=env, out="md") for name, env in variants
    ]
    return steps[: len(PROGRAMS)], steps[len(PROGRAMS) :]
