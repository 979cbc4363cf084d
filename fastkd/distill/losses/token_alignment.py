"""Which positions of two tokenizations of the same text have read the same of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import IGNORED

Span = tuple[int, int]
SHOWN = 24  # characters of a text in a message


class Alignment(NamedTuple):
    """Positions that stand beside each other: the first of `student` by the first of `teacher`.

    Args:
        student, teacher: int64 [n] positions in the flat student_shape, teacher_shape.
        student_shape, teacher_shape: (sequences, positions of each, padding among them).
    """

    student: Tensor
    teacher: Tensor
    student_shape: Span
    teacher_shape: Span

    def to(self, device: Any) -> Alignment:
        """The same on another device."""
        return self._replace(student=self.student.to(device), teacher=self.teacher.to(device))

    @property
    def coverage(self) -> float:
        """Pairs per position of the shorter side, padding among them, in [0, 1]."""
        least = min(a * b for a, b in (self.student_shape, self.teacher_shape))
        return self.student.numel() / max(least, 1)


def align(
    student: Any, teacher: Any, *, text: Sequence[str] | None = None, complete: bool = True
) -> Alignment:
    """Positions of student and teacher whose tokens end at the same place of the text.

    There both have read the same, so that what they say of what follows can be compared; positions
    that end within a token of the other have no counterpart. Of several tokens that end at one
    character (the bytes of one, say) the last counts, and none where a later one begins before.
    Positions of no width are padding or special tokens and are left out. A text that was cut at the
    left is compared where both have it.

    Args:
        student, teacher: of each sequence, all padded to one length, (start, end) of each token in
            characters, as a fast tokenizer's return_offsets_mapping=True gives (lists, or int
            [N, L, 2]); or the bytes of each token, b"" for padding and special tokens.
        text: of each sequence, of offsets: then gaps between tokens must be white space.
        complete: both must reach the same end. False where a tokenizer cut a text off at the right
            (truncation=True). Of offsets it may have cut within a character's bytes: with `text`
            an end behind a character of several bytes is then left out.

    Raises:
        TypeError: neither offsets nor bytes.
        ValueError: another number of sequences, sequences of several lengths, offsets that run
            backwards or do not cover the same text, bytes of another text; position and characters
            are named.
    """
    sides = [_sequences("student", student), _sequences("teacher", teacher)]
    count = len(sides[0])
    for name, values in (("teacher", sides[1]), ("text", text)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: got {len(values)} sequences, expected {count}")
    pairs: list[list[int]] = [[], []]
    lengths = [len(side[0]) if count else 0 for side in sides]
    for row in range(count):
        spans = _spans(
            row, [side[row] for side in sides], None if text is None else text[row], complete
        )
        ends = [_ends(side) for side in spans]
        if text is not None and not complete:
            ends = [_sure(side, text[row]) for side in ends]
        first = [min((a for a, b in side if b > a), default=0) for side in spans]
        for end, at in ends[0].items():
            if end > max(first) and end in ends[1]:
                pairs[0].append(row * lengths[0] + at)
                pairs[1].append(row * lengths[1] + ends[1][end])
    student_positions, teacher_positions = (torch.tensor(side, dtype=torch.int64) for side in pairs)
    return Alignment(student_positions, teacher_positions, (count, lengths[0]), (count, lengths[1]))


def align_labelled(student: Tensor, teacher: Tensor, *, ignore_index: int = IGNORED) -> Alignment:
    """The k-th labelled position of each student's sequence beside the k-th of the teacher's.

    What the paper does where a prompt stands before the answer: from the answer's start, as far as
    the shorter one goes. It waits for a device that the labels are on.

    Args:
        student, teacher: labels, int [N, L] and [N, M].
    """
    if student.dim() != 2 or teacher.dim() != 2 or student.size(0) != teacher.size(0):
        raise ValueError(
            f"teacher: got labels {list(teacher.shape)} beside the student's "
            f"{list(student.shape)}, expected [N, L] and [N, M]"
        )
    found: list[list[Tensor]] = [[], []]
    for row in range(student.size(0)):
        at = [(x[row] != ignore_index).nonzero().squeeze(-1) for x in (student, teacher)]
        least = min(at[0].size(0), at[1].size(0))
        for side, x, where in zip(found, (student, teacher), at, strict=True):
            side.append(row * x.size(1) + where[:least])
    none = student.new_zeros(0, dtype=torch.int64)
    student_positions, teacher_positions = (torch.cat([none, *side]) for side in found)
    return Alignment(student_positions, teacher_positions, _shape(student), _shape(teacher))


def first_positions(count: int, student_length: int, teacher_length: int) -> tuple[Tensor, Tensor]:
    """The first min(student_length, teacher_length) positions of `count` sequences, flat on "
    "either side."""
    row, at = torch.arange(count).unsqueeze(-1), torch.arange(min(student_length, teacher_length))
    return (row * student_length + at).flatten(), (row * teacher_length + at).flatten()


def _shape(x: Tensor) -> Span:
    return x.size(0), x.size(1)


