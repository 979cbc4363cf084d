"""What is known about one provider on one case and input."""

from __future__ import annotations

from dataclasses import dataclass

from bench import gate
from bench.cases import Shape
from bench.timing import Summary, gb_per_s

COPY = "copy"  # stands in a provider's place for the yardstick of bandwidth


@dataclass
class Result:
    """One provider on one case and input; times are None unless status is "ok".

    status: "ok", "wrong" (its loss or gradient is out of bounds), "failed" (it raised) or
    "skipped" (it cannot run here); note says why.
    """

    case: str
    call: str
    shape: Shape
    dtype: str
    provider: str
    logits_bytes: int
    forward_floor: int
    training_floor: int
    status: str = "ok"
    note: str = ""
    ours: bool = False
    forward: Summary | None = None
    training: Summary | None = None
    peak_bytes: int | None = None
    errors: gate.Errors | None = None
    bound: gate.Errors | None = None
    copy_gb_s: float | None = None
    others_cores: float | None = None  # CPU cores in use by others while this was timed

    @property
    def gb_s(self) -> float | None:
        """Floor bytes of forward+backward (of the copy: its read and write) per second, in 1e9."""
        moved = 2 * self.logits_bytes if self.provider == COPY else self.training_floor
        return gb_per_s(moved, self.training)

    @property
    def copy_share(self) -> float | None:
        """gb_s as a share of the copy's."""
        if self.gb_s is None or not self.copy_gb_s:
            return None
        return self.gb_s / self.copy_gb_s
