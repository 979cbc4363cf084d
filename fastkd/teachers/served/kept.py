"""Answers on disk: a file each, named by what was asked, so that nothing is paid for twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd.distill.serialization import needed, read, write

VERSION = 1  # of what the files hold: a part of their names
USER = "Served(keep=)"


def key(question: Any) -> str:
    """SHA-256 of what was asked, in hexadecimal."""
    text = json.dumps([VERSION, question], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Kept:
    """A folder of answers, shared by any number of processes.

    A file appears whole or not at all. Two that ask the same at once write the same file twice.
    """

    def __init__(self, folder: Any) -> None:
        needed("safetensors.torch", USER)
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"{folder!s:.300}, which cannot be a folder ({error.strerror}), expected one"
            raise type(error)(error.errno, f"keep: got {why}") from None

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, name: str) -> fastkd.TopK | None:
        """The answer of that name; None where nobody has asked yet."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            tensors, told = read(path, USER)
            return fastkd.TopK(
                tensors["logprobs"],
                tensors["indices"],
                tail_logprob=tensors.get("tail_logprob"),
                temperature=told["temperature"],
                tail=told["tail"],
            )
        except (KeyError, TypeError, ValueError, OSError, _damaged()) as error:
            raise ValueError(
                f"keep: got {path}, which cannot be read ({type(error).__name__}: {error!s:.80}), "
                "expected an answer; remove that file to ask again"
            ) from None

    def put(self, name: str, said: fastkd.TopK, asked: dict[str, Any]) -> None:
        """Keep an answer; `asked` is told in its header, for a reader."""
        path = self.path(name)
        path.parent.mkdir(exist_ok=True)
        tensors = {"logprobs": said.logprobs, "indices": said.indices.to(torch.int32)}
        if said.tail_logprob is not None:
            tensors["tail_logprob"] = said.tail_logprob
        told = {**asked, "temperature": said.temperature, "tail": said.tail}
        write(path, tensors, told, USER)


def _damaged() -> type[Exception]:
    error: type[Exception] = needed("safetensors", USER).SafetensorError
    return error
