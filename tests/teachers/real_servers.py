"""`make served`: real servers beside the model that they run; writes served.json.

Each server that is installed is started on loopback with a tiny random Llama and a tokenizer of
bytes: vLLM and llama-cpp-python here or in the environments whose Pythons FASTKD_VLLM and
FASTKD_LLAMA name, llama.cpp's own `llama-server` on the path or where FASTKD_LLAMA_SERVER says (the
gguf package writes their file). What `Served` says of random texts is compared with transformers'
own logits, API by API; what cannot be right has to be refused. Nothing is downloaded. A server that
is not there leaves its last record alone; another one is a function that gives its command.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf_model
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fastkd
from fastkd.teachers import Served, formats

RECORD = Path(__file__).with_name("served.json")
NAME, K, VOCAB, LENGTH = "tiny", 20, 320, 128
NATS = 2e-3  # of a log-probability in float32, and of a mean loss
STARTS = 900.0  # seconds


def made(folder: Path) -> tuple[Any, Any]:
    """A random Llama and a tokenizer of bytes, in the folder and here."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    # vLLM's attention on the CPU has no smaller heads
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    config = transformers.LlamaConfig(vocab_size=VOCAB, max_position_embeddings=256, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)  # rows that are not flat
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def texts() -> tuple[Any, Any]:
    """ids and bool mask [6, 24]."""
    torch.manual_seed(1)
    ids = torch.randint(VOCAB - 20, (6, 24))
    return ids, torch.arange(24) < torch.tensor([24, 5, 17, 3, 24, 11])[:, None]


def gguf_of(folder: Path, model: Any, tokenizer: Any) -> Path:
    """The model for llama.cpp; what would end a text is the best next token of many rows."""
    ids, mask = texts()
    with torch.no_grad():
        best = model(input_ids=ids, attention_mask=mask.long()).logits[mask].argmax(-1)
    gguf_model.write(folder / "tiny.gguf", model, tokenizer, end=int(best.mode().values))
    return folder / "tiny.gguf"


class Reversed:
    """A tokenizer of the same width, and other ids."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [255 - byte for byte in text.encode()]


def compared(url: str, api: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Errors of what a server says against the model here, in nats; raises where they are large."""
    ids, mask = texts()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
    expected = logits.double().log_softmax(-1)
    with Served(
        url, api=api, k=K, tokenizer=tokenizer, vocab_size=VOCAB, timeout=60, retries=2
    ) as teacher:
        said = teacher(input_ids=ids, attention_mask=mask.long())
        identity = teacher.identity()
    rows = said.indices[mask].long()
    apart = (said.logprobs[mask].double() - expected[mask].gather(-1, rows)).abs()
    best = fastkd.topk_from_logits(logits, K)
    # the k-th column may be another one of the same probability
    missed = expected[mask].topk(K).values[:, -1] - said.logprobs[mask].double().amin(-1)
    student = torch.randn(*ids.shape, VOCAB)
    labels = torch.where(mask, 0, -100)
    losses = [float(fastkd.kl_div(student, x, labels=labels)) for x in (said, best)]
    found = {"texts": len(ids), "rows": int(mask.sum()), "k": K}
    found |= {"logprob_error": float(apart.max()), "missed": float(missed.abs().max())}
    found |= {"loss": losses[0], "loss_error": abs(losses[0] - losses[1]), "model": identity[2]}
    if api == "vllm":  # the texts' own tokens alone; and it tells which tokenizer it has
        own = torch.where(mask, ids.roll(-1, -1), -100).masked_fill(labels < 0, -100)
        with Served(url, api=api, k=0) as one:
            logprobs = one.score({"input_ids": ids, "attention_mask": mask.long()}, own).logprobs
        apart = (logprobs[mask][:, 0] - expected[mask].gather(-1, own[mask][:, None])[:, 0]).abs()
        found["own_error"] = float(apart.max())
        found["loss_error"] = max(found["loss_error"], found["own_error"])
    if api != "openai":
        with Served(url, api=api, tokenizer=Reversed()) as other:
            found["another tokenizer"] = refusal(other, ids[:1], "tokenizer: got")
    with Served(url, api=api, k=2, retries=0) as other:
        wanted = "context" if api == "llama.cpp" else "max_model_len"
        ids = torch.zeros(1, 5 * LENGTH).long()
        labels = torch.full_like(ids, -100)
        labels[0, -2] = 0
        found["a long text"] = refusal(other, ids, wanted, labels)
    worst = max(found["logprob_error"], found["missed"], found["loss_error"])
    if not worst <= NATS:
        raise ValueError(f"{api}: got {json.dumps(found)}, expected errors up to {NATS}")
    return found


def refusal(teacher: Served, ids: Any, why: str, labels: Any = None) -> str:
    """What a question that has no answer meets; ValueError where it is no refusal that says why."""
    try:
        teacher.score(ids, labels)
    except ValueError as error:
        if why in str(error):
            return str(error).replace(f"{teacher.url}: ", "").replace(teacher.url, "it")[:160]
        raise
    raise ValueError(f"got an answer, expected a refusal: {why}")


