"""python -m bench [CASE ...]: speed and memory of fastkd's losses against what they replace."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench import report
from bench.cases import CASES, DTYPES, SHAPE_SETS, Shape
from bench.cli import Progress, device, listed, output, positive
from bench.measure import MAX_ROUNDS, MIN_ROUNDS, Plan, measure, out_of_memory
from bench.providers import DEFAULT_PROVIDERS, DEMO_PROVIDERS, PROVIDERS, TOY_PROVIDERS
from bench.result import Result

SECONDS = 6.0
GPU_SECONDS = 2.0  # runs take milliseconds there
DEMO_SECONDS = 8.0


def _shapes(text: str) -> list[Shape]:
    shapes: list[Shape] = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if part in SHAPE_SETS:
            shapes += SHAPE_SETS[part]
        elif sizes:
            shapes.append(Shape(int(sizes[1]), int(sizes[2]), "asked for"))
        else:
            raise argparse.ArgumentTypeError(
                f"shapes: got {part!r}, expected ROWSxVOCAB such as 512x32000, or one of the sets "
                f"{', '.join(SHAPE_SETS)}"
            )
    if not shapes:
        raise argparse.ArgumentTypeError(f"shapes: got {text!r}, expected at least one shape")
    return shapes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("cases", nargs="*", metavar="CASE", help="names of cases (all; see --list)")
    p.add_argument("--list", action="store_true", help="list what there is, and stop")
    sets = ", ".join(SHAPE_SETS)
    p.add_argument("--shapes", type=_shapes, help=f"ROWSxVOCAB,... or a set: {sets}")
    p.add_argument("--dtype", type=listed(DTYPES, "dtype"), help=",".join(DTYPES))
    p.add_argument("--device", type=device, help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    p.add_argument("--providers", type=listed(PROVIDERS, "providers"), help=",".join(PROVIDERS))
    p.add_argument("--threads", type=positive(int, "threads"), help="CPU threads")
    p.add_argument(
        "--seconds", type=positive(float, "seconds"), help="time budget for each case and shape"
    )
    p.add_argument("--json", type=output, metavar="FILE", help="write everything as JSON")
    p.add_argument("--plot", type=output, metavar="FILE", help="write a picture")
    short = p.add_mutually_exclusive_group()
    short.add_argument("--toy", action="store_true", help="each case once at a tiny size: it runs")
    short.add_argument("--demo", action="store_true", help="kl_div on two vocabularies, a minute")
    return p


def _settle(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Checks the cases and fills what was not given."""
    for name in a.cases:
        if name not in CASES:
            p.error(f"CASE: got {name!r}, expected one of {', '.join(CASES)}")
    if a.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            p.error("--plot: got a file, but matplotlib is not installed")
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    if a.device is None:
        a.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = a.device.type != "cpu"
    if on_gpu and a.device.index is not None:
        torch.get_device_module(a.device).set_device(a.device)  # events go to the current one
    a.cases = list(dict.fromkeys(a.cases)) or (["kl_div"] if a.demo else list(CASES))
    if a.shapes is None:
        default = "toy" if a.toy else "gpu" if on_gpu and not a.demo else "cpu"
        a.shapes = list(SHAPE_SETS[default])
    if a.dtype is None:
        a.dtype = [DTYPES["bfloat16" if on_gpu and not a.demo else "float32"]]
    names = TOY_PROVIDERS if a.toy else DEMO_PROVIDERS if a.demo else DEFAULT_PROVIDERS
    a.providers = [x.name for x in a.providers] if a.providers else list(names)
    if a.seconds is None:
        a.seconds = DEMO_SECONDS if a.demo else GPU_SECONDS if on_gpu else SECONDS


def _print_list() -> None:
    print("cases")
    for case in CASES.values():
        print(f"  {case.name:20} {case.call}")
    print("shapes")
    for name, shapes in SHAPE_SETS.items():
        for shape in shapes:
            print(f"  {name:6} {shape.label:13} {shape.reason}")
    print("providers")
    for provider in PROVIDERS.values():
        print(f"  {provider.name:20} {provider.about}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if fastkd was wrong or failed."""
    p = parser()
    given = sys.argv[1:] if argv is None else argv
    a = p.parse_args(given)
    if a.list:
        _print_list()
        return 0
    _settle(p, a)
    plan = Plan(
        a.providers,
        seconds=a.seconds,
        rounds=(1, 1) if a.toy else (MIN_ROUNDS, MAX_ROUNDS),
        with_forward=not a.demo,
        warm_up=0 if a.toy else 1,
        at_once=not a.toy,
    )
    facts = report.machine(a.device)
    settings = {"seconds": a.seconds, "toy": a.toy, "demo": a.demo, "argv": list(given)}
    groups = _run(a, plan, facts, settings)
    if a.plot is not None:
        from bench.plot import draw

        draw(groups, facts, a.plot)
    ours = [result for group in groups for result in group if result.ours]
    return int(any(result.status in ("wrong", "failed") for result in ours))


def _run(
    a: argparse.Namespace, plan: Plan, facts: dict[str, Any], settings: dict[str, Any]
) -> list[list[Result]]:
    """Measures everything; prints each table, and writes the JSON, when its last shape is done."""
    say = Progress()
    groups: list[list[Result]] = []
    total = len(a.cases) * len(a.dtype) * len(a.shapes)
    number = 0
    for name in a.cases:
        for dtype in a.dtype:
            table: list[list[Result]] = []
            for shape in a.shapes:
                number += 1
                spelled = str(dtype).removeprefix("torch.")
                say.prefix = f"[{number}/{total}] {name} {shape.label} {spelled}"
                try:
                    table.append(measure(CASES[name], shape, dtype, a.device, plan, say))
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    say.clear()
                    print(f"{name} {shape.label} {spelled} skipped: out of memory\n")
            say.clear()
            if table:
                print(report.markdown(table, facts), flush=True)
            groups += table
            if a.json is not None:  # after each table: what is measured is kept if the run is not
                document = report.as_json(groups, facts, settings)
                a.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    if groups:
        print(report.LEGEND)
    return groups


if __name__ == "__main__":
    sys.exit(main())
