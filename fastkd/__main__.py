"""python -m fastkd info [--json]"""

from __future__ import annotations

import argparse
import json

from fastkd import info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastkd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, backend, instruction set, threads, GPU")
    command.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    facts = info()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        print(f"{name:10} {'not available' if value is None else value}")


if __name__ == "__main__":
    main()
