"""python -m bench.accuracy: errors of loss and gradient against the truth, beside plain torch's.

The statement: in no case, dtype, distribution, temperature and vocabulary is fastkd's error above
eager or compiled torch's, and its bfloat16 gradient is the correctly rounded one in at least
99.9 % of its elements. Exit status 1 where it does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo

from bench.accuracy import report
from bench.accuracy.inputs import (
    DISTRIBUTIONS,
    QUICK_TEMPERATURES,
    QUICK_VOCABS,
    TEMPERATURES,
    VOCABS,
)
from bench.accuracy.points import DEFAULT_PROVIDERS, QUICK_PROVIDERS, Point, Runs, points
from bench.cases import DENSE, DTYPES
from bench.cli import Progress, device, listed, output, positive
from bench.providers import PROVIDERS
from bench.report import machine

ALL_DTYPES = {**DTYPES, "float64": torch.float64}
QUICK_DTYPES = ("float32", "bfloat16")

# Every case, dtype and kind of shape is one more version of a compiled function to torch, which
# by default gives up at the eighth.
COMPILED = 10_000


def _each(kind: Any, what: str) -> Any:
    """A parser of comma-separated numbers above 0."""
    one = positive(kind, what)

    def parse(text: str) -> list[Any]:
        return list(dict.fromkeys(one(part) for part in text.split(",") if part.strip())) or [
            one(text)
        ]

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
    known = {name: name for name in DISTRIBUTIONS}
    p.add_argument(
        "--distributions", type=listed(known, "distributions"), help=",".join(DISTRIBUTIONS)
    )
    p.add_argument("--vocab", type=_each(int, "vocab"), help="V,... (10 to 262144)")
    p.add_argument("--temperature", type=_each(float, "temperature"), help="T,... (0.1 to 100)")
    p.add_argument("--providers", type=listed(PROVIDERS, "providers"), help=",".join(PROVIDERS))
    p.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu, cuda, ...")
    p.add_argument("--threads", type=positive(int, "threads"), default=1, help="CPU threads (1)")
    p.add_argument("--quick", action="store_true", help="a part, in seconds; no torch.compile")
    p.add_argument("--json", type=output, metavar="FILE", help="write everything as JSON")
    p.add_argument("--plot", type=output, metavar="FILE", help="write a picture")
    return p


def _settle(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Fills what was not given."""
    if a.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            p.error("--plot: got a file, but matplotlib is not installed")
    if a.device.type != "cpu" and a.device.index is not None:
        torch.get_device_module(a.device).set_device(a.device)
    quick = a.quick
    a.cases = a.cases or list(DENSE.values())
    a.dtype = a.dtype or [ALL_DTYPES[name] for name in (QUICK_DTYPES if quick else ALL_DTYPES)]
    a.distributions = a.distributions or list(DISTRIBUTIONS)
    a.vocab = a.vocab or list(QUICK_VOCABS if quick else VOCABS)
    a.temperature = a.temperature or list(QUICK_TEMPERATURES if quick else TEMPERATURES)
    names = QUICK_PROVIDERS if quick else DEFAULT_PROVIDERS
    a.providers = [x.name for x in a.providers] if a.providers else list(names)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if the statement does not hold."""
    p = parser()
    given = sys.argv[1:] if argv is None else argv
    a = p.parse_args(given)
    _settle(p, a)
    before = torch.get_num_threads()
    # an error hardly depends on it, and threads wait for each other where the machine is busy
    torch.set_num_threads(a.threads)
    try:
        facts = machine(a.device)
        found = _run(a)
    finally:
        torch.set_num_threads(before)
    print(report.markdown(found, facts))
    if a.json is not None:
        document = report.as_json(found, facts, {"quick": a.quick, "argv": list(given)})
        a.json.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if a.plot is not None:
        from bench.accuracy.plot import draw

        draw(found, facts, a.plot)
    return int(not report.holds(found))


def _run(a: argparse.Namespace) -> list[Point]:
    """All points; the largest vocabularies last."""
    torch.compiler.reset()
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # 2.6
    with config.patch({limit: COMPILED, f"accumulated_{limit}": COMPILED}):
        return _points(a)


def _points(a: argparse.Namespace) -> list[Point]:
    say = Progress()
    runs = Runs(a.providers, a.device)
    found: list[Point] = []
    inputs = [(v, dtype, d) for v in sorted(a.vocab) for dtype in a.dtype for d in a.distributions]
    for number, (vocab, dtype, name) in enumerate(inputs, 1):
        spelled = report.spelled(dtype)
        say.prefix = f"[{number}/{len(inputs)}] {name} V {vocab} {spelled}"
        for point in points(a.cases, dtype, name, a.temperature, vocab, runs):
            say(f"{point.case} T {point.temperature:g}")
            found.append(point)
    say.clear()
    return found


if __name__ == "__main__":
    sys.exit(main())