def of_texts(url: str, api: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """llama-cpp-python takes text and answers text: both are refused; and its rows are one off."""
    text = "Hello world"
    ids = torch.tensor([tokenizer.encode(text)])
    with Served(url, api=api, k=K, retries=0) as teacher:
        found = {"ids": refusal(teacher, ids, "validation error")}
    body = {"prompt": text, "echo": True, "logprobs": 5, "max_tokens": 1}
    asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    asked.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(asked, timeout=60) as said:
        answer = json.load(said)
    try:
        [*formats.read("vllm-echo", answer)]
        raise ValueError("got rows of text, expected a refusal")
    except ValueError as error:
        found["text"] = str(error)[:160]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].double().log_softmax(-1)
    own = torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"][1:], dtype=torch.float64)
    rows = {name: expected[at:].gather(-1, ids[0, 1:, None])[: len(own), 0] for name, at in PLACES}
    return found | {name: float((own - x[: len(own)]).abs().max()) for name, x in rows.items()}


PLACES = ("error by the row in front", 0), ("error by the token's row", 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, log: Path, env: dict[str, str]) -> Iterator[str]:
    """The server's url while it runs; the end of its log where it does not start."""
    url = f"http://127.0.0.1:{port}"
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
        )
    try:
        until = time.monotonic() + STARTS
        while True:
            try:
                with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except (urllib.error.URLError, OSError):
                pass
            if process.poll() is not None or time.monotonic() > until:
                end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{command[0]} did not start:\n{end}")
            time.sleep(1.0)
        yield url
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(30)
                break
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def vllm(folder: Path, port: int) -> tuple[list[str], dict[str, str], list[str]] | None:
    """(command, environment, command that tells versions); None where it is not there."""
    program = os.environ.get("FASTKD_VLLM") or sys.executable
    version = [program, "-c", "import vllm; print('vllm', vllm.__version__)"]
    if subprocess.run(version, capture_output=True, check=False).returncode:
        return None
    command = [program, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(LENGTH), "--max-logprobs", str(K)]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return command, env, version


def llama_server(folder: Path, port: int) -> tuple[list[str], dict[str, str], list[str]] | None:
    program = os.environ.get("FASTKD_LLAMA_SERVER") or shutil.which("llama-server")
    if program is None:
        return None
    command = [program, "--model", str(folder / "tiny.gguf"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--alias", NAME, "--parallel", "4"]
    command += ["--threads", "2", "--cache-type-k", "f32", "--cache-type-v", "f32"]
    command += ["--flash-attn", "off"]  # which rounds to 16 bits
    return [*command, "--ctx-size", str(4 * LENGTH)], {}, [program, "--version"]


def llama_cpp_python(folder: Path, port: int) -> tuple[list[str], dict[str, str], list[str]] | None:
    program = os.environ.get("FASTKD_LLAMA") or sys.executable
    version = [program, "-c", "import llama_cpp.server as x, llama_cpp as y; print(y.__version__)"]
    if subprocess.run(version, capture_output=True, check=False).returncode:
        return None
    command = [program, "-m", "llama_cpp.server", "--model", str(folder / "tiny.gguf")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--model_alias", NAME]
    return [*command, "--n_ctx", str(LENGTH), "--logits_all", "true"], {}, version


SERVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vllm": (vllm, {"vllm": compared, "openai": compared}),
    "llama-server": (llama_server, {"llama.cpp": compared}),
    "llama-cpp-python": (llama_cpp_python, {"openai": of_texts}),
}


def commit() -> str:
    told = ["git", "-C", str(RECORD.parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(told, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("servers", nargs="*", help=f"of {', '.join(SERVERS)}; none: all")
    wanted = parser.parse_args().servers or [*SERVERS]
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    failed = False
    for name in wanted:
        find, apis = SERVERS[name]
        with tempfile.TemporaryDirectory() as place:
            model, tokenizer = made(Path(place))
            port = free_port()
            if (found := find(Path(place), port)) is None:
                print(f"{name}: not installed")
                continue
            if name.startswith("llama"):
                if importlib.util.find_spec("gguf") is None:
                    print(f"{name}: not asked: no gguf to write its file (pip install gguf)")
                    continue
                gguf_of(Path(place), model, tokenizer)
            command, env, version = found
            told = subprocess.run(version, capture_output=True, text=True, check=False)
            lines = (told.stdout + told.stderr).strip().splitlines() or ["?"]
            words = [x for x in lines if x.startswith("version")] or lines
            entry: dict[str, Any] = {
                "date": datetime.date.today().isoformat(),
                "commit": commit(),
                "versions": {name: words[-1][:80], "transformers": transformers.__version__}
                | {"torch": torch.__version__, "tokenizers": tokenizers.__version__},
                "arguments": command[command.index("--port") + 2 :],
                "apis": {},
            }
            try:
                with running(command, port, Path(place) / "log", env) as url:
                    for api, tried in apis.items():
                        try:
                            outcome: Any = tried(url, api, model, tokenizer)
                        except (ValueError, OSError) as error:
                            outcome, failed = {"failed": str(error)[:400]}, True
                            print((Path(place) / "log").read_text(errors="replace")[-3000:])
                        entry["apis"][api] = outcome
                        print(f"{name}, api={api!r}: {json.dumps(outcome)}")
            except RuntimeError as error:
                print(f"{name}: {error}")
                failed = True
                continue
        entry["passed"] = not any("failed" in x for x in entry["apis"].values())
        record[name] = entry
        RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
