"""python -m fastkd demo | info | scan | doctor | cache | recipes"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fastkd import info


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 for a fault found or a claim missed."""
    parser = argparse.ArgumentParser(prog="python -m fastkd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="distil a language model on real text, every way")
    command.add_argument("path", nargs="?", type=Path, help="(default: Python's own sources)")
    command.add_argument("--preset", default="small", help="tiny, small (default) or gpu")
    command.add_argument("--out", type=Path, default=Path("demo"), help="(default demo)")
    command.add_argument("--seed", type=int, default=0, help="(default 0)")
    text = "from --seed on, over which the gain is measured (default 1)"
    command.add_argument("--seeds", type=int, default=1, help=text)
    command.add_argument("--device", help="(default: a GPU if there is one)")
    command.add_argument("--fresh", action="store_true", help="forget what --out holds")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_demo)
    command = commands.add_parser("info", help="versions, backend, instruction set, threads, GPU")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_info)
    _judging(commands)
    group = commands.add_parser("cache", help="a teacher's outputs on disk")
    actions = group.add_subparsers(dest="action", required=True)
    command = actions.add_parser("info", help="what a cache holds")
    command.add_argument("path", type=Path, help="the cache's folder")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_cache_info)
    command = actions.add_parser("merge", help="name all shards in state.json")
    command.add_argument("path", type=Path, help="the cache's folder")
    command.set_defaults(run=_cache_merge)
    command = actions.add_parser("verify", help="read every byte and compare the hashes")
    command.add_argument("path", type=Path, help="the cache's folder")
    command.set_defaults(run=_cache_verify)
    command = actions.add_parser("import", help="make a cache of another tool's files or answers")
    command.add_argument("--from", dest="format", required=True, help="see teachers/formats")
    command.add_argument("source", metavar="IN", type=Path, help="the file or folder")
    command.add_argument("path", metavar="OUT", type=Path, help="the cache's folder")
    command.add_argument("--vocab-size", type=int, required=True, help="the student's")
    command.add_argument("--kind", help="logprob, prob or logit, where the format leaves it open")
    command.add_argument("--tail", help="of the TopK (default: the format's)")
    command.add_argument("--temperature", type=float, default=1.0, help="the teacher's (default 1)")
    command.add_argument("--dtype", default="float32", help="the values were rounded in")
    command.add_argument("--align", help="llamakd: next or token")
    command.add_argument("--config", type=Path, help="distillkit: the YAML of its compression")
    command.add_argument("--tokens", type=Path, help="a file with input_ids, where IN has none")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_cache_import)
    command = actions.add_parser("export", help="write a cache in another tool's format")
    command.add_argument("--to", dest="format", required=True, help="see teachers/formats")
    command.add_argument("path", metavar="IN", type=Path, help="the cache's folder")
    command.add_argument("out", metavar="OUT", type=Path, help="the file or folder")
    command.add_argument("--tokens", type=Path, help="a file with input_ids")
    command.set_defaults(run=_cache_export)
    command = commands.add_parser(
        "recipes", help="a demonstration of each method, with its control"
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="none: list them")
    command.add_argument("--all", action="store_true", help="run every one")
    command.add_argument("--seeds", type=int, help="how many (default: as many as claimed over)")
    command.add_argument("--first-seed", type=int, default=0, help="(default 0)")
    command.add_argument("--size", type=float, default=1.0, help="share of the steps (default 1)")
    command.add_argument("--jobs", type=int, help="processes (default: one per core)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the gains there")
    command.set_defaults(run=_recipes)
    arguments = parser.parse_args(argv)
    return arguments.run(parser, arguments) or 0


def _judging(commands: Any) -> None:
    """The commands that judge a program: both end with 1 where they name a fault."""
    text = "find the distillation losses of Python sources, and what to write in their place"
    end = (
        "exit status: 0 no fault was found, 1 a loss has a fault, 2 wrong usage. A loss that can be"
    )
    end += " written in another way is no fault. --diff and --write end with the same status."
    command = commands.add_parser("scan", help=text, description=text, epilog=end)
    text = "files (.py, .ipynb) or folders; nothing is changed without --write"
    command.add_argument("paths", nargs="+", metavar="path", type=Path, help=text)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--diff", action="store_true", help="show what --write would change")
    text = "write the lines that have the same value for every shape; the rest stay"
    command.add_argument("--write", action="store_true", help=text)
    command.set_defaults(run=_scan)
    text = "run ten steps of a training script, and name what is wrong with its distillation"
    end = "exit status: 0 no fault was found, 1 a loss has a fault, "
    end += "2 the script failed or wrong usage"
    command = commands.add_parser("doctor", help=text, description=text, epilog=end)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--steps", type=int, default=10, help="of distillation (default 10)")
    command.add_argument("script", type=Path, help="a Python file; it runs as it would alone")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    command.set_defaults(run=_doctor)


