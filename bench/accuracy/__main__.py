"""python -m bench.accuracy: errors of loss and gradient against the truth, beside plain torch's.

The statement: in no case, dtype, distribution, temperature and vocabulary is fastkd's error above
eager or compiled torch's, and its bfloat16 gradient is the correctly rounded one in at least
99.9 % of its elements; behind any factor its 16-bit gradient is rounded once. Exit status 1 where
one of them does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo

from bench.accuracy import factors, report
from bench.accuracy.points import DISTRIBUTIONS, TORCH, Point, Runs, points
from bench.families.loss_cases import DENSE
from bench.families.loss_providers import PROVIDERS
from bench.harness.cli import Progress, device, listed, output, positive
from bench.harness.family import DTYPES, spelled
from bench.harness.machine import machine

ALL_DTYPES = {**DTYPES, "float64": torch.float64}
TEMPERATURES, VOCABS = (0.1, 1.0, 2.0, 10.0, 100.0), (10, 100, 1000, 32_000, 262_144)
QUICK_TEMPERATURES, QUICK_VOCABS = (0.1, 2.0, 100.0), (10, 1025)
# Every case, dtype and kind of shape is one more version of a compiled function to torch, which
# by default gives up at the eighth.
COMPILED = 10_000


def _each(kind: Any, what: str) -> Any:
    """A parser of comma-separated numbers above 0."""
    one = positive(kind, what)

    def parse(text: str) -> list[Any]:
        parts = [part for part in text.split(",") if part.strip()] or [text]
        return list(dict.fromkeys(map(one, parts)))

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--cases", type=listed(DENSE, "cases"), help=",".join(DENSE))
    p.add_argument("--dtype", type=listed(ALL_DTYPES, "dtype"), help=",".join(ALL_DTYPES))
    for what, known in (("distributions", DISTRIBUTIONS), ("providers", PROVIDERS)):
        names = {name: name for name in known}
        p.add_argument(f"--{what}", type=listed(names, what), help=",".join(names))
    p.add_argument("--vocab", type=_each(int, "vocab"), help="V,... (10 to 262144)")
    p.add_argument("--temperature", type=_each(float, "temperature"), help="T,... (0.1 to 100)")
    factor = _each(float, "factors")
    p.add_argument("--factors", type=factor, help="F,... behind the loss (2^-10 to 2^20)")
    p.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu, cuda, ...")
    p.add_argument("--threads", type=positive(int, "threads"), default=1, help="CPU threads (1)")
    p.add_argument("--quick", action="store_true", help="a part, in seconds; no torch.compile")
    p.add_argument("--json", type=output, metavar="FILE", help="write everything as JSON")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if the statement does not hold."""
    words = list(sys.argv[1:] if argv is None else argv)
    a = parser().parse_args(words)
    if a.device.type != "cpu" and a.device.index is not None:
        torch.get_device_module(a.device).set_device(a.device)
    a.cases = a.cases or list(DENSE.values())
    quick = [torch.float32, torch.bfloat16]
    a.dtype = a.dtype or (quick if a.quick else list(ALL_DTYPES.values()))
    a.distributions = a.distributions or list(DISTRIBUTIONS)
    a.vocab = a.vocab or list(QUICK_VOCABS if a.quick else VOCABS)
    a.temperature = a.temperature or list(QUICK_TEMPERATURES if a.quick else TEMPERATURES)
    a.providers = a.providers or [*(TORCH[:1] if a.quick else TORCH), "fastkd"]
    before = torch.get_num_threads()
    # an error hardly depends on it, and threads wait for each other where the machine is busy
    torch.set_num_threads(a.threads)
    torch.compiler.reset()
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # 2.6
    try:
        facts = machine(a.device)
        with config.patch({limit: COMPILED, f"accumulated_{limit}": COMPILED}):
            found = _points(a)
            # a table of its own: the points' truth is of the bare loss
            chosen = a.factors or factors.FACTORS[:: 4 if a.quick else 1]
            rounded = list(factors.roundings(a.cases, a.dtype, chosen, a.device))
    finally:
        torch.set_num_threads(before)
    if rounded:
        print(factors.markdown(rounded))
    print(report.markdown(found, facts))
    if a.json is not None:
        document = report.as_json(found, facts, {"quick": a.quick, "argv": words})
        document["factors"] = factors.as_json(rounded)
        a.json.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return int(not (report.holds(found) and all(one.holds for one in rounded)))


def _points(a: argparse.Namespace) -> list[Point]:
    """All points; the largest vocabularies last."""
    say, found = Progress(), list[Point]()
    runs = Runs(a.providers, a.device)
    inputs = [(v, dtype, d) for v in sorted(a.vocab) for dtype in a.dtype for d in a.distributions]
    for number, (vocab, dtype, name) in enumerate(inputs, 1):
        say.prefix = f"[{number}/{len(inputs)}] {name} V {vocab} {spelled(dtype)}"
        for point in points(a.cases, dtype, name, a.temperature, vocab, runs):
            say(f"{point.case} T {point.temperature:g}")
            found.append(point)
    say.clear()
    return found


if __name__ == "__main__":
    sys.exit(main())
