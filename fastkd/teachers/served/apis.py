"""What each server is asked for the log-probabilities of a text, and how its answer is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import fastkd
from fastkd.arguments.messages import shown

from .. import formats


class Question(NamedTuple):
    """A text, and the rows of it that are asked for.

    tokens: ids [L + 1]; row i is for token i + 1, i from 0 to L - 1.
    rows: the places i that somebody wants; a server that scores the whole text answers all.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]


class Asking(NamedTuple):
    """What all questions of a teacher have in common."""

    model: str | None
    k: int
    temperature: float
    tail: str | None


class Api(NamedTuple):
    """One kind of server.

    bodies(question, asking) are the requests to `path` that a text takes, one as a rule; `format`
    reads the answers. `whole`: an answer has all rows of the text. `tempered`: the server takes a
    temperature for them. `tokenize(text, model)` is (path, body) of a request whose answer has the
    text's ids under "tokens". `listed`: /v1/models tells its models.
    """

    format: str
    path: str
    bodies: Callable[[Question, Asking], list[dict[str, Any]]]
    tokenize: Callable[[str, str | None], tuple[str, dict[str, Any]]] | None = None
    whole: bool = True
    tempered: bool = False
    listed: bool = True


def _vllm(question: Question, asking: Asking) -> list[dict[str, Any]]:
    # one token has to be written; k = 0 answers the text's own tokens alone
    return [
        {
            "model": asking.model,
            "prompt": [*question.tokens],
            "prompt_logprobs": asking.k,
            "max_tokens": 1,
            "temperature": 0.0,
            "return_token_ids": True,
        }
    ]


def _openai(question: Question, asking: Asking) -> list[dict[str, Any]]:
    return [
        {
            "model": asking.model,
            "prompt": [*question.tokens],
            "echo": True,
            "logprobs": max(asking.k, 1),
            "max_tokens": 0,
            "temperature": 0.0,
            "return_tokens_as_token_ids": True,
        }
    ]


def _sglang(question: Question, asking: Asking) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": [*question.tokens],
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": max(asking.k, 1),
            "return_text_in_logprobs": False,
        }
    ]


def _trl(question: Question, asking: Asking) -> list[dict[str, Any]]:
    return [
        {
            "sequences": [[*question.tokens]],
            "prompt_lengths": [1],
            "top_logprobs": max(asking.k, 1),
            "temperature": asking.temperature,
            "response_format": "binary",
        }
    ]


# What llama.cpp writes is of no use, but of a token that is half a character it tells nothing: it
# writes this one. The log-probabilities are those of its logits as they were.
WRITTEN = [["a", 1e6]]


def _llama_cpp(question: Question, asking: Asking) -> list[dict[str, Any]]:
    # it tells of what it writes alone: one token behind each beginning, whose cache it still has
    return [
        {
            "prompt": [*question.tokens[: row + 1]],
            "n_predict": 1,
            "n_probs": asking.k,
            "temperature": 0.0,
            "logit_bias": WRITTEN,
            "cache_prompt": True,
            "post_sampling_probs": False,
        }
        for row in question.rows
    ]


def _v1_tokenize(text: str, model: str | None) -> tuple[str, dict[str, Any]]:
    return "/tokenize", {"model": model, "prompt": text, "add_special_tokens": False}


def _llama_cpp_tokenize(text: str, model: str | None) -> tuple[str, dict[str, Any]]:
    return "/tokenize", {"content": text, "add_special": False}


APIS: dict[str, Api] = {
    "vllm": Api("vllm", "/v1/completions", _vllm, _v1_tokenize),
    "sglang": Api("sglang", "/generate", _sglang, _v1_tokenize),
    "trl": Api("trl", "/get_sequence_logprobs/", _trl, tempered=True, listed=False),
    "openai": Api("vllm-echo", "/v1/completions", _openai),
    "llama.cpp": Api("llama.cpp", "/completion", _llama_cpp, _llama_cpp_tokenize, whole=False),
}
FLOOR = 1e-3  # of a row's mass: what may be missing of it where columns are


