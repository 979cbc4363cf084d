"""OpenAI-style chat answers: tokens by their bytes, of the generated text alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastkd.arguments.messages import describe, shown

from .records import Options, Rows
from .wire import answers, field, generated_rows, value


def read(source: Any, options: Options) -> Iterator[Rows]:
    """`choices[].logprobs.content[]`: {token, bytes, logprob, top_logprobs}."""
    known = byte_ids(options.tokenizer)
    for where, answer in answers(source):
        for number, choice in enumerate(field(answer, "choices", where)):
            at = f"{where}.choices[{number}].logprobs"
            content = field(field(choice, "logprobs", at, "logprobs=true"), "content", at)
            rows, tokens = [], []
            for entry in content:
                top = field(entry, "top_logprobs", f"{at}.content", "top_logprobs=k")
                named = [(known(x, f"{at}.content"), value(x, at)) for x in [*top, entry]]
                tokens.append(named[-1][0])
                rows.append(named)
            yield generated_rows(rows, tokens, at)


class byte_ids:
    """The id of an entry with `bytes`: known(entry, where).

    Args:
        tokenizer: {bytes: id}; an object with encode_single_token(bytes) (tiktoken); or a fast
            tokenizer of transformers with byte-level tokens (GPT-2, Llama 3, Qwen).

    Raises:
        TypeError, ValueError: none of these; an entry without bytes, or bytes of no token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._find: Any = None
        if isinstance(tokenizer, Mapping):
            self._find = tokenizer.__getitem__
        elif hasattr(tokenizer, "encode_single_token"):
            self._find = tokenizer.encode_single_token
        elif "ByteLevel" in str(
            getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", "")
        ):
            self._find = _byte_level(tokenizer).__getitem__
        else:
            raise TypeError(
                f"tokenizer: got {describe(tokenizer)}, expected {{bytes: id}}, a tiktoken "
                "encoding or a fast byte-level tokenizer: these answers name tokens by their bytes"
            )

    def __call__(self, entry: Any, where: str) -> int:
        raw = entry.get("bytes")
        if raw is None:
            got = f"the token {shown(entry.get('token'))} without bytes"
            raise ValueError(f"{where}: got {got}, expected them: two ids may have one text")
        try:
            return int(self._find(bytes(raw)))
        except (KeyError, ValueError):
            got = f"the bytes {shown(bytes(raw))}"
            raise ValueError(f"{where}: got {got}, expected those of one of its tokens") from None


def _byte_level(tokenizer: Any) -> dict[bytes, int]:
    """{bytes: id}: a byte is written as itself where it prints, else as a character from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printed}
    others = [byte for byte in range(256) if byte not in letters.values()]
    letters |= {chr(256 + number): byte for number, byte in enumerate(others)}
    added = tokenizer.get_added_vocab()
    found = {text.encode(): index for text, index in added.items()}
    for text, index in tokenizer.get_vocab().items():
        if text not in added:
            found[bytes(letters[letter] for letter in text)] = index
    return found
