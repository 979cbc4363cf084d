"""A server on loopback that computes its answers from a tiny model, in each API's words.

Faults are switched on by name for some of the requests that score a text.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

NAME = "tiny-teacher"


class Scorer:
    """Log-probabilities [L, V] of what follows each of a text's tokens."""

    def __init__(self, model: Any) -> None:
        self.model, self._lock = model.eval(), threading.Lock()

    @torch.no_grad()
    def __call__(self, tokens: list[int], temperature: float = 1.0) -> Tensor:
        with self._lock:
            found = self.model(torch.tensor([tokens]))
        logits = getattr(found, "logits", found)[0]
        return (logits.double() / temperature).log_softmax(-1)


def best(row: Tensor, k: int) -> list[tuple[int, float]]:
    top = row.topk(min(k, row.numel()))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def vllm(score: Scorer, body: dict[str, Any]) -> dict[str, Any]:
    tokens, k = body["prompt"], body["prompt_logprobs"]
    rows: list[Any] = [None]
    for row, own in zip(score(tokens), tokens[1:], strict=False):
        entries = dict(best(row, k)) | {own: float(row[own])}
        rank = {i: 1 + int((row > x).sum()) for i, x in entries.items()}
        rows.append(
            {
                str(i): {"logprob": x, "rank": rank[i], "decoded_token": f"<{i}>"}
                for i, x in entries.items()
            }
        )
    choice = {"index": 0, "text": "x", "prompt_logprobs": rows, "prompt_token_ids": tokens}
    return {"object": "text_completion", "model": NAME, "choices": [choice]}


def openai(score: Scorer, body: dict[str, Any]) -> dict[str, Any]:
    tokens, k = body["prompt"], body["logprobs"]
    assert body["echo"] and body["max_tokens"] == 0 and body["return_tokens_as_token_ids"]
    top: list[Any] = [None]
    own: list[Any] = [None]
    for row, token in zip(score(tokens), tokens[1:], strict=False):
        top.append({f"token_id:{i}": x for i, x in best(row, k)})
        own.append(float(row[token]))
    said = {"tokens": [f"token_id:{i}" for i in tokens], "token_logprobs": own, "top_logprobs": top}
    return {"choices": [{"index": 0, "logprobs": said}]}


def sglang(score: Scorer, body: dict[str, Any]) -> dict[str, Any]:
    tokens, k = body["input_ids"], body["top_logprobs_num"]
    assert body["logprob_start_len"] == 0 and body["return_logprob"]
    rows = [*zip(score(tokens), tokens[1:], strict=False)]
    meta = {
        "input_token_logprobs": [
            [None, tokens[0], None],
            *([float(row[i]), i, None] for row, i in rows),
        ],
        "input_top_logprobs": [None, *([[x, i, None] for i, x in best(row, k)] for row, _ in rows)],
    }
    return {"text": "", "meta_info": meta}


def trl(score: Scorer, body: dict[str, Any]) -> dict[str, Any]:
    (tokens,), (start,), k = body["sequences"], body["prompt_lengths"], body["top_logprobs"]
    rows = score(tokens, body["temperature"])[start - 1 : -1]
    top = rows.topk(k)
    own = torch.tensor(tokens[start:])[:, None]

    def packed(x: Tensor) -> str:
        return base64.b64encode(x.contiguous().numpy().tobytes()).decode()

    return {
        "logprobs_b64": packed(top.values.float()),
        "token_ids_b64": packed(top.indices.int()),
        "actual_logprobs_b64": packed(rows.gather(-1, own).float()),
        "actual_token_ids_b64": packed(own.int()),
        "shape": [1, len(rows), k],
        "completion_lengths": [len(rows)],
    }


def llama_cpp(score: Scorer, body: dict[str, Any]) -> dict[str, Any]:
    assert body["n_predict"] == 1 and not body["post_sampling_probs"]
    row = score(body["prompt"])[-1]
    written = 64 if body.get("logit_bias") else int(row.argmax())
    if written % 2:  # half a character, of which nothing is told
        return {"content": "", "tokens": []}
    named, own = (
        [{"id": i, "token": f"<{i}>", "bytes": [], "logprob": x} for i, x in pairs]
        for pairs in (best(row, body["n_probs"]), [(written, float(row[written]))])
    )
    return {"content": "x", "completion_probabilities": [{**own[0], "top_logprobs": named}]}


