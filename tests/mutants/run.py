"""Seeds the listed faults, one at a time, and reports which of them the suite notices.

    python tests/mutants/run.py [--check] [--area AREA] [--only ID] [-j N] [--json FILE]

Each fault goes into a copy of the tree; the tests that its entry names run there, up to the first
that fails. They run on the tree as it is, too: a selection that fails there says nothing.

Exit status: 0 if the share caught is reached and every fault builds, 1 if not, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mutants import build, faults  # noqa: E402
from mutants.faults import BINARY, ROOT, Fault  # noqa: E402

SHARE = 0.95
# Of the kernels' own test: random cases, which stop at the first failure, then the fixed ones. Its
# seconds are those of a clock; what ends it is how many the processor has worked, so that a busy
# machine sees as many cases.
FUZZ, FUZZ_SECONDS = ("fuzz", "3600", "1"), 5
# a run that waits and does not work is ended by the clock, after so many times its seconds
PATIENCE = 60
LEFT_OUT = (".git", ".venv", "build", "dist", "demo", "results", "__pycache__", ".*_cache", "*.so")
# pytest's exit statuses
PASSED, FAILED = 0, 1
OUT_OF_TIME = (-signal.SIGXCPU, -signal.SIGKILL)
CAUGHT, SURVIVED, BROKEN, ENDLESS = "caught", "SURVIVED", "does not build", "timed out"


@dataclass
class Outcome:
    id: str
    area: str
    file: str
    result: str
    seconds: float
    by: str = ""  # the first line of what noticed it
    words: str = ""
    diff: str = ""


class Workshop:
    """The copies of the tree, one for each worker and one that stays as it is."""

    def __init__(self, folder: Path, workers: int, seconds: int) -> None:
        self.folder, self.seconds = folder, seconds
        self.cache = ROOT / "build" / "mutants"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.plain = self._copy("plain")
        self.free = [self._copy(f"tree{number}") for number in range(workers)]
        self.files = faults.test_files()
        self.lock = threading.Lock()
        os.environ["PYTHONPATH"] = str(HERE)  # where `preload` stands
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(["preload"])

    def _copy(self, name: str) -> Path:
        to = self.folder / name
        shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for path in (ROOT / "fastkd").glob("*.so"):
            shutil.copy2(path, to / "fastkd")
        return to

    def borrow(self) -> Path:
        with self.lock:
            return self.free.pop()

    def give_back(self, tree: Path) -> None:
        with self.lock:
            self.free.append(tree)

    # ---- one run

    def noticed(self, tree: Path, fault: Fault, file: str | None) -> tuple[str, str]:
        """(result, what failed first) of the fault's tests; file: where the fault is, if any."""
        if BINARY in fault.tests:
            result, said = self._binary(build.binary(tree, self.plain, self.cache, file))
            if result != SURVIVED:
                return result, said
        nodes = faults.nodes(fault.tests, self.files)
        if not nodes:
            return SURVIVED, ""
        if fault.area == "csrc":
            build.extension(tree, self.plain, self.cache, file)
        return self._pytest(tree, nodes, fault.area)

    def _binary(self, path: Path) -> tuple[str, str]:
        for words, seconds in ((FUZZ, FUZZ_SECONDS), (("check",), self.seconds)):
            status, said = _first_failure([str(path), *words], seconds)
            if said or status not in (0, *OUT_OF_TIME):
                return CAUGHT, f"binary: {said}"
            if status != 0 and words != FUZZ:
                return ENDLESS, ""
        return SURVIVED, ""

    def _pytest(self, tree: Path, nodes: list[str], area: str) -> tuple[str, str]:
        log = tree / "pytest.log"
        work = (str(tree), nodes, str(log), area, self.seconds)
        process = self.forks.Process(target=_run_tests, args=work)
        process.start()
        process.join(PATIENCE * self.seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return ENDLESS, ""
        said = log.read_text(errors="replace").splitlines() if log.exists() else []
        if process.exitcode == PASSED:
            return SURVIVED, ""
        if process.exitcode in OUT_OF_TIME:
            return ENDLESS, ""
        first = next((line for line in said if line.startswith(("FAILED", "ERROR "))), "")
        if process.exitcode == FAILED and not first.startswith("ERROR "):
            return CAUGHT, first.removeprefix("FAILED ") or f"exit status {process.exitcode}"
        if process.exitcode is not None and process.exitcode < 0:
            return CAUGHT, f"ended by signal {-process.exitcode}"
        return BROKEN, "\n".join(said[-15:])

    # ---- faults

    def baseline(self, fault: Fault) -> str:
        """What the tests of a fault say of the tree as it is: nothing, if they pass."""
        tree = self.borrow()
        try:
            self._give_extension(tree)
            result, said = self.noticed(tree, fault, None)
            if result != SURVIVED:
                print(f"{' '.join(fault.tests)}: without any fault, {result}: {said}", flush=True)
            return "" if result == SURVIVED else f"{result}: {said}"
        finally:
            self.give_back(tree)

    def _give_extension(self, tree: Path) -> None:
        for path in (self.plain / "fastkd").glob("*.so"):
            shutil.copy2(path, tree / "fastkd")

    def seed(self, fault: Fault) -> Outcome:
        start = time.monotonic()
        tree = self.borrow()
        path, faulty = fault.place(tree)
        text = path.read_text()
        path.write_text(faulty)
        try:
            if fault.area != "csrc":
                self._give_extension(tree)
            result, by = self.noticed(tree, fault, path.name)
        except build.DoesNotBuild as error:
            result, by = BROKEN, str(error)
        finally:
            path.write_text(text)
            self.give_back(tree)
        if result == ENDLESS and fault.hangs:
            result, by = CAUGHT, "it hangs"
        took = time.monotonic() - start
        name = path.relative_to(tree).as_posix()
        lines = difflib.unified_diff(
            text.splitlines(), faulty.splitlines(), name, name, n=2, lineterm=""
        )
        diff = "" if result == CAUGHT else "\n".join(lines)
        return Outcome(fault.id, fault.area, name, result, round(took, 1), by, fault.words, diff)


def _work_at_most(seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))