def _demo(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from fastkd.demo import PRESETS, report, run

    if arguments.preset not in PRESETS:
        parser.error(f"--preset: got {arguments.preset!r}, expected one of {list(PRESETS)}")
    try:
        found = run(
            arguments.path,
            preset=arguments.preset,
            out=arguments.out,
            seed=arguments.seed,
            seeds=arguments.seeds,
            fresh=arguments.fresh,
            device=arguments.device,
        )
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    print(report.text(found, arguments.out))
    return 0


def _info(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    _print(info(), arguments.json)


def _cache_info(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from fastkd.teachers import store

    try:
        facts = store.Reader(arguments.path).facts()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if not arguments.json:
        facts = {**facts.pop("teacher"), **facts}
    _print(facts, arguments.json)
    return 0


def _cache_merge(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from fastkd.teachers import store

    try:
        changed = store.merge(arguments.path)
        reader = store.Reader(arguments.path)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    of = "" if reader.spec.total is None else f" of {reader.spec.total}"
    facts = f"{len(reader)} samples{of} in {len(reader.shards)} shards"
    print(f"{arguments.path}: {facts}, {'merged' if changed else 'merged before'}")
    return 0


def _cache_verify(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from fastkd.teachers import store

    try:
        reader = store.Reader(arguments.path)
        faults = list(reader.faults(progress=True))
    except (OSError, ValueError) as error:
        faults = [str(error)]
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"{arguments.path}: {len(reader)} samples, {reader.tokens} tokens, as written")
    return int(bool(faults))


def _cache_import(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from fastkd.teachers.formats.cache import import_cache

    names = ("kind", "tail", "temperature", "dtype", "align", "config", "tokens", "vocab_size")
    given = {name: getattr(arguments, name) for name in names}
    try:
        report = import_cache(arguments.format, arguments.source, arguments.path, **given)
    except (OSError, TypeError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    print(report.json() if arguments.json else report)
    return 0


def _cache_export(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from fastkd.teachers.formats.cache import export_cache

    try:
        count = export_cache(
            arguments.path, arguments.format, arguments.out, tokens=arguments.tokens
        )
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.out}: {count} samples")
    return 0


def _recipes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from fastkd.recipes import runner

    recipes = runner.known()
    names = list(recipes) if arguments.all else arguments.names
    if not names:
        print(runner.listing(list(recipes.values())))
        return 0
    for file in filter(None, (arguments.json, arguments.plot)):
        if not file.parent.is_dir():  # found out before minutes of training, not after
            parser.error(f"got {str(file)!r}, expected a file in a folder that exists")
    try:
        result = runner.run(
            names,
            seeds=arguments.seeds,
            first_seed=arguments.first_seed,
            size=arguments.size,
            jobs=arguments.jobs,
        )
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    print(runner.as_text(result))
    if arguments.json:
        runner.write(result, arguments.json)
    if arguments.plot:
        runner.plot(result, arguments.plot)
    missed = runner.missed(result)
    for line in missed:
        print(line, file=sys.stderr)
    return int(bool(missed))


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(10, *map(len, facts))
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        print(f"{name:{width}} {'not available' if value is None else value}")


def _scan(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from fastkd.scan import scan
    from fastkd.scan.rules import FAULTS

    rewrites = arguments.diff or arguments.write
    if arguments.json and rewrites:
        parser.error("--json: got it with --diff or --write, expected one of them alone")
    try:
        found: list[Any] = list(scan(*arguments.paths))
    except FileNotFoundError as error:
        parser.error(str(error))
    faulty = sum(bool(loss.faults) for loss in found)
    status = int(faulty > 0)
    if rewrites:
        _rewrite(found, arguments)
        return status
    if arguments.json:
        print(json.dumps([loss._asdict() for loss in found], indent=2))
        return status
    for loss in found:
        cell = "" if loss.cell is None else f"cell {loss.cell}:"
        print(f"{loss.file}:{cell}{loss.line}")
        print(f"  - {loss.code}" if loss.code else "  ?")
        if loss.replacement:
            print(f"  + {loss.replacement}")
        for note in filter(None, loss.note.split("; ")):
            print(f"    note: {note}")
        for fault in loss.faults:
            print(f"    fault: {fault}: {FAULTS[fault][0]}")
    losses = sum(bool(loss.code) for loss in found)
    unread = "" if losses == len(found) else f", {len(found) - losses} not read"
    wrong = f", {faulty} with a fault" if faulty else ""
    print(f"{losses} found{unread}{wrong}, nothing changed")
    return status


def _rewrite(found: list[Any], arguments: argparse.Namespace) -> None:
    from fastkd.scan.rewrite import is_safe, rewritten

    changed = list(rewritten(found))
    for one in changed:
        if arguments.diff:
            print(one.diff(), end="")
        if arguments.write:
            Path(one.file).write_bytes(one.after.encode())
    losses, safe = sum(bool(x.code) for x in found), sum(map(is_safe, found))
    count, unread = sum(x.replaced for x in changed), sum(not x.code for x in found)
    verb = "rewritten" if arguments.write else "would be rewritten by --write"
    said = [f"{count} of {losses} places {verb}"]
    if noted := losses - safe:
        command = shlex.join(["python", "-m", "fastkd", "scan", *map(str, arguments.paths)])
        said += [f"{noted} only noted, the notes are printed by: {command}"]
    if safe > count:
        said += [f"{safe - count} left as they are, for a comment or another loss within them"]
    said += [f"{unread} not read"] if unread else []
    print("\n".join(said), file=sys.stderr)


def _doctor(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from fastkd.doctor import examine, report

    given, own = list(arguments.arguments), arguments.script
    if "--json" in given and own.is_file() and "--json" not in own.read_text(errors="replace"):
        given.remove("--json")  # said behind the script, which knows no such option
        arguments.json = True
    out = sys.stderr if arguments.json else sys.stdout  # JSON alone on standard output
    try:
        with contextlib.redirect_stdout(out):
            seen = examine(own, given, steps=arguments.steps)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if seen.error is not None:
        print(seen.error, file=sys.stderr)
    if arguments.json:
        facts = {"findings": [x._asdict() for x in seen.findings], "steps": seen.steps}
        print(json.dumps({**facts, "failed": seen.error}, indent=2))
    else:
        print(report(seen.findings, seen.steps))
    return seen.status


def _command_line() -> int:
    """`main`, which ends in silence where nobody reads what it prints (`... | head`)."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # here, not at exit, where the interpreter would tell of it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as of a program that SIGPIPE has ended


if __name__ == "__main__":
    sys.exit(_command_line())
