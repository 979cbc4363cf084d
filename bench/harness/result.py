"""What is known about one provider on one case and input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.harness.gate import Errors
from bench.harness.timing import MIN_ROUNDS, Summary, percentile


@dataclass
class Result:
    """One provider on one case and input; it has times only where its status is "ok".

    Args:
        case, input, dtype: what was measured; call: as a user writes it.
        ours: whether it is fastkd's, so that its failure fails the run.
        status: "ok", "wrong" (its loss or gradient is out of bounds), "failed" (it raised) or
            "skipped" (it cannot run here); note says why.
        times: what was timed -> its summary; samples: the same one by one.
        figures: what the family counts, ready for JSON.
        others_cores: CPU cores in use by others meanwhile.
    """

    case: str
    call: str
    input: str
    dtype: str
    provider: str
    ours: bool = False
    status: str = "ok"
    note: str = ""
    times: dict[str, Summary] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict, repr=False)
    peak_bytes: int | None = None
    errors: Errors | None = None
    bound: Errors | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    others_cores: float | None = None

    def record(self, times: Sequence[str]) -> dict[str, Any]:
        """As JSON has it; times: all that the family times."""
        shown = {f"{what}_ms": _dict(self.times.get(what)) for what in times}
        return {
            **{name: getattr(self, name) for name in ("case", "call", "input", "dtype")},
            **{name: getattr(self, name) for name in ("provider", "status", "note")},
            **shown,
            "peak_extra_bytes": self.peak_bytes,
            **finite(self.figures),
            "others_cores": self.others_cores,
            "error": finite(_dict(self.errors)),
            "allowed_error": finite(_dict(self.bound)),
        }


Group = Sequence[Result]  # all providers on one input


def named(group: Group, provider: str) -> Result | None:
    """The provider's result, if there is one."""
    return next((result for result in group if result.provider == provider), None)


def speedup(result: Result, base: Result | None, what: str) -> float | None:
    """How many times faster than the base; None if there is no saying.

    Too few rounds (`--toy` runs one, cold) say nothing about speed.
    """
    mine, other = result.times.get(what), base.times.get(what) if base else None
    if mine is None or other is None or min(mine.runs, other.runs) < MIN_ROUNDS:
        return None
    return other.median / mine.median if mine.median else None


def overhead(result: Result, base: Result, what: str) -> dict[str, float | int]:
    """What a pair of runs, one of each, says that the first adds to the base's time."""
    pairs = zip(base.samples[what], result.samples[what], strict=True)
    ratios = [b / a - 1 for a, b in pairs]
    low, high = percentile(ratios, 0.2), percentile(ratios, 0.8)
    middle = percentile(ratios, 0.5)
    found = {"overhead": middle, "overhead_p20": low, "overhead_p80": high}
    return {**found, "pairs": len(ratios)}


def _dict(pair: Any) -> dict[str, Any] | None:
    return None if pair is None else pair._asdict()


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity, so these become words."""
    if isinstance(value, dict):
        return {name: finite(of) for name, of in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
