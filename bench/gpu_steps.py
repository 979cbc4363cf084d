"""The steps of `bench.gpu`: what is run on a machine with a card, in which order, for how long."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROCESSES = 8  # of the tests: their time is the compiler's, on the host
OWN = "fastkd,fastkd-inplace,fastkd-scaled"
EVERYONE = f"eager,compile,compile-max,liger,liger-scaled,{OWN},fastkd-inplace-scaled"
# Threads of a program and blocks of a cluster decide how many rows are in flight, and so what of
# them the second sweep finds in the cache (`bench.traffic`). As in fastkd/backends/gpu/tune.py.
TILES = ("8192:256:1", "16384:512:1", "32768:1024:1", "8192:256:2", "8192:256:4")
WITHOUT_A_CARD = "sm_90"  # what --dry-run writes where there is no card to ask
FIT = {  # what fits: name -> (cases, shapes, dtypes, providers, seconds each, limit)
    "peers": ("kl_div js_div", "64x128256,8192x128256", "bfloat16", EVERYONE, 1.0, 150),
    "cases": ("", "8192x32000,8192x128256", "bfloat16", f"eager,{OWN}", 0.4, 80),
    "wide": ("kl_div", "512x50257,8192x151936,8192x256000", "bfloat16", f"eager,{OWN}", 0.4, 40),
    "fp32": ("kl_div", "64x32000,4096x128256", "float32", f"eager,compile,{OWN}", 0.4, 40),
}
# Programs that share a row (`fastkd/backends/gpu/cooperative.py`): about as many as it would take
# itself. The tiles are those of one program.
TEAMS = ("4", "8", "16")
TILE_SHAPES = "8192x32000,8192x128256,8192x256000"
FITTING = "fit"


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
    """The card as `bench.aot` names it."""
    import torch

    if not torch.cuda.is_available():
        return WITHOUT_A_CARD
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


def _json(results: Path, name: str) -> list[str]:
    return ["--json", str(results / f"gpu-{name}.json")]


def _files(results: Path, name: str) -> list[str]:
    """Its JSON and, where matplotlib is, its plot."""
    plot = ["--plot", str(results / f"gpu-{name}.png")] if has("matplotlib") else []
    return [*_json(results, name), *plot]


def _bench(
    results: Path, name: str, cases: str, shapes: str, dtypes: str, providers: str, seconds: float
) -> list[str]:
    return [
        *("-m", "bench", *cases.split(), "--device", "cuda", "--shapes", shapes),
        *("--dtype", dtypes, "--providers", providers, "--seconds", f"{seconds:g}"),
        *_files(results, name),
    ]


def steps(results: Path, shapes: str, arch: str, linear: str = "gpu") -> list[Step]:
    """All steps in their order; what matters most comes first.

    Args:
        results: folder of all files.
        shapes: "fit" for what fits ten minutes; ROWSxVOCAB,..., or "" for all shapes, for the
            whole grid of cases, dtypes and providers on them.
        arch: the card as `bench.aot` names it.
        linear: shapes of `bench.linear`.
    """
    card = _card(arch)
    xdist = ["-n", str(min(PROCESSES, os.cpu_count() or 1))] if has("xdist") else []
    pytest = ["-m", "pytest", *xdist, "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    limited = shapes == FITTING
    out = [
        Step(
            "build",
            ["setup.py", "build_ext", "--inplace"],
            120,
            env={"FASTKD_REQUIRE_CPU": "1"},
        ),
        Step(
            "driver",
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"],
            20,
            skip="" if shutil.which("nvidia-smi") else "nvidia-smi is not on this machine",
        ),
        Step("info", ["-m", "fastkd", "info", "--json"], 60, must=True, out="txt"),
        Step(
            "tests-passes",
            [*pytest, *_passes(), "-k", "gpu or topk or tune"],
            150 if limited else None,
            must=True,
        ),
        Step(
            "bench-peers",
            _bench(results, "bench-peers", *FIT["peers"][:5]),
            FIT["peers"][5],
            must=True,
            out="md",
        ),
        *(
            Step(
                f"bench-{name}",
                _bench(results, f"bench-{name}", *fit[:5]),
                fit[5],
                must=True,
                out="md",
            )
            for name, fit in FIT.items()
            if name != "peers"
        ),
    ]
    if not limited:
        grid = shapes or "gpu"
        both = "bfloat16,float32"
        command = _bench(results, "bench-grid", "", grid, both, EVERYONE, 2.0)
        out = [step for step in out if not step.name.startswith("bench-")]
        out.append(Step("bench-grid", command, None, must=True, out="md"))
    out += _tiles(results, arch, limited)
    tool = sanitizer()
    small = ["-m", "bench", "kl_div", "js_div", "distillation_loss", "kl_div_top64", "--toy"]
    small += ["--device", "cuda", "--providers", OWN]
    out += [
        Step(
            "memcheck",
            [
                *(tool or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
                *(sys.executable, *small),
            ],
            60,
            must=True,
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            skip="" if tool else "compute-sanitizer is not on this machine",
        ),
        Step(
            "aot",
            [
                *("-m", "bench.aot", "--quick", "--targets", arch),
                "--json",
                str(results / "gpu-aot.json"),
            ],
            60 if limited else None,
            must=True,
        ),
        Step(
            "traffic",
            [
                *("-m", "bench.traffic", "--cards", _card(arch) or "H200"),
                "--json",
                str(results / "gpu-traffic.json"),
            ],
            40,
            out="md",
            skip="" if card else f"no data sheet of a card of {arch} in bench/cards.py",
        ),
        Step(
            "tests-all",
            [*pytest, "tests", "-k", "gpu", *(f"--ignore={path}" for path in _passes())],
            150 if limited else None,
            must=True,
        ),
        Step(
            "linear",
            [
                *("-m", "bench.linear", "--device", "cuda", "--shapes", linear, "--seconds", "1"),
                *_files(results, "linear"),
            ],
            60 if limited else None,
            out="md",
        ),
    ]
    return out


def _passes() -> list[str]:
    """The files of tests about the Triton passes themselves."""
    own = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_gpu*.py"))
    return [*own, "tests/test_topk.py", "tests/test_tune.py"]


def _card(arch: str) -> str | None:
    from bench.cards import BY_ARCH

    card = BY_ARCH.get(arch)
    return card.name if card else None


def _tiles(results: Path, arch: str, limited: bool) -> list[Step]:
    """Wide rows under other teams and tiles and, where Triton and the card have them, clusters."""
    try:
        from fastkd.backends.gpu.tune import clusters
    except ImportError as error:
        return [Step("tiles", ["-m", "bench"], skip=f"the gpu backend does not import: {error}")]
    # name, environment, why not
    ways = [(f"team-{number}", {"FASTKD_GPU_COOPERATIVE": number}, "") for number in TEAMS]
    for text in TILES:
        refused = clusters(arch) if text.rpartition(":")[2] != "1" else None
        env = {"FASTKD_GPU_TILE": text, "FASTKD_GPU_COOPERATIVE": "0"}
        ways.append((f"tile-{text.replace(':', '-')}", env, refused or ""))
    out = []
    for name, env, skip in ways:
        command = _bench(
            results, name, "kl_div js_div", TILE_SHAPES, "bfloat16", "fastkd-inplace", 0.2
        )
        limit = 25 if limited else None
        out.append(Step(name, command, limit, env=env, out="md", skip=skip))
    return out
