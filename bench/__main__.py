"""python -m bench [FAMILY] [CASE ...]: speed and memory of fastkd against what it replaces.

Without a family the losses are measured. The families: {families}.
`python -m bench FAMILY --help` shows the options of one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench.families import FAMILIES, load
from bench.harness import cli
from bench.harness.family import Family
from bench.harness.gate import out_of_memory
from bench.harness.machine import machine
from bench.harness.result import Result


def parser(family: Family) -> argparse.ArgumentParser:
    """The command line of one family."""
    assert __doc__ is not None
    p = argparse.ArgumentParser(
        prog=f"python -m bench {family.name}".removesuffix(" losses"),
        description=f"{__doc__.format(families=', '.join(FAMILIES))}\n{family.about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_common(p, family)
    family.add_options(p)
    return p


def print_list(family: Family) -> None:
    print(f"families: {', '.join(FAMILIES)}\ncases of {family.name}")
    for name, about in family.cases.items():
        print(f"  {name:22} {about}")
    print("shapes")
    for name, shapes in family.shapes.items():
        for shape in shapes:
            print(f"  {name:10} {shape.label:20} {getattr(shape, 'reason', '')}")
    print("providers")
    for name, about in family.providers.items():
        print(f"  {name:22} {about}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if fastkd was wrong, failed or too slow."""
    words = list(sys.argv[1:] if argv is None else argv)
    named = bool(words) and words[0] in FAMILIES
    family = load(words[0] if named else "losses")
    p = parser(family)
    a = p.parse_args(words[1:] if named else words)
    if a.list:
        print_list(family)
        return 0
    cli.settle(p, a, family)
    before = torch.get_num_threads()
    torch.set_num_threads(a.threads or family.threads or before)
    try:
        return measured(family, a, words)
    finally:
        torch.set_num_threads(before)


def measured(family: Family, a: argparse.Namespace, words: list[str]) -> int:
    """Measures, prints and writes; returns the exit status."""
    facts = machine(a.device)
    settings = {"family": family.name, "argv": words, "seconds": a.seconds, "toy": a.toy}
    groups = run(family, a, facts, settings)
    if groups:
        print("\n".join(filter(None, (family.extra(groups, a), family.legend))))
    if getattr(a, "plot", None) is not None:
        family.draw(groups, facts, a.plot)
    complaints = family.complaints(groups, a)
    for text in complaints:
        print(text)
    ours = [result for group in groups for result in group if result.ours]
    bad = any(result.status in ("wrong", "failed") for result in ours)
    return int(bad or bool(complaints))


def run(
    family: Family, a: argparse.Namespace, facts: dict[str, Any], settings: dict[str, Any]
) -> list[list[Result]]:
    """Measures everything; prints each table, and writes the JSON, when its last input is done."""
    say = cli.Progress()
    groups: list[list[Result]] = []
    inputs = list(family.inputs(a))
    number = itertools.count(1)
    for heading, part in itertools.groupby(inputs, key=lambda one: one.heading):
        shown: list[list[Result]] = []
        for one in part:
            say.prefix = f"[{next(number)}/{len(inputs)}] {one.name}"
            try:
                shown.append(family.measure(one, a, say))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                say.clear()
                print(f"{one.name} skipped: out of memory\n")
        say.clear()
        if shown:
            print(family.markdown(heading, shown, facts), flush=True)
        groups += shown
        if a.json is not None:  # after each table: what is measured is kept if the run is not
            records = [one.record(family.times) for group in groups for one in group]
            document = {"machine": facts, "settings": settings, "results": records}
            a.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    return groups


if __name__ == "__main__":
    sys.exit(main())
