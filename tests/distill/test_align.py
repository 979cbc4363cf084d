"""Positions of two tokenizations that have read the same text."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from fastkd import distill

Span = tuple[int, int]


def spans(*pieces: str, start: int = 0) -> list[Span]:
    """Offsets of pieces that follow each other; "" is padding."""
    ends = list(accumulate((len(piece) for piece in pieces), initial=start))
    return [
        (a, b) if piece else (0, 0) for piece, a, b in zip(pieces, ends, ends[1:], strict=False)
    ]


def pairs(found: distill.Alignment) -> list[Span]:
    return list(zip(found.student.tolist(), found.teacher.tolist(), strict=True))


def test_positions_that_end_at_the_same_character() -> None:
    mine, its = spans("the", " ca", "t", " sat"), spans("t", "he cat", " s", "at")
    assert pairs(distill.align([mine], [its])) == [(2, 1), (3, 3)]
    assert pairs(distill.align([mine], [mine])) == [(i, i) for i in range(4)]


def test_sequences_are_positions_of_a_flat_batch() -> None:
    mine = [spans("ab", "c"), spans("d", "e")]
    its = torch.tensor([spans("a", "b", "c"), spans("", "d", "e")])
    found = distill.align(mine, its)
    assert pairs(found) == [(0, 1), (1, 2), (2, 4), (3, 5)]
    assert found.student_shape == (2, 2) and found.teacher_shape == (2, 3)
    assert found.coverage == 1.0 and found.to("meta").student.device.type == "meta"


def test_padding_and_special_tokens_stand_alone() -> None:
    mine, its = spans("", "", "ab", "c", ""), [*spans("a", "b", "c"), (3, 3)]
    assert pairs(distill.align([mine], [its])) == [(2, 1), (3, 2)]
    nothing = distill.align([spans("", "")], [spans("a", "")])
    assert pairs(nothing) == [] and nothing.student.dtype == torch.int64


def test_the_last_of_several_tokens_of_one_character() -> None:
    """Three bytes of a sign beside one token of it."""
    mine, its = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], spans("a", "€", "b")
    assert pairs(distill.align([mine], [its])) == [(0, 0), (3, 1), (4, 2)]


def test_a_token_of_bytes_that_ends_within_a_character() -> None:
    """Bytes 1 2 | 3 1 | 2 3 of two signs: nothing but the last position has read a whole sign."""
    mine, its = [(0, 1), (0, 2), (1, 2), (2, 3)], spans("日", "本", "!")
    assert pairs(distill.align([mine], [its])) == [(2, 1), (3, 2)]
    assert pairs(distill.align([its], [mine])) == [(1, 2), (2, 3)]


def test_cut_at_the_left_and_at_the_right() -> None:
    whole, late = spans("ab", "c", "de", "f"), spans("c", "d", "ef", start=2)
    assert pairs(distill.align([whole], [late])) == [(1, 0), (3, 2)]
    early = spans("a", "bc", "d")
    with pytest.raises(
        ValueError, match=r"characters 0 to 4 of sequence 0, .* 0 to 6; complete=False"
    ):
        distill.align([whole], [early])
    assert pairs(distill.align([whole], [early], complete=False)) == [(1, 1)]


def test_a_cut_within_a_character_of_offsets() -> None:
    """Its first byte has the offsets of the whole character, which the other has read."""
    text = "abécd"
    cut, other = [(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 3), (3, 5)]
    found = distill.align([cut], [other], text=[text], complete=False)
    assert pairs(found) == [(1, 0)]
    assert pairs(distill.align([other], [cut], text=[text], complete=False)) == [(0, 1)]
    # a character of one byte, and a text read to its end: nothing to doubt
    plain = distill.align([cut], [other], text=["abecd"], complete=False)
    assert pairs(plain) == [(1, 0), (2, 1)]
    assert pairs(distill.align([cut], [other[:2]], text=["abé"], complete=False)) == [
        (1, 0),
        (2, 1),
    ]


def test_white_space_that_no_token_has() -> None:
    text = "ab  cd \n"
    mine, its = [(0, 2), (4, 6)], spans("ab", "  c", "d", " \n")
    assert pairs(distill.align([mine], [its], text=[text])) == [(0, 0), (1, 2)]
    with pytest.raises(ValueError, match="cover characters 0 to 8"):
        distill.align([mine], [its])


def test_bytes_of_tokens() -> None:
    """Within a character too; b"" is padding."""
    mine, its = [b"", b"a", b"\xe2", b"\x82\xac!"], [b"a\xe2", b"\x82", b"\xac!", b""]
    assert pairs(distill.align([mine], [its])) == [(2, 0), (3, 2)]
    assert pairs(distill.align([[b"ab", b"c"]], [[b"b", b"c"]])) == [(0, 0), (1, 1)]
    assert pairs(distill.align([[b"ab", b"c"]], [[b"a", b"b"]], complete=False)) == [(0, 1)]


TEXTS = st.lists(
    st.text("ab €\n😀", min_size=1, max_size=30).filter(lambda x: x.strip()),
    min_size=1,
    max_size=3,
)


def cut(text: str, at: list[int]) -> list[str]:
    marks = sorted({0, len(text), *(x % (len(text) + 1) for x in at)})
    return [text[a:b] for a, b in pairwise(marks)]


@settings(max_examples=100, deadline=None, database=None)
@seed(1)
@given(
    texts=TEXTS,
    marks=st.tuples(*[st.lists(st.integers(0, 99), max_size=9)] * 2),
    left=st.integers(0, 4),
)
def test_what_is_paired_has_read_the_same(
    texts: list[str], marks: tuple[list[int], list[int]], left: int
) -> None:
    """All positions of which that is so, as offsets and as bytes, padded on either side."""
    sides = [[cut(text, at) for text in texts] for at in marks]
    padded = []
    for side, front in zip(sides, (True, False), strict=True):
        most = max(len(row) for row in side)
        fill = [[""] * (most - len(row)) for row in side]
        padded.append(
            [[*f, *row] if front else [*row, *f] for f, row in zip(fill, side, strict=True)]
        )
    width = [len(side[0]) for side in padded]
    expected = []
    for row in range(len(texts)):
        read = [[*accumulate(side[row])] for side in padded]
        for i, a in enumerate(read[0]):
            for j, b in enumerate(read[1]):
                if a == b and padded[0][row][i] and padded[1][row][j]:
                    expected.append((row * width[0] + i, row * width[1] + j))
    offsets = [[spans(*row) for row in side] for side in padded]
    raw = [[[piece.encode() for piece in row] for row in side] for side in padded]
    for found in (
        distill.align(*offsets),
        distill.align(*offsets, text=texts),
        distill.align(*raw),
    ):
        assert pairs(found) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ([[(0, 2)]], [[(5, 9)]], {}, "cover characters 5 to 9 of sequence 0, .* student's 0 to 2$"),
        ([[(0, 2), (1, 1)]], [[(0, 2)], [(0, 2)]], {}, "teacher: got 2 sequences, expected 1"),
        ([[(0, 2)]], [[(0, 2)]], {"text": ["a", "b"]}, "text: got 2 sequences, expected 1"),
        (
            [[(0, 2)], []],
            [[(0, 2)]] * 2,
            {},
            r"student: got sequences of \[0, 1\] positions, .*pad",
        ),
        ([[(3, 4), (0, 2)]], [[(0, 4)]], {}, "student: got characters 0 to 2 at position 1"),
        ([[(2, 1)]], [[(0, 2)]], {}, "student: got characters 2 to 1 at position 0"),
        (
            [[(0, 4)]],
            [[(0, 4)]],
            {"text": ["abc"]},
            "0 to 4 at position 0 .* at most 3, the length",
        ),
        (
            [[(0, 1), (2, 4)]],
            [[(0, 4)]],
            {"text": ["abcd"]},
            "student: .* position 1 of sequence 0, expected 1: no token has 'b', .* normaliser",
        ),
        (
            [[b"the ", b"cat"]],
            [[b"the Ca", b"t"]],
            {},
            "teacher: got b'Cat' at byte 4 of sequence 0 after b'the ', expected .* b'cat'",
        ),
        ([[b"abc"]], [[b"ab"]], {}, "at byte 2 .* complete=False"),
        ([[b"abc"]], [[(0, 3)]], {}, "got bytes beside offsets"),
        ([["abc"]], [["abc"]], {}, r"student: got 'abc' for a token, expected \(start, end\)"),
    ],
)
def test_wrong_arguments(student: Any, teacher: Any, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        distill.align(student, teacher, **options)


def test_fast_tokenizers() -> None:
    """Two byte-level vocabularies of one text: offsets as they give them."""
    tokenizers = pytest.importorskip("tokenizers")
    texts = ["def größe(x):\n    return 2 * x  # €\n", "print('naïve', 1_000)\n\n"]
    sides = []
    for size in (260, 300):
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator(texts, vocab_size=size, min_frequency=1, show_progress=False)
        made.enable_padding()
        sides.append([of.offsets for of in made.encode_batch(texts)])
    found = distill.align(*sides, text=texts)
    assert 0.5 < found.coverage <= 1.0
    first, second = ([span for row in side for span in row] for side in sides)
    assert all(first[i][1] == second[j][1] for i, j in pairs(found))
