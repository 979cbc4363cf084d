"""python -m fastkd info | scan"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastkd import info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastkd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, backend, instruction set, threads, GPU")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_info)
    command = commands.add_parser("scan", help="find the distillation losses of Python sources")
    command.add_argument("path", type=Path, help="a file or a folder; nothing is changed")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_scan)
    arguments = parser.parse_args(argv)
    arguments.run(parser, arguments)


def _info(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    facts = info()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        print(f"{name:10} {'not available' if value is None else value}")


def _scan(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    from fastkd.scan import scan

    try:
        found: list[Any] = list(scan(arguments.path))
    except FileNotFoundError as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps([loss._asdict() for loss in found], indent=2))
        return
    for loss in found:
        print(f"{loss.file}:{loss.line}")
        print(f"  - {loss.code}" if loss.code else "  ?")
        if loss.replacement:
            print(f"  + {loss.replacement}")
        if loss.note:
            print(f"    ({loss.note})")
    print(f"{len(found)} found, nothing changed")


if __name__ == "__main__":
    main()