def _first_failure(command: list[str], seconds: int) -> tuple[int, str]:
    """(exit status, first line of a failure), after which the command is not waited for."""
    ours, its = pty.openpty()  # to a terminal, a line is written when it is there
    work = partial(_work_at_most, seconds)
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, preexec_fn=work) as process:
        os.close(its)
        timer = threading.Timer(PATIENCE * seconds, process.kill)
        timer.start()
        try:
            with os.fdopen(ours, errors="replace") as lines:
                for line in lines:
                    if line.startswith("FAILED"):
                        process.kill()
                        return 1, line.strip()
        except OSError:  # the other end is closed: the command is over
            pass
        finally:
            timer.cancel()
    return process.returncode, ""


def _run_tests(tree: str, nodes: list[str], log: str, area: str, seconds: int) -> None:
    """In a process of its own: pytest in the tree, up to the first failure."""
    _work_at_most(seconds)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(tree)
    here = {str(ROOT), str(ROOT / "tests"), str(HERE)}
    sys.path[:] = [tree, *(path for path in sys.path if path not in here and path != "")]
    os.environ["PYTHONPATH"] = tree
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ.setdefault("FASTKD_TEST_SEED", "1")
    for name in [name for name in sys.modules if name.split(".")[0] in ("fastkd", "mutants")]:
        del sys.modules[name]
    import pytest

    words = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if area == "triton":  # the other backends run the same tests
        words += ["-k", "gpu"]
    elif area in ("csrc", "python"):
        words += ["-k", "not gpu"]
    status = pytest.main([*words, *nodes])
    sys.stdout.flush()
    os._exit(int(status))


def run_all(
    chosen: list[Fault], jobs: int, seconds: int, to: Path | None
) -> tuple[list[Outcome], list[str]]:
    """What came of every fault, and the selections that fail without one."""
    selections = {(fault.area == "csrc", fault.tests): fault for fault in chosen}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        workshop = Workshop(Path(folder), jobs, seconds)
        with ThreadPoolExecutor(jobs) as pool:
            seeded = [pool.submit(workshop.seed, fault) for fault in chosen]
            plain = [pool.submit(workshop.baseline, fault) for fault in selections.values()]
            for future in as_completed(seeded):
                outcome = future.result()
                outcomes.append(outcome)
                print(f"{outcome.id}: {outcome.result} ({outcome.seconds} s) {outcome.by[:100]}")
                sys.stdout.flush()
                if to is not None:
                    to.write_text(json.dumps([asdict(x) for x in outcomes], indent=1))
    names = [" ".join(tests) for _, tests in selections]
    said = [future.result() for future in plain]
    return outcomes, [
        f"{name}: without any fault, {x}" for name, x in zip(names, said, strict=True) if x
    ]


def table(outcomes: list[Outcome], seconds: float) -> str:
    lines = [
        f"{x.id:32} {x.file:34} {x.result:14} {x.seconds:6.0f} s  {x.by[:70]}" for x in outcomes
    ]
    for x in outcomes:
        if x.result != CAUGHT:
            lines += ["", f"{x.result}: {x.id}: {x.words}", x.by, x.diff]
    caught = sum(x.result == CAUGHT for x in outcomes)
    lines += ["", "area       faults  caught"]
    for area in faults.AREAS:
        own = [x for x in outcomes if x.area == area]
        lines += (
            [f"{area:10} {len(own):6}  {sum(x.result == CAUGHT for x in own):6}"] if own else []
        )
    share = caught / max(len(outcomes), 1)
    lines.append(
        f"{len(outcomes)} faults, {caught} caught ({share:.1%}), {seconds / 60:.1f} minutes"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only see that every fault applies")
    parser.add_argument("--area", action="append", choices=faults.AREAS)
    parser.add_argument("--only", action="append", metavar="ID")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=int, default=300, help="of work in one run, at most")
    options = parser.parse_args()
    said = faults.problems()
    if options.check and len(faults.every()) < faults.LEAST:
        said.append(f"{len(faults.every())} faults, expected at least {faults.LEAST}")
    if said:
        print("\n".join(said), file=sys.stderr)
        return 1 if options.check else 2
    chosen = [x for x in faults.every() if x.area in (options.area or faults.AREAS)]
    if options.only:
        chosen = [x for x in chosen if x.id in options.only]
    if options.check or not chosen:
        print(f"{len(chosen)} faults, each applies once")
        return 0 if chosen else 2
    start = time.monotonic()
    outcomes, wrong = run_all(chosen, max(1, options.jobs), options.seconds, options.json)
    print(table(outcomes, time.monotonic() - start))
    print("\n".join(wrong))
    caught = sum(x.result == CAUGHT for x in outcomes)
    builds = all(x.result != BROKEN for x in outcomes)
    return 0 if builds and not wrong and caught >= SHARE * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
