"""The rules that all formats share: from ids and values as they came to a `TopK`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fastkd

from .records import Report, Rows

FLOOR = -9999.0  # what servers write for -inf, which JSON has not
SLACK = 1e-3  # of a mass or probability in float32, computed in some other order
TWICE = 1e-3  # nats by which two mentions of one column may differ
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class Rules(NamedTuple):
    """How the values of one reading are to be understood."""

    kind: str
    declared: bool  # by the caller: then an answer that says another one is an error
    vocab_size: int | None
    temperature: float
    tail: str
    dtype: str  # in which the values were rounded
    ordered: bool  # by falling probability; else the source's columns as they are


class Counts:
    """What a `Report` is made of."""

    def __init__(self, name: str) -> None:
        self._report = Report(name)
        self._sum, self._known = 0.0, 0

    def add(self, mass: Tensor | None, named: Tensor, beyond: int, renormalized: int) -> None:
        taught, old = named.any(-1), self._report
        if mass is not None and bool(taught.any()):
            mass = mass[taught]
            self._sum, self._known = self._sum + float(mass.sum()), self._known + len(mass)
            least = float(mass.min())
            least = least if old.least_mass is None else min(old.least_mass, least)
            old = old._replace(mean_mass=self._sum / self._known, least_mass=least)
        self._report = old._replace(
            sequences=old.sequences + 1,
            rows=old.rows + len(taught),
            absent_rows=old.absent_rows + int((~taught).sum()),
            columns=max([old.columns, *named.sum(-1).tolist()]),
            beyond_vocab=old.beyond_vocab + beyond,
            renormalized=old.renormalized + renormalized,
        )

    @property
    def report(self) -> Report:
        return self._report


def most_mass(logprobs: Tensor, dtype: str) -> Tensor:
    """[rows] what rounding may make of a mass of 1: 1 + SLACK + u / (1 - u) sum p |log p|.

    Of stored l = log p (1 + e), |e| <= u: sum exp(l) - 1 <= sum exp(l) |l| u / (1 - u).
    """
    p, u = logprobs.exp(), ROUNDING[dtype]
    sizes = torch.where(p > 0, p * -logprobs, 0.0)
    return 1.0 + SLACK + u / (1.0 - u) * sizes.sum(-1)


def settle(rows: Rows, rules: Rules, counts: Counts) -> fastkd.TopK:
    """Check the rows of one sequence and make a `TopK` of them; see the README's rules.

    Raises:
        ValueError: names the field and row, what came and what was expected.
    """
    kind = rows.kind or rules.kind
    if rules.declared and kind != rules.kind:
        raise ValueError(f"kind: got {rules.kind!r}, expected {kind!r}, as {rows.where} says")
    ids, logs = _present(rows, kind)
    ids, logs = _once(ids, logs, rows.where)
    if kind == "logit":
        logs = logs.log_softmax(-1).masked_fill(ids < 0, -torch.inf)
    mass = logs.exp().sum(-1)
    above = torch.zeros_like(mass, dtype=torch.bool)
    if rules.tail in ("bucket", "drop"):
        _raise_first(
            mass > most_mass(logs, rules.dtype),
            mass,
            rows.where,
            f"a mass of at most 1 but for the rounding of {rules.dtype} (dtype='bfloat16' for what "
            "was stored so, tail='renormalize' for what is known up to its sum)",
        )
        above = mass > 1.0
        logs = torch.where(above[:, None], logs - mass.log()[:, None], logs)
    beyond = torch.zeros_like(ids, dtype=torch.bool)
    if rules.vocab_size is not None:
        beyond = ids >= rules.vocab_size
    _raise_first(ids >= 2**31, ids, rows.where, "ids below 2**31")
    ids, logs = ids.masked_fill(beyond, -1), logs.masked_fill(beyond, -torch.inf)
    kept = logs.exp().sum(-1)
    counts.add(None if kind == "logit" else kept, ids >= 0, int(beyond.sum()), int(above.sum()))
    tail = None
    if rules.tail == "bucket":
        tail = torch.log1p(-kept.clamp_max(1.0)).float()
        if rules.vocab_size is not None:  # of a row that names all columns only rounding is left
            tail[(ids >= 0).sum(-1) == rules.vocab_size] = -torch.inf
    if rules.ordered:
        order = logs.sort(stable=True, dim=-1, descending=True).indices
        width = max([1, *(ids >= 0).sum(-1).tolist()])
        ids, logs = (x.gather(-1, order)[:, :width] for x in (ids, logs))
    return fastkd.TopK(
        logs.float(),
        ids.to(torch.int32),
        tail_logprob=tail,
        temperature=rules.temperature,
        tail=rules.tail,  # type: ignore[arg-type]
    )


def _present(rows: Rows, kind: str) -> tuple[Tensor, Tensor]:
    """ids, -1 where an entry is absent, and logarithms, -inf there; checks what the kind says."""
    ids, values, where = rows.ids, rows.values.double(), rows.where
    if ids.shape != values.shape:
        got = f"{list(ids.shape)} ids and {list(values.shape)} values"
        raise ValueError(f"{where}: got {got}, expected one value for each id")
    absent = (ids == -1) | (values == -torch.inf)
    if kind == "logprob":
        absent |= values <= FLOOR
    elif kind == "prob":
        absent |= values == 0.0
    values = values.masked_fill(absent, -torch.inf)
    _raise_first(values.isnan() | (values == torch.inf), values, where, "finite numbers")
    _raise_first(~absent & (ids < 0), ids, where, "ids, or -1 for absent columns")
    if kind == "prob":
        wrong = ~absent & ((values < 0.0) | (values > 1.0 + SLACK))
        _raise_first(wrong, values, where, "probabilities, as kind='prob' says")
        values = values.clamp_min(0.0).log()
    if kind != "logit":
        expected = "log-probabilities, at most 0, as kind='logprob' says"
        _raise_first(values > SLACK, values, where, expected)
        values = values.clamp_max(0.0)
    return ids.masked_fill(absent, -1), values.masked_fill(absent, -torch.inf)


def _once(ids: Tensor, logs: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The same without second mentions of a column, which must agree with the first."""
    order = ids.sort(stable=True, dim=-1).indices
    ids, logs = ids.clone(), logs.clone()
    sorted_ids, sorted_logs = ids.gather(-1, order), logs.gather(-1, order)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = (sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] >= 0)
    apart = torch.zeros_like(again)
    apart[:, 1:] = again[:, 1:] & ((sorted_logs[:, 1:] - sorted_logs[:, :-1]).abs() > TWICE)
    _raise_first(apart, sorted_ids, where, "no column twice with other values")
    second = torch.zeros_like(again).scatter(-1, order, again)
    return ids.masked_fill(second, -1), logs.masked_fill(second, -torch.inf)


def _raise_first(wrong: Tensor, values: Tensor, where: str, expected: str) -> None:
    if bool(wrong.any()):
        at = wrong.nonzero()[0]
        got = values[tuple(at)].item()
        raise ValueError(f"{where}: got {got:.6g} in row {int(at[0])}, expected {expected}")
