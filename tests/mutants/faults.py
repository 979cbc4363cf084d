"""The list of faults: how it is read, and where each of them stands in the tree.

An entry of `csrc.txt`, `python.txt`, `triton.txt` and `parallel.txt`:

    kl-turned: divergence.h
        The log ratio of kl is turned round.
        - weighted(p, logp - logq)
        + weighted(p, logq - logp)

The first line names the fault and the file, found by its name wherever it lies in the tree. `-` is
the old text and `+` the new one; several lines of each are joined. The old text must occur once in
the file, or behind a line `@ text`, which must itself occur once: there the first one counts. Where
the file has it no longer, one other file of the area must.
A line `hangs` says that a run without end is how the fault shows.

A line `tests:` at the left margin names the tests of all entries below it, by function, or by
`file::function` where several files have one. `binary` is the kernels' own test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
AREAS = ("csrc", "python", "triton", "parallel")
LEAST = 80
SUFFIXES = (".py", ".h", ".inl", ".cpp")
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

    def place(self, root: Path = ROOT) -> tuple[Path, str]:
        """The file that the fault goes into, and its text with the fault in it.

        Raises:
            ValueError: the old text is in no file of the area, or in several, or twice in one.
        """
        texts = _texts(root / ("csrc" if self.area == "csrc" else "fastkd"))
        named = [path for path in texts if path.as_posix().endswith("/" + self.file)]
        fits = [path for path in named if self._fits(texts[path])]
        if not fits:  # code that has moved is the same fault
            fits = [path for path in texts if self._fits(texts[path])]
        if len(fits) != 1:
            raise ValueError(f"{self.id}: its old text stands in {len(fits)} files, expected one")
        return fits[0], self._applied(texts[fits[0]])

    def _fits(self, text: str) -> bool:
        before, behind = text.count(self.after), text.count(self.old)
        if not self.after:
            return behind == 1
        return before == 1 and self.old in text[text.index(self.after) :]

    def _applied(self, text: str) -> str:
        at = text.index(self.old, text.index(self.after) + len(self.after))
        return text[:at] + self.new + text[at + len(self.old) :]


@cache
def _texts(folder: Path) -> dict[Path, str]:
    """As they are before the first fault; a run puts them back."""
    return {path: path.read_text() for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES}


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
        every = files.get(function, [])
        there = [path for path in every if path.stem == stem] or every
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
            fault.place()
            nodes(fault.tests, files)
        except ValueError as error:
            said.append(str(error))
    return said
