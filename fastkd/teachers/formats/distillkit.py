"""DistillKit's Parquet files: packed ids; log-probabilities as values, polynomial and bins."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, listed, shown
from fastkd.arguments.numbers import integer
from fastkd.distill.serialization import needed
from fastkd.teachers.bits import MOST, pack, unpack

from . import tables
from .records import Options, Record, Rows

YAML = "compression_config.yaml"
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
# settings with their defaults; None: it must be there
PACKED: dict[str, Any] = {
    **{"d": None, "k": None, "exact_k": None, "exact_dtype": "float32"},
    **{"polynomial_terms": [], "term_dtype": "float32", "residual_bins": None},
    **{"delta_encoding": True, "error_diffusion": False, "normalize_t": False},
}
LEGACY: dict[str, Any] = {
    **{"vocab_size": None, "k": None, "exact_k": None, "polynomial_degree": None},
    **{"invert_polynomial": True, "with_sqrt_term": False, "term_dtype": "float32"},
}
BIN = {"scale_dtype": None, "element_bits": None, "num_elements": None}


def read(source: Any, options: Options) -> Iterator[Rows]:
    """compressed_logprobs and bytepacked_indices, as the compression_config.yaml beside says."""
    config = options.config
    if config is None and isinstance(source, (str, os.PathLike)):
        config = (Path(source) if Path(source).is_dir() else Path(source).parent) / YAML
    settings = _settings(config, PACKED, "logprob_compressor")
    for where, row in tables.rows(source):
        data, packed = (
            tables.grid(tables.column(row, name, where), 0, f"{where}.{name}")
            for name in ("compressed_logprobs", "bytepacked_indices")
        )
        ids = unpack_bits(packed, settings["k"], index_bits(settings["d"]), where)
        yield _placed(row, ids, logprobs(data, settings, where), where)


def read_legacy(source: Any, options: Options) -> Iterator[Rows]:
    """packed_indices, exact_values and coeffs; settings in config, log-probabilities or logits."""
    settings = _settings(options.config, LEGACY, "legacy_logit_compression")
    k, exact_k = settings["k"], settings["exact_k"]
    rank = torch.arange(1, k - exact_k + 1, dtype=torch.float64)
    sign = -1 if settings["invert_polynomial"] else 1
    terms = [rank ** (sign * power) for power in range(settings["polynomial_degree"] + 1)]
    terms += [rank.sqrt()] if settings["with_sqrt_term"] else []
    for where, row in tables.rows(source):
        words, exact, coeffs = (
            tables.grid(tables.column(row, name, where), fill, f"{where}.{name}")
            for name, fill in (("packed_indices", 0), ("exact_values", 0.0), ("coeffs", 0.0))
        )
        ids = unpack_words(words, k, index_bits(settings["vocab_size"]), where)
        fit = coeffs.new_empty((len(ids), 0))
        if exact_k < k:
            _same(coeffs.size(-1), len(terms), f"{where}.coeffs", "coefficients a row")
            fit = coeffs @ torch.stack(terms)
        exact = exact if exact_k else exact[:, :0]
        _same(exact.size(-1), exact_k, f"{where}.exact_values", "values a row")
        yield _placed(row, ids, torch.cat((exact, fit), -1), where)


def read_raw(source: Any, _: Options) -> Iterator[Rows]:
    """token_ids and top_values, as DistillKit's own reader takes them."""
    for where, row in tables.rows(source):
        yield _placed(row, *tables.pair(row, "token_ids", "top_values", where), where)