ANSWERS = {
    "/v1/completions": vllm,
    "/generate": sglang,
    "/get_sequence_logprobs/": trl,
    "/completion": llama_cpp,
}


class Server(ThreadingHTTPServer):
    """faults: a name for each coming request for a text, taken in turn; "" for none."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: Any, **told: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.score, self.faults, self.lock = Scorer(model), [], threading.Lock()
        self.told = {"id": NAME, "max_model_len": 64} | told
        self.requests: list[dict[str, Any]] = []  # for texts
        self.headers: list[Any] = []
        self.delay, self.most, self.now = 0.0, 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"data": [self.server.told]})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            text = body["prompt"] if "prompt" in body else body["content"]
            self._send(200, {"tokens": [*text.encode()]})
            return
        with server.lock:
            server.requests.append(body)
            server.headers.append(self.headers)
            fault = server.faults.pop(0) if server.faults else ""
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            time.sleep(server.delay)
            self._answer(body, fault)
        finally:
            with server.lock:
                server.now -= 1

    def _answer(self, body: dict[str, Any], fault: str) -> None:
        answer = ANSWERS[self.path]
        if "echo" in body:
            answer = openai
        if fault == "dies":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "late":
            time.sleep(0.5)
        if fault == "wrong":  # as llama-cpp-python refuses ids
            told = "13 validation errors:\n  {'type': 'string_type', 'loc': ('body', 'prompt')}"
            self._send(500, {"error": {"message": told, "type": "internal_server_error"}})
            return
        if fault.isdigit():
            said = {"error": {"message": "the queue is full", "code": int(fault)}}
            self._send(int(fault), said, {"Retry-After": "0.05"} if fault == "429" else {})
            return
        found = answer(self.server.score, body)
        data = json.dumps(spoilt(found, fault)).encode()
        if fault == "nan":
            data = data.replace(b'"logprob": -', b'"logprob": NaN, "was": -', 40)
        if fault == "half":
            self._raw(200, data, {}, data[: len(data) // 2])
        elif fault == "cut":  # a whole answer of half the text, as some proxies send it
            self._raw(200, data[: len(data) // 2], {})
        elif fault == "twice":
            self._raw(200, data + data, {})
        else:
            self._raw(200, data, {})

    def _send(self, status: int, said: Any, headers: dict[str, str] | None = None) -> None:
        self._raw(status, json.dumps(said).encode(), headers or {})

    def _raw(
        self, status: int, data: bytes, headers: dict[str, str], sent: bytes | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if sent is None else sent)
        if sent is not None:
            self.close_connection = True


def spoilt(answer: dict[str, Any], fault: str) -> dict[str, Any]:
    """vLLM's answer with a fault."""
    if fault not in ("fewer", "other", "beyond", "null", "longer", "shifted"):
        return answer
    choice = answer["choices"][0]
    rows = choice["prompt_logprobs"]
    if fault == "fewer":
        rows[1:] = [
            {i: x for i, x in row.items() if x["rank"] == 1 or x["rank"] > 3} for row in rows[1:]
        ]
    if fault == "beyond":
        rows[1]["50000"] = rows[1].pop(next(iter(rows[1])))
    if fault == "null":
        rows[2] = None
    if fault == "other":
        choice["prompt_token_ids"] = choice["prompt_token_ids"][::-1]
    if fault == "longer":
        rows.append(rows[-1])
        choice["prompt_token_ids"] = None
    if fault == "shifted":  # row i scores token i + 1, and nobody says for which tokens
        rows[1:] = [*rows[2:], rows[1]]
        choice["prompt_token_ids"] = None
    return answer


@contextmanager
def serving(model: Any, **told: Any) -> Iterator[Server]:
    server = Server(model, **told)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@torch.no_grad()
def local(server: Server, inputs: Any) -> Tensor:
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    logits: Tensor = server.score.model(**inputs).logits
    return logits
