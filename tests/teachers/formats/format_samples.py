"""One sequence of four tokens, as each tool would say it; written by hand from the field lists."""

from __future__ import annotations

import base64
import struct
from types import SimpleNamespace
from typing import Any

import torch

from fastkd.teachers import formats

V = 12
IDS = [5, 3, 7, 1]
# what the teacher says of the tokens 3, 7 and 1: by rank, the second with its own token behind
SAID: list[dict[int, float]] = [
    {3: -0.5, 2: -1.5},
    {4: -0.25, 8: -2.0, 7: -3.0},
    {1: -0.125, 9: -2.5},
]
RANKS = [{3: 1, 2: 2}, {4: 1, 8: 2, 7: 5}, {1: 1, 9: 2}]
OWN = [said[token] for said, token in zip(SAID, IDS[1:], strict=True)]
TOP = [[*said.items()][:2] for said in SAID]
BYTES = {bytes([65 + i]): i for i in range(V)}


def same(record: formats.Record, said: list[dict[int, float]] = SAID) -> None:
    """The record holds these rows, each by falling log-probability."""
    assert len(record.topk.indices) == len(said)
    rows = zip(record.topk.indices.tolist(), record.topk.logprobs.tolist(), said, strict=True)
    for ids, logs, wanted in rows:
        assert [i for i in ids if i >= 0] == [*wanted]
        found = [x for i, x in zip(ids, logs, strict=True) if i >= 0]
        assert torch.allclose(torch.tensor(found), torch.tensor([*wanted.values()]), atol=1e-6)


def b64(format: str, *numbers: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}{format}", *numbers)).decode()


def vllm(said: Any = SAID, **more: Any) -> dict[str, Any]:
    rows = [
        {str(i): {"logprob": x, "rank": ranks[i]} for i, x in sorted(row.items())}
        for row, ranks in zip(said, RANKS, strict=True)
    ]
    return {"choices": [{"index": 0, "prompt_logprobs": [None, *rows], **more}]}


def offline() -> SimpleNamespace:
    rows = [
        {i: SimpleNamespace(logprob=x, rank=ranks[i]) for i, x in row.items()}
        for row, ranks in zip(SAID, RANKS, strict=True)
    ]
    return SimpleNamespace(prompt_logprobs=[None, *rows], prompt_token_ids=IDS)


def flat() -> SimpleNamespace:
    """A row is its own token first, then the best two, one of which may be the token again."""
    slots = [
        [(t, said[t], ranks[t]), *((i, said[i], ranks[i]) for i, _ in top)]
        for t, said, ranks, top in zip(IDS[1:], SAID, RANKS, TOP, strict=True)
    ]
    ids, logs, ranks = zip(*(slot for row in slots for slot in row), strict=True)
    said = SimpleNamespace(
        start_indices=[0, 0, 3, 6],
        end_indices=[0, 3, 6, 9],
        token_ids=[*ids],
        logprobs=[*logs],
        ranks=[*ranks],
    )
    return SimpleNamespace(prompt_logprobs=said, prompt_token_ids=IDS)


def echo() -> dict[str, Any]:
    logprobs = {
        "tokens": [f"token_id:{i}" for i in IDS],
        "token_logprobs": [None, *OWN],
        "top_logprobs": [None, *({f"token_id:{i}": x for i, x in row} for row in TOP)],
        "text_offset": [0, 1, 2, 3],
    }
    return {"choices": [{"index": 0, "logprobs": logprobs}]}


def sglang(kind: str = "nested") -> dict[str, Any]:
    own = [[x, i, None] for x, i in zip([None, *OWN], IDS, strict=True)]
    meta: dict[str, Any] = {"input_token_logprobs": own}
    values, ids = ([x for row in TOP for _, x in row], [i for row in TOP for i, _ in row])
    name = "input_top_logprobs"
    if kind == "nested":
        meta[name] = [None, *([[x, i, None] for i, x in row] for row in TOP)]
        return {"meta_info": meta}
    meta |= {f"{name}_shape": [3, 2], f"{name}_null_prefix": 1}
    if kind == "flat":
        meta |= {f"{name}_val_flat": values, f"{name}_idx_flat": ids}
    else:
        meta |= {f"{name}_val_flat_b64": b64("f", *values), f"{name}_idx_flat_b64": b64("i", *ids)}
        meta |= {f"{name}_val_flat_b64_dtype": "float32", f"{name}_idx_flat_b64_dtype": "int32"}
    return {"meta_info": meta}


def trl() -> dict[str, Any]:
    """A batch of two: the second has one completion token, and is padded by id 0 at -inf."""
    low = [-torch.inf] * 4
    return {
        "logprobs_b64": b64("f", *(x for row in TOP for _, x in row), *(-0.5, -1.5), *low),
        "token_ids_b64": b64("i", *(i for row in TOP for i, _ in row), 3, 2, 0, 0, 0, 0),
        "actual_logprobs_b64": b64("f", *OWN, -0.5, -torch.inf, -torch.inf),
        "actual_token_ids_b64": b64("i", *IDS[1:], 3, 0, 0),
        "shape": [2, 3, 2],
        "completion_lengths": [3, 1],
    }