def write(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """A folder of data_0.parquet and compression_config.yaml, every log-probability in float32.

    d holds the largest id, k is the widest record's, an absent column is id 0 at -inf.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    yaml = needed("yaml", "distillkit", "formats")
    kept = [*records]
    if not kept:
        raise ValueError("records: got none, expected at least one")
    k = max(record.topk.size(-1) for record in kept)
    most = max(int(x.max()) for r in kept for x in (r.topk.indices, r.tokens) if x is not None)
    settings = {**PACKED, "d": most + 2, "k": k, "exact_k": k, "delta_encoding": False}
    settings["residual_bins"] = []

    def row(record: Record) -> dict[str, Any]:
        tokens = tables.tokens_of(record, "distillkit")
        ids, logs = tables.grids(record, len(tokens), first=1)
        ids = torch.nn.functional.pad(ids.clamp_min(0), (0, k - ids.size(-1)))
        logs = torch.nn.functional.pad(logs, (0, k - logs.size(-1)), value=-torch.inf)
        data = logs.contiguous().view(torch.uint8)
        packed = pack(ids, index_bits(most + 2))
        return {
            "input_ids": tokens,
            "compressed_logprobs": data.tolist(),
            "bytepacked_indices": packed.tolist(),
        }

    def types(pa: Any) -> list[Any]:
        nested = pa.list_(pa.list_(pa.uint8()))
        columns = ("compressed_logprobs", "bytepacked_indices")
        return [("input_ids", pa.list_(pa.uint64())), *((name, nested) for name in columns)]

    tables.write(folder / "data_0.parquet", map(row, kept), "distillkit", types)
    (folder / YAML).write_text(yaml.safe_dump(settings), encoding="utf-8")


def _placed(row: Any, ids: Tensor, values: Tensor, where: str) -> Rows:
    """Row i is for token i + 1; a document that was packed before another has no last row."""
    tokens = tables.ids(row, "input_ids", where)
    size = len(tokens)
    if len(ids) not in (size, size - 1) or len(ids) != len(values):
        got = f"{len(ids)} rows of ids and {len(values)} of values for {size} tokens"
        raise ValueError(f"{where}: got {got}, expected {size - 1} or {size} of each")
    ids, values = ids[: size - 1], values[: size - 1]
    document = tables.optional_ids(row, "attention_mask", where)
    if document is not None:
        same = document[1:size] == document[: size - 1]
        ids = ids.masked_fill(~same[:, None], -1)
    return Rows(tokens, ids, values, torch.arange(1, size), where)


def index_bits(vocab_size: int) -> int:
    """ceil(log2 d), in float32 as the writer has it."""
    return max(1, math.ceil(torch.tensor(float(vocab_size)).log2().item()))


def unpack_bits(data: Tensor, count: int, bits: int, where: str) -> Tensor:
    """int64 [rows, count] of packed bytes."""
    if len(data):
        what = f"bytes a row for {count} numbers of {bits} bits"
        _same(data.size(-1), -(-count * bits // 8), f"{where}.bytepacked_indices", what)
    return unpack(data, count, bits).long()


def unpack_words(words: Tensor, count: int, bits: int, where: str) -> Tensor:
    """64 // bits ids of each 64-bit word, least significant bits first, int64 [rows, count]."""
    per = 64 // bits
    if len(words):
        _same(words.size(-1), -(-count // per), f"{where}.packed_indices", "words a row")
    found = (words[..., None] >> (bits * torch.arange(per))) & ((1 << bits) - 1)
    return found.flatten(1)[:, :count]


def logprobs(data: Tensor, settings: dict[str, Any], where: str) -> Tensor:
    """Bytes of rows as log-probabilities [rows, k], float64.

    In order: exact_k values; the polynomial's coefficients; for each bin a scale and its residuals
    as offset integers. Ranks behind exact_k are sum of coefficient x term(rank) plus residual;
    with delta_encoding all are differences from one rank to the next.
    """
    k, exact_k, terms = (settings[name] for name in ("k", "exact_k", "polynomial_terms"))
    if not len(data):
        return torch.empty((0, k), dtype=torch.float64)
    parts = [(settings["exact_dtype"], exact_k), (settings["term_dtype"], len(terms))]
    for part in settings["residual_bins"]:
        size = -(-part["num_elements"] * part["element_bits"] // 8)
        parts += [(part["scale_dtype"], 1), ("uint8", size)]
    sizes = [count * getattr(torch, name).itemsize for name, count in parts]
    at = f"{where}.compressed_logprobs"
    _same(data.size(-1), sum(sizes), at, f"bytes a row by {YAML}")
    exact, coeffs, *bins = (
        piece.flatten().clone().view(getattr(torch, name)).view(len(data), count)
        for piece, (name, count) in zip(data.to(torch.uint8).split(sizes, -1), parts, strict=True)
    )
    rest = torch.zeros((len(data), k - exact_k), dtype=torch.float64)
    if terms:  # in the coefficients' dtype, as DistillKit's own reader has it
        count, dtype = k - exact_k, coeffs.dtype
        ranks = torch.arange(count, dtype=dtype)
        t = torch.linspace(0, 1, count, dtype=dtype) if settings["normalize_t"] else ranks
        basis = torch.stack([getattr(t, x)() if isinstance(x, str) else t**x for x in terms], -1)
        rest += (basis * coeffs[:, None, :]).sum(-1).double()
    first = 0
    for part, scale, packed in zip(settings["residual_bins"], bins[::2], bins[1::2], strict=True):
        count, bits = part["num_elements"], part["element_bits"]
        number = unpack_bits(packed, count, bits, where).double()
        number = 2.0 * number - 1.0 if bits == 1 else number - 2.0 ** (bits - 1)
        rest[:, first : first + count] += number * scale.double()
        first += count
    found = torch.cat((exact.double(), rest), -1)
    return found.cumsum(-1) if settings["delta_encoding"] else found


def _settings(config: Any, known: dict[str, Any], section: str) -> dict[str, Any]:
    """Checked settings of a dict or a YAML file; what is unknown or missing is refused."""
    name = "config"
    if isinstance(config, (str, os.PathLike)):
        name = str(config)
        if not Path(config).is_file():
            raise ValueError(f"config: got no {name}, expected the file that the capture wrote")
        yaml = needed("yaml", "distillkit", "formats")
        config = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(config, Mapping):
        wanted = f"a dict of {listed(known)}, or a YAML file of them"
        raise ValueError(f"{name}: got {describe(config)}, expected {wanted}")
    config = config.get("teacher", config)
    found = _checked(config.get(section, config), known, name)
    found["polynomial_terms"] = found.get("polynomial_terms") or []
    found["residual_bins"] = [
        _checked(x, BIN, f"{name}: residual_bins") for x in found.get("residual_bins") or ()
    ]
    for term in found["polynomial_terms"]:
        if term not in ("sqrt", "exp") and integer(term) is None:
            got = f"the polynomial term {shown(term)}"
            raise ValueError(f"{name}: got {got}, expected a power, 'sqrt' or 'exp'")
    ranks = found["k"] - found["exact_k"]
    if ranks < 0 or sum(x["num_elements"] for x in found["residual_bins"]) > ranks:
        got = f"k={found['k']}, exact_k={found['exact_k']}"
        raise ValueError(f"{name}: got {got}, expected exact_k and the bins to fit into k")
    return found


def _checked(given: Any, known: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of `known`, no others: dtypes by name, numbers in range, flags."""
    if not isinstance(given, Mapping) or set(given) - set(known):
        raise ValueError(f"{name}: got {shown(given)}, expected only {listed(known)}")
    found = {**known, **given}
    for key, got in found.items():
        if key in ("polynomial_terms", "residual_bins"):
            wrong, wanted = got is None and key not in given, "a list"
        elif key.endswith("dtype"):
            wrong, wanted = got not in DTYPES, f"one of {listed(DTYPES)}"
        elif isinstance(known[key], bool):
            wrong, wanted = not isinstance(got, bool), "true or false"
        else:
            low, high = int(key not in ("exact_k", "polynomial_degree")), 2**31
            high = MOST if key == "element_bits" else high
            wrong = integer(got) is None or not low <= got <= high
            wanted = f"an integer from {low} to {high}"
        if wrong:
            raise ValueError(f"{name}: got {key}={shown(got)}, expected {wanted}")
    return found


def _same(got: int, wanted: int, where: str, what: str) -> None:
    if got != wanted:
        raise ValueError(f"{where}: got {got} {what}, expected {wanted}")
