"""PTX text to a program: statements with typed operands, cut into basic blocks.

Only what a kernel's entry holds is read. A basic block ends at a branch, at a label, and behind a
statement that other blocks of threads may have waited for (`HANDS_OVER`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np


class Register(NamedTuple):
    file: str  # p, rs, r, rd
    index: int


class Address(NamedTuple):
    base: Any  # Register, Name or Number
    offset: int


class Name(str):
    """A label, a parameter, a special register or an array in shared memory."""


class Vector(tuple[Any, ...]):
    """Operands in braces, or a predicate and its opposite: p|q."""

    __slots__ = ()


class Number(NamedTuple):
    """An immediate: its bits where it is a float, else an integer."""

    value: int
    bits: int  # 32 or 64 of a float, 0 of an integer


@dataclass(frozen=True)
class Statement:
    opcode: str
    operands: tuple[Any, ...]
    guard: tuple[Register, bool] | None  # (predicate, whether it is negated)
    text: str

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))


@dataclass
class BasicBlock:
    statements: list[Statement] = field(default_factory=list)
    target: int | None = None  # of its branch
    guard: tuple[Register, bool] | None = None  # of its branch
    falls: bool = True  # whether the next block may follow
    hands_over: bool = False

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(statement.opcode for statement in self.statements)


@dataclass
class Program:
    name: str
    params: list[tuple[str, str]]  # (type, name)
    threads: int
    registers: dict[str, int]  # file -> how many
    shared: dict[str, int]  # array in shared memory -> its address
    shared_size: int
    blocks: list[BasicBlock]

    @cached_property
    def joins(self) -> list[int]:
        """Where the ways out of each block meet again; len(blocks) is the end of the program."""
        end = len(self.blocks)
        next_of = [
            [x for x in (b.target, i + 1 if b.falls else None) if x is not None] or [end]
            for i, b in enumerate(self.blocks)
        ]
        every = (1 << (end + 1)) - 1
        after = [every] * end + [1 << end]  # bit sets: blocks that every way from here passes
        changed = True
        while changed:
            changed = False
            for i in reversed(range(end)):
                common = every
                for x in next_of[i]:
                    common &= after[x]
                common |= 1 << i
                changed |= common != after[i]
                after[i] = common
        # of those, the nearest is the one that has all others behind it
        return [
            max(
                (j for j in range(end + 1) if j != i and after[i] >> j & 1),
                key=lambda j: after[j].bit_count(),
            )
            for i in range(end)
        ]


FILES = {"pred": "p", "b16": "rs", "b32": "r", "b64": "rd"}
_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)(.*?)^\{$(.*?)^\}", re.S | re.M)
_PARAM = re.compile(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)")
_FILE = re.compile(r"\.reg\s+\.(\w+)\s+%(\w+?)<(\d+)>")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]")
_LABEL = re.compile(r"\s*([$\w]+):\s*$")
_STATEMENT = re.compile(r"(?:@(!?)%(\w+)\s+)?([\w.:]+)\s*(.*)", re.S)
_SCRATCH = re.compile(r"\{ \.reg \.b32 (\w+); (mov\.b64 [^;]*;) \}")
HANDS_OVER = ("ld.volatile", "atom")


@lru_cache(maxsize=64)
def parse(text: str) -> Program:
    text = _SCRATCH.sub(_without_scratch, re.sub(r"//[^\n]*", "", text))
    found = _ENTRY.search(text)
    if found is None:
        raise ValueError("no entry in the PTX")
    name, params, directives, body = found.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if threads is None:
        raise ValueError(f"{name} does not say how many threads it takes")
    shared, size = {}, 0
    for align, array, length in _SHARED.findall(text):
        size = -(-size // int(align)) * int(align)
        shared[array] = size
        size += int(length or 0)
    program = Program(
        name,
        _PARAM.findall(params),
        int(threads[1]),
        {file: int(n) for _, file, n in _FILE.findall(body)},
        shared,
        size,
        [],
    )
    program.blocks = _cut(body)
    return program


def _without_scratch(found: re.Match[str]) -> str:
    """The half of a number that goes into a register of its own scope, and is not used."""
    return re.sub(rf"\b{found[1]}\b", "_", found[2])


def _cut(body: str) -> list[BasicBlock]:
    blocks, labels, to = [BasicBlock()], {}, {}
    for line in body.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].statements:
                blocks.append(BasicBlock())
            labels[label[1]] = len(blocks) - 1
            continue
        for raw in line.split(";"):
            text = raw.strip().strip("{} \t") if raw.strip() in ("{", "}") else raw.strip()
            if not text or text.startswith("."):
                continue
            statement = _statement(text)
            block = blocks[-1]
            block.statements.append(statement)
            kind = statement.parts[0]
            if kind == "bra":
                to[len(blocks) - 1] = statement.operands[0]
                block.guard, block.falls = statement.guard, statement.guard is not None
            elif kind in ("ret", "exit"):
                block.falls = statement.guard is not None
            block.hands_over = statement.opcode.startswith(HANDS_OVER)
            if kind in ("bra", "ret", "exit") or block.hands_over:
                blocks.append(BasicBlock())
    for i, label in to.items():
        blocks[i].target = labels[label]
    return blocks


def _statement(text: str) -> Statement:
    match = _STATEMENT.match(text)
    if match is None:
        raise ValueError(f"cannot read {text!r}")
    negated, predicate, opcode, rest = match.groups()
    guard = None if predicate is None else (_register(predicate), bool(negated))
    return Statement(opcode, tuple(operand(part) for part in split(rest)), guard, text)


def split(text: str) -> list[str]:
    """Cuts at the commas that stand in no bracket."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def _register(text: str) -> Register:
    match = re.fullmatch(r"([a-z]+)(\d+)", text)
    if match is None:
        raise ValueError(f"%{text} is no register")
    return Register(match[1], int(match[2]))


def operand(text: str) -> Any:
    if text.startswith("{"):
        return Vector(operand(part) for part in split(text[1:-1]))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(operand(base), int(offset, 0) if offset else 0)
    if "|" in text:
        return Vector(operand(part) for part in text.split("|"))
    if text.startswith("%"):
        return _register(text[1:]) if re.fullmatch(r"%[a-z]+\d+", text) else Name(text)
    if text[:2].lower() in ("0f", "0d") and len(text) > 9:
        return Number(int(text[2:], 16), 32 if text[1] in "fF" else 64)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return Number(int(np.float32(text).view(np.uint32)), 32)
    if re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)", text):
        return Number(int(text, 0), 0)
    return Name(text)
