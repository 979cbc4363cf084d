"""A teacher that a server runs: asked ahead of the step, by several threads, and paid for once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import listed, shown
from fastkd.arguments.numbers import integer, real
from fastkd.distill.batch import Batch, Outputs, unwrap
from fastkd.distill.teachers import Teacher

from . import apis
from .apis import APIS, Asking, Question
from .client import Client
from .kept import Kept, key
from .texts import asked_of, questions

PROBE = "Zwei Tokenizer, one text:\n\tdef f(x): return x**2 # 1234567 \u00e9\u4f60"
WAITING = 4096  # texts asked ahead that nobody has fetched; a transform may have changed them


class Served(Teacher):
    """A language model that a server runs, as teacher: its best k log-probabilities of each token.

        row i of `TopK` [B, L, K] is what the server says of the token behind position i

    A teacher of `distill.train`, `distill.on_policy`, `DistillationTrainer` and `store.capture`.
    Texts are asked one by one, `concurrency` at a time, `ahead` batches before their step where the
    trainer allows it, and each once: an answer that is kept is never asked again. Of a text are
    sent the tokens that attention_mask shows, up to the last one with a label. What a server says
    is raw, at T = 1: a loss at another temperature wants tail="renormalize" or "restrict".

    To be used in the process that made it; `close` it, or use it in a `with`.

    Args:
        url: of the server, as "http://localhost:8000".
        api: "vllm" (/v1/completions, prompt_logprobs), "openai" (the same path with echo and
            logprobs, tokens as "token_id:N"), "sglang" (/generate), "trl" (`trl vllm-serve`'s
            /get_sequence_logprobs/) or "llama.cpp" (/completion, a request for each row).
        k: columns of a row. 0: the text's own token alone, for `distill.sampled_reverse_kl`.
        own: keep the text's own token as column k + 1 where it is not among the best k.
        concurrency: requests at a time.
        ahead: batches that are asked for before their step.
        keep: folder for the answers, safetensors named by the hash of the question (api, model, k,
            temperature, tokens); None keeps none.
        timeout: seconds for an answer.
        retries: further attempts, with a growing wait, where a connection fails or the server says
            429 or 5xx, or half of an answer comes.
        model: its name on the server; None: the one that /v1/models lists.
        vocab_size: of the served model; ids beyond are an error. None: the student's, where its
            `config` tells it.
        tokenizer: the student's; the server's must make the same ids of a probe text, where it has
            /tokenize. None: not compared.
        temperature: T of the server's softmax; other than 1 with "trl" only.
        tail: of the `TopK`; None: "bucket".
        headers: of each request, as {"Authorization": "Bearer ..."}.

    Raises:
        TypeError, ValueError: an argument that is none of these; when asked: a model, tokenizer,
            vocabulary or length that is not the server's, an answer that is not to the question.
        TimeoutError, ConnectionError: no answer, in all attempts; names url, what was asked, and
            how long.
        PermissionError: the server wants other headers.
    """

    reads_batch = False

    def __init__(
        self,
        url: str,
        *,
        api: str = "vllm",
        k: int = 20,
        own: bool = False,
        concurrency: int = 8,
        ahead: int = 2,
        keep: str | os.PathLike[str] | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        model: str | None = None,
        vocab_size: int | None = None,
        tokenizer: Any = None,
        temperature: float = 1.0,
        tail: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if api not in APIS:
            raise ValueError(f"api: got {shown(api)}, expected one of {listed(APIS)}")
        least = {"k": (k, 0 if api == "vllm" else 1), "concurrency": (concurrency, 1)}
        least |= {"ahead": (ahead, 0), "retries": (retries, 0)}
        if vocab_size is not None:
            least["vocab_size"] = (vocab_size, 1)
        for name, (value, most) in least.items():
            if (integer(value) is None) or value < most:
                raise ValueError(f"{name}: got {shown(value)}, expected an integer >= {most}")
        for name, number in (("timeout", timeout), ("temperature", temperature)):
            if not 0 < (real(number) or 0) < float("inf"):
                raise ValueError(f"{name}: got {shown(number)}, expected a number above 0")
        self.api, self._api = api, APIS[api]
        if temperature != 1 and not self._api.tempered:
            raise ValueError(
                f"temperature: got {temperature:g} with api={api!r}, expected 1: it scores a given "
                "text at T = 1; at the loss's own T, tail='renormalize' is exact over the k columns"
            )
        if own and not self._api.whole:
            raise ValueError(
                f"own: got True with api={api!r}, expected False: it tells its best tokens alone"
            )
        if tail not in (None, "bucket", "renormalize", "restrict", "drop"):
            raise ValueError(f"tail: got {shown(tail)}, expected None or a tail of TopK")
        self.url, self.k, self.own, self.ahead_by = url, k, bool(own) or not k, ahead
        self.vocab_size, self.temperature, self.tail = vocab_size, float(temperature), tail
        self._client = Client(url, timeout=timeout, retries=retries, headers=headers)
        self._kept = None if keep is None else Kept(keep)
        self._named, self._tokenizer, self._longest = model, tokenizer, None
        self._met = False
        self._asking: Asking | None = None
        self._lock, self._meeting, self._process = threading.Lock(), threading.Lock(), os.getpid()
        self._waiting: OrderedDict[str, tuple[Future[fastkd.TopK], int]] = OrderedDict()
        self._pool = ThreadPoolExecutor(concurrency, "fastkd-served")
        self.asked = 0  # texts that the server was asked for; those that were kept are not counted

    # what a trainer calls

    def __call__(self, batch: Any = None, /, **inputs: Any) -> Any:
        """`Outputs` of a `Batch`; a `TopK` of ids [B, L], or of a model's own arguments."""
        if not isinstance(batch, Batch):
            return self.score(inputs if batch is None else batch)
        return Outputs(self.score(*asked_of(batch)), role="teacher")

    def expect(self, batch: Batch) -> None:
        self.prefetch(*asked_of(batch))

    def beside(self, student: nn.Module) -> None:
        config = getattr(unwrap(student), "config", None)
        text = getattr(config, "get_text_config", None)
        found = getattr(text() if callable(text) else config, "vocab_size", None)
        self.vocab_size = found if self.vocab_size is None else self.vocab_size

    def identity(self) -> Any:
        return ["Served", self.api, self._model(), self.k, self.own, self.temperature, self.tail]

    # what is asked

    def score(self, inputs: Any, labels: Tensor | None = None) -> fastkd.TopK:
        """The server's `TopK` [B, L, K] of texts.

        Args:
            inputs: ids [B, L], or a dict with input_ids and, where texts are padded,
                attention_mask.
            labels: int [B, L], of the token behind each position, -100 where none is wanted; None:
                all tokens are, the one behind the last too.

        Returns:
            `TopK` on the ids' device; K = k, k + 1 with own=True. Padding has no column.
        """
        ids, asked = questions(inputs, labels)
        futures = [None if x is None else self._submit(x[1], fetched=True) for x in asked]
        lead, width = list(ids.shape), self.k + self.own
        logs, indices = torch.full([*lead, width], -torch.inf), torch.full([*lead, width], -1)
        indices, tail = indices.int(), torch.zeros(lead)
        for number, (x, future) in enumerate(zip(asked, futures, strict=True)):
            if x is None or future is None:
                continue
            said = self._fitted(future.result(), x[1])
            rows = slice(x[0], x[0] + said.size(0))
            logs[number, rows], indices[number, rows] = said.logprobs, said.indices
            if said.tail_logprob is not None:
                tail[number, rows] = said.tail_logprob
        kind: Any = self.tail or "bucket"
        made = fastkd.TopK(
            logs,
            indices,
            tail_logprob=tail if kind == "bucket" else None,
            temperature=self.temperature,
            tail=kind,
        )
        return made.to(ids.device)

    def prefetch(self, inputs: Any, labels: Tensor | None = None) -> None:
        """Ask for what `score` will be asked for, and return at once."""
        for x in questions(inputs, labels)[1]:
            if x is not None:
                self._submit(x[1])

    def close(self) -> None:
        """Stop asking; threads that wait for an answer are woken."""
        self._client.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.release()

    def __reduce__(self) -> Any:
        raise TypeError(
            "teacher: got a Served to copy or pickle, expected the one that was made: it has "
            "threads and connections"
        )

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _question(self, question: Question) -> dict[str, Any]:
        asking = self._asked_as()
        asked: dict[str, Any] = {
            "api": self.api,
            "model": asking.model,
            "k": asking.k,
            "tail": asking.tail,
        }
        asked |= {"temperature": asking.temperature, "tokens": question.tokens}
        return asked if self._api.whole else asked | {"rows": question.rows}

    def _submit(self, question: Question, *, fetched: bool = False) -> Future[fastkd.TopK]:
        if os.getpid() != self._process:
            raise RuntimeError(
                "teacher: got a Served in another process (a DataLoader's worker?), expected the "
                "one that made it: its threads live there"
            )
        if self._client.closed:
            raise RuntimeError(
                f"teacher: got a question for {self.url} after close(), expected none"
            )
        if self.vocab_size is not None and (most := max(question.tokens)) >= self.vocab_size:
            got = f"the id {most} in a text"
            raise ValueError(
                f"input_ids: got {got}, expected ids below vocab_size={self.vocab_size}"
            )
        name = key(self._question(question))
        with self._lock:
            future, count = self._waiting.pop(name, (None, 0))
            if future is None:
                future = self._pool.submit(self._answer, name, question)
            count += -1 if fetched else 1  # two batches may have one text
            if count > 0:
                self._waiting[name] = future, count
                while len(self._waiting) > WAITING:
                    self._waiting.popitem(last=False)
            return future

    # in a thread of the pool

    def _answer(self, name: str, question: Question) -> fastkd.TopK:
        asking, api = self._asked_as(), self._api
        if self._kept is not None and (said := self._kept.get(name)) is not None:
            apis.check(said, question, asking, self.vocab_size)
            return said
        self._meet()
        if self._longest is not None and len(question.tokens) >= self._longest:
            raise ValueError(
                f"{self.url}: got a text of {len(question.tokens)} tokens for {asking.model}, "
                f"expected fewer than its max_model_len={self._longest}"
            )
        what = f"{len(question.tokens)} tokens, k={self.k}"
        with self._lock:
            self.asked += 1
        bodies = api.bodies(question, asking)
        answers = [self._client.ask(api.path, body, what=what) for body in bodies]
        try:
            said = apis.read(api, answers, question, asking, self.vocab_size)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            kind = f"{type(error).__name__}: " if not isinstance(error, ValueError) else ""
            text = f"{self.url}: {api.path} ({what}): {kind}{error!s:.330}"
            raise ValueError(text) from error
        if self._kept is not None:
            self._kept.put(name, said, {**self._question(question), "url": self.url})
        return said

    def _fitted(self, said: fastkd.TopK, question: Question) -> fastkd.TopK:
        """The best k columns, and with own=True the text's own token; the rest is the tail's."""
        k, own = self.k, torch.tensor(question.tokens[1:], dtype=torch.int32)[:, None]
        ids, logs, tail = said.indices, said.logprobs, said.tail_logprob
        kept = torch.arange(ids.size(-1)).expand_as(ids) < k
        if self.own:
            kept = kept | (ids == own)
        cut = (~kept & (ids >= 0)).any(-1)
        ids, logs = ids.masked_fill(~kept, -1), logs.masked_fill(~kept, -torch.inf)
        logs, order = logs.sort(dim=-1, descending=True, stable=True)
        ids, width = ids.gather(-1, order), self.k + self.own
        if tail is not None and bool(cut.any()):
            mass = logs.double().exp().sum(-1).clamp_max(1.0)
            tail = torch.where(cut, torch.log1p(-mass).float(), tail)
        more = max(0, width - ids.size(-1))
        logs = nn.functional.pad(logs, (0, more), value=-torch.inf)[:, :width]
        ids = nn.functional.pad(ids, (0, more), value=-1)[:, :width]
        return fastkd.TopK(
            logs, ids, tail_logprob=tail, temperature=said.temperature, tail=said.tail
        )

    # the server itself

    def _asked_as(self) -> Asking:
        if self._asking is None:
            self._asking = Asking(self._model(), self.k, self.temperature, self.tail)
        return self._asking

    def _model(self) -> str | None:
        """The model's name: what was given, or what the server lists."""
        if self._named is None:
            self._meet()
        if self._named is None and self._kept is not None:
            raise ValueError(
                f"model: got none beside keep=, and {self.url} lists none, expected its name: "
                "answers of two teachers would have the same files"
            )
        return self._named

    def _meet(self) -> None:
        """Ask once what the server runs, and refuse another model or tokenizer."""
        with self._meeting:
            if self._met:
                return
            if self._api.listed:
                told = self._client.ask("/v1/models", optional=True) or {}
                models = [x for x in told.get("data") or () if isinstance(x, dict)]
                names = [str(x.get("id")) for x in models]
                if self._named is None and len(names) == 1:
                    self._named = names[0]
                if names and self._named not in names:
                    got = f"{shown(self._named)} at {self.url}"
                    raise ValueError(f"model: got {got}, expected one of {listed(names)}")
                if names:
                    self._longest = models[names.index(str(self._named))].get("max_model_len")
            if self._tokenizer is not None and self._api.tokenize is not None:
                _same_tokens(self._client, self._tokenizer, *self._api.tokenize(PROBE, self._named))
            self._met = True


def _same_tokens(client: Client, tokenizer: Any, path: str, body: dict[str, Any]) -> None:
    told = client.ask(path, body, what="tokens of a probe text", optional=True)
    if told is None:
        return  # nothing is compared where the server does not tell
    encode = getattr(tokenizer, "tokenizer", tokenizer).encode
    own, found = [*encode(PROBE, add_special_tokens=False)], [*told.get("tokens", ())]
    if own != found:
        at = next((i for i, x in enumerate(zip(own, found)) if x[0] != x[1]), 0)  # noqa: B905
        raise ValueError(
            f"tokenizer: got {shown(own[at:])} for a part of a text of which {client.url} makes "
            f"{shown(found[at:])}, expected the same ids: models of other tokenizers are compared "
            "by distill.uld"
        )
