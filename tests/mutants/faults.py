"""The list of faults: how it is read, and where each of them stands in the tree.

An entry of `csrc.txt`, `python.txt`, `triton.txt` and `parallel.txt`:

    kl-turned: divergence.h
        The log ratio of kl is turned round.
        - weighted(p, logp - logq)
        + weighted(p, logq - logp)

The first line names the fault and the file, found by its name wherever it lies in the tree. `-` is
the old text and `+` the new one; several lines of each are joined. The old text must occur once in
the file, or once behind a line `@ text`, which must itself occur once: there the first one counts.
A line `hangs` says that a run without end is how the fault shows.

A line `tests:` at the left margin names the tests of all entries below it, by function, or by
`file::function` where several files have one of that name. `binary` is the kernels' own test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
AREAS = ("csrc", "python", "triton", "parallel")
LEAST = 80
BINARY = "binary"


@dataclass
class Fault:
    id: str
    area: str
    file: str
    tests: tuple[str, ...]
    words: str = ""
    old: str = ""
    new: str = ""
    after: str = ""
    hangs: bool = False
    lines: dict[str, list[str]] = field(default_factory=dict)

    def path(self, root: Path = ROOT) -> Path:
        """The one file of this name in csrc or fastkd.

        Raises:
            ValueError: there is none, or more than one; an entry may then name a folder too.
        """
        folders = [root / "csrc"] if self.area == "csrc" else [root / "fastkd"]
        name = Path(self.file).name
        found = [path for folder in folders for path in sorted(folder.rglob(name))]
        found = [path for path in found if path.as_posix().endswith("/" + self.file)]
        if len(found) != 1:
            raise ValueError(f"{self.id}: {len(found)} files are called {self.file}, expected one")
        return found[0]

    def applied(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: the old text is not there, or there more than once.
        """
        start = 0
        if self.after:
            if text.count(self.after) != 1:
                raise ValueError(self._counted("the text after @", text.count(self.after)))
            start = text.index(self.after) + len(self.after)
        count = text.count(self.old, start)
        if count == 0 or (count > 1 and not self.after):
            raise ValueError(self._counted("the old text", count))
        at = text.index(self.old, start)
        return text[:at] + self.new + text[at + len(self.old) :]

    def _counted(self, what: str, count: int) -> str:
        return f"{self.id}: {what} occurs {count} times in {self.file}, expected once"


def read(area: str) -> list[Fault]:
    """The entries of an area's list."""
    faults: list[Fault] = []
    tests: tuple[str, ...] = ()
    for number, line in enumerate((HERE / f"{area}.txt").read_text().splitlines(), 1):
        text = line.strip()
        if not text or line.startswith("#"):
            continue
        if line.startswith("tests:"):
            tests = tuple(text.split()[1:])
        elif not line.startswith(" "):
            name, colon, file = text.partition(": ")
            if not colon:
                raise ValueError(f"{area}.txt:{number}: got {text!r}, expected `id: file`")
            faults.append(Fault(name, area, file, tests))
        elif text == "hangs":
            faults[-1].hangs = True
        elif text[:2] in ("- ", "+ ", "@ ") or text in "-+":
            faults[-1].lines.setdefault(text[0], []).append(text[2:])
        else:
            faults[-1].words = f"{faults[-1].words} {text}".strip()
    for fault in faults:
        fault.old, fault.new = ("\n".join(fault.lines.get(sign, [])) for sign in "-+")
        fault.after = "\n".join(fault.lines.get("@", []))
    return faults


def every() -> list[Fault]:
    return [fault for area in AREAS for fault in read(area)]


def test_files(root: Path = ROOT) -> dict[str, list[Path]]:
    """The files in which a test function of each name stands."""
    found: dict[str, list[Path]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(path)
    return found


def nodes(tests: tuple[str, ...], files: dict[str, list[Path]], root: Path = ROOT) -> list[str]:
    """What pytest is asked for.

    Raises:
        ValueError: no test of that name, or several of them and no file named.
    """
    out = []
    for name in tests:
        if name == BINARY:
            continue
        stem, _, function = name.rpartition("::")
        there = [path for path in files.get(function, []) if stem in ("", path.stem)]
        if len(there) != 1:
            raise ValueError(f"tests: {len(there)} test files have {name}, expected one")
        out.append(f"{there[0].relative_to(root).as_posix()}::{function}")
    return out


def problems() -> list[str]:
    """What is wrong with the list as it stands: nothing, if every fault can be seeded."""
    said: list[str] = []
    try:
        faults = every()
    except ValueError as error:
        return [str(error)]
    files = test_files()
    ids = [fault.id for fault in faults]
    said += [
        f"{name}: two faults of this id" for name in sorted({x for x in ids if ids.count(x) > 1})
    ]
    for fault in faults:
        try:
            if not (fault.words and fault.old and fault.tests) or fault.old == fault.new:
                raise ValueError(f"{fault.id}: no words, no tests, or nothing that it changes")
            fault.applied(fault.path().read_text())
            nodes(fault.tests, files)
        except ValueError as error:
            said.append(str(error))
    return said
