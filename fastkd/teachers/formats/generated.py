"""llama.cpp's `/completion` and TGI's `/generate`: ids, of the generated tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastkd.arguments.messages import listed

from .records import Options, Rows
from .wire import answers, field, generated_rows, id_of, value


def read_llama_cpp(source: Any, _: Options) -> Iterator[Rows]:
    """completion_probabilities[] of {id, logprob, top_logprobs}, or {id, prob, top_probs}.

    The latter are probabilities behind the samplers (post_sampling_probs): the entries' fields say
    which it is.
    """
    for where, answer in answers(source):
        name = "probs" if "probs" in answer else "completion_probabilities"
        asked = "n_probs=k (nothing is told where half a character was written)"
        said, at = field(answer, name, where, asked), f"{where}.{name}"
        rows, tokens, kinds = [], [], set()
        for entry in said:
            if "id" not in entry:
                raise ValueError(
                    f"{at}: got the fields {listed(entry)}, expected 'id': builds of before 2025 "
                    "name tokens by their text, and two ids may have one text"
                )
            kind = "prob" if "prob" in entry else "logprob"
            top = field(entry, f"top_{kind}s", at)
            named = [(id_of(x["id"], at, digits=False), value(x, at, kind)) for x in [*top, entry]]
            kinds.add(kind)
            tokens.append(named[-1][0])
            rows.append(named)
        if len(kinds) > 1:
            raise ValueError(f"{at}: got both logprob and prob, expected one of them")
        yield generated_rows(rows, tokens, at)._replace(kind=next(iter(kinds), None))


def read_tgi(source: Any, _: Options) -> Iterator[Rows]:
    """details.top_tokens[][] of {id, logprob} beside details.tokens; no top-k of the prompt."""
    for where, answer in answers(source):
        details, at = field(answer, "details", where, "details=true"), f"{where}.details"
        own = field(details, "tokens", at)
        top = field(details, "top_tokens", at, "top_n_tokens=k")
        if len(own) != len(top):
            got = f"{len(top)} rows for {len(own)} tokens"
            raise ValueError(f"{at}.top_tokens: got {got}, expected one for each")
        rows = [
            [(id_of(x["id"], at, digits=False), value(x, at)) for x in [*entries, token]]
            for entries, token in zip(top, own, strict=True)
        ]
        before = [x["id"] for x in details.get("prefill") or ()]
        yield generated_rows(rows, before + [x["id"] for x in own], at)