def read(
    api: Api, answers: Sequence[Any], question: Question, asking: Asking, vocab_size: int | None
) -> fastkd.TopK:
    """`TopK` [L, K], row i for token i + 1, of the answers to a question's requests.

    Raises:
        ValueError: other tokens, ids that the vocabulary has not, a row without columns, fewer
            columns than were asked for, NaN, or what `formats.read` refuses.
    """
    for answer in answers:  # a reader of files would take text for a path
        if not isinstance(answer, dict):
            raise ValueError(f"answer: got {shown(answer)}, expected an object with its rows")
        if isinstance(error := answer.get("error"), (dict, str)):  # with status 200
            raise ValueError(f"answer: got the error {shown(error)}, expected rows")
    options: dict[str, Any] = {"temperature": asking.temperature, "tail": asking.tail}
    if api.whole:
        said = _whole(api, answers[0], question, options)
    else:
        said = _joined(api, answers, question, options)
    check(said, question, asking, vocab_size)
    return said


def check(said: fastkd.TopK, question: Question, asking: Asking, vocab_size: int | None) -> None:
    """ValueError for what no teacher of this student says."""
    indices, rows = said.indices, torch.tensor(question.rows)
    if said.size(0) != len(question.tokens) - 1:
        got = f"{said.size(0)} rows for {len(question.tokens)} tokens"
        raise ValueError(f"answer: got {got}, expected one for each but the first")
    if vocab_size is not None and bool((indices >= vocab_size).any()):
        raise ValueError(
            f"answer: got the id {int(indices.max())}, expected ids below vocab_size={vocab_size}: "
            "another model's vocabulary? vocab_size= is the served model's where it is larger"
        )
    named = (indices[rows] >= 0).sum(-1)
    if bool((empty := named == 0).any()):
        got = f"no column in row {int(rows[empty][0])} (null, or NaN)"
        raise ValueError(f"answer: got {got}, expected {max(asking.k, 1)}")
    mass = said.logprobs[rows].double().exp().sum(-1)
    few = (named < min(asking.k, vocab_size or asking.k)) & (mass < 1.0 - FLOOR)
    if bool(few.any()):
        got = f"{int(named[few][0])} columns in row {int(rows[few][0])}"
        got += f" with {float(mass[few][0]):.3f}"
        raise ValueError(
            f"answer: got {got} of the mass, expected k={asking.k}: the server's own limit "
            "(vLLM: --max-logprobs)?"
        )


def _whole(api: Api, answer: Any, question: Question, options: dict[str, Any]) -> fastkd.TopK:
    """The rows of a text that was scored as a whole."""
    tokens = torch.tensor(question.tokens)
    reading = formats.read(api.format, answer, tokens=[question.tokens], **options)
    record = next(reading)
    next(reading, None)  # an answer to more texts than one is an error of the reader's
    said = record.aligned()
    named = (said.indices >= 0).any(-1)
    own = (said.indices == tokens[1 : 1 + said.size(0), None]).any(-1)
    # each row names its own token, but for one that the teacher excludes; TRL's may leave it out
    if api.format != "trl" and 2 * int(own.sum()) < int(named.sum()):
        got = f"{int(own.sum())} of {int(named.sum())} rows that name the token they are for"
        raise ValueError(f"answer: got {got}, expected all: an answer for other tokens?")
    return said


def _joined(
    api: Api, answers: Sequence[Any], question: Question, options: dict[str, Any]
) -> fastkd.TopK:
    """The rows of a text, of which each was asked for by itself."""
    found = [next(formats.read(api.format, x, **options)).topk for x in answers]
    width = max(x.size(-1) for x in found)
    size = len(question.tokens) - 1
    logs, ids = torch.full((size, width), -torch.inf), torch.full((size, width), -1)
    tail = torch.zeros(size) if found[0].tail_logprob is not None else None
    for row, x in zip(question.rows, found, strict=True):
        if x.size(0) != 1:
            got = f"{x.size(0)} tokens behind the first {row + 1}"
            raise ValueError(f"answer: got {got}, expected one (n_predict=1)")
        logs[row, : x.size(-1)], ids[row, : x.size(-1)] = x.logprobs[0], x.indices[0].long()
        if tail is not None and x.tail_logprob is not None:
            tail[row] = x.tail_logprob[0]
    return fastkd.TopK(
        logs, ids.int(), tail_logprob=tail, temperature=found[0].temperature, tail=found[0].tail
    )