def _sequences(name: str, tokens: Any) -> list[list[Any]]:
    rows = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
    if len({len(row) for row in rows}) > 1:
        lengths = sorted({len(row) for row in rows})
        raise ValueError(f"{name}: got sequences of {lengths} positions, expected one length (pad)")
    for row in rows:
        for token in row:
            span = isinstance(token, (list, tuple)) and len(token) == 2
            if not span and not isinstance(token, bytes):
                raise TypeError(
                    f"{name}: got {token!r} for a token, expected (start, end) in characters or "
                    "its bytes"
                )
    return rows


def _spans(row: int, sides: list[list[Any]], text: str | None, complete: bool) -> list[list[Span]]:
    """Start and end of each token in what both have in common."""
    is_bytes = [isinstance(token, bytes) for side in sides for token in side]
    if any(is_bytes) and not all(is_bytes):
        raise TypeError("teacher: got bytes beside offsets, expected one of them on both sides")
    if any(is_bytes):
        return _of_bytes(row, sides, complete)
    for name, side in zip(("student", "teacher"), sides, strict=True):
        _forwards(name, row, side, text)
    reach = [(min(a for a, b in s if b > a), max(b for _, b in s)) for s in sides if _any(s)]
    if len(reach) < 2:
        return sides
    (a, b), (c, d) = reach
    apart = min(b, d) <= max(a, c)
    if apart or (complete and b != d and not _blank(text, min(b, d), max(b, d))):
        hint = "" if apart else "; complete=False where a text was cut off at the right"
        if text is None and not apart:
            hint += ", text= where white space has no token"
        raise ValueError(
            f"teacher: got offsets that cover characters {c} to {d} of sequence {row}, expected "
            f"the student's {a} to {b}{hint}{_shown(text, min(b, d), ' after')}"
        )
    return sides


def _any(side: list[Span]) -> bool:
    return any(b > a for a, b in side)


def _blank(text: str | None, start: int, end: int) -> bool:
    return text is not None and not text[start:end].strip()


def _shown(text: str | None, at: int, what: str) -> str:
    return "" if text is None else f"{what} {text[max(at - SHOWN, 0) : at]!r}"


def _forwards(name: str, row: int, side: list[Span], text: str | None) -> None:
    before, last = None, 0
    for at, (start, end) in enumerate(side):
        if start == end:
            continue
        here = f"{name}: got characters {start} to {end} at position {at} of sequence {row}"
        if end < start or end < last or start < 0:
            raise ValueError(f"{here}, expected none before {last}: offsets of one text, in order")
        if text is None:
            last = end
            continue
        if end > len(text):
            raise ValueError(f"{here}, expected at most {len(text)}, the length of the text")
        if before is not None and start > last and not _blank(text, last, start):
            raise ValueError(
                f"{here}, expected {last}: no token has {text[last:start][:SHOWN]!r}, which is in "
                "the text; is it of another tokenizer or normaliser?"
            )
        before, last = at, end


def _of_bytes(row: int, sides: list[list[bytes]], complete: bool) -> list[list[Span]]:
    student_bytes, teacher_bytes = (b"".join(side) for side in sides)
    shifts = [0, 0]
    if student_bytes != teacher_bytes and student_bytes and teacher_bytes:
        short, long = sorted((student_bytes, teacher_bytes), key=len)
        if long.endswith(short):  # cut at the left
            shifts[student_bytes is not short] = len(long) - len(short)
        elif complete or not long.startswith(short):
            both = enumerate(zip(student_bytes, teacher_bytes, strict=False))
            at = next((i for i, (a, b) in both if a != b), len(short))
            hint = "" if at < len(short) else "; complete=False where one was cut off at the right"
            before = max(at - SHOWN // 2, 0)
            raise ValueError(
                f"teacher: got {teacher_bytes[at : at + SHOWN]!r} at byte {at} of sequence {row} "
                "after "
                f"{teacher_bytes[before:at]!r}, expected the student's "
                f"{student_bytes[at : at + SHOWN]!r}: another "
                f"text, tokenizer or normaliser{hint}"
            )
    spans = []
    for side, end in zip(sides, shifts, strict=True):
        spans.append([(end, end := end + len(token)) for token in side])
    return spans


def _sure(ends: dict[int, int], text: str) -> dict[int, int]:
    """Without the last where the text goes on and a part of its character may be what was read."""
    last = max(ends, default=len(text))
    if last < len(text) and not text[last - 1].isascii():
        ends = {end: at for end, at in ends.items() if end != last}
    return ends


def _ends(side: list[Span]) -> dict[int, int]:
    """The last position that ends at each character, and before which all is read.

    A token of bytes may end within a character and begin within one: where a later token begins
    before an end, what ends there has not been read in full.
    """
    found: dict[int, int] = {}
    unread = math.inf  # where the tokens behind begin
    for at, (start, end) in reversed(list(enumerate(side))):
        if end > start:
            if end <= unread:
                found[end] = at
            unread = min(unread, start)
    return dict(reversed(found.items()))
