"""The reductions of torch's losses, and what to write for each."""

from __future__ import annotations

import ast

from fastkd.scan import rules
from fastkd.scan.around import Around
from fastkd.scan.softmax import Unread, constant

LEGACY = ("size_average", "reduce", "reduction")


def written(
    around: Around, dim: int | str | None, plain: str, faults: list[str], hints: list[str]
) -> tuple[str, str, str]:
    """(fastkd's reduction, the option that leaves rows out, what is divided by afterwards)."""
    form, options, after = around.form, "", ""
    if form in ("mean", "row means"):
        hints.append(rules.MEAN.seen)
    if form == "batchmean" and isinstance(dim, int) and dim != -1 and dim < 1:
        form, after = "sum", f" / {plain}.size(0)"
    elif form == "mean":
        form, after = "sum", f" / {plain}.numel()"
    elif form == "row means":
        form, after = "rows", f" / {plain}.size({dim})"
    elif form == "columns":
        faults.append(
            "a loss per column, fastkd's is per row: in place of its sum over the classes"
        )
        form = "rows"
    elif form in ("kept sum", "kept mean"):
        form, options = "sum" if form == "kept sum" else "row mean", around.mask
    elif form == "kept rows":
        form, options = "rows", around.mask
    elif form not in ("sum", "batchmean", "rows", "row mean"):
        form = "?"
        hints.append("with that reduction: 'mean' of F.kl_div is 'sum' / the number of elements")
    return form, options, after


def read(options: dict[str, ast.expr]) -> tuple[str, list[str]]:
    """torch's reduction of its three arguments, and why it cannot be read."""
    values = [constant(options.get(x)) for x in LEGACY]
    for name, value in zip(LEGACY, values, strict=True):
        if isinstance(value, Unread):
            return "?", [f"its {name} could not be read ({value})"]
    average, reduce, reduction = values
    if average is not None or reduce is not None:  # None is True where the other is given
        if reduce is not None and not reduce:
            return "none", []
        return ("mean" if average is None or average else "sum"), []
    if "reduction" not in options:
        return "mean", []
    known = reduction in ("mean", "batchmean", "sum", "none")
    return str(reduction), [] if known else [f"its reduction could not be read ({reduction})"]


def means(options: dict[str, ast.expr]) -> list[str]:
    """What is to be said of a loss whose logits could not be read, but its mean can."""
    return [rules.MEAN.seen] if read(options) == ("mean", []) else []