def openai() -> dict[str, Any]:
    def entry(i: int, x: float) -> dict[str, Any]:
        return {"token": chr(65 + i), "bytes": [65 + i], "logprob": x}

    content = [
        {**entry(i, x), "top_logprobs": [entry(*one) for one in row]}
        for i, x, row in zip(IDS[1:], OWN, TOP, strict=True)
    ]
    return {"choices": [{"logprobs": {"content": content}}]}


def llama_cpp(kind: str = "logprob") -> dict[str, Any]:
    def entry(i: int, x: float) -> dict[str, Any]:
        x = x if kind == "logprob" else float(torch.tensor(x, dtype=torch.float64).exp())
        return {"id": i, "token": chr(65 + i), "bytes": [65 + i], kind: x}

    rows = zip(IDS[1:], OWN, TOP, strict=True)
    said = [{**entry(i, x), f"top_{kind}s": [entry(*one) for one in row]} for i, x, row in rows]
    return {"completion_probabilities": said}


def tgi() -> list[dict[str, Any]]:
    def entry(i: int, x: float | None) -> dict[str, Any]:
        return {"id": i, "text": chr(65 + i), "logprob": x, "special": False}

    own = [entry(i, x) for i, x in zip(IDS[1:], OWN, strict=True)]
    top = [[entry(*one) for one in row] for row in TOP]
    return [{"details": {"prefill": [entry(5, None)], "tokens": own, "top_tokens": top}}]


# name, answer, options, ids that the answer itself has
ANSWERS: list[tuple[str, str, Any, dict[str, Any], list[int] | None]] = [
    ("vllm", "vllm", vllm(), {}, None),
    ("vllm with its ids", "vllm", vllm(prompt_token_ids=IDS), {}, IDS),
    ("offline", "vllm", [offline()], {}, IDS),
    ("flat_logprobs", "vllm", [flat()], {}, IDS),
    ("echo", "vllm-echo", echo(), {}, IDS),
    ("sglang", "sglang", sglang(), {}, IDS),
    ("sglang flat", "sglang", sglang("flat"), {}, IDS),
    ("sglang base64", "sglang", [sglang("b64")], {}, IDS),
    ("trl", "trl", trl(), {}, IDS[1:]),
    ("openai", "openai", openai(), {"tokenizer": BYTES}, IDS[1:]),
    ("llama.cpp", "llama.cpp", llama_cpp(), {}, IDS[1:]),
    ("llama.cpp behind its samplers", "llama.cpp", llama_cpp("prob"), {}, IDS[1:]),
    ("tgi", "tgi", tgi(), {}, IDS),
]

WIDE = [[*said.items()] + [(-1, -torch.inf)] * (3 - len(said)) for said in SAID]
WIDE_IDS, WIDE_LOGS = ([[x[j] for x in row] for row in WIDE] for j in (0, 1))
RAGGED_IDS, RAGGED_LOGS = [[*row] for row in SAID], [[*row.values()] for row in SAID]
LOW = -torch.inf


def floored(ids: list[list[int]]) -> list[list[int]]:
    return [[max(i, 0) for i in row] for row in ids]


V1 = [[{"token": f"token_id:{i}", "logprob": x} for i, x in row.items()] for row in SAID]
PROBS = [
    {str(i): float(torch.tensor(x, dtype=torch.float64).exp()) for i, x in row.items()}
    for row in SAID
]
TARGETS = [
    [logs, [float(max(i, 0)) for i in ids]] for logs, ids in zip(WIDE_LOGS, WIDE_IDS, strict=True)
]
LLAMAKD = {"inputs": IDS, "targets": [*TARGETS, TARGETS[0]], "line_number": 0}
TRL_ROWS = {
    "input_ids": IDS,
    "completion_mask": [0, 1, 1, 1],
    "teacher_topk_ids": [[-1] * 3, *WIDE_IDS],
    "teacher_topk_logprobs": [[LOW] * 3, *WIDE_LOGS],
}
VERL = {
    "input_ids": [0, *IDS, 0],
    "attention_mask": [0, 1, 1, 1, 1, 0],
    "teacher_ids": [[0] * 3, *floored(WIDE_IDS), [0] * 3, [0] * 3],
    "teacher_logprobs": [[0.0] * 3, *WIDE_LOGS, [0.0] * 3, [0.0] * 3],
}
RAW = {"input_ids": IDS, "token_ids": floored(WIDE_IDS), "top_values": WIDE_LOGS}
V2 = {"input_ids": IDS, "logprobs": RAGGED_LOGS, "target_token_ids": RAGGED_IDS}

# format, a row of its file, options, ids that the file has
FILES: list[tuple[str, Any, dict[str, Any], list[int] | None]] = [
    ("axolotl-v1", {"logprobs": V1}, {}, None),
    ("axolotl-v2", V2, {}, IDS),
    ("llamakd", LLAMAKD, {"align": "next"}, IDS),
    ("easydistill", PROBS, {}, None),
    ("trl-rows", TRL_ROWS, {}, IDS),
    ("verl", VERL, {}, IDS),
    ("distillkit-raw", RAW, {"kind": "logprob"}, IDS),
]
